"""Bounds on the page's uploads."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict, deque
from contextlib import suppress
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.serve.api.problem import refuse
from raylift.serve.api.request_limits import route_path


class UploadQuota:
    """ASGI middleware that bounds the page's uploads: bytes of a client within the retention, and of the folder."""

    def __init__(self, app: ASGIApp, folder: Path, max_bytes: int, max_client_bytes: int, retention_s: float) -> None:
        """Middleware around an application.

        Args:
            app: the application.
            folder: where uploads and results are kept.
            max_bytes: largest size of the folder.
            max_client_bytes: largest size of a client's uploads within the retention.
            retention_s: how long uploads are kept.
        """
        self._app, self._folder = app, folder
        self._max_bytes, self._max_client_bytes, self._retention_s = max_bytes, max_client_bytes, retention_s
        self._uploads: dict[str, deque[tuple[float, int]]] = defaultdict(deque)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or route_path(scope) != "/gradio_api/upload":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if not declared.isdigit():
            await refuse(scope, send, 411, "an upload needs a content-length")
            return
        size, client, now = int(declared), (scope.get("client") or ("",))[0], time.monotonic()
        for uploads in [*self._uploads.values()]:
            while uploads and now - uploads[0][0] > self._retention_s:
                uploads.popleft()
        self._uploads = defaultdict(deque, {name: uploads for name, uploads in self._uploads.items() if uploads})
        retry_after = str(max(1, round(self._retention_s)))
        own = self._uploads[client]
        if sum(sent for _, sent in own) + size > self._max_client_bytes:
            detail = f"your uploads are over the limit of {self._max_client_bytes} bytes: try again later"
            oldest_s = self._retention_s - (now - own[0][0]) if own else self._retention_s
            await refuse(scope, send, 429, detail, retry_after=str(max(1, math.ceil(oldest_s))))
        elif size_of(self._folder) + size > self._max_bytes:
            detail = "the service has no space for further uploads: try again later"
            await refuse(scope, send, 503, detail, retry_after=retry_after)
        else:
            own.append((now, size))

            async def send_and_release(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] >= 400:
                    own.remove((now, size))  # nothing of a refused upload is kept
                await send(message)

            await self._app(scope, receive, send_and_release)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, without those that are deleted meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
