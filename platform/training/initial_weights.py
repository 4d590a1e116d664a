"""Weights that a new run starts with: of its whole network (`train.initial_model`), and of frozen parts of its system.

Their models are resolved, checked, recorded in the provenance and loaded here. The location of such a model matters
until the run's first checkpoint, which holds its weights with all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.serialization import to_plain
from raylift.models.system_config import SystemConfig
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description
from raylift.platform import model_store
from raylift.platform.config import RunConfig, flatten
from raylift.platform.training.checkpoint import resolve_checkpoint

NETWORK = "network"
"""Key of the whole network's model in a record, next to the names of parts."""


def resolve(run: RunConfig) -> RunConfig:
    """The run with the exact URL of every model that it starts with, and the settings of those that are parts."""
    if run.train.initial_model:
        run = replace(run, train=replace(run.train, initial_model=resolve_checkpoint(run.train.initial_model)))
    resolved: dict[str, Any] = {}
    for part, url in run.system.base_models.items():
        if url:
            exact = resolve_checkpoint(url)
            resolved |= {f"{part}_model": exact, part: model_store.description_of(exact).system}
    return replace(run, system=replace(run.system, **resolved)) if resolved else run


def record(run: RunConfig) -> dict[str, dict[str, str]]:
    """The URL and SHA-256 of every model whose weights a new run starts with, by part."""
    return {part: {"model": url, "sha256": model_store.sha256_of(url)} for part, url in _models(run) if url}


def check(run: RunConfig, archive: Archive) -> None:
    """Check the models that a run starts with.

    Raises:
        ConfigError: a part's model is missing or was trained with another grid, geometry or window, or the initial
            model is of another system, or has other views, tensors or another window.
    """
    views = tuple(archive.manifest.geometry.view(name) for name in run.system.views)
    for part, url in run.system.base_models.items():
        if not url:
            raise ConfigError(
                f"{run.system.name} needs a trained model as its {part}: pass --system.{part}-model with a run, "
                "a checkpoint or an exported model"
            )
        trained = model_store.description_of(url)
        grid, geometry = run.system.part_geometry(
            part, archive.manifest.grid, replace(archive.manifest.geometry, views=views)
        )
        if trained.system != getattr(run.system, part):
            raise ConfigError(f"the settings of system.{part} are not those of {url}: leave them out")
        _check_window(url, trained, run)
        if trained.grid != grid:
            raise ConfigError(f"{url} was trained on {trained.grid}, here it would have to be {grid}: use another base")
        if not _same(trained.geometry, geometry):
            raise ConfigError(
                f"{url} was trained with {trained.geometry}, here it would have to be {geometry}: use another archive"
            )
    if run.train.initial_model:
        geometry = replace(archive.manifest.geometry, views=views)
        _check_network(run.train.initial_model, run, archive.manifest.grid, geometry)


def load_weights(network: nn.Module, run: RunConfig) -> None:
    """Load the weights of the initial model and of the base models into a newly initialized network."""
    for part, url in _models(run):
        target = network if part == NETWORK else network.get_submodule(part)
        target.load_state_dict(model_store.load(url).network.state_dict())


def training_data(run: RunConfig) -> list[TrainingData | None]:
    """The training data of every model whose weights a new run starts with; None where they are unknown."""
    return [model_store.load(url).training_data for _, url in _models(run) if url]


def _models(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Part and URL of each model, the whole network first, so that a part's own model prevails."""
    if run.train.initial_model:
        yield NETWORK, run.train.initial_model
    yield from run.system.base_models.items()


def _check_network(url: str, run: RunConfig, grid: Grid, geometry: Geometry) -> None:
    """Raise a ConfigError unless the model has the run's system, views, window, and tensors of the same shapes."""
    trained = model_store.description_of(url)
    if trained.system.name != run.system.name:
        raise ConfigError(
            f"{url} is a model of system {trained.system.name}, this run trains {run.system.name}: "
            f"use a preset of {trained.system.name}"
        )
    # Branches of views may have the same shapes, so exchanged views would load without an error.
    if trained.system.views != run.system.views:
        raise ConfigError(
            f"{url} has the views {', '.join(trained.system.views)}, this run {', '.join(run.system.views)}: "
            f"pass --system.views {' '.join(trained.system.views)}"
        )
    _check_window(url, trained, run)
    if trained.normalization != run.data.normalization:
        raise ConfigError(
            f"{url} was trained on radiographs normalized by {trained.normalization}, this run has "
            f"{run.data.normalization}: pass --data.normalization {trained.normalization}"
        )
    theirs, ours = _shapes(trained.system, trained.grid, trained.geometry), _shapes(run.system, grid, geometry)
    differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differ:
        there, here = flatten(to_plain(trained.system)), flatten(to_plain(run.system))
        settings = [
            f"system.{key} {value}, not {there.get(key)}"
            for key, value in here.items()
            if value != there.get(key) and not key.startswith("loss.")
        ]
        listed = [
            f"{name} has shape {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here"
            for name in differ[:3]
        ]
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(
            f"{url} does not fit this run: {'; '.join(listed)}{more}. "
            f"Use its settings; this run has {'; '.join(settings) or f'{grid}, not {trained.grid}'}"
        )


def _shapes(system: SystemConfig, grid: Grid, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a system's network, by name."""
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape)
            for name, tensor in system.reconstruction_network(grid, geometry).state_dict().items()
        }


def _check_window(url: str, trained: Description, run: RunConfig) -> None:
    if trained.window != run.data.window:
        low, high = trained.window.low_hu, trained.window.high_hu
        raise ConfigError(
            f"{url} was trained in the window from {low:g} to {high:g} HU, this run has {run.data.window.low_hu:g} "
            f"to {run.data.window.high_hu:g}: pass --data.window.low-hu {low:g} --data.window.high-hu {high:g}"
        )


def _same(a: Geometry, b: Geometry) -> bool:
    """Whether two geometries are equal up to rounding."""
    exact = all(getattr(a, name) == getattr(b, name) for name in ("beam", "detector_px", "views"))
    distances = ("source_isocenter_mm", "source_detector_mm", "detector_pitch_mm")
    return exact and all(math.isclose(getattr(a, name), getattr(b, name), rel_tol=1e-9) for name in distances)
