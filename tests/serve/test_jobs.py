"""Jobs of the API: progress, results, cancellation, bounds, owners, and a service that stops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from service_clients import real_backend

from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.inference import Step
from raylift.serve.api import credentials, routes
from raylift.serve.api.access import AccessControl
from raylift.serve.api.jobs import Jobs, ReconstructInSteps
from raylift.serve.client import Client, RemoteJob, ServiceError
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.gate import Gate, Queue
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import HUVolume, Reconstructor
from raylift.serve.replica import ModelReplica
from raylift.serve.served_model import ReconstructionSettings
from raylift.serve.settings import ServeSettings

URL = "/v1/reconstructions"
AS_JOB = {"Prefer": "respond-async"}
TOKENS = ("0123456789abcdef" * 2, "fedcba9876543210" * 2)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Held:
    """A model whose jobs wait for a signal before each step."""

    def __init__(self, replica: ModelReplica) -> None:
        self.replica, self.may_go_on = replica, threading.Event()

    async def __call__(
        self, radiographs: np.ndarray, settings: ReconstructionSettings
    ) -> AsyncIterator[Step | HUVolume]:
        async for item in self.replica.reconstruct_in_steps(radiographs, settings):
            yield item
            while not self.may_go_on.is_set():
                await asyncio.sleep(0.01)


@pytest.fixture
def held(diffusion_folder: Path) -> Held:
    return Held(ModelReplica(ServeSettings(str(diffusion_folder))))


def api_of_jobs(
    diffusion: Reconstructor, reconstruct: ReconstructInSteps, folder: Path, gate: Gate | None = None, **bounds: Any
) -> tuple[FastAPI, Queue]:
    """The API with a diffusion model and a queue, and the queue."""
    queue, gate = Queue(10.0, 1, 100), gate or Gate()
    given = {"retention_s": 60.0, "max_jobs": 4, "max_client_jobs": 3, "max_bytes": 2**30} | bounds
    backend = real_backend(diffusion, max_samples=3, max_steps=50, max_consistency_steps=4)
    object.__setattr__(backend, "slot", queue.slot)
    decoder = ImageDecoder(backend.description, RadiographLimits())
    return routes.build(backend, decoder, Jobs(reconstruct, gate.start, folder, **given)), queue


def submit(api: TestClient, files: dict[str, bytes], **fields: object) -> str:
    """The path of a new job."""
    response = api.post(URL, files=files, data={name: str(value) for name, value in fields.items()}, headers=AS_JOB)
    assert response.status_code == 202, response.text
    assert response.headers["preference-applied"] == "respond-async"
    assert response.json()["links"]["self"] == response.headers["location"]
    return response.headers["location"]


def wait_for(api: TestClient, path: str, *states: str) -> dict[str, Any]:
    until = time.monotonic() + 60
    while (document := api.get(path).json())["state"] not in states:
        assert time.monotonic() < until, document
        time.sleep(0.01)
    return document


def events_of(lines: Iterator[str]) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    found, name = [], ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            found.append((name, json.loads(value)))
    return found


def in_flight(url: str) -> float:
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    (value,) = (
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "raylift_reconstructions_in_flight"
    )
    return value


def test_a_job_has_the_volume_of_a_request_that_waits_and_cancellation_frees_the_model(
    diffusion_url: str, radiographs: dict[str, bytes]
) -> None:
    settings = {"seed": 7, "samples": 2, "steps": 4, "consistency_steps": 2, "return_std": True, "invert": "no"}
    seen: list[RemoteJob] = []
    with Client(diffusion_url) as client:
        expected = client.reconstruct(**radiographs, **settings)
        job = client.submit(**radiographs, **settings)
        assert (job.state, job.stage, job.step, job.seconds_left) == ("queued", None, None, None)
        result = client.wait(job, seen.append, poll_s=0.02)
        assert result.file == expected.file
        np.testing.assert_array_equal(result.std, expected.std)
        assert (result.parameters, result.level) == (expected.parameters, "ok")
        assert seen[-1].state == "succeeded"
        assert {one.steps for one in seen if one.state == "running"} == {12}
        assert [one.step or 0 for one in seen] == sorted(one.step or 0 for one in seen)
        with pytest.raises(ServiceError, match="no job has this id") as removed:
            client.cancel(job)
        assert removed.value.status == 404

        # The job is removed, as when it expires, between the result and its removal by the client.
        def remove(response: httpx.Response) -> None:
            if response.url.path.endswith("/result"):
                assert httpx.delete(str(response.url).removesuffix("/result"), trust_env=False).status_code == 204

        client._http.event_hooks["response"].append(remove)
        assert client.wait(client.submit(**radiographs, **settings)).file == expected.file
        client._http.event_hooks["response"].remove(remove)

        # 500 evaluations take seconds; the canceled job ends before the next one.
        long = client.submit(**radiographs, samples=5, steps=100)
        with httpx.stream("GET", f"{long.url}/events", timeout=60, trust_env=False) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            for line in lines:
                if '"step":3,' in line.replace(" ", ""):
                    break
            begun = time.monotonic()
            client.cancel(long)
            rest = events_of(lines)
        assert rest[-1][0] == "end"
        assert rest[-1][1]["state"] == "canceled"
        with pytest.raises(ServiceError, match="the job was canceled") as canceled:
            client.wait(long)
        assert canceled.value.status == 410
        client.reconstruct(**radiographs)
        assert time.monotonic() - begun < 5
        assert in_flight(diffusion_url) == 0


def test_events_have_every_step_and_end_with_the_result(
    held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    app, _ = api_of_jobs(diffusion, held, tmp_path)
    with TestClient(app) as api:
        path = submit(api, radiographs, samples=2, steps=3, consistency_steps=2, seed=5)
        document = wait_for(api, path, "running")
        assert (document["stage"], document["step"], document["steps"]) == ("forward", 1, 10)
        refused = api.get(f"{path}/result")
        assert (refused.status_code, refused.headers["content-type"]) == (409, "application/problem+json")
        threading.Timer(0.3, held.may_go_on.set).start()
        with api.stream("GET", f"{path}/events") as response:
            found = events_of(response.iter_lines())
        names, documents = zip(*found, strict=True)
        assert names == ("progress",) * (len(names) - 1) + ("end",)
        steps = [document["step"] for document in documents]
        assert steps == sorted(steps)
        assert steps[0] == 1
        stages = [document["stage"] for document in documents]
        assert {*stages} <= {"forward", "fit", "encoding", None}
        assert documents[-1]["state"] == "succeeded"
        assert documents[-1]["links"]["result"] == f"{path}/result"
        result, again = (api.get(f"{path}/result") for _ in range(2))
        waited = api.post(URL, files=radiographs, data={"samples": 2, "steps": 3, "consistency_steps": 2, "seed": 5})
        assert result.content == again.content == waited.content
        own = {"content-disposition"}
        assert {k: v for k, v in result.headers.items() if k not in own} == {
            k: v for k, v in waited.headers.items() if k not in own
        }
        assert api.head(f"{path}/result").headers["content-length"] == str(len(result.content))
        description = api.get("/openapi.json").json()
        schema = description["components"]["schemas"]["JobInfo"]
        for one in (*documents, *schema["examples"]):
            jsonschema.validate(one, schema | {"components": description["components"]})


def test_the_time_left_follows_the_steps_so_far(
    diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    held = threading.Event()

    async def steps(_: np.ndarray, __: ReconstructionSettings) -> AsyncIterator[Step | HUVolume]:
        for number in (1, 2, 3):
            yield Step("forward", number, 12)
            await asyncio.sleep(0.2 if number < 3 else 0)
        while not held.is_set():
            await asyncio.sleep(0.01)

    app, _ = api_of_jobs(diffusion, steps, tmp_path)
    with TestClient(app) as api:
        path = submit(api, radiographs)
        while (document := wait_for(api, path, "running"))["step"] < 3:
            assert (document["seconds_left"] is None) == (document["step"] == 1)
        # Ten of twelve steps of 0.2 s are left.
        assert document["seconds_left"] == pytest.approx(2.0, abs=0.4)
        api.delete(path)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_canceled_job_leaves_the_queue_and_the_model(
    is_running: bool, held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    app, queue = api_of_jobs(diffusion, held, tmp_path)
    with TestClient(app) as api:
        first = submit(api, radiographs, steps=50)
        wait_for(api, first, "running")
        path = first if is_running else submit(api, radiographs)
        assert queue.in_use == 2 - is_running
        assert api.delete(path).status_code == 204
        document = api.get(path).json()
        assert (document["state"], document["error"]) == ("canceled", None)
        assert queue.in_use == 1 - is_running
        assert api.get(f"{path}/result").status_code == 410
        held.may_go_on.set()
        after = submit(api, radiographs)
        wait_for(api, after, "succeeded")
        # What has ended is removed.
        for ended in (path, after):
            assert api.delete(ended).status_code == 204
            assert api.get(ended).status_code == api.delete(ended).status_code == 404
        if not is_running:
            wait_for(api, first, "succeeded")
            api.delete(first)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [True, False])
def test_a_job_that_is_canceled_during_encoding_stays_canceled_and_counts_until_its_work_ends(
    fails: bool, tmp_path: Path
) -> None:
    async def steps(_: np.ndarray, __: ReconstructionSettings) -> AsyncIterator[Step | HUVolume]:
        yield Step("forward", 1, 1)
        yield HUVolume(np.zeros((2, 2, 2), np.int16))

    async def check() -> None:
        begun, may_go_on = asyncio.Event(), asyncio.Event()

        async def encode(_: HUVolume) -> Response:
            begun.set()
            await may_go_on.wait()
            if fails:
                raise OSError("no space left on device")
            return Response(b"volume")

        jobs = Jobs(steps, Gate().start, tmp_path, 60.0, 1, 1, 2**30)
        request = Request({"type": "http", "path": "/", "headers": [], "client": ("127.0.0.1", 1)})
        job = jobs.new(request, 100)
        await jobs.submit(
            job, request, AsyncExitStack(), np.zeros((2, 4, 4), np.float32), ReconstructionSettings(), encode
        )
        await begun.wait()
        for _ in range(2):
            jobs.end(job)
            assert jobs.find(job.id, None).info.state == "canceled"
            with pytest.raises(HTTPException, match="you have 1 jobs"):
                jobs.new(request, 100)
        may_go_on.set()
        assert job.task
        await job.task
        assert (job.info.state, job.info.error) == ("canceled", None)
        with pytest.raises(HTTPException) as refused:
            await jobs.result(job)
        assert refused.value.status_code == 410
        assert not list(tmp_path.iterdir())
        jobs.end(job)
        with pytest.raises(HTTPException, match="no job has this id"):
            jobs.find(job.id, None)

    asyncio.run(check())


def test_a_failed_job_has_a_problem_and_its_result_the_same_status(
    diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [ServiceUnavailableError("the model is restarting"), RuntimeError("secret path")]

    async def fail(_: np.ndarray, __: ReconstructionSettings) -> AsyncIterator[Step | HUVolume]:
        yield Step("forward", 1, 1)
        raise errors.pop(0)

    app, queue = api_of_jobs(diffusion, fail, tmp_path)
    with TestClient(app) as api:
        for status, detail in ((503, "the model is restarting"), (500, "the service failed; see its log")):
            path = submit(api, radiographs)
            document = wait_for(api, path, "failed")
            assert (document["error"]["status"], document["error"]["detail"]) == (status, detail)
            result = api.get(f"{path}/result")
            assert (result.status_code, result.json()["detail"]) == (status, detail)
        assert queue.in_use == 0
    assert "secret path" in caplog.text


def test_invalid_requests_are_refused_before_there_is_a_job(
    held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    app, queue = api_of_jobs(diffusion, held, tmp_path, max_jobs=1)
    with TestClient(app) as api:
        for files, fields, status in (
            ({**radiographs, "lateral": b"%PDF-1.7"}, {}, 415),
            ({"frontal": radiographs["frontal"]}, {}, 422),
            (radiographs, {"steps": 1000}, 422),
        ):
            assert api.post(URL, files=files, data=fields, headers=AS_JOB).status_code == status
        assert queue.in_use == 0
        # A place of the one job is free, and other preferences are ignored.
        assert api.post(URL, files=radiographs, headers={"Prefer": "wait=5, handling=lenient"}).status_code == 200
        assert api.post(URL, files=radiographs, headers={"Prefer": "wait=5, Respond-Async"}).status_code == 202


@pytest.mark.parametrize(
    ("bounds", "accepted", "status"),
    [({"max_client_jobs": 2}, 2, 429), ({"max_jobs": 2}, 2, 503), ({"max_bytes": 2 * (2 * 32**3 + 2**20)}, 2, 503)],
)
def test_jobs_are_bounded_in_number_of_a_client_and_in_all_and_in_bytes(
    bounds: dict[str, int],
    accepted: int,
    status: int,
    held: Held,
    diffusion: Reconstructor,
    radiographs: dict[str, bytes],
    tmp_path: Path,
) -> None:
    app, _ = api_of_jobs(diffusion, held, tmp_path, **bounds)
    with TestClient(app) as api:
        paths = [submit(api, radiographs) for _ in range(accepted)]
        refused = api.post(URL, files=radiographs, headers=AS_JOB)
        assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json")
        assert int(refused.headers["retry-after"]) > 0
        held.may_go_on.set()
        for path in paths:
            wait_for(api, path, "succeeded")
        if "max_bytes" not in bounds:
            assert api.post(URL, files=radiographs, headers=AS_JOB).status_code == status
            api.delete(paths[0])
        submit(api, radiographs)


def test_an_ended_job_is_removed_after_the_retention(
    held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    held.may_go_on.set()
    app, _ = api_of_jobs(diffusion, held, tmp_path, retention_s=1.0)
    with TestClient(app) as api:
        path = submit(api, radiographs)
        assert wait_for(api, path, "succeeded")["expires"] is not None
        (file,) = tmp_path.iterdir()
        assert file.read_bytes() == api.get(f"{path}/result").content
        time.sleep(1.1)
        assert api.get(path).status_code == api.get(f"{path}/result").status_code == 404
        assert not list(tmp_path.iterdir())


def test_a_result_that_is_read_slowly_delays_no_other_request(
    held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    held.may_go_on.set()
    app, _ = api_of_jobs(diffusion, held, tmp_path)
    with TestClient(app) as api, ThreadPoolExecutor() as pool:
        path = submit(api, radiographs)
        wait_for(api, path, "succeeded")
        (file,) = tmp_path.iterdir()
        content = file.read_bytes()
        file.unlink()
        assert api.get(f"{path}/result").status_code == 404
        # A read of a pipe lasts until its writer closes it.
        os.mkfifo(file)
        result = pool.submit(api.get, f"{path}/result")
        with file.open("wb") as pipe:
            document = pool.submit(api.get, path)
            try:
                assert document.result(timeout=5).json()["state"] == "succeeded"
                assert not result.done()
            finally:
                pipe.write(content)
        assert result.result().content == content


def test_a_job_belongs_to_the_token_or_user_that_made_it(
    held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text("\n".join(TOKENS))
    (tmp_path / "results").mkdir()
    held.may_go_on.set()
    app, _ = api_of_jobs(diffusion, held, tmp_path / "results", max_client_jobs=1)
    required = credentials.read(None, tokens)
    app.add_middleware(AccessControl, hosts={"127.0.0.1"}, proxied_hosts=(), credentials=required)
    with TestClient(app, base_url="http://127.0.0.1:8000") as api:
        api.headers["authorization"] = f"Bearer {TOKENS[0]}"
        path = submit(api, radiographs)
        wait_for(api, path, "succeeded")
        for authorization, status in ((f"Bearer {TOKENS[1]}", 404), ("", 401)):
            headers = {"authorization": authorization}
            for route in ("", "/events", "/result"):
                assert api.get(f"{path}{route}", headers=headers).status_code == status
            assert api.delete(path, headers=headers).status_code == status
        # The bound is that of each client.
        assert api.post(URL, files=radiographs, headers=AS_JOB).status_code == 429
        other = {**AS_JOB, "authorization": f"bearer  {TOKENS[1]}"}
        assert api.post(URL, files=radiographs, headers=other).status_code == 202
        assert api.get(f"{path}/result").status_code == 200


@pytest.mark.parametrize(("grace_s", "state"), [(30.0, "succeeded"), (0.0, "failed")])
def test_a_gate_that_closes_completes_jobs_within_the_grace(
    grace_s: float, state: str, held: Held, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    gate = Gate()
    app, queue = api_of_jobs(diffusion, held, tmp_path, gate)
    with TestClient(app) as api:
        path = submit(api, radiographs)
        wait_for(api, path, "running")
        threading.Timer(0.2, held.may_go_on.set).start()
        assert api.portal is not None
        assert api.portal.call(gate.close, grace_s) == (state == "failed")
        document = wait_for(api, path, state)
        assert queue.in_use == 0
        if state == "failed":
            assert document["error"]["detail"] == "the service is stopping"


def test_a_service_that_stops_completes_its_jobs_and_their_results_can_be_read(
    service: Any, radiographs: dict[str, bytes]
) -> None:
    with Client(service.url, retries=0) as client:
        job = client.submit(**radiographs)
        assert list(service.scratch.glob("raylift-jobs-*"))
        service.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{service.url}/readyz", trust_env=False).status_code == 200:
            time.sleep(0.01)
        while (read := httpx.get(job.url, trust_env=False).json())["state"] != "succeeded":
            time.sleep(0.01)
        result = httpx.get(job.url + "/result", trust_env=False)
        assert (result.status_code, result.headers["content-type"]) == (200, "application/gzip")
        assert read["links"]["result"]
        # Its job is not removed, and nothing is lost.
        assert client.wait(job).file == result.content
        with pytest.raises(ServiceError, match="the service is stopping"):
            client.submit(**radiographs)
    service.process.communicate(timeout=30)
    assert service.process.returncode == 0
    assert not list(service.scratch.glob("raylift-*"))
