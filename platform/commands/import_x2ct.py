"""`raylift import-x2ct`: a generator's checkpoint of X2CT-GAN's public code as a raylift model."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, x2ct
from raylift.datasets.intensity import Window
from raylift.models import x2ct_weights
from raylift.models.weights import Description, Model, WeightsError, file_sha256
from raylift.platform import export as exporting

EXTENT_MM = 320.0
"""Edge of X2CT-GAN's volumes."""
KEYS = "{iters, epoch, state_dict, lr}"


@dataclass(frozen=True)
class ImportX2CTOptions:
    """Write a checkpoint of X2CT-GAN's public code, of one view or of two, as a raylift model.

    The model has geometry x2ct and divides radiographs by their maximum.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """The generator's file, such as 90_net_G.pth."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """A new or empty folder."""


def import_x2ct(arguments: list[str]) -> int:
    """A checkpoint of X2CT-GAN's public code as a raylift model."""
    options = tyro.cli(ImportX2CTOptions, prog="raylift import-x2ct", args=arguments)
    model = read_checkpoint(options.checkpoint)
    sha256 = exporting.export(model, options.folder, {})
    views = " and ".join(model.description.system.views)
    print(f"{options.folder}: X2CT-GAN, {views}, {model.description.grid.size}^3, weights SHA-256 {sha256}")
    return 0


def read_checkpoint(path: Path) -> Model:
    """The generator of a checkpoint `{iters, epoch, state_dict, lr}`; nothing but tensors is unpickled.

    Raises:
        WeightsError: it is not such a file, or its weights are not those of X2CT-GAN's generator.
    """
    checkpoint = _unpickled(path)
    state = checkpoint["state_dict"]
    try:
        weights = x2ct_weights.convert(state)
        system, size = x2ct_weights.system_of(weights)
        grid = Grid(size, EXTENT_MM / size)
        geometry = x2ct(grid)
        geometry = replace(geometry, views=tuple(geometry.view(name) for name in system.views))
        with torch.device("meta"):
            network = system.reconstruction_network(grid, geometry)
        network.load_state_dict({name: tensor.float().contiguous() for name, tensor in weights.items()}, assign=True)
    except (ConfigError, RuntimeError) as error:
        raise WeightsError(f"{path} does not fit X2CT-GAN's generator: {error}") from error
    numbers = {key: checkpoint[key] for key in ("iters", "epoch", "lr") if isinstance(checkpoint.get(key), int | float)}
    provenance = {"imported": f"the data of {path.name}", "source_sha256": file_sha256(path), **numbers}
    description = Description(system, grid, geometry, Window(), normalization="maximum", provenance=provenance)
    return Model(network.eval().requires_grad_(False), description, "")


def _unpickled(path: Path) -> Mapping[str, Any]:
    """The file's dictionary, whose `state_dict` has finite tensors by name."""
    if not path.is_file():
        raise WeightsError(f"{path} is not a file: give the generator's checkpoint of X2CT-GAN's public code")
    try:
        # torch warns of pickle protocols that it may not read; whether it does is what counts.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not a PyTorch file of tensors alone, and nothing else is unpickled: give the generator's "
            "checkpoint of X2CT-GAN's public code"
        ) from error
    contents: Mapping[str, Any] = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = contents.get("state_dict")
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"{path} has no state_dict: a checkpoint of X2CT-GAN's public code is {KEYS}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: '{name!s:.80}' of state_dict is no tensor")
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{path}: '{name:.80}' has values that are not finite")
    return contents
