"""Pretrained parts of a system: resolving and checking their models, and loading their weights into a new run.

The location of such a model matters until the run's first checkpoint, which holds its weights with all others.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry
from raylift.models.system_config import SystemConfig
from raylift.platform import model_store
from raylift.platform.config import RunConfig
from raylift.platform.training.checkpoint import resolve_checkpoint


def resolve(run: RunConfig) -> RunConfig:
    """The run with the system settings and the exact checkpoint URL of every model that it uses as a part."""
    resolved: dict[str, Any] = {}
    for part, url in run.system.pretrained.items():
        if url:
            exact = resolve_checkpoint(url)
            resolved |= {f"{part}_model": exact, part: model_store.description_of(exact).system}
    return replace(run, system=replace(run.system, **resolved)) if resolved else run


def check(run: RunConfig, archive: Archive) -> None:
    """Raise a ConfigError if a part's model is missing, or was trained with another grid, geometry or window."""
    views = tuple(archive.manifest.geometry.view(name) for name in run.system.views)
    for part, url in run.system.pretrained.items():
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
        if trained.window != run.data.window:
            low, high = trained.window.low_hu, trained.window.high_hu
            raise ConfigError(
                f"{url} was trained in the window from {low:g} to {high:g} HU, this run has {run.data.window.low_hu:g} "
                f"to {run.data.window.high_hu:g}: pass --data.window.low-hu {low:g} --data.window.high-hu {high:g}"
            )
        if trained.grid != grid:
            raise ConfigError(f"{url} was trained on {trained.grid}, here it would have to be {grid}: use another base")
        if not _same(trained.geometry, geometry):
            raise ConfigError(
                f"{url} was trained with {trained.geometry}, here it would have to be {geometry}: use another archive"
            )


def load_weights(network: nn.Module, system: SystemConfig) -> None:
    """Load the weights of the pretrained parts into a newly initialized network."""
    for part, url in system.pretrained.items():
        network.get_submodule(part).load_state_dict(model_store.load(url).network.state_dict())


def _same(one: Geometry, other: Geometry) -> bool:
    """Whether two geometries are equal up to rounding."""
    exact = all(getattr(one, name) == getattr(other, name) for name in ("beam", "detector_px", "views"))
    distances = ("source_axis_mm", "source_detector_mm", "detector_pitch_mm")
    return exact and all(math.isclose(getattr(one, name), getattr(other, name), rel_tol=1e-9) for name in distances)
