"""The API reference as one HTML page without scripts or external files, generated from the OpenAPI description."""

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
    """The reference: example requests, then every route with its fields and responses."""
    schemas = openapi["components"]["schemas"]
    routes = [
        _route(method, path, route, schemas)
        for path, methods in sorted(openapi["paths"].items(), reverse=True)
        for method, route in methods.items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>raylift API</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>raylift API</h1><p>{escape(notice)}</p>"
        f"<h2>Command line</h2><pre>{escape(_curl(views, url))}</pre>"
        f"<h2>Python</h2><pre>{escape(_python(views, url))}</pre>"
        f'{"".join(routes)}<p><a href="openapi.json">OpenAPI description</a> · <a href=".">Web page</a></p>'
        "</body></html>"
    )


def _curl(views: list[str], url: str) -> str:
    files = " ".join(f"-F {view}=@{view}.png" for view in views)
    return f"curl --fail-with-body {files} \\\n  -o volume.nii.gz {url}v1/reconstructions"


def _python(views: list[str], url: str) -> str:
    files = ", ".join(f'"{view}": open("{view}.png", "rb")' for view in views)
    return (
        f"import httpx\n\nfiles = {{{files}}}\n"
        f'response = httpx.post("{url}v1/reconstructions", files=files, timeout=300)\n'
        'response.raise_for_status()\nopen("volume.nii.gz", "wb").write(response.content)'
    )


def _route(method: str, path: str, route: dict[str, Any], schemas: dict[str, Any]) -> str:
    content = route.get("requestBody", {}).get("content", {}).get("multipart/form-data")
    form = schemas[content["schema"]["$ref"].rpartition("/")[2]] if content else {}
    required = form.get("required", [])
    fields = sorted(form.get("properties", {}).items(), key=lambda item: item[0] not in required)
    rows = [_row(f"<code>{escape(name)}</code>", _field(field, name in required)) for name, field in fields]
    responses = [_row(escape(status), response["description"]) for status, response in route["responses"].items()]
    about = escape(route.get("description") or route.get("summary", ""))
    table = f"<table><tr><th>field</th><td></td></tr>{''.join(rows)}</table>" if rows else ""
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{about}</p>{table}"
        f"<table><tr><th>response</th><td></td></tr>{''.join(responses)}</table>"
    )


def _field(field: dict[str, Any], required: bool) -> str:
    """Description, permitted values and default of a form field."""
    values = f": {', '.join(field['enum'])}" if "enum" in field else ""
    return f"{field['description']}{values} ({'required' if required else 'default ' + str(field['default'])})"


def _row(head: str, text: str) -> str:
    return f"<tr><td>{head}</td><td>{escape(text)}</td></tr>"
