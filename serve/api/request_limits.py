"""What may come in at all: requests for known paths, with bodies of a bounded size."""

from __future__ import annotations

import json
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = re.compile(
    # The API.
    r"/healthz|/readyz|/docs|/openapi\.json|/v1/[a-z]+"
    # The page, and of Gradio's two score routes those it uses. `file=` with a URL would fetch that URL for anyone.
    r"|/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static)/.+"
    r"|/gradio_api/(upload|upload_progress|startup-events|queue/(join|data)|run/predict|cancel|reset|heartbeat/\w+|file=/.+)"
)


class KnownPaths:
    """Answers 404 to every path that neither the API nor the page has a use for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and not PATHS.fullmatch(scope["path"]):
            await _refuse(send, 404, "there is nothing here")
        else:
            await self._app(scope, receive, send)


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
        if not declared.isdigit():
            await _refuse(send, 400, "the request's content-length is not a number")
            return
        if int(declared) > self._max_bytes:
            await self._refuse_size(send)
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
            # Whoever reads the body may have turned _TooMuch into an answer of its own.
            if not answered and received > self._max_bytes:
                raise _TooMuch
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooMuch:
            if not answered:
                await self._refuse_size(send)

    async def _refuse_size(self, send: Send) -> None:
        await _refuse(send, 413, f"the request is over the limit of {self._max_bytes} bytes")


class _TooMuch(Exception):
    pass


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
