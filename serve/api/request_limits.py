"""ASGI middleware that serves below a root path, and refuses requests for unknown routes and bodies over a limit."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.serve.api.problem import refuse

ROUTES = {
    re.compile(pattern): methods
    for pattern, methods in {
        # The API.
        r"/healthz|/readyz|/docs|/openapi\.json|/metrics|/v1/models?|/v1/models/[^/]+": ("GET", "HEAD"),
        r"/v1/reconstructions": ("POST",),
        r"/v1/jobs/[^/]+": ("GET", "HEAD", "DELETE"),
        r"/v1/jobs/[^/]+/result": ("GET", "HEAD"),
        r"/v1/jobs/[^/]+/events": ("GET",),
        # The page, and those of Gradio's routes that it uses. `file=` with a URL would fetch that URL for any client.
        r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static)/.+": ("GET", "HEAD"),
        r"/viewer/\w+/[\w.]+|/volumes/[0-9a-f]{64}/[\w.]+": ("GET", "HEAD"),
        r"/gradio_api/(upload_progress|startup-events|queue/data|heartbeat/\w+|file=/.+)": ("GET", "HEAD"),
        r"/gradio_api/(upload|queue/join|run/predict|cancel|reset)": ("POST",),
    }.items()
}
"""Methods by path."""
PROBES = ("/healthz", "/readyz")
"""Paths of liveness and readiness."""

MAX_TOTAL_BYTES = 2**31
"""Bytes of the bodies of all requests in progress, which are kept on disk; at least one request of the largest size."""


class KnownRoutes:
    """Responds 404 to every path that neither the API nor the page uses, and 405 to other methods."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        allowed = next((methods for pattern, methods in ROUTES.items() if pattern.fullmatch(path)), ())
        if not allowed:
            await refuse(scope, send, 404, "not found: the API reference at /docs lists the routes")
        elif scope["method"] not in allowed:
            methods = ", ".join(allowed)
            await refuse(
                scope, send, 405, f"{path} does not accept {scope['method']:.20}: use {methods}", allow=methods
            )
        else:
            await self._app(scope, receive, send)


class RootPath:
    """Serves the application below a path, for proxies that pass the path on and for those that strip it."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and self._root:
            path = str(scope["path"])
            if not path.startswith(f"{self._root}/"):
                path = f"{self._root}/" if path == self._root else self._root + path
            scope = {**scope, "path": path, "root_path": self._root}
        await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """A request's path below the root path."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


class BodyLimit:
    """Responds 413 to bodies over a limit: by the content-length if there is one, otherwise while receiving.

    Responds 503 to a body with which the requests in progress would exceed a limit of all bodies.

    FastAPI's own `max_body_size` responds in plain text without naming the limit, and only if no handler below it
    catches the exception.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes
        self._max_total_bytes = max(MAX_TOTAL_BYTES, max_bytes)
        self._total_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit():
            await refuse(scope, send, 400, "the request's content-length is not a number")
            return
        if int(declared) > self._max_bytes:
            await self._refuse(scope, send, int(declared))
            return
        received, is_over, started = 0, False, False

        async def count_bytes() -> Message:
            nonlocal received, is_over
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._total_bytes += size
            is_over = received > self._max_bytes or self._total_bytes > self._max_total_bytes
            if is_over:
                raise _BodyTooLargeError
            return message

        async def send_within_limit(message: Message) -> None:
            nonlocal started
            # A handler may have caught _BodyTooLargeError and responded itself.
            if not started and is_over:
                raise _BodyTooLargeError
            started = True
            await send(message)

        try:
            await self._app(scope, count_bytes, send_within_limit)
        except _BodyTooLargeError:
            if not started:
                await self._refuse(scope, send, received)
        finally:
            self._total_bytes -= received

    async def _refuse(self, scope: Scope, send: Send, size: int) -> None:
        if size > self._max_bytes:
            await refuse(scope, send, 413, f"the request is over the limit of {self._max_bytes} bytes")
        else:
            detail = "too many bytes of requests at a time: try again in a few seconds"
            await refuse(scope, send, 503, detail, retry_after="5")


class BodyTimeout:
    """Responds 408 to requests whose body is incomplete some time after it is first read."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self._app, self._timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline: float | None = None
        is_complete = is_late = started = False

        async def receive_in_time() -> Message:
            nonlocal deadline, is_complete, is_late
            if is_complete:
                return await receive()
            now = asyncio.get_running_loop().time()
            deadline = deadline or now + self._timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                is_late = True
                raise _BodyTooSlowError from None
            is_complete = not message.get("more_body", False)
            return message

        async def send_in_time(message: Message) -> None:
            nonlocal started
            # A handler may have caught _BodyTooSlowError and responded itself.
            if is_late and not started:
                raise _BodyTooSlowError
            started = True
            await send(message)

        try:
            await self._app(scope, receive_in_time, send_in_time)
        except _BodyTooSlowError:
            if not started:
                await refuse(scope, send, 408, f"the body did not arrive within {self._timeout_s:g} s")


class _BodyTooLargeError(Exception):
    pass


class _BodyTooSlowError(Exception):
    pass
