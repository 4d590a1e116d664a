"""A trained network on disk: safetensors beside a description that says all a stranger needs to use it.

```
model.safetensors    weights in fp32
model.json           system and its settings, grid, geometry, window, provenance, SHA-256 of the weights
```

Nothing here is a pickle, and weights are never read without their digest being checked.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from raylift import __version__
from raylift.datasets.archive.store import Folder, absolute, is_local, join
from raylift.datasets.errors import ConfigError, RayliftError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.datasets.radiographs.histogram import Quantiles, ReferenceHistograms
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models.zoo import System

FORMAT, FORMAT_VERSION = "raylift-model", 1
WEIGHTS_FILE, DESCRIPTION_FILE = "model.safetensors", "model.json"


class WeightsError(RayliftError, ValueError):
    """A model folder that is incomplete, altered, or not raylift's."""


@dataclass(frozen=True)
class Description:
    """What a network was made and trained for."""

    system: System
    grid: Grid
    geometry: Geometry
    """The geometry of the radiographs it was trained on; its views are the network's, in the same order."""
    window: Window
    histograms: ReferenceHistograms = field(default_factory=dict)
    """Quantiles of projections by view, to which every radiograph is matched first; empty: none is."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Archive, run, step, seed, config hash and versions."""

    @property
    def reference_quantiles(self) -> tuple[Quantiles, ...]:
        """The quantiles in the order of the geometry's views; none if radiographs are not matched."""
        return tuple(self.histograms[view.name] for view in self.geometry.views) if self.histograms else ()


@dataclass(frozen=True)
class Model:
    """A network with its description, in evaluation mode."""

    network: nn.Module
    description: Description
    sha256: str


def save(folder: Path, network_state: dict[str, torch.Tensor], description: Description) -> str:
    """Write the two files and return the SHA-256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _to_store(tensor) for name, tensor in network_state.items()}
    safetensors.torch.save_file(state, folder / WEIGHTS_FILE)
    sha256 = file_sha256(folder / WEIGHTS_FILE)
    head = {"format": FORMAT, "version": FORMAT_VERSION, "written_by": f"raylift {__version__}", "sha256": sha256}
    text = json.dumps({**head, "model": to_plain(description)}, indent=1)
    (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
    return sha256


def _to_store(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32 unless it counts something, on the CPU, in memory of its own."""
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return tensor.cpu().contiguous().clone()


def describe(folder: Path) -> tuple[Description, str]:
    """The description of a model folder and the SHA-256 its weights must have.

    Raises:
        WeightsError: the folder is not a raylift model, or of another version.
    """
    path = folder / DESCRIPTION_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        written = (data["format"], data["version"])
        if written != (FORMAT, FORMAT_VERSION):
            raise WeightsError(f"{path} is {written}; this raylift reads {(FORMAT, FORMAT_VERSION)}")
        return from_plain(Description, data["model"], str(path)), data["sha256"]
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} is not a model: it has no {DESCRIPTION_FILE}. Give a checkpoint or an exported folder"
        ) from error
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, ConfigError) as error:
        raise WeightsError(f"{path} is not a model description: {error}") from error


def load(url: str | Path) -> Model:
    """The network of an exported folder or of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        WeightsError: something is missing, or the weights do not match their digest or the description.
    """
    with _local(url, DESCRIPTION_FILE, WEIGHTS_FILE) as folder:
        return _load(folder)


def description_of(url: str | Path) -> Description:
    """What stands beside the weights of an exported folder or of a checkpoint.

    Raises:
        WeightsError: it is no model.
    """
    with _local(url, DESCRIPTION_FILE) as folder:
        return describe(folder)[0]


@contextmanager
def _local(url: str | Path, *names: str) -> Iterator[Path]:
    """A folder on this machine with these files of a model, if they are there."""
    url = absolute(url)
    # A checkpoint holds a model folder.
    inside = join(url, "model") if Folder(url).exists(f"model/{DESCRIPTION_FILE}") else url
    if is_local(inside):
        yield Path(inside)
        return
    with tempfile.TemporaryDirectory(prefix="raylift-model-") as temporary:
        for name in names:
            if Folder(inside).exists(name):
                Folder(inside).get(name, Path(temporary) / name)
        yield Path(temporary)


def _load(folder: Path) -> Model:
    description, sha256 = describe(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise WeightsError(f"{folder} has no {WEIGHTS_FILE}")
    found = file_sha256(path)
    if found != sha256:
        raise WeightsError(f"{path} has SHA-256 {found}, its description says {sha256}: the file was altered or cut")
    with torch.device("meta"):
        network = description.system.reconstructor(description.grid, description.geometry)
    try:
        state = safetensors.torch.load_file(path)
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} does not fit system {description.system.name}: {error}") from error
    return Model(network.eval().requires_grad_(False), description, sha256)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
