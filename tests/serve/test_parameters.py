"""Parameters of a request, and the models of a service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from fastapi.testclient import TestClient
from service_clients import api_of, client_of, real_backend

from raylift.datasets.errors import ConfigError
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.platform import cli
from raylift.platform.model_store import CARD_FILE, DEFAULT_MODEL, FRONTAL_MODEL, MODELS, card_of, sha256_of
from raylift.serve import deployment
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import Reconstructor
from raylift.serve.served_model import ReconstructionSettings, ServedModel
from raylift.serve.settings import ServeSettings

URL = "/v1/reconstructions"


@pytest.fixture(scope="module")
def api(diffusion: Reconstructor) -> TestClient:
    """The API with a diffusion model."""
    return client_of(real_backend(diffusion, max_samples=3, max_steps=5, max_consistency_steps=4))


def post(api: TestClient | httpx.Client, files: dict[str, bytes], **fields: Any) -> httpx.Response:
    response = api.post(URL, files=files, data={name: str(value) for name, value in fields.items()})
    assert response.status_code == 200, response.text
    return response


def parameters(response: httpx.Response) -> dict[str, Any]:
    return json.loads(response.headers["X-Raylift-Parameters"])


def references_in(document: Any) -> Iterator[str]:
    """The values of `$ref` anywhere in a JSON document."""
    if isinstance(document, dict) and isinstance(reference := document.get("$ref"), str):
        yield reference
    if isinstance(document, dict | list):
        for part in document.values() if isinstance(document, dict) else document:
            yield from references_in(part)


def test_every_parameter_changes_the_volume_and_is_named_in_the_response(
    api: TestClient, radiographs: dict[str, bytes]
) -> None:
    default = {
        "model": "model",
        "samples": 1,
        "sampler": "dpm_solver",
        "steps": 2,
        "seed": 0,
        "consistency_steps": 0,
    }
    plain = post(api, radiographs)
    assert parameters(plain) == default
    for given in ({"seed": 3}, {"steps": 4}, {"consistency_steps": 2}, {"samples": 2}):
        response = post(api, radiographs, **given)
        assert parameters(response) == default | given
        assert response.content != plain.content
        assert ("X-Raylift-Residual-After" in response.headers) == ("consistency_steps" in given)
        report = api.post(URL, files=radiographs, data=given, headers={"Accept": "application/json"}).json()
        assert report["parameters"] == default | given


def test_a_request_weighs_its_evaluations_and_a_tenth_of_its_fit_steps_relative_to_those_of_the_service(
    diffusion: Reconstructor, reconstructor: Reconstructor
) -> None:
    sampler = real_backend(diffusion, consistency_steps=5).model  # two steps
    network = real_backend(reconstructor).model
    for model, given, weight in (
        (sampler, ReconstructionSettings(), 1),
        (sampler, ReconstructionSettings(samples=3, seed=1), 3),
        (sampler, ReconstructionSettings(samples=8, steps=100, consistency_steps=20), 8 * (100 + 2) / 2.5),
        (sampler, ReconstructionSettings(steps=1, consistency_steps=0), 1 / 2.5),
        (network, ReconstructionSettings(), 1),
        (network, ReconstructionSettings(consistency_steps=20), 3),
    ):
        assert model.weight(given) == pytest.approx(weight)


def test_each_request_takes_a_slot_of_its_weight(diffusion: Reconstructor, radiographs: dict[str, bytes]) -> None:
    weights = []

    def slot(weight: float) -> AbstractAsyncContextManager[None]:
        weights.append(weight)
        return nullcontext()

    api = client_of(replace(real_backend(diffusion, max_samples=3, max_steps=5), slot=slot))
    post(api, radiographs)
    post(api, radiographs, samples=3, steps=4)
    assert weights == [1, 6]


def test_the_named_parameters_repeat_a_request_byte_for_byte(api: TestClient, radiographs: dict[str, bytes]) -> None:
    first = post(api, radiographs, samples=2, seed=7, steps=3, consistency_steps=1)
    again = {name: value for name, value in parameters(first).items() if name != "sampler"}
    assert post(api, radiographs, **again).content == first.content


def test_the_parameters_are_those_of_the_reconstructor(
    diffusion_folder: Path, diffusion: Reconstructor, radiographs: dict[str, bytes]
) -> None:
    given = np.random.default_rng(0).random((2, 32, 32), dtype=np.float32)
    (result,) = diffusion.reconstruct([given], [ReconstructionSettings(seed=5, steps=3, consistency_steps=2)])
    flags = SamplingFlags(steps=3, seed=5)
    expected = Reconstructor.load(str(diffusion_folder), consistency_steps=2, sampling=flags).reconstruct([given])[0]
    np.testing.assert_array_equal(result.hu, expected.hu)
    assert result.residuals == expected.residuals


def test_a_batch_of_different_settings_gives_each_its_own_volume_and_one_with_a_seed_the_same_bytes(
    diffusion: Reconstructor,
) -> None:
    given = list(np.random.default_rng(4).random((5, 2, 32, 32), dtype=np.float32))
    settings = [
        ReconstructionSettings(),
        ReconstructionSettings(seed=9),
        ReconstructionSettings(steps=4),
        ReconstructionSettings(2, seed=9, consistency_steps=1),
        ReconstructionSettings(),
    ]
    together = diffusion.reconstruct(given, settings)
    for one, its, found in zip(given, settings, together, strict=True):
        (alone,) = diffusion.reconstruct([one], [its])
        assert np.abs(np.subtract(found.hu, alone.hu, dtype=np.int32)).max() <= (1 if its.seed is None else 0)
        assert found.residuals.keys() == alone.residuals.keys()
        assert (found.std is None) == (its.samples == 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ReconstructionSettings(seed=1), "deterministic: leave out seed"),
        (ReconstructionSettings(2, steps=3), "deterministic: leave out steps, samples"),
    ],
)
def test_a_deterministic_model_ignores_no_setting(
    reconstructor: Reconstructor, settings: ReconstructionSettings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        reconstructor.reconstruct([np.zeros((2, 32, 32), np.float32)], [settings])


@pytest.mark.parametrize("field", ["seed", "steps", "samples", "return_std"])
def test_a_parameter_that_the_model_does_not_use_is_refused(
    field: str, service_client: TestClient, radiographs: dict[str, bytes]
) -> None:
    response = service_client.post(URL, files=radiographs, data={field: "1"})
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert response.json()["detail"].startswith(f"this model does not use {field}: ")


def test_a_model_is_listed_by_name_with_its_card_and_an_unknown_one_is_refused(
    reconstructor: Reconstructor, radiographs: dict[str, bytes]
) -> None:
    backend = real_backend(reconstructor, name="thorax", title="a title", license="CC0", card="# Card")
    api = client_of(replace(backend, models_of_service=(backend.model, replace(backend.model, name="b", path="/2"))))
    first, second = api.get("/v1/models").json()["models"]
    assert (first["name"], second["name"], second["path"]) == ("thorax", "b", "/2")
    assert (first["title"], first["license"], first["card"]) == ("a title", "CC0", "# Card")
    assert (first["shape"], first["sampler"], first["parameters"]) == ([32, 32, 32], None, {})
    assert [view["name"] for view in first["geometry"]["views"]] == ["frontal", "lateral"]
    assert api.get("/v1/models/b").json() == second
    assert api.get("/v1/model").json() == first
    for response in (api.get("/v1/models/c"), api.post(URL, files=radiographs, data={"model": "c"})):
        assert response.json()["detail"] == "unknown model 'c': this service has thorax, b"
    assert (api.get("/v1/models/c").status_code, api.get("/v1/models/a/b").status_code) == (404, 404)
    assert post(api, radiographs, model="thorax").headers["X-Raylift-Model"] == reconstructor.sha256
    # Without its radiographs too: the other model may require other views.
    response = api.post(URL, files={"side": b"x"}, data={"model": "b"}, follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (307, "/2/v1/reconstructions")


def test_a_form_for_a_model_with_more_views_is_redirected(reconstructor: Reconstructor) -> None:
    frontal = ServedModel.load(ServeSettings(FRONTAL_MODEL), "", ())
    backend = real_backend(reconstructor, name="b", path="/2")
    backend = replace(backend, model=frontal, models_of_service=(frontal, backend.model))
    api = TestClient(api_of(backend, ImageDecoder(frontal.description, RadiographLimits(max_bytes=100_000))))
    for size, status in ((90_000, 307), (140_000, 413)):
        files = dict.fromkeys(("frontal", "lateral"), bytes(size))
        assert api.post(URL, files=files, data={"model": "b"}, follow_redirects=False).status_code == status


def test_examples_and_documents_have_the_form_of_the_openapi_description(
    api: TestClient, radiographs: dict[str, bytes]
) -> None:
    description = api.get("/openapi.json").json()
    content = description["paths"][URL]["post"]["responses"]["200"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ReconstructionReport"}
    components = {"components": description["components"]}
    report = api.post(URL, files=radiographs, headers={"Accept": "application/json"}).json()
    for document in (content["example"], report):
        jsonschema.validate(document, content["schema"] | components)
    assert set(content["example"]) == set(report)
    with pytest.raises(jsonschema.ValidationError, match="'min' is a required property"):
        jsonschema.validate(report | {"hu": {"mean": 0.0, "max": 0}}, content["schema"] | components)
    schema = description["components"]["schemas"]["ModelInfo"]
    jsonschema.validate(api.get("/v1/model").json(), schema | components)


def test_every_reference_in_the_openapi_description_is_within_it(api: TestClient, service_client: TestClient) -> None:
    for client in (api, service_client):
        description = client.get("/openapi.json").json()
        references = set(references_in(description))
        assert {"#/components/schemas/HURange", "#/components/schemas/Residual"} <= references
        for reference in references:
            assert reduce(getitem, reference.removeprefix("#/").split("/"), description)["type"] == "object"


def test_models_of_the_registry_and_folders_have_a_name_a_card_and_limits(model_folder: Path) -> None:
    def load(model: str | Path, names: tuple[str, ...] = (), **options: Any) -> ServedModel:
        return ServedModel.load(ServeSettings(str(model), **options), "", names)

    registered = load(FRONTAL_MODEL, consistency_steps=30)
    assert (registered.name, registered.label, registered.sha256) == (
        FRONTAL_MODEL,
        FRONTAL_MODEL,
        sha256_of(FRONTAL_MODEL),
    )
    assert registered.title == MODELS["chest-64-frontal"].title
    assert registered.license == MODELS["chest-64-frontal"].license
    assert registered.card == card_of(FRONTAL_MODEL)
    assert registered.card.startswith("# ")
    # The service's own setting is within the limit.
    assert registered.max_consistency_steps == 30
    folder = load(model_folder, names=(model_folder.name,))
    assert (folder.name, folder.license, folder.card) == (f"{model_folder.name}-2", None, None)
    assert folder.title == "x2ct-gan from frontal and lateral radiographs"


def test_responses_name_neither_the_archive_nor_the_settings_of_an_exported_model(
    finished_run: Path, archive32: Path, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "thorax"
    assert cli.main(["export", str(finished_run), str(folder)]) == 0
    words = (str(archive32), archive32.name, str(tmp_path), "config", "validate_every")
    card = (folder / CARD_FILE).read_text()
    assert all(word in card for word in words if word != str(tmp_path))
    served = ServedModel.load(ServeSettings(str(folder)), "", ())
    api = client_of(replace(real_backend(Reconstructor.load(str(folder))), model=served))
    responses = [api.get(path) for path in ("/v1/models", "/v1/models/thorax", "/v1/model", "/openapi.json", "/docs")]
    responses.append(api.post(URL, files=radiographs, headers={"Accept": "application/json"}))
    for response in responses:
        assert response.status_code == 200
        assert not [word for word in words if word in f"{response.headers}{response.text}"], response.url
    assert responses[1].json()["card"] is None


def test_the_applications_of_a_service_have_all_models(model_folder: Path) -> None:
    settings = ServeSettings(str(model_folder), also=(DEFAULT_MODEL, str(model_folder)))
    for target in deployment.applications(settings):
        arguments = target.target._bound_deployment.init_args
        (models,) = [one for one in arguments if isinstance(one, tuple)]
        assert [one.path for one in models] == ["", "/2", "/3"]
        assert [one.name for one in models] == [model_folder.name, DEFAULT_MODEL, f"{model_folder.name}-3"]
