"""The HTTP API, independent of what runs the model."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from jaxtyping import Float32, Int16
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from raylift import __version__
from raylift.datasets.radiograph import RadiographLimits, prepare
from raylift.models.weights import Description
from raylift.serve.intake import BadRequest, BodyLimit, radiographs
from raylift.serve.reconstructor import nifti

DISCLAIMER = "Research software, not a medical device: not for diagnosis."


@dataclass(frozen=True)
class Backend:
    """What the API needs of whatever holds the model."""

    description: Description
    sha256: str
    reconstruct: Callable[[Float32[np.ndarray, "views rows columns"]], Awaitable[Int16[np.ndarray, "d h w"]]]
    ready: Callable[[], Awaitable[bool]]


class ModelInfo(BaseModel):
    """What the service serves."""

    system: str
    views: list[str] = Field(description="radiographs a request must send")
    size: int = Field(description="voxels a side of the volume")
    spacing_mm: float
    window_hu: tuple[float, float] = Field(description="lowest and highest HU it can give")
    sha256: str = Field(description="of the weights")
    raylift: str = Field(description="version")
    notice: str = DISCLAIMER


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


def build(backend: Backend, limits: RadiographLimits) -> FastAPI:
    """The application."""
    app = FastAPI(title="raylift", version=__version__, description=f"CT volumes from radiographs. {DISCLAIMER}")
    # Two images and their fields; the page's uploads come one at a time.
    app.add_middleware(BodyLimit, max_bytes=2 * limits.max_bytes + 2**16)
    views = [view.name for view in backend.description.geometry.views]

    @app.exception_handler(BadRequest)
    async def refuse(_: Request, error: BadRequest) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.get("/healthz", tags=["service"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["service"], responses={503: {"model": Problem}})
    async def readyz() -> Response:
        """The model answers."""
        if await backend.ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"detail": "the model does not answer yet"}, 503)

    @app.get("/v1/model", tags=["reconstruction"])
    async def model() -> ModelInfo:
        """What is served and what it wants."""
        description = backend.description
        return ModelInfo(
            system=description.system.name,
            views=views,
            size=description.grid.size,
            spacing_mm=description.grid.spacing_mm,
            window_hu=(description.window.low_hu, description.window.high_hu),
            sha256=backend.sha256,
            raylift=__version__,
        )

    @app.post(
        "/v1/reconstructions",
        tags=["reconstruction"],
        response_class=Response,
        responses={
            200: {"content": {"application/gzip": {}}, "description": "the volume as gzipped NIfTI, int16 HU"},
            413: {"model": Problem},
            415: {"model": Problem},
            422: {"model": Problem},
        },
        openapi_extra={"requestBody": _form(views)},
    )
    async def reconstruct(request: Request) -> Response:
        """Reconstruct a volume from one radiograph of each view, as DICOM, PNG, JPEG or TIFF."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise BadRequest(415, "send the images as multipart/form-data, in the fields " + " and ".join(views))
        try:
            form = await request.form(max_files=4, max_fields=16)
        except (HTTPException, MultiPartException) as error:
            raise BadRequest(422, f"the form cannot be read: {getattr(error, 'detail', error)}") from error
        images = await radiographs(form, views, limits)
        size = backend.description.geometry.detector_px
        volume = await backend.reconstruct(np.stack([prepare(images[view], size) for view in views]))
        body = nifti(volume, backend.description.grid, f"raylift {backend.sha256[:12]}, research only")
        name = f"reconstruction-{uuid.uuid4().hex[:8]}.nii.gz"
        headers = {"Content-Disposition": f'attachment; filename="{name}"', "X-Raylift-Model": backend.sha256}
        return Response(body, media_type="application/gzip", headers=headers)

    return app


def _form(views: list[str]) -> dict[str, object]:
    """The request body for the API's description: FastAPI cannot see it, since the form is read by hand."""
    files = {view: {"type": "string", "format": "binary", "description": f"{view} radiograph"} for view in views}
    flips = {
        f"flip_{view}": {"type": "string", "enum": ["true", "false"], "default": "false", "description": "mirror"}
        for view in views
    }
    invert = {"type": "string", "enum": ["auto", "yes", "no"], "default": "auto", "description": "make bone bright"}
    schema = {"type": "object", "required": views, "properties": {**files, "invert": invert, **flips}}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
