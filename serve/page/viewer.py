"""The interactive viewer of a volume: its markup, and the scripts and styles that the browser loads for the page."""

from __future__ import annotations

import gzip
import hashlib
from html import escape
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from raylift.serve.images import DIRECTIONS, PLANES, WINDOWS

FOLDER = Path(__file__).parent / "browser"
SCRIPTS, STYLES = ("viewer.js", "comparison.js"), ("viewer.css", "comparison.css")
FILES = {
    **{name: gzip.compress((FOLDER / name).read_bytes(), mtime=0) for name in (*SCRIPTS, *STYLES)},
    "niivue.umd.js": (FOLDER / "niivue.umd.js.gz").read_bytes(),
}
"""Gzipped content by name."""
DIGEST = hashlib.sha256(b"".join(FILES.values())).hexdigest()[:16]
HEADERS = {
    "Content-Encoding": "gzip",
    "Cache-Control": "private, max-age=31536000, immutable",
}
DRAGS = {
    "crosshair": "Crosshair",
    "window": "Window",
    "distance": "Distance",
    "pan": "Pan and zoom",
}
LAYOUTS = {
    "multiplanar": "Three planes and 3-D",
    "axial": "Axial",
    "coronal": "Coronal",
    "sagittal": "Sagittal",
    "render": "3-D",
}
SHOW = "(...files) => globalThis.rayliftShow(...files)"
"""The function of the browser that shows a volume: its file, that of the standard deviation and its brightest HU."""


def add_routes(app: FastAPI) -> None:
    """Serve the files under their digest, so that a browser can keep them."""
    app.add_route(f"/viewer/{DIGEST}/{{name}}", _file, include_in_schema=False)


def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        raise HTTPException(404)
    kind = "text/css" if name.endswith(".css") else "text/javascript"
    return Response(FILES[name], media_type=kind, headers=HEADERS)


def head(root_path: str) -> str:
    """The elements that load the viewer, for the head of the page."""
    folder = f"{escape(root_path)}/viewer/{DIGEST}"
    styles = "".join(f'<link rel="stylesheet" href="{folder}/{name}">' for name in STYLES)
    return styles + "".join(f'<script type="module" src="{folder}/{name}"></script>' for name in SCRIPTS)


def markup() -> str:
    """The viewer's element, with the controls that its script uses."""
    presets = "".join(
        f'<label><input type="radio" name="preset" data-low="{window.low_hu:g}" data-high="{window.high_hu:g}"'
        f"{' checked' * (name == 'wide')}>{name}</label>"
        for name, window in WINDOWS.items()
    )
    drags = "".join(
        f'<label><input type="radio" name="drag" value="{name}"{" checked" * (name == "crosshair")}>{text}</label>'
        for name, text in DRAGS.items()
    )
    layouts = "".join(f'<option value="{name}">{text}</option>' for name, text in LAYOUTS.items())
    sliders = "".join(
        f'<label class="field"><span>{plane.capitalize()}, {DIRECTIONS[plane]}</span>'
        f'<input type="range" name="{plane}" min="0" max="1" step="1"></label>'
        for plane in PLANES
    )
    readings = "".join(
        f'<output name="{name}"{" aria-live=off" if name == "pointer" else ""}></output>'
        for name in ("crosshair", "pointer", "window", "distance")
    )
    return (
        '<raylift-viewer role="group" aria-label="Volume viewer">'
        '<p class="unavailable">The interactive viewer, which needs WebGL 2, is not available, so the volume is shown '
        "as slices.</p>"
        f'<div class="tools"><fieldset><legend>Window</legend>{presets}</fieldset>'
        f"<fieldset><legend>Drag</legend>{drags}</fieldset>"
        f'<label class="field"><span>Layout</span><select name="layout">{layouts}</select></label>'
        '<label class="overlay" hidden><input type="checkbox" name="std">Standard deviation</label>'
        '<button type="button" name="reset">Reset</button>'
        '<button type="button" name="full-screen">Full screen</button></div>'
        '<div class="stage"><canvas tabindex="0" role="application" aria-describedby="viewer-keys" '
        'aria-label="Reconstructed volume: axial, coronal and sagittal slices and a 3-D rendering"></canvas>'
        '<span class="scale-bar" hidden>10 cm</span></div>'
        f'<div class="readings">{readings}</div><div class="sliders">{sliders}</div>'
        '<p class="keys" id="viewer-keys">Scroll over a plane for its slices. Keys: ← and → for sagittal slices, '
        "↑ and ↓ for axial ones, Page Up and Page Down for coronal ones, with Shift by 5.</p></raylift-viewer>"
    )
