"""The Python client and the metrics, against a running service."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import SimpleITK as sitk
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from service_clients import api_of, client_of, real_backend

from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.serve.api import credentials
from raylift.serve.api.access import AccessControl
from raylift.serve.api.measured_requests import Measured
from raylift.serve.client import DEFAULT_RETRY_S, Client, ServiceError
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import Reconstructor
from raylift.serve.served_model import ReconstructionSettings
from raylift.serve.service_metrics import STAGES, Metrics

TOKEN = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def values(text: str) -> dict[tuple[str, ...], float]:
    """Values of metrics by name and the values of their labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_client_of_a_diffusion_service_returns_its_volume_and_the_metrics_count_it(
    diffusion_url: str, diffusion_folder: Path, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "frontal.png").write_bytes(radiographs["frontal"])
    files = {"frontal": tmp_path / "frontal.png", "lateral": radiographs["lateral"]}
    with Client(diffusion_url) as client:
        (model,) = client.models()
        assert (model.name, model.views) == (diffusion_folder.name, ("frontal", "lateral"))
        assert model.parameters["samples"] == {"default": 1, "min": 1, "max": 5}
        settings = {"seed": 7, "samples": 2, "consistency_steps": 1}
        result = client.reconstruct(**files, **settings, return_std=True, invert="no", model=model.name)
        again = client.reconstruct(**files, **settings, invert="no")
        with pytest.raises(ServiceError, match="steps is '1000'") as refused:
            client.reconstruct(**files, steps=1000)
    assert refused.value.status == 422
    assert result.parameters == settings | {"model": model.name, "sampler": "dpm_solver", "steps": 2}
    assert (result.sha256, result.level, result.warnings, result.notes) == (model.sha256, "ok", {}, {})

    reconstructor = Reconstructor.load(str(diffusion_folder), sampling=SamplingFlags(steps=2))
    given = reconstructor.prepare({view: read(data, view, invert="no").pixels for view, data in radiographs.items()})
    (expected,) = reconstructor.reconstruct([given], [ReconstructionSettings(**settings)])
    assert result.spacing_mm == 10.0
    assert np.abs(np.subtract(result.hu, expected.hu, dtype=np.int32)).max() <= 1
    assert np.abs(np.subtract(result.std, expected.std, dtype=np.int32)).max() <= 1
    # The same seed in another request: the same bytes of the volume, and the axes are those that SimpleITK reads.
    np.testing.assert_array_equal(again.hu, result.hu)
    assert again.std is None
    (tmp_path / "again.nii.gz").write_bytes(again.file)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "again.nii.gz")))[::-1], again.hu
    )

    response = httpx.get(f"{diffusion_url}/metrics", trust_env=False)
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = values(response.text)
    assert found["raylift_requests_total", "/v1/reconstructions", "200"] == 2
    assert found["raylift_requests_total", "/v1/reconstructions", "422"] == 1
    assert {stage: found["raylift_stage_seconds_count", stage] for stage in STAGES} == {
        "upload": 3,
        "decoding": 4,
        "queue": 2,
        "forward": 2,
        "fit": 2,
        "encoding": 3,
    }
    assert all(found["raylift_stage_seconds_sum", stage] > 0 for stage in STAGES)
    assert (found["raylift_reconstructions_in_flight",], found["raylift_queue_length",]) == (0, 0)
    assert found["raylift_model_info", model.name, model.sha256] == 1


@pytest.fixture
def protected(reconstructor: Reconstructor, tmp_path: Path) -> TestClient:
    """The API of a service with tokens."""
    tokens = tmp_path / "tokens"
    tokens.touch(0o600)
    tokens.write_text(TOKEN)
    backend = real_backend(reconstructor)
    app = api_of(backend, ImageDecoder(backend.description, RadiographLimits()))
    required = credentials.read(None, tokens)
    app.add_middleware(AccessControl, hosts={"127.0.0.1"}, proxied_hosts=(), credentials=required)
    app.add_middleware(Measured, metrics=backend.metrics)
    return TestClient(app, base_url="http://127.0.0.1:8000")


def test_metrics_require_the_token_and_count_refused_requests(protected: TestClient) -> None:
    authorized = {"authorization": f"Bearer {TOKEN}"}
    assert protected.get("/metrics").status_code == 401
    assert protected.get("/v1/models/none", headers=authorized).status_code == 404
    assert protected.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
    assert protected.get("/nothing", headers=authorized).status_code == 404
    found = values(protected.get("/metrics", headers=authorized).text)
    counts = {labels[1:]: value for labels, value in found.items() if labels[0] == "raylift_requests_total"}
    assert counts == {
        ("/metrics", "401"): 1,
        ("/v1/models/{name}", "404"): 1,
        ("/v1/models", "421"): 1,
        ("page", "404"): 1,
    }


def test_the_gauges_are_read_when_the_metrics_are() -> None:
    metrics, state = Metrics(), {"in_flight": 0, "queued": 0}
    metrics.watch(lambda: state["in_flight"], lambda: state["queued"], name="a")
    for count in (3, 1):
        state |= {"in_flight": count + 4, "queued": count}
        found = values(metrics.text().decode())
        assert (found["raylift_reconstructions_in_flight",], found["raylift_queue_length",]) == (count + 4, count)


def test_the_rest_of_a_call_is_time_in_the_queue() -> None:
    metrics = Metrics()
    metrics.add_reconstruction(1.5, 0.5, 0.25)
    metrics.add_reconstruction(1.0, 1.25, 0.0)
    found = values(metrics.text().decode())
    sums = {stage: found["raylift_stage_seconds_sum", stage] for stage in ("queue", "forward", "fit")}
    assert sums == {"queue": 0.75, "forward": 1.75, "fit": 0.25}
    assert found["raylift_stage_seconds_count", "fit"] == 1


@pytest.fixture(params=["number", "date"])
def overloaded(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[float]]]:
    """URL of a server that responds 503 once, with a delay of 1 to 2 s, and the times of its requests."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            times.append(time.monotonic())
            body = b'{"models": []}'
            self.send_response(503 if len(times) == 1 else 200)
            date = formatdate(time.time() + 2, usegmt=True)
            self.send_header("Retry-After", "1" if request.param == "number" else date)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", times
        server.shutdown()


def test_the_client_repeats_a_request_with_503_after_the_stated_time(overloaded: tuple[str, list[float]]) -> None:
    url, times = overloaded
    with Client(url) as client:
        assert client.models() == []
    assert 1 <= times[1] - times[0] < DEFAULT_RETRY_S
    times.clear()
    with Client(url, retries=0) as client, pytest.raises(ServiceError, match="status 503"):
        client.models()
    assert len(times) == 1


def test_the_stages_in_the_process_of_the_api_are_measured(
    reconstructor: Reconstructor, radiographs: dict[str, bytes]
) -> None:
    backend = real_backend(reconstructor)
    assert client_of(backend).post("/v1/reconstructions", files=radiographs).status_code == 200
    found = values(backend.metrics.text().decode())
    assert found["raylift_stage_seconds_count", "encoding"] == 1
