"""The trust boundary: what comes over HTTP is bounded, checked and named before anything else sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
from jaxtyping import Float32
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.datasets.errors import RayliftError, RefusedFile
from raylift.datasets.radiograph import Inversion, RadiographLimits, read

VIEWS = ("frontal", "lateral")


class BadRequest(RayliftError, ValueError):
    """A request that cannot be served, with the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BodyLimit:
    """Refuses requests whose body is over a limit, by its header where it says so, else while it arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_bytes:
            await _refuse(send, self._max_bytes)
            return
        received, answered = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _TooMuch
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooMuch:
            if not answered:
                await _refuse(send, self._max_bytes)


async def radiographs(
    form: Mapping[str, Any], wanted: list[str], limits: RadiographLimits
) -> dict[str, Float32[np.ndarray, "_ _"]]:
    """The images of a form by view, bone bright.

    Fields: `frontal` and `lateral` are files; `invert` is auto, yes or no for both; `flip_frontal` and `flip_lateral`
    are true or false.

    Raises:
        BadRequest: 422 for a wrong, missing or surplus field; 415 for what is no image; 413 for one that is too large.
    """
    known = {*VIEWS, "invert", *(f"flip_{view}" for view in VIEWS)}
    unknown = set(form) - known
    if unknown:
        raise BadRequest(422, f"unknown field {', '.join(sorted(unknown))}: send {', '.join(sorted(known))}")
    given = [view for view in VIEWS if view in form]
    if set(given) != set(wanted):
        raise BadRequest(
            422, f"this model wants {' and '.join(wanted)}; sent were {' and '.join(given) or 'no images'}"
        )
    invert = form.get("invert", "auto")
    if invert not in get_args(Inversion):
        raise BadRequest(422, f"field invert is '{invert}': send auto, yes or no")
    images = {}
    for view in wanted:
        upload = form[view]
        if not isinstance(upload, UploadFile):
            raise BadRequest(422, f"field {view} is text: send a file")
        flip = form.get(f"flip_{view}", "false")
        if flip not in ("true", "false"):
            raise BadRequest(422, f"field flip_{view} is '{flip}': send true or false")
        data = await upload.read()
        if len(data) > limits.max_bytes:
            raise BadRequest(413, f"{view}: {len(data)} bytes, over the limit of {limits.max_bytes}")
        try:
            images[view] = read(data, view, limits, invert=invert, flip=flip == "true")
        except RefusedFile as error:
            raise BadRequest(415, str(error)) from error
    return images


class _TooMuch(Exception):
    pass


async def _refuse(send: Send, max_bytes: int) -> None:
    body = f'{{"detail": "the request is over the limit of {max_bytes} bytes"}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
