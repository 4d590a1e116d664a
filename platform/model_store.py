"""Trained models by name or URL: a model is found, fetched if it is elsewhere, checked and loaded.

A model is given as one of

* `models:NAME`, a model of `MODELS`: its description and card are in the package, and so are its weights unless the
  registry has a URL for them;
* the path or URL of an exported model folder or of a checkpoint, which contains one.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raylift.datasets import process_folder
from raylift.datasets.archive.store import Folder, absolute, is_local, join, require_reachable
from raylift.datasets.errors import ConfigError
from raylift.models import weights
from raylift.models.weights import (
    DESCRIPTION_FILE,
    TRAINING_DATA_FILE,
    WEIGHTS_FILE,
    Description,
    Model,
    WeightsError,
)

PREFIX = "models:"
DEFAULT_MODEL = "models:chest-64"
"""The model of `raylift reconstruct` and `raylift serve` without one."""
FRONTAL_MODEL = "models:chest-64-frontal"
"""The model of `raylift reconstruct` without one, for a frontal radiograph alone."""
CARD_FILE = "README.md"
CACHE_VARIABLE = "RAYLIFT_CACHE"
"""Environment variable of the folder for fetched weights; ~/.cache/raylift by default."""


@dataclass(frozen=True)
class PretrainedModel:
    """A model that raylift offers by name; `models/pretrained/NAME` holds model.json and the card README.md."""

    title: str
    license: str
    """License of the weights and of the training data."""
    url: str = ""
    """Folder URL of the files whose SHA-256 are in model.json; empty: they are in `models/pretrained/NAME`."""


MODELS: dict[str, PretrainedModel] = {
    "chest-64": PretrainedModel("chest from a frontal and a lateral radiograph", "Apache-2.0; training data CC BY"),
    "chest-64-frontal": PretrainedModel("chest from a frontal radiograph alone", "Apache-2.0; training data CC BY"),
}
"""The models that `raylift models` lists. A new one is a line here and a folder in `models/pretrained`."""


def resolve(url: str | Path) -> str:
    """The exact name or URL of a model: `models:NAME` if that exists, otherwise the absolute URL.

    Raises:
        ConfigError: no model has that name, or the URL is not one.
    """
    name = _name(url)
    if name is None:
        require_reachable(url)
        return absolute(url)
    return f"{PREFIX}{name}"


def is_named(url: str | Path) -> bool:
    """Whether this is `models:NAME`."""
    return _name(url) is not None


def registered(url: str | Path) -> PretrainedModel | None:
    """The entry of `models:NAME` in the registry; None for a URL or path.

    Raises:
        ConfigError: no model has that name.
    """
    name = _name(url)
    return None if name is None else MODELS[name]


def card_of(url: str | Path) -> str | None:
    """The card of `models:NAME` in Markdown; None for a URL or path, whose card names its archive and settings.

    Raises:
        ConfigError: no model has that name.
    """
    name = _name(url)
    return None if name is None else (package_folder(name) / CARD_FILE).read_text(encoding="utf-8")


def location(url: str | Path) -> str:
    """Folder or URL of a model's files. Weights of a named model that are not in the package are fetched first.

    Raises:
        ConfigError: no model has that name.
        WeightsError: the weights of a named model are absent, or those at its URL have another SHA-256.
    """
    name = _name(url)
    if name is None:
        require_reachable(url)
        return absolute(url)
    folder = package_folder(name)
    if (path := weights.weights_file(folder)).is_file():
        return str(folder)
    if not MODELS[name].url:
        raise WeightsError(
            f"{PREFIX}{name}: this copy of raylift has no {path}. Install the wheel, or pass the URL of an "
            "exported copy"
        )
    return str(_fetched(name))


def package_folder(name: str) -> Path:
    """The folder of a named model in the package."""
    return Path(weights.__file__).parent / "pretrained" / name


def load(url: str | Path) -> Model:
    """The network of a model, on the CPU, in evaluation mode.

    Raises:
        WeightsError: a file is missing, or the weights do not match their digest or the description.
    """
    with _local(location(url), DESCRIPTION_FILE, WEIGHTS_FILE, TRAINING_DATA_FILE) as folder:
        return weights.load(folder)


def description_of(url: str | Path) -> Description:
    """The description of a model.

    Raises:
        WeightsError: the URL is not a model.
    """
    return _describe(url)[0]


def sha256_of(url: str | Path) -> str:
    """The SHA-256 of a model's weights, by its description."""
    return _describe(url)[1][WEIGHTS_FILE]


def _describe(url: str | Path) -> tuple[Description, dict[str, str]]:
    name = _name(url)
    place = absolute(url) if name is None else str(package_folder(name))
    with _local(place, DESCRIPTION_FILE) as folder:
        return weights.describe(weights.model_folder(folder))


def _name(url: str | Path) -> str | None:
    """The name in `models:NAME`; None for a URL or path."""
    text = str(url)
    match = re.match(r"models?:/*", text, re.IGNORECASE)
    if match is None:
        return None
    name = text[match.end() :]
    if match[0] != PREFIX or name not in MODELS:
        names = ", ".join(f"{PREFIX}{known}" for known in MODELS)
        raise ConfigError(f"unknown model '{text}': use {names}, or the path or URL of an exported model or checkpoint")
    return name


def _fetched(name: str) -> Path:
    """The cache folder of a named model, with its files as its description lists them.

    Raises:
        WeightsError: a file at the URL has another SHA-256; it is not kept.
    """
    url, digests = MODELS[name].url, _describe(f"{PREFIX}{name}")[1]
    folder = cache_folder() / f"{name}-{digests[WEIGHTS_FILE][:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, expected in digests.items():
        if (folder / file).is_file() and weights.file_sha256(folder / file) == expected:
            continue
        print(f"{PREFIX}{name}: fetching {join(url, file)} to {folder}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            new = Path(temporary) / file
            try:
                Folder(url).get(file, new)
            except FileNotFoundError as error:
                raise WeightsError(f"{join(url, file)}, the weights of {PREFIX}{name}, is missing") from error
            found = weights.file_sha256(new)
            if found != expected:
                raise WeightsError(
                    f"{join(url, file)} has SHA-256 {found}, {PREFIX}{name} has {expected}: it is not used"
                )
            new.replace(folder / file)
    (folder / DESCRIPTION_FILE).write_bytes((package_folder(name) / DESCRIPTION_FILE).read_bytes())
    return folder


def cache_folder() -> Path:
    """The folder of fetched weights: `RAYLIFT_CACHE`, else `raylift` in `XDG_CACHE_HOME` or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "raylift"
    return Path(os.environ.get(CACHE_VARIABLE) or default).expanduser()


def _get_shared_weights(url: str, folder: Path) -> None:
    """Fetch the weights that the model at a URL shares with a folder next to it, if it has none of its own."""
    if (folder / WEIGHTS_FILE).is_file() or not (other := weights.weights_of(folder)):
        return
    neighbor = join(url.rstrip("/").rpartition("/")[0], other)
    if not Folder(neighbor).exists(WEIGHTS_FILE):
        raise WeightsError(
            f"{url} has the weights of {neighbor}, and that folder has no {WEIGHTS_FILE}: copy both folders, or export "
            "the model, which writes its own"
        )
    Folder(neighbor).get(WEIGHTS_FILE, folder / WEIGHTS_FILE)


@contextmanager
def _local(url: str, *names: str) -> Iterator[Path]:
    """A local folder with those of the named files of a model that exist."""
    if is_local(url):
        yield Path(url)
        return
    remote = join(url, "model") if Folder(url).exists(f"model/{DESCRIPTION_FILE}") else url
    with process_folder.make("model-files") as local:
        for name in names:
            if Folder(remote).exists(name):
                Folder(remote).get(name, local / name)
        if WEIGHTS_FILE in names and (local / DESCRIPTION_FILE).is_file():
            _get_shared_weights(remote, local)
        yield local
