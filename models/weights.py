"""A trained network in a local folder: safetensors weights and a self-contained description.

```
model.safetensors    weights, in fp32 or fp16; always loaded in fp32; absent where model.json names a folder
                     next to this one whose weights are the same (`weights_of`)
training_data.npz    digests of its training scans and the fitted trivial baselines (`models.training_data`); absent for
                     a model whose training data are unknown
model.json           system and its settings, grid, geometry, window, provenance, SHA-256 of itself and of the others
```

No file is a pickle, and all digests are always checked. `platform.model_store` loads models from URLs.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from raylift import __version__
from raylift.datasets import hashed_json
from raylift.datasets.errors import AlteredFileError, ConfigError, RayliftError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Normalization, Window
from raylift.datasets.radiographs.histogram import Quantiles, ReferenceHistograms
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models import zoo  # noqa: F401 (registers the settings of all systems)
from raylift.models.system_config import SystemConfig
from raylift.models.training_data import TrainingData

FORMAT, FORMAT_VERSION = "raylift-model", 1
WEIGHTS_FILE, DESCRIPTION_FILE, TRAINING_DATA_FILE = "model.safetensors", "model.json", "training_data.npz"
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory layouts by the number of a tensor's dimensions."""


class WeightsError(RayliftError, ValueError):
    """A model folder that is incomplete, altered, or not raylift's."""


@dataclass(frozen=True)
class Description:
    """The system of a network and the conditions of its training."""

    system: SystemConfig
    grid: Grid
    geometry: Geometry
    """The geometry of the radiographs it was trained on; its views are the network's, in the same order."""
    window: Window
    histograms: ReferenceHistograms = field(default_factory=dict)
    """Reference quantiles by view for histogram matching of radiographs; empty for no matching."""
    normalization: Normalization = "percentiles"
    """How radiographs are scaled to the network's [0, 1]."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Archive, run, step, seed, config hash and versions."""

    @property
    def reference_quantiles(self) -> tuple[Quantiles, ...]:
        """The reference quantiles in the order of the geometry's views; empty without histogram matching."""
        return tuple(self.histograms[view.name] for view in self.geometry.views) if self.histograms else ()


@dataclass(frozen=True)
class Model:
    """A network with its description, in evaluation mode."""

    network: nn.Module
    description: Description
    sha256: str
    training_data: TrainingData | None = None
    """None for a model whose training data are unknown."""


def save(
    folder: Path,
    network_state: dict[str, torch.Tensor],
    description: Description,
    dtype: torch.dtype = torch.float32,
    training_data: TrainingData | None = None,
) -> str:
    """Write the files, floating-point weights in `dtype`, and return the SHA-256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _to_store(tensor, dtype) for name, tensor in network_state.items()}
    safetensors.torch.save_file(state, folder / WEIGHTS_FILE)
    sha256 = file_sha256(folder / WEIGHTS_FILE)
    head = {"format": FORMAT, "version": FORMAT_VERSION, "written_by": f"raylift {__version__}", "sha256": sha256}
    if training_data:
        training_data.save(folder / TRAINING_DATA_FILE, description.window)
        head["training_data_sha256"] = file_sha256(folder / TRAINING_DATA_FILE)
    (folder / DESCRIPTION_FILE).write_bytes(hashed_json.encode({**head, "model": to_plain(description)}))
    return sha256


def _to_store(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy on the CPU, floating-point tensors in `dtype`."""
    tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
    return tensor.cpu().contiguous().clone()


def describe(folder: Path) -> tuple[Description, dict[str, str]]:
    """The description of a model folder, and the expected SHA-256 of its other files by name.

    Raises:
        WeightsError: the folder is not a raylift model, its description was altered, or has another format version.
    """
    path = folder / DESCRIPTION_FILE
    try:
        data = _head(folder)
        written = (data["format"], data["version"])
        if written != (FORMAT, FORMAT_VERSION):
            raise WeightsError(f"{path} is {written}; this raylift reads {(FORMAT, FORMAT_VERSION)}")
        digests = {WEIGHTS_FILE: data["sha256"]}
        if "training_data_sha256" in data:
            digests[TRAINING_DATA_FILE] = data["training_data_sha256"]
        return from_plain(Description, data["model"], str(path)), digests
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} is not a model: it has no {DESCRIPTION_FILE}. Give a checkpoint or an exported folder"
        ) from error
    except AlteredFileError as error:
        raise WeightsError(f"{error}. Export the model again, or use another copy or checkpoint") from error
    except (KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{path} is not a model description: {error}") from error


def weights_file(folder: Path) -> Path:
    """The weights of a model folder: its own or, without any, those of the folder that its description names.

    Raises:
        WeightsError: the description names a folder that is not next to this one.
    """
    other = "" if (folder / WEIGHTS_FILE).is_file() else weights_of(folder)
    return folder.parent / other / WEIGHTS_FILE if other else folder / WEIGHTS_FILE


def weights_of(folder: Path) -> str:
    """The name of the folder whose weights a model shares, from its description; empty: it has its own.

    Raises:
        WeightsError: the description does not name a folder next to this one.
    """
    other = _head(folder).get("weights_of", "")
    if not isinstance(other, str) or not re.fullmatch(r"[\w-]*", other):
        raise WeightsError(f"{folder / DESCRIPTION_FILE} has weights_of '{other}': it must be a folder next to it")
    return other


def _head(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    return hashed_json.decode(path.read_bytes(), str(path))


def model_folder(folder: str | Path) -> Path:
    """The folder of the files: the given one, or the folder `model` inside it, as in a checkpoint."""
    inside = Path(folder) / "model"
    return inside if (inside / DESCRIPTION_FILE).is_file() else Path(folder)


def load(folder: str | Path) -> Model:
    """The network of an exported folder or of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        WeightsError: a file is missing, or the weights do not match their digest or the description.
    """
    folder = model_folder(folder)
    description, digests = describe(folder)
    path = weights_file(folder)
    for name, expected in digests.items():
        file = path if name == WEIGHTS_FILE else folder / name
        if not file.is_file():
            shared = f", whose weights {folder} has: copy both folders, or export it" if file.parent != folder else ""
            raise WeightsError(f"{file.parent} has no {name}{shared}")
        if (computed := file_sha256(file)) != expected:
            raise WeightsError(
                f"{file} has SHA-256 {computed}, its description states {expected}: the file was altered or cut"
            )
    with torch.device("meta"):
        network = description.system.reconstruction_network(description.grid, description.geometry)
    try:
        stored = safetensors.torch.load_file(path)
        # A copy, whose alignment in memory no file decides: the last digits of a convolution depend on it.
        formats = CHANNELS_LAST if description.system.channels_last else {}
        state = {
            name: tensor.to(
                torch.float32 if tensor.is_floating_point() else tensor.dtype,
                copy=True,
                memory_format=formats.get(tensor.dim(), torch.contiguous_format),
            )
            for name, tensor in stored.items()
        }
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} does not fit system {description.system.name}: {error}") from error
    training_data = _training_data(folder, description) if TRAINING_DATA_FILE in digests else None
    return Model(network.eval().requires_grad_(False), description, digests[WEIGHTS_FILE], training_data)


def _training_data(folder: Path, description: Description) -> TrainingData:
    path = folder / TRAINING_DATA_FILE
    try:
        return TrainingData.load(path, description.grid, description.window)
    except ValueError as error:
        raise WeightsError(f"{path} does not fit {DESCRIPTION_FILE}: {error}. Export the model again") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
