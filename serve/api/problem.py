"""Errors as documents of RFC 9457, `application/problem+json`."""

from __future__ import annotations

import json
import re
import uuid
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.types import Scope, Send

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = re.compile(r"[\w.-]{1,64}")


class Problem(BaseModel):
    """Why a request failed."""

    type: str = Field(description="the status alone states the kind of the problem")
    title: str = Field(description="name of the status")
    status: int
    detail: str = Field(description="what is wrong, with the remedy")
    request_id: str = Field(description="the request's X-Request-ID, or a new one")


def problem(scope: Scope, status: int, detail: str) -> Problem:
    """The problem of one request."""
    sent = Headers(scope=scope).get("x-request-id", "")
    request_id = sent if REQUEST_ID.fullmatch(sent) else str(uuid.uuid4())
    return Problem(
        type="about:blank", title=HTTPStatus(status).phrase, status=status, detail=detail, request_id=request_id
    )


def described(description: str) -> dict[str, Any]:
    """OpenAPI description of a response that is a problem."""
    return {"description": description, "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}


async def refuse(scope: Scope, send: Send, status: int, detail: str, **headers: str) -> None:
    """Respond to a request with a problem; underscores in names of headers stand for hyphens."""
    body = json.dumps(problem(scope, status, detail).model_dump()).encode()
    fields = {"content_type": MEDIA_TYPE, "content_length": str(len(body))} | headers
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
