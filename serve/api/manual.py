"""The API's manual as one page that loads nothing from anywhere: written from the OpenAPI description."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2.2rem 0 .4rem; font-size: 1.15rem; }
pre { padding: .8rem 1rem; overflow-x: auto; border-radius: 8px; background: #8882; font-size: .88rem; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1rem; }
td:first-child { width: 9rem; } th, td { text-align: left; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid #8884; vertical-align: top; } code { font-size: .9em; }
"""


def page(openapi: dict[str, Any], views: list[str], url: str, notice: str) -> str:
    """HTML: how to send a request, and every route with its fields and answers."""
    routes = [
        _route(method, path, route)
        for path, methods in sorted(openapi["paths"].items(), reverse=True)
        for method, route in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>raylift API</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>raylift API</h1><p>{escape(notice)}</p>"
        f"<h2>From a shell</h2><pre>{escape(_curl(views, url))}</pre>"
        f"<h2>From Python</h2><pre>{escape(_python(views, url))}</pre>"
        f'{"".join(routes)}<p><a href="openapi.json">OpenAPI description</a> · <a href=".">the page</a></p>'
        "</body></html>"
    )


def _curl(views: list[str], url: str) -> str:
    files = " ".join(f"-F {view}=@{view}.png" for view in views)
    return f"curl --fail-with-body {files} \\\n  -o volume.nii.gz {url}v1/reconstructions"


def _python(views: list[str], url: str) -> str:
    files = ", ".join(f'"{view}": open("{view}.png", "rb")' for view in views)
    return (
        f"import httpx\n\nfiles = {{{files}}}\n"
        f'answer = httpx.post("{url}v1/reconstructions", files=files, timeout=300)\n'
        'answer.raise_for_status()\nopen("volume.nii.gz", "wb").write(answer.content)'
    )


def _route(method: str, path: str, route: dict[str, Any]) -> str:
    form = route.get("requestBody", {}).get("content", {}).get("multipart/form-data", {}).get("schema", {})
    fields = [
        (name, field["description"] + (f": {', '.join(field['enum'])}" if "enum" in field else ""), name in required)
        for required in [form.get("required", [])]
        for name, field in form.get("properties", {}).items()
    ]
    rows = [
        f"<tr><td><code>{escape(n)}</code></td><td>{escape(d)}{'' if r else ' (optional)'}</td></tr>"
        for n, d, r in fields
    ]
    answers = [
        f"<tr><td>{escape(status)}</td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in route["responses"].items()
    ]
    about = escape(route.get("description") or route.get("summary", ""))
    table = f"<table><tr><th>field</th><td></td></tr>{''.join(rows)}</table>" if rows else ""
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{about}</p>{table}"
        f"<table><tr><th>answer</th><td></td></tr>{''.join(answers)}</table>"
    )
