"""S3 through s3fs: one layer of retries, and a probe of a bucket before work."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import time
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from typing import Any

import aiohttp
import botocore.exceptions  # type: ignore[import-untyped]
import fsspec.asyn
import s3fs

from raylift.datasets.archive import store
from raylift.datasets.errors import StoreError

PROBE_ATTEMPTS, ATTEMPT_S = 2, 5.0
"""A bucket that does not respond to so many requests, of so many seconds each, is given up."""


SLOW_S, REPORT_EVERY_S = 5.0, 30.0
"""Seconds until a request without a response is reported, and between further reports of it."""
_attempts: ContextVar[list[int]] = ContextVar("attempts")


def _count_attempt(attempts: int, **_: Any) -> None:
    """Record, before botocore decides on a retry, which attempt of the present request follows."""
    with suppress(LookupError):
        _attempts.get()[0] = attempts + 1


class S3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs without retries of its own: botocore repeats requests, by its configuration.

    botocore does not repeat the reading of a body, so this repeats reads whose connection broke in the body, as often.
    """

    retries = 1

    async def set_session(self, *args: Any, **options: Any) -> Any:
        """Open the client, whose attempts are counted."""
        client = await super().set_session(*args, **options)
        # A second registration with the same id is ignored.
        client.meta.events.register("needs-retry.s3", _count_attempt, unique_id="raylift-attempts")
        return client

    async def _call_s3(self, method: str, *args: Any, **options: Any) -> Any:
        if any("Body" in arguments for arguments in (*args, options) if isinstance(arguments, dict)):
            # An upload takes as long as the connection does; its attempts have timeouts of their own.
            return await super()._call_s3(method, *args, **options)
        token = _attempts.set([1])
        watch = asyncio.ensure_future(self._report_stalls(options.get("Bucket", "")))
        try:
            return await super()._call_s3(method, *args, **options)
        finally:
            watch.cancel()
            _attempts.reset(token)

    async def _report_stalls(self, bucket: str) -> None:
        """Report the present request until it is canceled."""
        begun = time.monotonic()
        await asyncio.sleep(SLOW_S)
        while True:
            waited_s, attempt = time.monotonic() - begun, _attempts.get()[0]
            store.report_stall(
                f"s3://{bucket} does not respond for {waited_s:.0f} s, retrying ({attempt} of {self._total_attempts()})"
            )
            await asyncio.sleep(REPORT_EVERY_S)

    def _total_attempts(self) -> int:
        """Attempts of a request. botocore replaces the number of retries in its configuration by this one."""
        retries = self.config_kwargs.get("retries", {})
        return int(retries.get("total_max_attempts", retries.get("max_attempts", 0) + 1))

    async def _cat_file(self, *args: Any, **options: Any) -> bytes:
        for _ in range(self._total_attempts() - 1):
            try:
                return await super()._cat_file(*args, **options)  # type: ignore[no-any-return]
            except aiohttp.ClientPayloadError:
                continue
        return await super()._cat_file(*args, **options)  # type: ignore[no-any-return]


@atexit.register
def _close_sessions() -> None:
    """Close what s3fs leaves open: the sessions of asynchronous file systems."""
    for system in S3FileSystem._cache.values():
        session = getattr(getattr(system._s3, "_endpoint", None), "http_session", None)
        sessions: dict[Any, aiohttp.ClientSession] = getattr(session, "_sessions", None) or {}
        for each in sessions.values():
            if each.connector is not None:
                each.connector._close()


def require_bucket(url: str) -> None:
    """Check that the bucket of an `s3://` URL exists and its store responds, within PROBE_ATTEMPTS * ATTEMPT_S seconds.

    A line on standard error precedes each further attempt. A bucket that responded is not checked again.

    Raises:
        StoreError: the store does not respond or the name of its host is unknown, or there is no such bucket.
    """
    _require_bucket(url.removeprefix("s3://").partition("/")[0], os.environ.get("AWS_ENDPOINT_URL_S3", ""))


@cache
def _require_bucket(bucket: str, endpoint: str) -> None:
    options = {"retries": {"total_max_attempts": 1}, "connect_timeout": ATTEMPT_S, "read_timeout": ATTEMPT_S}
    store = S3FileSystem(config_kwargs=options, skip_instance_cache=True)
    where = f"s3://{bucket}" + (f" at {endpoint}" if endpoint else "")
    for attempt in range(1, PROBE_ATTEMPTS + 1):
        begun = time.monotonic()
        try:
            fsspec.asyn.sync(store.loop, store._call_s3, "head_bucket", Bucket=bucket, timeout=ATTEMPT_S)
        except FileNotFoundError as error:
            raise StoreError(f"{where}: there is no such bucket: create it, or correct the name") from error
        except PermissionError:
            return  # credentials may be for a part of the bucket
        except botocore.exceptions.NoCredentialsError as error:
            raise StoreError(f"{where}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except (OSError, TimeoutError, botocore.exceptions.BotoCoreError) as error:
            if attempt == PROBE_ATTEMPTS:
                reason, total_s = str(error) or type(error).__name__, PROBE_ATTEMPTS * ATTEMPT_S
                raise StoreError(
                    f"{where} does not respond within {total_s:.0f} s ({reason}): check AWS_ENDPOINT_URL_S3"
                ) from error
        else:
            return
        time.sleep(max(0.0, begun + ATTEMPT_S - time.monotonic()))
        print(
            f"raylift: {where} does not respond, retrying ({attempt + 1} of {PROBE_ATTEMPTS})",
            file=sys.stderr,
            flush=True,
        )
