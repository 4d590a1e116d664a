import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from fastapi.openapi.models import OpenAPI
from fastapi.testclient import TestClient
from PIL import Image
from service_clients import backend_of, client_of, real_backend

from raylift.datasets.geometry import FRONTAL
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.histogram import normalize_and_match
from raylift.datasets.radiographs.preparation import prepare
from raylift.models.weights import Description, Model
from raylift.serve.backend import Backend
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import HUVolume, Reconstructor
from raylift.serve.served_model import ReconstructionSettings, ServedModel


def client(
    description: Description, reconstruct: Callable[[np.ndarray], HUVolume], sha256: str = "0" * 64, **options: Any
) -> TestClient:
    """The API of a function of prepared radiographs; options are those of its backend."""
    return client_of(backend_of(ServedModel(description, sha256), lambda prepared, _: reconstruct(prepared), **options))


def opened(data: bytes, folder: Path) -> sitk.Image:
    path = folder / "volume.nii.gz"
    path.write_bytes(data)
    return sitk.ReadImage(str(path))


def test_the_response_is_the_networks_volume_for_the_radiographs(
    service_client: TestClient, reconstructor: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    response = service_client.post("/v1/reconstructions", files=radiographs, data={"invert": "no"})
    assert response.status_code == 200
    prepared = np.stack([prepare(read(data, view, invert="no").pixels, 32) for view, data in radiographs.items()])
    image = opened(response.content, tmp_path)
    assert (image.GetSize(), image.GetSpacing()) == ((32, 32, 32), (10.0, 10.0, 10.0))
    hu = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(hu[::-1], reconstructor.reconstruct([prepared])[0].hu)
    assert (hu.min(), hu.max()) == (-1024, 1476)


def test_inverted_radiographs_give_the_same_volume_unless_inversion_is_off(
    service_client: TestClient, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    def negative(data: bytes) -> bytes:
        file = io.BytesIO()
        Image.fromarray(65535 - np.asarray(Image.open(io.BytesIO(data)))).save(file, "PNG")
        return file.getvalue()

    def volume(files: dict[str, bytes], **fields: str) -> np.ndarray:
        response = service_client.post("/v1/reconstructions", files=files, data=fields)
        assert response.status_code == 200
        return sitk.GetArrayFromImage(opened(response.content, tmp_path)).astype(np.int32)

    negatives = {view: negative(data) for view, data in radiographs.items()}
    plain = volume(radiographs, invert="no")
    np.testing.assert_array_equal(volume(radiographs), plain)
    assert np.abs(volume(negatives) - plain).max() <= 1
    assert np.abs(volume(negatives, invert="no") - plain).mean() > 1


def test_real_radiographs_are_reconstructed_without_options(
    service_client: TestClient, real_data: Path, tmp_path: Path
) -> None:
    files = {view: (real_data / "xray" / f"cc0_normal_{view}.jpg").read_bytes() for view in ("frontal", "lateral")}
    response = service_client.post("/v1/reconstructions", files=files)
    assert response.status_code == 200
    assert opened(response.content, tmp_path).GetSize() == (32, 32, 32)


def test_the_headers_give_file_name_content_type_and_digest_of_the_weights(
    service_client: TestClient, reconstructor: Reconstructor, radiographs: dict[str, bytes]
) -> None:
    headers = [service_client.post("/v1/reconstructions", files=radiographs).headers for _ in range(2)]
    assert headers[0]["content-type"] == "application/gzip"
    assert headers[0]["x-raylift-model"] == reconstructor.sha256
    names = {one["content-disposition"] for one in headers}
    assert len(names) == 2
    assert all(name.startswith('attachment; filename="reconstruction-') for name in names)


def test_the_headers_give_the_reprojection_residuals_before_and_after_the_fit(
    service_client: TestClient, model_folder: Path, radiographs: dict[str, bytes]
) -> None:
    fitting = Reconstructor.load(str(model_folder), consistency_steps=3)
    api = client_of(real_backend(fitting, consistency_steps=3, max_consistency_steps=3))
    plain, fitted = (one.post("/v1/reconstructions", files=radiographs) for one in (service_client, api))
    assert not [name for name in plain.headers if "residual" in name]
    before, after = (
        {view: float(value) for view, value in (part.split("=") for part in fitted.headers[name].split(", "))}
        for name in ("x-raylift-residual-before", "x-raylift-residual-after")
    )
    assert list(before) == list(after) == ["frontal", "lateral"]
    assert all(0 < after[view] < before[view] < 2 for view in before)
    assert fitted.content != plain.content
    assert service_client.get("/v1/model").json()["parameters"] == {}
    assert api.get("/v1/model").json()["parameters"] == {"consistency_steps": {"default": 3, "min": 0, "max": 3}}
    schema = api.get("/openapi.json").json()
    OpenAPI.model_validate(schema)
    headers = schema["paths"]["/v1/reconstructions"]["post"]["responses"]["200"]["headers"]
    residuals = {"X-Raylift-Residual-Before", "X-Raylift-Residual-After"}
    checks = {"X-Raylift-Level", "X-Raylift-Warnings"}
    assert set(headers) == {"X-Raylift-Model", "X-Raylift-Parameters", "X-Raylift-Notes", *checks, *residuals}


def test_superior_anterior_right_in_the_volume_is_superior_anterior_right_in_the_file(
    description: Description, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    def box(_: np.ndarray) -> HUVolume:
        hu = np.full((32, 32, 32), -1000, np.int16)
        hu[2:6, 4:8, 3:9] = 900
        return HUVolume(hu)

    response = client(description, box).post("/v1/reconstructions", files=radiographs)
    image = opened(response.content, tmp_path)
    inside = np.argwhere(sitk.GetArrayFromImage(image) == 900)[:, ::-1]
    points = np.array([image.TransformIndexToPhysicalPoint(index.tolist()) for index in inside])
    # LPS in mm about the isocenter: x to the left, y to the back, z up; voxels of 10 mm, 32 per side.
    np.testing.assert_allclose(points.min(0), [-125, -115, 105])
    np.testing.assert_allclose(points.max(0), [-75, -85, 135])


def test_flip_and_inversion_apply_to_the_named_image(description: Description, radiographs: dict[str, bytes]) -> None:
    received: list[np.ndarray] = []

    def keep(prepared: np.ndarray) -> HUVolume:
        received.append(prepared)
        return HUVolume(np.zeros((32, 32, 32), np.int16))

    api = client(description, keep)
    for fields in ({"invert": "no"}, {"invert": "no", "flip_lateral": "true"}, {"invert": "yes"}):
        assert api.post("/v1/reconstructions", files=radiographs, data=fields).status_code == 200
    plain, flipped, inverted = received
    np.testing.assert_array_equal(flipped[0], plain[0])
    np.testing.assert_allclose(flipped[1], plain[1][:, ::-1], atol=1e-5)
    np.testing.assert_allclose(inverted[0], 1 - plain[0], atol=0.02)


def test_a_lateral_that_clearly_faces_right_is_flipped_unless_flip_lateral_is_false(
    description: Description, radiographs: dict[str, bytes]
) -> None:
    received: list[np.ndarray] = []

    def keep(prepared: np.ndarray) -> HUVolume:
        received.append(prepared)
        return HUVolume(np.zeros((32, 32, 32), np.int16))

    api = client(description, keep)
    file = io.BytesIO()
    Image.open(io.BytesIO(radiographs["lateral"])).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file, "PNG")
    flipped = {**radiographs, "lateral": file.getvalue()}
    for files, fields in ((radiographs, {}), (flipped, {}), (flipped, {"flip_lateral": "auto"})):
        assert api.post("/v1/reconstructions", files=files, data=fields).status_code == 200
    np.testing.assert_allclose(received[1], received[0], atol=1e-5)
    np.testing.assert_array_equal(received[2], received[1])
    assert api.post("/v1/reconstructions", files=flipped, data={"flip_lateral": "false"}).status_code == 200
    np.testing.assert_allclose(received[3][1], received[0][1][:, ::-1], atol=1e-5)


def test_radiographs_are_histogram_matched_if_the_model_was_trained_so(
    description: Description, radiographs: dict[str, bytes]
) -> None:
    received: list[np.ndarray] = []

    def keep(prepared: np.ndarray) -> HUVolume:
        received.append(prepared)
        return HUVolume(np.zeros((32, 32, 32), np.int16))

    levels = tuple(float(value) for value in np.linspace(0.2, 1, 65))
    matching = replace(description, histograms={"frontal": levels, "lateral": levels})
    for described in (description, matching):
        api = client(described, keep)
        assert api.post("/v1/reconstructions", files=radiographs).status_code == 200
    plain, matched = received
    np.testing.assert_array_equal(matched, np.stack([normalize_and_match(image, levels) for image in plain]))
    assert np.abs(matched - plain).mean() > 0.02


def test_a_single_view_model_requires_one_radiograph(description: Description, radiographs: dict[str, bytes]) -> None:
    system = replace(description.system, views=("frontal",))
    geometry = replace(description.geometry, views=(FRONTAL,))
    alone = replace(description, system=system, geometry=geometry)
    network = system.reconstruction_network(alone.grid, geometry).eval().requires_grad_(False)
    reconstructor = Reconstructor(Model(network, alone, "0" * 64))
    service = client_of(real_backend(reconstructor))
    frontal = {"frontal": radiographs["frontal"]}
    assert service.post("/v1/reconstructions", files=frontal).status_code == 200
    response = service.post("/v1/reconstructions", files=radiographs)
    assert response.json()["detail"] == "unknown field lateral: send invert, model, frontal, flip_frontal"
    response = service.post("/v1/reconstructions", files=frontal, data={"flip_lateral": "true"})
    assert response.json()["detail"] == "unknown field flip_lateral: send invert, model, frontal, flip_frontal"


def test_warnings_are_in_headers_and_a_strict_service_refuses_them(
    service_client: TestClient, description: Description, radiographs: dict[str, bytes]
) -> None:
    response = service_client.post("/v1/reconstructions", files=radiographs)
    assert response.headers["X-Raylift-Level"] == "ok"
    assert "X-Raylift-Warnings" not in response.headers
    exchanged = {"frontal": radiographs["lateral"], "lateral": radiographs["frontal"]}
    response = service_client.post("/v1/reconstructions", files=exchanged)
    assert response.status_code == 200
    assert response.headers["X-Raylift-Level"] == "stop"
    found = json.loads(response.headers["X-Raylift-Warnings"])
    assert list(found) == ["frontal", "lateral"]
    (check,) = found["frontal"]
    assert check["value"] < check["limit"] == -0.1
    assert {name: check[name] for name in ("name", "level", "bound", "text")} == {
        "name": "exchanged",
        "level": "stop",
        "bound": "at least",
        "text": "This looks like a lateral chest radiograph: the two may be exchanged.",
    }
    same = {"frontal": radiographs["frontal"], "lateral": radiographs["frontal"]}
    found = json.loads(service_client.post("/v1/reconstructions", files=same).headers["X-Raylift-Warnings"])
    assert [check["name"] for check in found["all views"]] == ["same image"]

    def never(_: np.ndarray) -> HUVolume:
        raise AssertionError("refused radiographs reached the model")

    strict = client(description, never, strict=True)
    response = strict.post("/v1/reconstructions", files=exchanged)
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    start = "frontal: stop: This looks like a lateral chest radiograph: the two may be exchanged. (exchanged -"
    assert response.json()["detail"].startswith(start)


def test_health_readiness_and_model_are_reported(service_client: TestClient, reconstructor: Reconstructor) -> None:
    assert service_client.get("/healthz").json() == {"status": "ok"}
    assert service_client.get("/readyz").json() == {"status": "ready"}
    model = service_client.get("/v1/model").json()
    assert model["sha256"] == reconstructor.sha256
    assert model["views"] == ["frontal", "lateral"]
    assert (model["size"], model["spacing_mm"], model["window_hu"]) == (32, 10.0, [-1024.0, 1476.0])
    assert "not for diagnosis" in model["notice"]


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/model", "/v1/models"]
)
def test_head_has_the_status_of_get(service_client: TestClient, path: str) -> None:
    assert service_client.head(path).status_code == service_client.get(path).status_code == 200


def test_an_unresponsive_model_is_not_ready_and_a_full_queue_gives_503_with_retry_after(
    description: Description, radiographs: dict[str, bytes]
) -> None:
    async def busy(_: np.ndarray, __: ReconstructionSettings) -> HUVolume:
        raise ServiceUnavailableError("the queue is full: try again in a few seconds")

    async def ready() -> bool:
        return False

    api = client_of(Backend(ServedModel(description, "0" * 64), busy, ready))
    assert api.get("/readyz").status_code == 503
    response = api.post("/v1/reconstructions", files=radiographs)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "try again" in response.json()["detail"]


def test_an_internal_error_is_reported_without_details(description: Description, radiographs: dict[str, bytes]) -> None:
    def broken(_: np.ndarray) -> HUVolume:
        raise RuntimeError("CUDA error at /home/someone/secret.cu")

    api = client(description, broken)
    with pytest.raises(RuntimeError, match="CUDA"):
        api.post("/v1/reconstructions", files=radiographs)
    response = TestClient(api.app, raise_server_exceptions=False).post("/v1/reconstructions", files=radiographs)
    assert (response.status_code, response.json()["detail"]) == (500, "the service failed; see its log")


def test_failures_of_the_decoder_are_not_the_files(
    description: Description, radiographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = client(replace(description, histograms={"frontal": ()}), lambda _: pytest.fail("decoded"))
    broken = TestClient(broken.app, raise_server_exceptions=False)
    response = broken.post("/v1/reconstructions", files=radiographs)
    assert (response.status_code, response.json()["detail"]) == (500, "the service failed; see its log")
    ImageDecoder.stop()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    response = broken.post("/v1/reconstructions", files=radiographs)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["detail"].startswith("the decoder of radiographs is unavailable")


def test_the_openapi_description_is_valid_and_lists_every_field(service_client: TestClient) -> None:
    schema = service_client.get("/openapi.json").json()
    OpenAPI.model_validate(schema)
    form = schema["components"]["schemas"]["ReconstructionForm"]
    assert form["required"] == ["frontal", "lateral"]
    assert set(form["properties"]) == {"frontal", "lateral", "model", "invert", "flip_frontal", "flip_lateral"}
    assert set(schema["paths"]) == {
        *("/healthz", "/readyz", "/metrics", "/v1/model", "/v1/models", "/v1/models/{name}", "/v1/reconstructions"),
        *("/v1/jobs/{id}", "/v1/jobs/{id}/events", "/v1/jobs/{id}/result"),
    }


def test_the_api_reference_lists_every_route_and_loads_nothing_external(service_client: TestClient) -> None:
    page = service_client.get("/docs").text
    for text in (
        "POST /v1/reconstructions",
        "GET /readyz",
        "flip_lateral",
        "curl --fail-with-body",
        "not for diagnosis",
    ):
        assert text in page
    assert "<script" not in page
    assert "http://testserver/v1/reconstructions" in page
    assert page.count("http") == page.count("http://testserver/") + page.count("httpx")


def test_the_host_header_is_escaped_in_the_api_reference(service_client: TestClient) -> None:
    page = service_client.get("/docs", headers={"host": "<script>alert(1)</script>"}).text
    assert "<script" not in page
