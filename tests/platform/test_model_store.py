"""Models by name: those in the package, and those whose weights are fetched from a URL when a command needs them."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError
from raylift.models import weights
from raylift.platform import cli, model_store
from raylift.platform.model_store import MODELS, PretrainedModel, package_folder
from raylift.platform.training.checkpoint import resolve_checkpoint

MODEL_NAMES = [f"models:{name}" for name in MODELS]


class Requests(SimpleHTTPRequestHandler):
    """Serves a folder and records the paths of its requests."""

    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A named model whose description is in the package and whose weights are on a web server; its folder there."""
    folder, package = tmp_path / "web", tmp_path / "package"
    shutil.copytree(package_folder("chest-64"), folder)
    shutil.copytree(folder, package / "far", ignore=lambda *_: ["model.safetensors"])
    monkeypatch.setattr(Requests, "paths", [])
    monkeypatch.setattr(model_store, "package_folder", lambda name: package / name)
    monkeypatch.setenv("RAYLIFT_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Requests, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        far = PretrainedModel("far", "CC0", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(model_store, "MODELS", {"far": far})
        yield folder
        server.shutdown()


def test_every_name_of_the_registry_is_a_folder_of_the_package_and_every_folder_has_a_name():
    folders = {path.name for path in package_folder("x").parent.iterdir() if path.is_dir()}
    assert folders == set(MODELS)
    for name, entry in MODELS.items():
        model = model_store.load(f"models:{name}")
        assert model.sha256 == model_store.sha256_of(f"models:{name}")
        assert entry.title
        assert entry.license


def test_a_name_is_its_folder_in_every_use():
    folder = package_folder("chest-64")
    assert model_store.location("models:chest-64") == str(folder)
    assert resolve_checkpoint("models:chest-64") == "models:chest-64"
    assert model_store.description_of("models:chest-64") == weights.describe(folder)[0]
    by_name, by_path = model_store.load("models:chest-64").network, model_store.load(folder).network
    assert all(torch.equal(one, two) for one, two in zip(by_name.parameters(), by_path.parameters(), strict=True))


def test_the_frontal_model_has_the_weights_of_the_other_and_an_export_of_it_has_its_own(tmp_path):
    assert not (package_folder("chest-64-frontal") / "model.safetensors").exists()
    both, frontal = (model_store.load(f"models:{name}") for name in ("chest-64", "chest-64-frontal"))
    assert frontal.sha256 == both.sha256
    assert cli.main(["export", "models:chest-64-frontal", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own/model.safetensors").is_file()
    exported = weights.load(tmp_path / "own")
    assert exported.description.system.views == ("frontal",)
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(exported.network(image), frontal.network(image))


def test_a_model_at_a_url_is_fetched_with_the_weights_of_the_folder_next_to_it(tmp_path):
    bucket = Folder("memory://shared-weights")
    for name in ("chest-64", "chest-64-frontal"):
        for file in package_folder(name).iterdir():
            bucket.write(f"{name}/{file.name}", file.read_bytes())
    expected = model_store.load("models:chest-64-frontal")
    assert model_store.load("memory://shared-weights/chest-64-frontal/").sha256 == expected.sha256
    bucket.remove("chest-64/model.safetensors")
    with pytest.raises(weights.WeightsError, match=r"chest-64-frontal.* has the weights of .*/chest-64, .*copy both"):
        model_store.load("memory://shared-weights/chest-64-frontal")


@pytest.mark.parametrize(
    "name", ["models:chest-65", "models:", "model:chest-64", "models://chest-64", "Models:chest-64"]
)
def test_an_unknown_name_is_refused_with_the_names(name):
    for use in (model_store.resolve, model_store.load, model_store.description_of, resolve_checkpoint):
        with pytest.raises(
            ConfigError, match=f"unknown model '{name}': use {', '.join(MODEL_NAMES)}, or the path or URL"
        ):
            use(name)


def test_weights_elsewhere_are_fetched_once_when_they_are_needed_and_not_to_list_them(remote, capsys):
    assert cli.main(["models"]) == 0
    assert "not in the package" in capsys.readouterr().out
    assert model_store.description_of("models:far").grid.size == 64
    assert not Requests.paths
    first = model_store.load("models:far")
    assert [path for path in Requests.paths if "safetensors" in path]
    Requests.paths.clear()
    assert model_store.load("models:far").sha256 == first.sha256 == weights.describe(remote)[1][weights.WEIGHTS_FILE]
    assert not Requests.paths
    fetched = [line for line in capsys.readouterr().out.splitlines() if "models:far: fetching" in line]
    assert [line.partition(" to ")[0].rpartition("/")[2] for line in fetched] == [
        "model.safetensors",
        "training_data.npz",
    ]


def test_fetched_weights_with_another_digest_are_not_used_and_damaged_ones_are_fetched_again(remote, tmp_path):
    cached = Path(model_store.location("models:far")) / "model.safetensors"
    cached.write_bytes(b"damaged")
    model_store.load("models:far")
    shutil.rmtree(tmp_path / "cache")
    (remote / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(weights.WeightsError, match=r"model\.safetensors has SHA-256 .*: it is not used"):
        model_store.load("models:far")
    (remote / "model.safetensors").unlink()
    with pytest.raises(weights.WeightsError, match=r"the weights of models:far, is missing"):
        model_store.load("models:far")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_copy_of_raylift_without_the_weights_names_the_remedy(remote, monkeypatch):
    monkeypatch.setitem(model_store.MODELS, "far", PretrainedModel("far", "CC0"))
    with pytest.raises(weights.WeightsError, match="Install the wheel, or pass the URL of an exported copy"):
        model_store.load("models:far")
