"""Admission of requests: a bounded number, a deadline in the queue, and none while the service stops."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylift.serve.api.problem import refuse
from raylift.serve.api.request_limits import PROBES, route_path
from raylift.serve.failures import ServiceUnavailableError

EVENTS = "/gradio_api/queue/data"
"""Path of the events of the page, which has its results when they have ended and then gets the files."""
JOBS = "/v1/jobs/"
"""Beginning of the paths of jobs."""
FILES = ("/gradio_api/file=", "/volumes/", JOBS)
"""Beginnings of the paths of the files of a result."""
FILES_S = 3.0
"""How long a service that stops waits for requests for the files of a result."""
Result = TypeVar("Result")
WORK = ("/v1/reconstructions", "/gradio_api/upload", EVENTS)
"""Paths whose requests are completed before the service stops."""
STREAMS = re.compile(rf"/gradio_api/heartbeat/.*|{JOBS}[^/]+/events")
"""Paths of requests that stay open: of pages, and of clients that follow a job."""
MAX_REQUESTS = 512
"""Requests in progress; more get 503, so that probes always find a free slot in the process."""
MAX_STREAMS = 256
"""Open pages and followed jobs."""
DECAY = 0.9
"""Weight of the throughput before each completed reconstruction."""


class Queue:
    """Reconstructions in progress and waiting, and their measured throughput in units of weight.

    A reconstruction with the settings of the service has the weight 1, one that takes longer a larger one.
    """

    def __init__(self, deadline_s: float, min_slots: int, max_slots: int) -> None:
        """A queue.

        Args:
            deadline_s: longest expected wait.
            min_slots: weight of reconstructions that are admitted in any case, those that begin at once.
            max_slots: reconstructions that are admitted at most.
        """
        self._deadline_s, self._min_slots, self._max_slots = deadline_s, min_slots, max_slots
        self._weights: list[float] = []
        self._abandoned: dict[asyncio.Task[Any], float] = {}
        self._busy_since = 0.0
        self._completed = self._busy_s = 0.0

    @property
    def in_use(self) -> int:
        """Slots of requests, and of calls whose requests were canceled."""
        return len(self._weights) + len(self._abandoned)

    @property
    def waiting(self) -> int:
        """Reconstructions that wait for others to end."""
        return max(0, self.in_use - self._min_slots)

    def check(self, weight: float = 1.0) -> None:
        """Raise ServiceUnavailableError if there is no slot of this weight.

        The expected wait is the time until the reconstructions in the queue are complete, and what this one takes
        longer than one of weight 1, because others wait for it. An empty queue admits every weight.
        """
        load = sum(self._weights) + sum(self._abandoned.values())
        queue_s = load * self._seconds_per_unit()
        wait_s = queue_s + max(0.0, weight - 1) * self._seconds_per_unit()
        is_full = self.in_use >= self._max_slots or wait_s > self._deadline_s
        if self.in_use and load + weight > self._min_slots and is_full:
            retry_after_s = max(1, math.ceil(min(queue_s, wait_s - self._deadline_s)))
            raise ServiceUnavailableError(f"the queue is full: try again in {retry_after_s} s", retry_after_s)

    @asynccontextmanager
    async def slot(self, weight: float = 1.0) -> AsyncIterator[None]:
        """A slot for one reconstruction of this weight.

        Raises:
            ServiceUnavailableError: the expected wait is longer than the deadline.
        """
        self.check(weight)
        if self.in_use == 0:
            self._busy_since = time.monotonic()
        self._weights.append(weight)
        try:
            yield
        finally:
            self._weights.remove(weight)
        self._measure(weight)

    async def complete(self, call: Coroutine[Any, Any, Result], weight: float = 1.0) -> Result:
        """The result of a call of the model of this weight.

        The model does not stop computing if the request is canceled. The call then continues and keeps its slot.
        """
        # Ray Serve cancels the calls that were made in the context of a canceled request.
        task = asyncio.create_task(call, context=Context())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                self._abandoned[task] = weight
                task.add_done_callback(self._end_abandoned)
            raise

    def _end_abandoned(self, task: asyncio.Task[Any]) -> None:
        weight = self._abandoned.pop(task)
        if not task.cancelled() and task.exception() is None:
            self._measure(weight)

    def _measure(self, weight: float) -> None:
        now = time.monotonic()
        self._completed = DECAY * self._completed + weight
        self._busy_s = DECAY * self._busy_s + now - self._busy_since
        self._busy_since = now

    def _seconds_per_unit(self) -> float:
        """Seconds per unit of weight; 0 before the first reconstruction is complete."""
        return self._busy_s / self._completed if self._completed else 0.0


class Gate:
    """Bounds the requests of a process, and ends them when the service stops.

    Attributes:
        is_open: whether requests are accepted.
    """

    def __init__(self) -> None:
        self.is_open = True
        self._work: set[asyncio.Task[None]] = set()
        self._others: set[asyncio.Task[None]] = set()
        self._streams: set[asyncio.Task[None]] = set()

    def start(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin a job, which goes on after its request and completes before the service stops."""
        # Ray Serve cancels the calls that were made in the context of a request that ended.
        task = asyncio.create_task(job, name=JOBS, context=Context())
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def close(self, grace_s: float) -> int:
        """Refuse requests from now on, wait for those in progress, and cancel what remains after the grace.

        A page and the client of a job may get the files of their results within the grace.

        Returns:
            Number of canceled requests and jobs.
        """
        self.is_open = False
        until = time.monotonic() + grace_s
        has_files = any(task.get_name() in (EVENTS, JOBS) for task in self._work)
        if self._work:
            await asyncio.wait(self._work, timeout=grace_s)
        canceled = len(self._work)
        if has_files and not canceled:
            await asyncio.sleep(min(FILES_S, max(0.0, until - time.monotonic())))
            if files := [task for task in self._others if task.get_name().startswith(FILES)]:
                await asyncio.wait(files, timeout=max(0.0, until - time.monotonic()))
        remaining = self._work | self._others | self._streams
        for task in remaining:
            task.cancel()
        if remaining:
            await asyncio.wait(remaining, timeout=1.0)
        return canceled

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request with an application, or refuse it."""
        path = route_path(scope)
        if path in PROBES:
            await app(scope, receive, send)
            return
        if not self.is_open and not (path.startswith(FILES) and scope["method"] == "GET"):
            await refuse(scope, send, 503, "the service is stopping", retry_after="5")
            return
        is_stream = STREAMS.fullmatch(path) is not None
        tasks = self._streams if is_stream else self._work if path in WORK else self._others
        in_progress = len(self._streams) if is_stream else len(self._work) + len(self._others)
        if in_progress >= (MAX_STREAMS if is_stream else MAX_REQUESTS):
            await refuse(scope, send, 503, "too many requests at a time: try again in a few seconds", retry_after="5")
            return
        started = False

        async def note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        async def handle() -> None:
            await app(scope, receive, note_start)

        task = asyncio.create_task(handle(), name=path)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        try:
            await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self.is_open or (current is not None and current.cancelling()):
                raise
            if started:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await refuse(scope, send, 503, "the service is stopping", retry_after="5")


class Admission:
    """ASGI middleware with a gate for all requests.

    A reconstruction for which the queue has no slot is refused before its body is read. It takes a slot when the body
    is complete, so that a slow client holds none.
    """

    def __init__(self, app: ASGIApp, gate: Gate, queue: Queue) -> None:
        self._app, self._gate, self._queue = app, gate, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif route_path(scope) == "/v1/reconstructions" and scope["method"] == "POST":
            await self._gate.run(self._queued, scope, receive, send)
        else:
            await self._gate.run(self._app, scope, receive, send)

    async def _queued(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._queue.check()
        except ServiceUnavailableError as error:
            await refuse(scope, send, 503, str(error), retry_after=str(error.retry_after_s))
        else:
            await self._app(scope, receive, send)
