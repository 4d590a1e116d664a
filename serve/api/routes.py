"""The HTTP API, independent of what runs the model."""

from __future__ import annotations

import asyncio
import io
import uuid
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from jaxtyping import Float32, Int16
from pydantic import BaseModel, Field
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from raylift import __version__
from raylift.datasets.errors import RayliftError
from raylift.datasets.geometry import View
from raylift.datasets.radiographs.decoding import RadiographLimits
from raylift.models.generative import SamplerName, SamplingConfig
from raylift.models.weights import Description
from raylift.serve.api import manual
from raylift.serve.api.form import BadRequest, asked_draws, flip_choices, radiographs
from raylift.serve.api.request_limits import BodyLimit, KnownPaths
from raylift.serve.reconstructor import Reconstruction, nifti
from raylift.serve.reconstructor import prepared as prepared_for

DISCLAIMER = "Research software, not a medical device: not for diagnosis."
HANGING = {"frontal": ", the patient's right at its left edge", "lateral": ", the patient facing its left edge"}
DECODED_AT_ONCE = 4
"""Requests whose images are in memory; others wait with their uploads on disk."""

RESIDUALS = {"X-Raylift-Residual-Before": 0, "X-Raylift-Residual-After": 1}
"""Headers of an answer whose volume was fitted to its radiographs, and what they hold of a view's residuals."""


SPREAD = "; with spread, a zip of it (the mean of the draws) and of their standard deviation, -std.nii.gz, in HU"


class Unavailable(RayliftError, RuntimeError):
    """The model cannot answer now: too many requests wait for it, or it is being restarted."""


@dataclass(frozen=True)
class Backend:
    """What the API and the page need of whatever holds the model."""

    description: Description
    sha256: str
    reconstruct: Callable[[Float32[np.ndarray, "views rows columns"], int], Awaitable[Reconstruction]]
    """Prepared radiographs and a number of draws to a volume in HU; raises Unavailable."""
    ready: Callable[[], Awaitable[bool]]
    consistency_steps: int = 0
    """Steps by which volumes are fitted to their radiographs."""
    draw: SamplingConfig | None = None
    """How the model draws; None if it computes its volume."""
    max_samples: int = 1
    """Draws that a request may ask for at most."""

    @property
    def draws(self) -> bool:
        """Whether a request may ask for more than one draw."""
        return self.draw is not None and self.max_samples > 1

    @property
    def views(self) -> list[str]:
        """Names of the views the model wants, in order."""
        return [view.name for view in self.description.geometry.views]

    def nifti(self, volume: Int16[np.ndarray, "d h w"]) -> bytes:
        """One of its volumes as a file, with the model's digest in its notes."""
        return nifti(volume, self.description.grid, f"raylift {self.sha256[:12]}, research only")


class DrawingInfo(BaseModel):
    """How a model draws that draws."""

    sampler: SamplerName
    steps: int = Field(description="evaluations of the denoiser")
    seed: int = Field(description="of the first draw; the next ones count on from it")
    max_samples: int = Field(description="draws that a request may ask for")


class ModelInfo(BaseModel):
    """What the service serves."""

    system: str
    views: list[str] = Field(description="radiographs a request must send")
    size: int = Field(description="voxels a side of the volume")
    spacing_mm: float
    window_hu: tuple[float, float] = Field(description="lowest and highest HU it can give")
    sha256: str = Field(description="of the weights")
    consistency_steps: int = Field(description="steps that fit a volume to its radiographs after the network; 0: none")
    drawing: DrawingInfo | None = Field(description="how volumes are drawn; null for a model that computes them")
    raylift: str = Field(description="version")
    notice: str = DISCLAIMER


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


def build(backend: Backend, limits: RadiographLimits) -> FastAPI:
    """The application."""
    # FastAPI's own pages for the API load their scripts from a public server; `manual` needs nobody.
    app = FastAPI(
        title="raylift",
        version=__version__,
        description=f"CT volumes from radiographs. {DISCLAIMER}",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(KnownPaths)
    # Two images and their fields; the page's uploads come one at a time.
    app.add_middleware(BodyLimit, max_bytes=2 * limits.max_bytes + 2**16)
    views, decoders, draws = backend.views, asyncio.Semaphore(DECODED_AT_ONCE), backend.draws
    poses = backend.description.geometry.views

    @app.exception_handler(BadRequest)
    async def refuse(_: Request, error: BadRequest) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.exception_handler(Unavailable)
    async def postpone(_: Request, error: Unavailable) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> JSONResponse:
        # Starlette raises it again, so that it is logged.
        return JSONResponse({"detail": "the service failed: its log says why"}, 500)

    @app.get("/healthz", tags=["service"], response_description="it does")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["service"],
        response_description="it does",
        responses={503: {"model": Problem, "description": "it does not yet"}},
    )
    async def readyz() -> Response:
        """The model answers."""
        if await backend.ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"detail": "the model does not answer yet"}, 503)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(manual.page(app.openapi(), views, str(request.base_url), DISCLAIMER))

    @app.get("/v1/model", tags=["reconstruction"], response_description="views, size, spacing, window and digest")
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
            consistency_steps=backend.consistency_steps,
            drawing=DrawingInfo(**vars(backend.draw), max_samples=backend.max_samples) if backend.draw else None,
            raylift=__version__,
        )

    @app.post(
        "/v1/reconstructions",
        tags=["reconstruction"],
        response_class=Response,
        responses={
            200: {
                "content": {kind: {} for kind in ("application/gzip", "application/zip")[: 1 + draws]},
                "description": "the volume as gzipped NIfTI, int16 HU" + (SPREAD if draws else ""),
                "headers": {"X-Raylift-Model": _header("SHA-256 of the weights"), **_residual_headers(backend)},
            },
            413: {"model": Problem, "description": "too large"},
            415: {"model": Problem, "description": "not a form, or not a radiograph that can be read"},
            422: {"model": Problem, "description": "a wrong, missing or surplus field"},
            503: {"model": Problem, "description": "too many requests are waiting, or the model is being restarted"},
        },
        openapi_extra={"requestBody": _form(poses, backend.max_samples)},
    )
    async def reconstruct(request: Request) -> Response:
        """Reconstruct a volume from one radiograph of each view, as DICOM, PNG, JPEG, TIFF or BMP."""
        form = await _read_form(request, views)
        try:
            async with decoders:
                images = await radiographs(form, poses, limits, backend.max_samples)
                samples, spread = asked_draws(form, backend.max_samples)
                prepared = await asyncio.to_thread(prepared_for, images, backend.description)
                del images
        finally:
            await form.close()
        made = await backend.reconstruct(prepared, samples)
        name = f"reconstruction-{uuid.uuid4().hex[:8]}"
        body = await asyncio.to_thread(_both if spread else _volume, made, name, backend)
        kind, suffix = ("application/zip", ".zip") if spread else ("application/gzip", ".nii.gz")
        headers = {"Content-Disposition": f'attachment; filename="{name}{suffix}"', "X-Raylift-Model": backend.sha256}
        for header, place in RESIDUALS.items() if made.residuals else ():
            # A dictionary of RFC 8941: frontal=0.0812, lateral=0.0675.
            headers[header] = ", ".join(f"{view}={pair[place]:.4f}" for view, pair in made.residuals.items())
        return Response(body, media_type=kind, headers=headers)

    return app


async def _read_form(request: Request, views: list[str]) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BadRequest(415, "send the images as multipart/form-data, in the fields " + " and ".join(views))
    try:
        return await request.form(max_files=4, max_fields=16)
    except (HTTPException, MultiPartException) as error:
        raise BadRequest(422, f"the form cannot be read: {getattr(error, 'detail', error)}") from error


def _volume(made: Reconstruction, _: str, backend: Backend) -> bytes:
    return backend.nifti(made.hu)


def _both(made: Reconstruction, name: str, backend: Backend) -> bytes:
    """A zip of the mean volume and the standard deviation over draws."""
    assert made.deviation is not None
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.nii.gz", backend.nifti(made.hu))
        archive.writestr(f"{name}-std.nii.gz", backend.nifti(made.deviation))
    return file.getvalue()


def _residual_headers(backend: Backend) -> dict[str, object]:
    """What the API's description says of the headers that tell of a fit."""
    about = "how far the projections are from the radiographs, by view, {} the fit (relative L2)"
    told = zip(RESIDUALS, ("before", "after"), strict=True)
    return {name: _header(about.format(when)) for name, when in told} if backend.consistency_steps else {}


def _header(description: str) -> dict[str, object]:
    return {"description": description, "schema": {"type": "string"}}


def _form(poses: Sequence[View], max_samples: int) -> dict[str, object]:
    """The request body for the API's description: FastAPI cannot see it, since the form is read by hand."""
    views = [pose.name for pose in poses]
    files = {
        view: {
            "type": "string",
            "format": "binary",
            "description": f"{view} radiograph{HANGING.get(view, '')}",
        }
        for view in views
    }
    invert = {
        "type": "string",
        "enum": ["auto", "yes", "no"],
        "default": "auto",
        "description": "invert an image that shows bone dark",
    }
    flips = {
        f"flip_{pose.name}": {
            "type": "string",
            "enum": list(flip_choices(pose)),
            "default": flip_choices(pose)[0],
            "description": f"mirror the {pose.name} image left to right"
            + ("; auto does where the patient clearly faces the other edge" if "auto" in flip_choices(pose) else ""),
        }
        for pose in poses
    }
    draws = {
        "samples": {
            "type": "integer",
            "minimum": 1,
            "maximum": max_samples,
            "default": 1,
            "description": f"answer with the mean of so many draws of the model, up to {max_samples}",
        },
        "spread": {
            "type": "string",
            "enum": ["true", "false"],
            "default": "false",
            "description": "answer with a zip that also holds the standard deviation over the draws",
        },
    }
    properties = {**files, "invert": invert, **flips, **(draws if max_samples > 1 else {})}
    schema = {"type": "object", "required": views, "properties": properties}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
