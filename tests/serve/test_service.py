import asyncio
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import SimpleITK as sitk

from raylift.datasets.errors import ConfigError
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.preparation import prepare
from raylift.serve import deployment
from raylift.serve.reconstructor import Reconstructor

# The options of the service of these tests.
BATCH, BATCH_WAIT_S, UPLOAD_MIB = 4, 0.8, 4


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def hu(data: bytes, path: Path) -> np.ndarray:
    path.write_bytes(data)
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[::-1]


def variants() -> list[dict[str, str]]:
    """Fields of eight requests with different volumes."""
    return [
        {"invert": invert, "flip_frontal": frontal, "flip_lateral": lateral}
        for invert in ("yes", "no")
        for frontal in ("true", "false")
        for lateral in ("true", "false")
    ]


def expected(reconstructor: Reconstructor, radiographs: dict[str, bytes], fields: dict[str, str]) -> np.ndarray:
    images = [
        read(data, view, invert=fields["invert"]).pixels  # type: ignore[arg-type]
        for view, data in radiographs.items()
    ]
    flips = [fields[f"flip_{view}"] == "true" for view in radiographs]
    images = [
        prepare(np.ascontiguousarray(image[:, ::-1]) if flip else image, 32)
        for image, flip in zip(images, flips, strict=True)
    ]
    return reconstructor.reconstruct([np.stack(images)])[0].hu


def test_eight_concurrent_requests_each_get_their_own_volume(
    http: httpx.Client, reconstructor: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    requests = variants()
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda one: http.post("/v1/reconstructions", files=radiographs, data=one), requests))
    assert [response.status_code for response in responses] == [200] * 8
    volumes = [hu(response.content, tmp_path / f"{k}.nii.gz") for k, response in enumerate(responses)]
    for volume, fields in zip(volumes, requests, strict=True):
        correct = expected(reconstructor, radiographs, fields)
        assert np.abs(np.subtract(volume, correct, dtype=np.int32)).max() <= 1
    assert len({volume.tobytes() for volume in volumes}) == 8


def test_a_single_request_waits_for_the_batch_and_a_full_batch_starts_at_once(
    http: httpx.Client, radiographs: dict[str, bytes]
) -> None:
    def seconds(count: int) -> float:
        started = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            responses = list(pool.map(lambda _: http.post("/v1/reconstructions", files=radiographs), range(count)))
        assert {response.status_code for response in responses} == {200}
        return time.monotonic() - started

    assert seconds(1) >= BATCH_WAIT_S
    assert min(seconds(BATCH) for _ in range(5)) < BATCH_WAIT_S


def test_requests_beyond_the_queue_get_503_with_retry_after(http: httpx.Client, radiographs: dict[str, bytes]) -> None:
    with ThreadPoolExecutor(60) as pool:
        responses = list(pool.map(lambda _: http.post("/v1/reconstructions", files=radiographs), range(60)))
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 503}
    refused = responses[statuses.index(503)]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["detail"].startswith("the queue is full: try again in ")
    assert http.get("/readyz").status_code == 200


def test_decoding_ends_when_the_client_leaves(service: Any, large: bytes, radiographs: dict[str, bytes]) -> None:
    def decoding() -> list[psutil.Process]:
        """The children of the decoder's server, which have its command line."""
        children = []
        for process in psutil.Process(service.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if all(
                    "raylift.serve.image_decoder_server" in one.cmdline()
                    for one in (process, psutil.Process(process.ppid()))
                ):
                    children.append(process)
        return children

    def leave() -> None:
        files = {**radiographs, "frontal": large}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/reconstructions", files=files, timeout=0.5, trust_env=False)

    assert len(large) < UPLOAD_MIB * 2**20
    with ThreadPoolExecutor(1) as pool:
        left = pool.submit(leave)
        while not (children := decoding()):
            assert not left.done()
        left.result()
        assert psutil.wait_procs(children, timeout=1)[1] == []
    assert httpx.get(f"{service.url}/healthz", trust_env=False).status_code == 200


def test_the_routes_of_the_api_take_precedence_over_the_page(http: httpx.Client, reconstructor: Reconstructor) -> None:
    assert http.get("/healthz").json() == {"status": "ok"}
    assert [(one.status_code, one.content) for one in map(http.head, ("/healthz", "/readyz"))] == [(200, b"")] * 2
    assert http.get("/readyz").json() == {"status": "ready"}
    assert http.get("/v1/model").json()["sha256"] == reconstructor.sha256
    assert "raylift API" in http.get("/docs").text
    assert "/v1/reconstructions" in http.get("/openapi.json").json()["paths"]
    assert '"title":"raylift"' in http.get("/").text


def test_the_running_service_refuses_with_a_problem_and_the_id_of_the_request(
    http: httpx.Client, radiographs: dict[str, bytes]
) -> None:
    response = http.post("/v1/reconstructions", files={"frontal": radiographs["frontal"]})
    assert response.status_code == 422
    assert response.json() == {
        "type": "about:blank",
        "title": response.json()["title"],
        "status": 422,
        "detail": "this model requires frontal and lateral; missing: lateral",
        "request_id": response.headers["x-request-id"],
    }
    assert http.post("/v1/reconstructions", files={**radiographs, "lateral": b"%PDF-1.7"}).status_code == 415


def test_the_running_service_refuses_a_body_of_unknown_length_at_the_limit(http: httpx.Client) -> None:
    async def endless() -> int:
        async def chunks() -> AsyncIterator[bytes]:
            yield b'--b\r\ncontent-disposition: form-data; name="frontal"; filename="a.png"\r\n\r\n'
            for _ in range(1000):
                yield bytes(2**16)

        async with httpx.AsyncClient(base_url=http.base_url, timeout=60, trust_env=False) as client:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            response = await client.post("/v1/reconstructions", content=chunks(), headers=headers)
            assert "over the limit" in response.json()["detail"]
            return response.status_code

    assert asyncio.run(endless()) == 413


def test_the_page_accepts_uploads_up_to_the_limit_and_no_larger_ones(http: httpx.Client) -> None:
    limit = UPLOAD_MIB * 2**20
    allowed = http.post("/gradio_api/upload", files={"files": ("a.dcm", bytes(limit - 4096))})
    assert allowed.status_code == 200, allowed.text
    assert http.post("/gradio_api/upload", files={"files": ("a.dcm", bytes(limit + 2**20))}).status_code == 413
    assert http.post("/gradio_api/upload", files={"files": ("a.dcm", bytes(3 * limit))}).status_code == 413


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "../../../../etc/passwd", __file__])
def test_the_page_serves_no_file_of_the_machine(http: httpx.Client, path: str) -> None:
    assert http.get(f"/gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize("path", ["/etc/passwd", __file__, "http://127.0.0.1/", "https://example.org/a.png"])
def test_an_event_of_the_page_accepts_no_file_that_was_not_uploaded(
    service: Any, http: httpx.Client, path: str
) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    event = {"data": [file, "auto", False], "fn_index": 0, "session_hash": "other-session", "trigger_id": 0}
    assert http.post("/gradio_api/queue/join", json=event).status_code == 200
    with http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "other-session"}) as response:
        ended = next(line for line in response.iter_lines() if "process_completed" in line)
    assert "was not uploaded to this page" in ended
    assert not list(service.scratch.glob(f"raylift-page-*/files/*/{Path(path).name}"))


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1/",
        "/gradio_api/proxy=https://example.hf.space/a",
        "/gradio_api/component_server",
        "/gradio_api/info",
        "/monitoring",
        "/nothing",
    ],
)
def test_gradio_routes_that_the_page_does_not_use_give_404(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == http.post(path).status_code == 404


def test_a_port_in_use_is_refused_by_its_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            deployment.require_free("127.0.0.1", port)


def test_an_address_of_ipv6_is_tested_as_one() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as used:
        port = used.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on \[::1\]:{port}: Address already in use"):
            deployment.require_free("::1", port)
    deployment.require_free("::1", port)


def test_a_signal_ends_the_wait_for_a_service_that_does_not_respond() -> None:
    interrupted = threading.Event()
    threading.Timer(0.3, interrupted.set).start()
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        deployment._wait_until_ready("127.0.0.1", silent.getsockname()[1], interrupted)
    assert 0.3 <= time.monotonic() - begun < 1 + deployment.POLL_TIMEOUT_S


def test_requests_during_the_restart_of_a_killed_replica_succeed_or_get_503(
    service: Any, radiographs: dict[str, bytes]
) -> None:
    statuses, done = [], threading.Event()

    def client(_: int) -> None:
        while not done.is_set():
            statuses.append(post(service, radiographs).status_code)
            done.wait(0.2)

    with ThreadPoolExecutor(6) as pool:
        clients = pool.map(client, range(6))
        try:
            while len(statuses) < 6:
                time.sleep(0.05)
            kill_replica(service)
            wait_for_readiness(service, 200)
        finally:
            done.set()
        list(clients)
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) >= 12
    assert post(service, radiographs).status_code == 200


def test_a_service_that_stops_while_a_replica_restarts_completes_what_it_accepted(
    service: Any, radiographs: dict[str, bytes]
) -> None:
    kill_replica(service)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(post, service, radiographs)
        time.sleep(BATCH_WAIT_S / 2)
        service.process.send_signal(signal.SIGTERM)
        while (refused := post(service, {})).status_code != 503:
            assert not accepted.done()
        assert refused.json()["detail"] == "the service is stopping"
        assert accepted.result().status_code == 200
    service.process.communicate(timeout=30)
    assert service.process.returncode == 0


def kill_replica(service: Any) -> None:
    """Kill the model's replica and wait until Ray Serve has noticed it."""
    service.replica("model").kill()
    wait_for_readiness(service, 503)


def wait_for_readiness(service: Any, status: int) -> None:
    until = time.monotonic() + 60
    while httpx.get(f"{service.url}/readyz", trust_env=False).status_code != status:
        assert time.monotonic() < until
        time.sleep(0.05)


def post(service: Any, files: dict[str, bytes]) -> httpx.Response:
    return httpx.post(f"{service.url}/v1/reconstructions", files=files, timeout=60, trust_env=False)


def test_a_service_that_stops_completes_what_it_accepted_and_leaves_no_process_no_port_and_no_upload(
    service: Any, radiographs: dict[str, bytes]
) -> None:
    httpx.post(f"{service.url}/gradio_api/upload", files={"files": ("a.dcm", b"radiograph")}, trust_env=False)
    assert list(service.scratch.glob("raylift-page-*/files/*/a.dcm"))
    assert list(service.scratch.glob("raylift-decoder-*/files/socket"))
    children = psutil.Process(service.process.pid).children(recursive=True)
    with ThreadPoolExecutor(6) as pool:
        accepted = [pool.submit(post, service, radiographs) for _ in range(5)]
        time.sleep(BATCH_WAIT_S / 2)
        service.process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{service.url}/readyz", trust_env=False)).status_code == 200:
            assert not all(request.done() for request in accepted)
        refused, alive = post(service, radiographs), httpx.get(f"{service.url}/healthz", trust_env=False)
        assert [request.result().status_code for request in accepted] == [200] * 5
    assert (ready.status_code, refused.status_code, alive.status_code) == (503, 503, 200)
    assert refused.json()["detail"] == "the service is stopping"
    begun = time.monotonic()
    output, _ = service.process.communicate(timeout=30)
    assert service.process.returncode == 0
    assert time.monotonic() - begun < 20
    assert psutil.wait_procs(children, timeout=15)[1] == []
    assert not list(service.scratch.glob("raylift-*"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", service.port)) != 0
    assert (output, (service.scratch / "stderr").read_text()) == ("", "")
