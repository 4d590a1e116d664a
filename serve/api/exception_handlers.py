"""Errors of routes as HTTP responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raylift.datasets.errors import FileError, InputCheckError
from raylift.serve.api.form import ReconstructionForm, field_names
from raylift.serve.api.problem import MEDIA_TYPE, problem
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.view_text import in_words

SAMPLER_FIELDS = {"samples", "return_std", "seed", "steps"}
"""Fields of diffusion models."""


def handle_errors(app: FastAPI, form: type[ReconstructionForm], views: Sequence[str]) -> None:
    """Add the handlers of every error that a route raises."""

    @app.exception_handler(RequestValidationError)
    async def invalid_form(request: Request, error: RequestValidationError) -> JSONResponse:
        return _response(request, 422, describe(error.errors(), form, views))

    @app.exception_handler(HTTPException)
    async def refused_request(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:
            return _response(request, 422, f"the form cannot be read: {error.detail}")
        return _response(request, error.status_code, error.detail, error.headers)

    @app.exception_handler(InputCheckError)
    async def unlike_radiograph(request: Request, error: InputCheckError) -> JSONResponse:
        return _response(request, 422, str(error))

    @app.exception_handler(FileError)
    async def refused_file(request: Request, error: FileError) -> JSONResponse:
        return _response(request, 415, str(error))

    @app.exception_handler(ServiceUnavailableError)
    async def unavailable(request: Request, error: ServiceUnavailableError) -> JSONResponse:
        return _response(request, 503, str(error), {"Retry-After": str(error.retry_after_s)})

    @app.exception_handler(Exception)
    async def internal(request: Request, _: Exception) -> JSONResponse:
        # Starlette raises the exception again, so the server logs it.
        return _response(request, 500, "the service failed; see its log")


def describe(errors: Sequence[Any], form: type[ReconstructionForm], views: Sequence[str]) -> str:
    """One sentence for pydantic's errors of a form: missing views first, then unknown fields, then invalid values."""
    missing, unknown = (_fields(errors, kind) for kind in ("missing", "extra_forbidden"))
    if missing:
        return f"this model requires {in_words(views)}; missing: {', '.join(missing)}"
    if ignored := sorted({*unknown} & SAMPLER_FIELDS):
        return f"this model does not use {in_words(ignored)}: leave out what GET v1/models does not list for it"
    if unknown:
        return f"unknown field {', '.join(unknown)}: send {', '.join(field_names(form))}"
    error = errors[0]
    if len(error["loc"]) == 1:
        return str(error["ctx"]["error"])
    name, value = error["loc"][-1], error["input"]
    if name in views:
        return f"field {name} is text: send a file"
    shown = f"'{value:.40}'" if isinstance(value, str) else "a file"
    return f"field {name} is {shown}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields(errors: Sequence[Any], kind: str) -> list[str]:
    return [f"{error['loc'][-1]:.40}" for error in errors if error["type"] == kind]


def _response(request: Request, status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    document = problem(request.scope, status, detail).model_dump()
    return JSONResponse(document, status, headers, media_type=MEDIA_TYPE)
