"""ASGI middleware that measures requests."""

from __future__ import annotations

import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.serve.api.request_limits import route_path
from raylift.serve.service_metrics import Metrics

RECONSTRUCTIONS = "/v1/reconstructions"
PATTERNS = {
    re.compile("/v1/models/[^/]+"): "/v1/models/{name}",
    re.compile("/v1/jobs/[^/]+"): "/v1/jobs/{id}",
    re.compile("/v1/jobs/[^/]+/events"): "/v1/jobs/{id}/events",
    re.compile("/v1/jobs/[^/]+/result"): "/v1/jobs/{id}/result",
}
ROUTES = {RECONSTRUCTIONS, "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/model", "/v1/models"}
ROUTES |= set(PATTERNS.values())
CLIENT_LEFT = "499"
"""Status of requests whose client left before the response began, as nginx logs it."""


class Measured:
    """ASGI middleware that counts requests by route and status, and measures uploads of radiographs."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        route = next((to for pattern, to in PATTERNS.items() if pattern.fullmatch(path)), path)
        route = route if route in ROUTES else "page"
        status, begun, is_complete = CLIENT_LEFT, time.perf_counter(), path != RECONSTRUCTIONS

        async def receive_measured() -> Message:
            nonlocal is_complete
            message = await receive()
            if not is_complete and message["type"] == "http.request" and not message.get("more_body", False):
                is_complete = True
                self._metrics.seconds.labels("upload").observe(time.perf_counter() - begun)
            return message

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive_measured, note_status)
        finally:
            self._metrics.requests.labels(route, status).inc()
