"""Admission: the deadline of the queue, bounds on requests, and a service that stops."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from raylift.serve import gate as gate_module
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.gate import Admission, Gate, Queue

RECONSTRUCTION = "/v1/reconstructions"


async def nothing() -> Message:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


async def request(
    app: Any, path: str, method: str = "POST", headers: Sequence[tuple[bytes, bytes]] = ()
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": headers}, nothing, send)
    received = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], received, b"".join(message.get("body", b"") for message in sent[1:])


def application(
    queue: Queue, seconds: float, workers: int = 1
) -> Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]:
    """An application whose reconstructions take this long, so many at a time."""
    slots = asyncio.Semaphore(workers)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == RECONSTRUCTION:
            async with queue.slot(), slots:
                await asyncio.sleep(seconds)
        elif scope["path"].startswith("/gradio_api/heartbeat/"):
            await asyncio.sleep(60)
        await PlainTextResponse("done")(scope, receive, send)

    return app


def test_under_overload_the_accepted_wait_for_the_deadline_at_most_and_others_are_refused_at_once() -> None:
    compute_s, deadline_s = 0.1, 0.5

    async def overload() -> tuple[list[float], list[float], list[int]]:
        queue = Queue(deadline_s, 1, 1000)
        app = Admission(application(queue, compute_s), Gate(), queue)
        await request(app, RECONSTRUCTION)
        accepted, refused, retry_after = [], [], []

        async def client() -> None:
            begun = time.monotonic()
            status, headers, _ = await request(app, RECONSTRUCTION)
            (accepted if status == 200 else refused).append(time.monotonic() - begun)
            if status == 503:
                retry_after.append(int(headers["retry-after"]))

        clients = []
        for _ in range(100):  # ten times the throughput
            clients.append(asyncio.create_task(client()))
            await asyncio.sleep(compute_s / 10)
        await asyncio.gather(*clients)
        return accepted, refused, retry_after

    accepted, refused, retry_after = asyncio.run(overload())
    assert len(accepted) + len(refused) == 100
    assert 8 <= len(accepted) <= 30
    assert np.quantile(accepted, 0.95) <= 2 * (compute_s + deadline_s)
    assert np.quantile(refused, 0.99) < 0.1
    assert set(retry_after) == {1}


def test_retry_after_follows_the_measured_throughput() -> None:
    async def fill(compute_s: float) -> int:
        queue = Queue(0.0, 1, 1000)
        async with queue.slot():
            await asyncio.sleep(compute_s)
        async with queue.slot():
            with pytest.raises(ServiceUnavailableError, match="the queue is full: try again in") as caught:
                async with queue.slot():
                    pass
        return caught.value.retry_after_s

    assert asyncio.run(fill(0.1)) == 1
    assert asyncio.run(fill(1.2)) == 2


def test_a_heavy_request_is_refused_where_a_plain_one_is_admitted() -> None:
    async def run() -> None:
        gate, queue = Gate(), Queue(0.5, 1, 1000)
        slots = asyncio.Semaphore(1)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            weight = float(dict(scope["headers"])[b"weight"])
            try:
                async with queue.slot(weight), slots:
                    await asyncio.sleep(0.1 * weight)
                await PlainTextResponse("done")(scope, receive, send)
            except ServiceUnavailableError as error:
                await PlainTextResponse(str(error), 503)(scope, receive, send)

        admission = Admission(app, gate, queue)

        def post(weight: float) -> asyncio.Task[tuple[int, dict[str, str], bytes]]:
            headers = [(b"weight", str(weight).encode())]
            return asyncio.create_task(request(admission, RECONSTRUCTION, headers=headers))

        assert (await post(1))[0] == 200
        first = post(1)
        await asyncio.sleep(0.01)
        status, _, body = await post(50)
        # After one second at most the queue is empty, and admits it.
        assert (status, body) == (503, b"the queue is full: try again in 1 s")
        others = [post(weight) for weight in (1, 2)]
        assert [(await one)[0] for one in (first, *others)] == [200] * 3
        # An idle service admits every weight, and others wait for all of it.
        heavy = post(10)
        await asyncio.sleep(0.01)
        assert (await post(1))[0] == 503
        assert (await heavy)[0] == 200

    asyncio.run(run())


def test_the_throughput_is_measured_per_unit_of_weight() -> None:
    async def run() -> None:
        queue = Queue(10.0, 1, 1000)
        for weight in (4.0, 1.0, 0.5):
            async with queue.slot(weight):
                await asyncio.sleep(0.1 * weight)
        assert queue._completed == pytest.approx(gate_module.DECAY**2 * 4 + gate_module.DECAY + 0.5)
        assert 0.1 <= queue._seconds_per_unit() < 0.2

        # A call that goes on without its client keeps the weight.
        async def abandoned() -> None:
            async with queue.slot(4.0):
                await queue.complete(asyncio.sleep(0.4), 4.0)

        left = asyncio.create_task(abandoned())
        await asyncio.sleep(0.01)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert queue.in_use == 1
        queue.check(40)
        with pytest.raises(ServiceUnavailableError, match="try again in 1 s"):
            queue.check(110)
        await asyncio.sleep(0.45)
        assert 0.1 <= queue._seconds_per_unit() < 0.2
        queue.check(110)

    asyncio.run(run())


def test_failed_reconstructions_free_their_slot_and_are_no_measure_of_the_throughput() -> None:
    async def run() -> None:
        queue = Queue(0.0, 1, 1)
        for _ in range(3):
            with pytest.raises(ValueError, match="no radiograph"):
                async with queue.slot():
                    raise ValueError("no radiograph")
        assert (queue.in_use, queue._completed) == (0, 0)

    asyncio.run(run())


def test_probes_find_a_slot_where_pages_and_requests_take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "MAX_STREAMS", 5)
    monkeypatch.setattr(gate_module, "MAX_REQUESTS", 5)

    async def run() -> None:
        gate = Gate()
        queue = Queue(1e9, 100, 100)
        app = Admission(application(queue, 60), gate, queue)
        open_ones = [
            asyncio.create_task(request(app, path))
            for path in ("/gradio_api/heartbeat/a", RECONSTRUCTION)
            for _ in range(5)
        ]
        await asyncio.sleep(0.05)
        for path in ("/gradio_api/heartbeat/a", RECONSTRUCTION, "/"):
            status, headers, body = await request(app, path)
            assert (status, headers["retry-after"]) == (503, "5")
            assert json.loads(body)["detail"].startswith("too many requests at a time")
        for path in ("/healthz", "/readyz"):
            assert (await request(app, path, "GET"))[0] == 200
        assert await gate.close(0.0) == 5
        assert [(await one)[0] for one in open_ones] == [503] * 10

    asyncio.run(run())


@pytest.mark.parametrize(("grace_s", "statuses", "cancelled"), [(5.0, [200, 200], 0), (0.05, [503, 503], 2)])
def test_a_gate_that_closes_completes_requests_within_the_grace_and_cancels_the_rest(
    grace_s: float, statuses: list[int], cancelled: int
) -> None:
    async def run() -> None:
        gate = Gate()
        queue = Queue(10.0, 2, 10)
        app = Admission(application(queue, 0.3, workers=2), gate, queue)
        in_work = [asyncio.create_task(request(app, RECONSTRUCTION)) for _ in range(2)]
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(gate.close(grace_s))
        await asyncio.sleep(0.01)
        status, headers, body = await request(app, RECONSTRUCTION)
        assert (status, headers["retry-after"], json.loads(body)["detail"]) == (503, "5", "the service is stopping")
        assert (await request(app, "/healthz", "GET"))[0] == 200
        assert await closing == cancelled
        assert [(await one)[0] for one in in_work] == statuses

    asyncio.run(run())


def test_a_call_of_the_model_keeps_its_slot_when_its_client_leaves() -> None:
    request_context: ContextVar[str] = ContextVar("request_context", default="")
    contexts = []

    async def run() -> None:
        gate, queue = Gate(), Queue(10.0, 1, 1)

        async def call() -> str:
            contexts.append(request_context.get())
            await asyncio.sleep(0.3)
            return "volume"

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request_context.set("of a request")
            async with queue.slot():
                result = await queue.complete(call())
            await PlainTextResponse(result)(scope, receive, send)

        admission = Admission(app, gate, queue)
        left = asyncio.create_task(request(admission, RECONSTRUCTION))
        await asyncio.sleep(0.01)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert (await request(admission, RECONSTRUCTION))[0] == 503
        await asyncio.sleep(0.35)
        status, _, body = await request(admission, RECONSTRUCTION)
        assert (status, body) == (200, b"volume")
        # The model computed for both.
        assert queue._completed == 1 + gate_module.DECAY
        assert 0.5 < queue._busy_s < 0.8

    asyncio.run(run())
    assert contexts == ["", ""]


@pytest.mark.parametrize("file", ["/gradio_api/file=/tmp/a.png", "/volumes/0a/reconstruction.zip"])
def test_a_page_gets_the_files_of_its_result_while_the_service_stops(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "FILES_S", 0.3)
    events = "/gradio_api/queue/data"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.2 if scope["path"] == events else 0.4)
        await PlainTextResponse("done")(scope, receive, send)

    async def run(grace_s: float) -> tuple[float, list[int]]:
        gate = Gate()
        admission = Admission(app, gate, Queue(10.0, 1, 1))
        stream = asyncio.create_task(request(admission, events, "GET"))
        await asyncio.sleep(0.01)
        begun = time.monotonic()
        closing = asyncio.create_task(gate.close(grace_s))
        status, _, _ = await stream
        statuses = [status, (await request(admission, "/", "GET"))[0], (await request(admission, file, "POST"))[0]]
        statuses.append((await request(admission, file, "GET"))[0])
        assert await closing == 0
        return time.monotonic() - begun, statuses

    for grace_s, seconds, status in ((10.0, 0.6, 200), (0.4, 0.4, 503)):
        took, statuses = asyncio.run(run(grace_s))
        assert statuses == [200, 503, 503, status]
        assert seconds - 0.05 < took < seconds + 0.5


def test_a_client_that_leaves_cancels_its_request() -> None:
    async def run() -> None:
        gate, queue = Gate(), Queue(10.0, 1, 1)
        left = asyncio.create_task(request(Admission(application(queue, 60), gate, queue), RECONSTRUCTION))
        await asyncio.sleep(0.01)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await asyncio.sleep(0)
        assert (len(gate._work), queue.in_use) == (0, 0)

    asyncio.run(run())
