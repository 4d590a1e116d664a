"""Errors as HTTP responses: a status and one sentence, `{"detail": ...}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from raylift.datasets.errors import RefusedFile
from raylift.serve.api.form import ReconstructionForm, field_names
from raylift.serve.backend import Unavailable
from raylift.serve.view_text import in_words

RETRY_AFTER_S = 5


def handle_errors(app: FastAPI, form: type[ReconstructionForm], views: Sequence[str]) -> None:
    """Add the handlers of every error that a route raises."""

    @app.exception_handler(RequestValidationError)
    async def invalid_form(_: Request, error: RequestValidationError) -> JSONResponse:
        return _response(422, describe(error.errors(), form, views))

    @app.exception_handler(400)
    async def malformed_form(_: Request, error: HTTPException) -> JSONResponse:
        return _response(422, f"the form cannot be read: {error.detail}")

    @app.exception_handler(RefusedFile)
    async def refused_file(_: Request, error: RefusedFile) -> JSONResponse:
        return _response(415, str(error))

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Unavailable) -> JSONResponse:
        return _response(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(Exception)
    async def internal(_: Request, __: Exception) -> JSONResponse:
        # Starlette raises the exception again, so the server logs it.
        return _response(500, "the service failed; see its log")


def describe(errors: Sequence[Any], form: type[ReconstructionForm], views: Sequence[str]) -> str:
    """One sentence for pydantic's errors of a form: missing views first, then unknown fields, then invalid values."""
    missing, unknown = (_fields(errors, kind) for kind in ("missing", "extra_forbidden"))
    if missing:
        return f"this model requires {in_words(views)}; missing: {', '.join(missing)}"
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


def _response(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
