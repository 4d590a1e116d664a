"""Downloads of a volume in formats other than that of its stored file and its report, made when they are requested."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from raylift.serve.backend import Backend
from raylift.serve.page import result_files, result_report
from raylift.serve.page.result_files import STEM
from raylift.serve.volume_formats import FORMATS, NIFTI, read_nifti

OTHERS = {f"{STEM}{kind.suffix}": kind for kind in FORMATS.values() if kind is not NIFTI}
"""Formats by the name of their file."""
REPORT = f"{STEM}.html"
MEDIA_TYPES = {name: kind.media_type for name, kind in OTHERS.items()} | {REPORT: "text/html"}
MAX_ENCODINGS = 2
"""Volumes that are encoded at a time."""


def links(identifier: str, retention_s: float) -> str:
    """HTML with a link for each other format of a result, to its report, and to the page with it."""
    files = {f"download-{kind.name.lower()}": (name, f"Download {kind.name}") for name, kind in OTHERS.items()}
    files["download-report"] = (REPORT, "Download report")
    downloads = "".join(
        f'<a id="{element}" href="volumes/{identifier}/{name}" download="{name}">{text}</a>'
        for element, (name, text) in files.items()
    )
    link = f'<a href="?volume={identifier}">Link to this result</a>, kept for {round(retention_s / 60)} min'
    return f'{downloads}<p id="permalink">{link}</p>'


def add_routes(app: FastAPI, backend: Backend, folder: Path) -> None:
    """Serve the volumes whose NIfTI is below a folder of the page; nothing is stored."""
    encodings = asyncio.Semaphore(MAX_ENCODINGS)

    async def encoded(request: Request) -> Response:
        name = request.path_params["name"]
        user = request.scope.get("user")
        found = result_files.read(folder, request.path_params["id"], user) if name in MEDIA_TYPES else None
        if found is None:
            raise HTTPException(404, "the volume has expired: reconstruct it again")
        stored, record = found
        async with encodings:
            volume = await asyncio.to_thread(read_nifti, stored)
            if name == REPORT:
                data: bytes | str = await asyncio.to_thread(result_report.render, volume, record, backend)
            else:
                data = await asyncio.to_thread(backend.encode, volume, OTHERS[name])
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "private, no-store"}
        return Response(data, media_type=MEDIA_TYPES[name], headers=headers)

    app.add_route("/volumes/{id}/{name}", encoded, include_in_schema=False)
