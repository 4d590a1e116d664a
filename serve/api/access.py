"""ASGI middleware for hosts, origins and credentials of requests, and security headers of responses."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.serve.api.credentials import Credentials
from raylift.serve.api.problem import refuse
from raylift.serve.api.request_limits import PROBES, route_path

MAX_REMEMBERED = 1000
"""Digests of accepted headers, because the hash of a password takes a tenth of a second."""
MAX_VERIFICATIONS = 16
"""Passwords that are hashed or wait for it; two are hashed at a time."""
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'self'",
        # Gradio's page has inline scripts and styles, and makes functions of strings.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class AccessControl:
    """Refuses requests for other hosts, from other origins and without credentials, and adds security headers.

    No response permits another origin (CORS).
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], proxied_hosts: Collection[str], credentials: Credentials | None
    ) -> None:
        """Middleware around an application.

        Args:
            app: the application.
            hosts: names that requests may have as Host, without a port.
            proxied_hosts: further ones, which an origin may have too where Host is another one.
            credentials: required ones; None for none.
        """
        self._app, self._credentials = app, credentials
        self._origins = {host.lower() for host in proxied_hosts}
        self._hosts = {host.lower() for host in hosts} | self._origins
        self._accepted: set[bytes] = set()
        self._verifications, self._hashing = 0, asyncio.Semaphore(2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]
            await send(message)

        # Probes have no credentials, and an address of the machine as Host.
        if route_path(scope) in PROBES:
            await self._app(scope, receive, send_with_headers)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name(host) not in self._hosts:
            await refuse(scope, send_with_headers, 421, f"unknown host {host!r:.80}: pass --allowed-hosts")
        elif origin is not None and not self._permits(origin, host):
            await refuse(scope, send_with_headers, 403, f"origin {origin!r:.80} is not this service")
        elif (status := await self._authenticate(headers.get("authorization", ""))) == 401:
            assert self._credentials is not None
            challenge = self._credentials.challenge
            await refuse(scope, send_with_headers, 401, "credentials are required", www_authenticate=challenge)
        elif status == 503:
            detail = "too many passwords are verified at a time: try again in a few seconds"
            await refuse(scope, send_with_headers, 503, detail, retry_after="5")
        else:
            user = self._credentials and self._credentials.user(headers.get("authorization", ""))
            await self._app({**scope, "user": user}, receive, send_with_headers)

    def _permits(self, origin: str, host: str) -> bool:
        """Whether an origin is the requested host and port, or a host of a proxy."""
        scheme, _, netloc = origin.lower().partition("://")
        return scheme in ("http", "https") and (netloc == host.lower() or _name(netloc) in self._origins)

    async def _authenticate(self, authorization: str) -> int:
        """Status of a request with this header: 200, 401, or 503 where too many passwords are verified."""
        if self._credentials is None or self._credentials.accept_token(authorization):
            return 200
        digest = hashlib.sha256(authorization.encode()).digest()
        if digest in self._accepted:
            return 200
        if self._verifications >= MAX_VERIFICATIONS:
            return 503
        self._verifications += 1
        try:
            async with self._hashing:
                accepted = await asyncio.to_thread(self._credentials.accept_password, authorization)
        finally:
            self._verifications -= 1
        if accepted and len(self._accepted) < MAX_REMEMBERED:
            self._accepted.add(digest)
        return 200 if accepted else 401


def _name(host: str) -> str:
    """A host without its port, in lower case."""
    return host.rpartition("]")[0].lower() + "]" if host.startswith("[") else host.partition(":")[0].lower()
