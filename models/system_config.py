"""The interface of every system's settings: inputs, network, objective.

A family of systems is a frozen dataclass of settings that inherits from `SystemConfig`. Plain data become settings of
the right family by their `name`, with `models.zoo.SYSTEMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models.objectives.objective import Objective
from raylift.models.volume_network import VolumeNetwork

Supervision = Literal["volumes", "radiographs"]

DEFAULT_WINDOW = Window()


@dataclass(frozen=True)
class SystemConfig(ABC):
    """Settings of a system."""

    name: str
    """The system that these settings are based on."""

    @property
    @abstractmethod
    def views(self) -> tuple[str, ...]:
        """Names of views of the archive's geometry, in the order of the network's inputs."""

    @property
    def any_views(self) -> bool:
        """Whether it can be trained on any number of views in any pose, a composition with `lifting.along` rays."""
        return False

    @property
    def supervision(self) -> Supervision:
        """What supervises it: the CT volumes of the radiographs, or the radiographs alone.

        A system supervised by radiographs trains on archives of both kinds and may use CT of other patients.
        """
        return "volumes"

    @property
    def channels_last(self) -> bool:
        """Whether a loaded model has its weights in channels-last layout, which `benchmarks/inference.py` compares."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether its loss uses the archive's label volumes."""
        return False

    @property
    def base_models(self) -> dict[str, str]:
        """Frozen parts that are initialized from a trained model: the model's URL by the part's attribute name.

        A URL may be empty until a run is started.
        """
        return {}

    def part_geometry(self, part: str, grid: Grid, geometry: Geometry) -> tuple[Grid, Geometry]:  # noqa: ARG002
        """The grid and geometry that such a part must have been trained on, for a whole on `grid` and `geometry`."""
        return grid, geometry

    @abstractmethod
    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> VolumeNetwork:
        """The network from radiographs of `geometry` to volumes on `grid`, with initial weights.

        Raises:
            ConfigError: the geometry lacks a view, or the grid cannot be halved as often as the network needs.
        """

    @abstractmethod
    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:
        """The loss modules that train it, with initial weights, on volumes whose [0, 1] is `window` in HU."""
