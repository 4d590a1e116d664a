"""The HTTP API."""

# FastAPI resolves annotations at run time and the form's type is local to `build`, so they are not postponed here.
import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Annotated

import numpy as np
from fastapi import Depends, FastAPI, Form, Header, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from raylift import __version__
from raylift.datasets.radiographs import input_checks
from raylift.datasets.radiographs.check_result import CheckResult, warnings, worst
from raylift.datasets.serialization import to_plain
from raylift.serve.api import jobs as job_routes
from raylift.serve.api import reference
from raylift.serve.api.documents import EXAMPLE, JobInfo, ModelInfo, ModelList, ReconstructionReport
from raylift.serve.api.exception_handlers import handle_errors
from raylift.serve.api.form import MAX_FIELDS, MAX_FILES, ReconstructionForm, form_model, require_multipart
from raylift.serve.api.jobs import Jobs
from raylift.serve.api.negotiation import RESPOND_ASYNC, negotiated, prefers_async
from raylift.serve.api.problem import described
from raylift.serve.api.request_limits import BodyLimit, KnownRoutes
from raylift.serve.backend import DISCLAIMER, Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import HUVolume
from raylift.serve.served_model import ServedModel
from raylift.serve.volume_formats import FORMATS, VolumeFormat, zipped

RESIDUALS = {"X-Raylift-Residual-Before": "before", "X-Raylift-Residual-After": "after"}
"""Headers with the reprojection residuals before and after the data-consistency fit."""
NOTES = "X-Raylift-Notes"
"""Header with what was changed or ignored in reading the files, by view, as JSON; absent if nothing was."""
PARAMETERS = "X-Raylift-Parameters"
"""Header with all values on which the volume depends besides the files, as JSON."""
LEVEL = "X-Raylift-Level"
"""Header with the worst level of the checks of the input: ok, caution or stop."""
WARNINGS = "X-Raylift-Warnings"
"""Header with the warnings of the checks, lists by view, as JSON; absent without one."""
JSON, ZIP = "application/json", "application/zip"
WITH_STD = [kind for kind, one in FORMATS.items() if one.has_std]
"""Formats in which the standard deviation over samples is returned too."""
RESPONSES = ", ".join([*(f"{kind} ({one.summary})" for kind, one in FORMATS.items()), f"{JSON} (no voxels)"])
STD_RESPONSE = "; with return_std a zip of the mean and the standard deviation over samples (-std), in HU"


def build(backend: Backend, decoder: ImageDecoder, jobs: Jobs) -> FastAPI:
    """The application with all routes of the API."""
    # FastAPI's own documentation pages load scripts from a public server; `reference` has none.
    app = FastAPI(
        title="raylift",
        version=__version__,
        description=f"CT volumes from radiographs. {DISCLAIMER}",
        docs_url=None,
        redoc_url=None,
    )
    model = backend.model
    views, form_type = model.views, form_model(model, [one.name for one in backend.models])
    handle_errors(app, form_type, views)
    app.add_middleware(KnownRoutes)
    # One file for each view, and the other fields of the form; a form for another model of the service is redirected.
    most_views = max(len(one.views) for one in backend.models)
    app.add_middleware(BodyLimit, max_bytes=most_views * decoder.file_limits.max_bytes + 2**16)

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

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse, response_description="all metrics")
    async def metrics() -> Response:
        """Requests, durations of stages and the queue, in the text format of Prometheus."""
        return Response(backend.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(reference.page(app.openapi(), views, str(request.base_url), DISCLAIMER))

    @app.head("/v1/model", include_in_schema=False)
    @app.get("/v1/model", tags=["reconstruction"], response_description="the model")
    async def own_model() -> ModelInfo:
        """The model of this path."""
        return ModelInfo.of(model)

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models", tags=["reconstruction"], response_description="all models")
    async def all_models() -> ModelList:
        """The models of this service, their parameters and cards."""
        return ModelList(models=[ModelInfo.of(one) for one in backend.models])

    @app.head("/v1/models/{name}", include_in_schema=False)
    @app.get(
        "/v1/models/{name}",
        tags=["reconstruction"],
        response_description="the model",
        responses={404: described("no model has this name")},
    )
    async def named_model(name: str) -> ModelInfo:
        """One model of this service."""
        return ModelInfo.of(_named(backend, name, 404))

    async def require_own_model(request: Request) -> None:
        """Redirect a request for another model of the service to its path, and refuse one for no model."""
        name = (await request.form()).get("model", model.name)
        if isinstance(name, str) and name != model.name:
            location = f"{_named(backend, name, 422).path}/v1/reconstructions"
            raise HTTPException(307, f"{name} has the path {location}", {"Location": location})

    @app.post(
        "/v1/reconstructions",
        tags=["reconstruction"],
        response_class=Response,
        dependencies=[Depends(require_multipart), Depends(require_own_model)],
        form_limits={"max_files": MAX_FILES, "max_fields": MAX_FIELDS},
        responses={
            200: {
                "model": ReconstructionReport,
                "content": {kind: {} for kind in FORMATS} | {JSON: {"example": EXAMPLE}},
                "description": f"by Accept: {RESPONSES}" + (STD_RESPONSE if model.multiple_samples else ""),
                "headers": _headers(model),
            },
            202: {
                "model": JobInfo,
                "description": "with Prefer: respond-async, the job",
                "headers": {"Location": {"description": "path of the job", "schema": {"type": "string"}}},
            },
            307: described("another model of the service has the path in Location"),
            406: described("no format is accepted"),
            413: described("the request or a file is too large"),
            415: described("not a multipart form, or a file is not a readable radiograph"),
            422: described(
                "a field is missing, unknown or invalid; with --strict, a warning of the checks of the input"
            ),
            429: described("the client has too many jobs"),
            503: described("the queue is full, or the model is restarting"),
        },
    )
    async def reconstruct(
        request: Request,
        fields: Annotated[form_type, Form(media_type="multipart/form-data")],  # type: ignore[valid-type]
        prefer: Annotated[str, Header(description="respond-async: as a job (RFC 7240)")] = "",
    ) -> Response:
        """Reconstruct a volume from one radiograph of each view (DICOM, PNG, JPEG, TIFF or BMP).

        With `Prefer: respond-async` the response has status 202 and the path of a job.
        """
        form: ReconstructionForm = fields
        accepted = negotiated(request.headers.get("accept", "*/*"), (*FORMATS, JSON))
        if form.include_std and accepted not in WITH_STD:
            raise HTTPException(422, f"return_std has the formats {', '.join(WITH_STD)}, not {accepted}")
        job = jobs.new(request, _max_bytes(model, form)) if prefers_async(prefer) else None
        async with AsyncExitStack() as slot:
            await slot.enter_async_context(backend.slot(model.weight(form.settings)))
            async with decoder.slots:
                loaded = await form.radiographs(backend.description.geometry.views, decoder)
            prepared = np.stack([radiograph.image for radiograph in loaded.values()])
            checks = input_checks.check(loaded, prepared)
            if backend.strict:
                input_checks.require_ok(checks)
            notes = {view: radiograph.notes for view, radiograph in loaded.items() if radiograph.notes}
            if job:
                encode = partial(_encoded, backend, form, accepted, checks, notes)
                await jobs.submit(job, request, slot, prepared, form.settings, encode)
                applied = {"Location": job.path, "Preference-Applied": RESPOND_ASYNC}
                return JSONResponse(job.info.model_dump(mode="json"), 202, applied)
            result = await backend.reconstruct(prepared, form.settings)
        return await _encoded(backend, form, accepted, checks, notes, result)

    job_routes.add_routes(app, jobs)
    return app


async def _encoded(
    backend: Backend,
    form: ReconstructionForm,
    accepted: str,
    checks: Mapping[str, Sequence[CheckResult]],
    notes: Mapping[str, Sequence[str]],
    result: HUVolume,
) -> Response:
    """The response with a volume, in an accepted format."""
    model = backend.model
    headers = {
        "X-Raylift-Model": model.sha256,
        PARAMETERS: json.dumps(model.parameters(form.settings)),
        "Vary": "Accept",
    }
    if accepted == JSON:
        report = ReconstructionReport.of(result, checks, notes, model, form.settings)
        return JSONResponse(report.model_dump(), headers=headers)
    name, kind = f"reconstruction-{uuid.uuid4().hex[:8]}", FORMATS[accepted]
    if form.include_std:
        body, media_type, suffix = await asyncio.to_thread(_zip, result, backend, kind), ZIP, ".zip"
    else:
        body, media_type, suffix = (
            await asyncio.to_thread(backend.encode, result.hu, kind),
            kind.media_type,
            kind.suffix,
        )
    headers["Content-Disposition"] = f'attachment; filename="{name}{suffix}"'
    if notes:
        headers[NOTES] = json.dumps(notes)
    headers[LEVEL] = worst(check for of_view in checks.values() for check in of_view)
    if found := {view: to_plain(warnings(of_view)) for view, of_view in checks.items() if warnings(of_view)}:
        headers[WARNINGS] = json.dumps(found, allow_nan=False)
    for place, header in enumerate(RESIDUALS) if result.residuals else ():
        # A dictionary of RFC 8941, whose keys are in lower case: frontal=0.0812, lateral=0.0675.
        headers[header] = ", ".join(f"{view.lower()}={pair[place]:.4f}" for view, pair in result.residuals.items())
    return Response(body, media_type=media_type, headers=headers)


def _zip(result: HUVolume, backend: Backend, kind: VolumeFormat) -> bytes:
    """The mean volume and the standard deviation over samples."""
    assert result.std is not None
    volumes = {"reconstruction": result.hu, "reconstruction-std": result.std}
    return zipped({f"{name}{kind.suffix}": backend.encode(hu, kind) for name, hu in volumes.items()})


def _max_bytes(model: ServedModel, form: ReconstructionForm) -> int:
    """Most bytes of a response: those of the voxels, uncompressed, and of the headers of DICOM slices."""
    return (2 if form.include_std else 1) * (2 * model.description.grid.size**3 + 2**20)


def _named(backend: Backend, name: str, status: int) -> ServedModel:
    """A model of the service.

    Raises:
        HTTPException: with this status, no model has that name.
    """
    found = next((one for one in backend.models if one.name == name), None)
    if found is None:
        names = ", ".join(one.name for one in backend.models)
        raise HTTPException(status, f"unknown model {name!r:.80}: this service has {names}")
    return found


def _headers(model: ServedModel) -> dict[str, object]:
    """OpenAPI description of the headers of a reconstruction."""
    about = {
        "X-Raylift-Model": "SHA-256 of the weights",
        PARAMETERS: "name of the model and all values on which the volume depends besides the files, as JSON",
        NOTES: "what was changed or ignored in reading the files, lists of sentences by view, as JSON",
        LEVEL: "worst level of the checks of the input: ok, caution or stop",
        WARNINGS: "warnings of these checks, lists by view (and of all views), as JSON; absent without one",
    }
    if model.max_consistency_steps:
        residual = "relative L2 distance between reprojection and radiograph of each view, {} the data-consistency fit"
        about |= {header: residual.format(when) for header, when in RESIDUALS.items()}
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in about.items()}
