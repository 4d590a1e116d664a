"""The HTTP API."""

# FastAPI resolves annotations at run time and the form's type is local to `build`, so they are not postponed here.
import asyncio
import io
import json
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Form, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field

from raylift import __version__
from raylift.datasets.radiographs import input_checks
from raylift.datasets.radiographs.finding import Finding, warnings, worst
from raylift.datasets.serialization import to_plain
from raylift.models.diffusion.samplers import SamplerName
from raylift.serve.api import reference
from raylift.serve.api.exception_handlers import handle_errors
from raylift.serve.api.form import MAX_FIELDS, MAX_FILES, ReconstructionForm, form_model, require_multipart
from raylift.serve.api.negotiation import negotiated
from raylift.serve.api.problem import described
from raylift.serve.api.request_limits import BodyLimit, KnownRoutes
from raylift.serve.backend import DISCLAIMER, Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import HUVolume
from raylift.serve.volume_formats import FORMATS, VolumeFormat

RESIDUALS = {"X-Raylift-Residual-Before": "before", "X-Raylift-Residual-After": "after"}
"""Headers with the reprojection residuals before and after the data-consistency fit."""
NOTES = "X-Raylift-Notes"
"""Header with what was changed or ignored in reading the files, by view, as JSON; absent if nothing was."""
LEVEL = "X-Raylift-Level"
"""Header with the worst level of the checks of the input: ok, caution or stop."""
FINDINGS = "X-Raylift-Findings"
"""Header with the warnings of the checks, lists by view, as JSON; absent without one."""
JSON, ZIP = "application/json", "application/zip"
WITH_STD = [kind for kind, one in FORMATS.items() if one.has_std]
"""Formats in which the standard deviation over samples is returned too."""
RESPONSES = ", ".join([*(f"{kind} ({one.summary})" for kind, one in FORMATS.items()), f"{JSON} (no voxels)"])
STD_RESPONSE = "; with return_std a zip of the mean and the standard deviation over samples (-std), in HU"


class SamplingInfo(BaseModel):
    """Sampler settings of a diffusion model."""

    sampler: SamplerName
    steps: int = Field(description="evaluations of the denoiser")
    seed: int = Field(description="seed of the first sample; each further sample adds 1")
    max_samples: int = Field(description="largest number of samples of a request")


class ModelInfo(BaseModel):
    """The served model."""

    system: str
    views: list[str] = Field(description="required radiographs")
    size: int = Field(description="voxels along each axis of the volume")
    spacing_mm: float
    window_hu: tuple[float, float] = Field(description="lowest and highest HU of the output")
    sha256: str = Field(description="digest of the weights")
    consistency_steps: int = Field(description="steps of the data-consistency fit; 0 for none")
    sampling: SamplingInfo | None = Field(description="sampler settings; null for a deterministic model")
    raylift: str = Field(description="version of raylift")
    notice: str = DISCLAIMER


def build(backend: Backend, decoder: ImageDecoder) -> FastAPI:
    """The application with all routes of the API."""
    # FastAPI's own documentation pages load scripts from a public server; `reference` has none.
    app = FastAPI(
        title="raylift",
        version=__version__,
        description=f"CT volumes from radiographs. {DISCLAIMER}",
        docs_url=None,
        redoc_url=None,
    )
    poses, views, multiple_samples = backend.description.geometry.views, backend.views, backend.multiple_samples
    form_type = form_model(poses, backend.max_samples)
    handle_errors(app, form_type, views)
    app.add_middleware(KnownRoutes)
    # One file for each view, and the other fields of the form.
    app.add_middleware(BodyLimit, max_bytes=len(views) * decoder.file_limits.max_bytes + 2**16)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", tags=["service"], response_description="the process is running")
    async def healthz() -> dict[str, str]:
        """Liveness of the process."""
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        tags=["service"],
        response_description="the model is ready",
        responses={503: described("the model is not ready")},
    )
    async def readyz() -> Response:
        """Readiness of the model."""
        if await backend.ready():
            return JSONResponse({"status": "ready"})
        raise HTTPException(503, "the model is not ready")

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(reference.page(app.openapi(), views, str(request.base_url), DISCLAIMER))

    @app.head("/v1/model", include_in_schema=False)
    @app.get("/v1/model", tags=["reconstruction"], response_description="views, size, spacing, window and digest")
    async def model() -> ModelInfo:
        """The served model and the views it requires."""
        description = backend.description
        sampling = backend.sampling
        return ModelInfo(
            system=description.system.name,
            views=views,
            size=description.grid.size,
            spacing_mm=description.grid.spacing_mm,
            window_hu=(description.window.low_hu, description.window.high_hu),
            sha256=backend.sha256,
            consistency_steps=backend.consistency_steps,
            sampling=SamplingInfo(**vars(sampling), max_samples=backend.max_samples) if sampling else None,
            raylift=__version__,
        )

    @app.post(
        "/v1/reconstructions",
        tags=["reconstruction"],
        response_class=Response,
        dependencies=[Depends(require_multipart)],
        form_limits={"max_files": MAX_FILES, "max_fields": MAX_FIELDS},
        responses={
            200: {
                "content": {kind: {} for kind in (*FORMATS, JSON)},
                "description": f"by Accept: {RESPONSES}" + (STD_RESPONSE if multiple_samples else ""),
                "headers": _headers(backend),
            },
            406: described("no format is accepted"),
            413: described("the request or a file is too large"),
            415: described("not a multipart form, or a file is not a readable radiograph"),
            422: described(
                "a field is missing, unknown or invalid; with --strict, a warning of the checks of the input"
            ),
            503: described("the queue is full, or the model is restarting"),
        },
    )
    async def reconstruct(
        request: Request,
        fields: Annotated[form_type, Form(media_type="multipart/form-data")],  # type: ignore[valid-type]
    ) -> Response:
        """Reconstruct a volume from one radiograph of each view (DICOM, PNG, JPEG, TIFF or BMP)."""
        form: ReconstructionForm = fields
        accepted = negotiated(request.headers.get("accept", "*/*"), (*FORMATS, JSON))
        if form.include_std and accepted not in WITH_STD:
            raise HTTPException(422, f"return_std has the formats {', '.join(WITH_STD)}, not {accepted}")
        async with backend.slot():
            async with decoder.slots:
                loaded = await form.radiographs(poses, decoder)
            prepared = np.stack([radiograph.image for radiograph in loaded.values()])
            findings = input_checks.check(loaded, prepared)
            if backend.strict:
                input_checks.require_ok(findings)
            result = await backend.reconstruct(prepared, form.sample_count)
        notes = {view: radiograph.notes for view, radiograph in loaded.items() if radiograph.notes}
        headers = {"X-Raylift-Model": backend.sha256, "Vary": "Accept"}
        if accepted == JSON:
            return JSONResponse(_report(result, findings, notes, backend), headers=headers)
        name, kind = f"reconstruction-{uuid.uuid4().hex[:8]}", FORMATS[accepted]
        if form.include_std:
            body, media_type, suffix = await asyncio.to_thread(_zip, result, name, backend, kind), ZIP, ".zip"
        else:
            body, media_type, suffix = (
                await asyncio.to_thread(backend.encode, result.hu, kind),
                kind.media_type,
                kind.suffix,
            )
        headers["Content-Disposition"] = f'attachment; filename="{name}{suffix}"'
        if notes:
            headers[NOTES] = json.dumps(notes)
        headers[LEVEL] = worst(finding for of_view in findings.values() for finding in of_view)
        if found := {view: to_plain(warnings(of_view)) for view, of_view in findings.items() if warnings(of_view)}:
            headers[FINDINGS] = json.dumps(found, allow_nan=False)
        for place, header in enumerate(RESIDUALS) if result.residuals else ():
            # A dictionary of RFC 8941, whose keys are in lower case: frontal=0.0812, lateral=0.0675.
            headers[header] = ", ".join(f"{view.lower()}={pair[place]:.4f}" for view, pair in result.residuals.items())
        return Response(body, media_type=media_type, headers=headers)

    return app


def _zip(result: HUVolume, name: str, backend: Backend, kind: VolumeFormat) -> bytes:
    """The mean volume and the standard deviation over samples."""
    assert result.std is not None
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}{kind.suffix}", backend.encode(result.hu, kind))
        archive.writestr(f"{name}-std{kind.suffix}", backend.encode(result.std, kind))
    return file.getvalue()


def _report(
    result: HUVolume,
    findings: Mapping[str, Sequence[Finding]],
    notes: Mapping[str, Sequence[str]],
    backend: Backend,
) -> dict[str, Any]:
    """What a reconstruction states without its voxels."""
    grid = backend.description.grid
    return {
        "model": backend.sha256,
        "size": grid.size,
        "spacing_mm": grid.spacing_mm,
        "hu": {"min": int(result.hu.min()), "mean": float(result.hu.mean()), "max": int(result.hu.max())},
        "level": worst(finding for of_view in findings.values() for finding in of_view),
        "findings": {view: to_plain(of_view) for view, of_view in findings.items()},
        "notes": notes,
        "residuals": {
            view: dict(zip(("before", "after"), pair, strict=True)) for view, pair in result.residuals.items()
        },
        "notice": DISCLAIMER,
    }


def _headers(backend: Backend) -> dict[str, object]:
    """OpenAPI description of the headers of a reconstruction."""
    about = {
        "X-Raylift-Model": "SHA-256 of the weights",
        NOTES: "what was changed or ignored in reading the files, lists of sentences by view, as JSON",
        LEVEL: "worst level of the checks of the input: ok, caution or stop",
        FINDINGS: "warnings of these checks, lists by view (and of all views), as JSON; absent without one",
    }
    if backend.consistency_steps:
        residual = "relative L2 distance between reprojection and radiograph of each view, {} the data-consistency fit"
        about |= {header: residual.format(when) for header, when in RESIDUALS.items()}
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in about.items()}
