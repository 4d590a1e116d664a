"""Downloads of a volume in formats other than that of its stored file, encoded when they are requested."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from raylift.serve.backend import Backend
from raylift.serve.volume_formats import FORMATS, NIFTI, read_nifti

STEM = "reconstruction"
OTHERS = {f"{STEM}{kind.suffix}": kind for kind in FORMATS.values() if kind is not NIFTI}
"""Formats by the name of their file."""
MAX_ENCODINGS = 2
"""Volumes that are encoded at a time."""


def links(stored: Path) -> str:
    """HTML with a link for each other format of a stored NIfTI, whose folder has the name of its digest."""
    return "".join(
        f'<a id="download-{kind.name.lower()}" href="volumes/{stored.parent.name}/{name}" download="{name}">'
        f"Download {kind.name}</a>"
        for name, kind in OTHERS.items()
    )


def add_routes(app: FastAPI, backend: Backend, folder: Path) -> None:
    """Serve the volumes whose NIfTI is below a folder of the page; nothing is stored."""
    encodings = asyncio.Semaphore(MAX_ENCODINGS)

    async def encoded(request: Request) -> Response:
        name = request.path_params["name"]
        stored = folder / request.path_params["digest"] / f"{STEM}{NIFTI.suffix}"
        if name not in OTHERS or not stored.is_file():
            raise HTTPException(404, "the volume has expired: reconstruct it again")
        async with encodings:
            volume = await asyncio.to_thread(read_nifti, stored)
            data = await asyncio.to_thread(backend.encode, volume, OTHERS[name])
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "private, no-store"}
        return Response(data, media_type=OTHERS[name].media_type, headers=headers)

    app.add_route("/volumes/{digest}/{name}", encoded, include_in_schema=False)
