"""ASGI middleware that refuses requests for unknown paths and bodies over a size limit."""

from __future__ import annotations

import json
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = re.compile(
    # The API.
    r"/healthz|/readyz|/docs|/openapi\.json|/v1/[a-z]+"
    # The page, and those of Gradio's routes that it uses. `file=` with a URL would fetch that URL for any client.
    r"|/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static)/.+"
    r"|/gradio_api/(upload|upload_progress|startup-events|queue/(join|data)|run/predict|cancel|reset|heartbeat/\w+|file=/.+)"
)


class KnownPaths:
    """Responds 404 to every path that neither the API nor the page uses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and not PATHS.fullmatch(scope["path"]):
            await _refuse(send, 404, "not found")
        else:
            await self._app(scope, receive, send)


class BodyLimit:
    """Responds 413 to bodies over a limit: by the content-length if there is one, otherwise while receiving.

    FastAPI's own `max_body_size` responds in plain text without naming the limit, and only if no handler below it
    catches the exception.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
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
        received, started = 0, False

        async def count_bytes() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _BodyTooLarge
            return message

        async def send_within_limit(message: Message) -> None:
            nonlocal started
            # A handler may have caught _BodyTooLarge and responded itself.
            if not started and received > self._max_bytes:
                raise _BodyTooLarge
            started = True
            await send(message)

        try:
            await self._app(scope, count_bytes, send_within_limit)
        except _BodyTooLarge:
            if not started:
                await self._refuse_size(send)

    async def _refuse_size(self, send: Send) -> None:
        await _refuse(send, 413, f"the request is over the limit of {self._max_bytes} bytes")


class _BodyTooLarge(Exception):
    pass


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
