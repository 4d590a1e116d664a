"""What every system's settings can do, whatever its family: say what it reads, build its network and its objective.

A family is a frozen dataclass of settings that inherits from `SystemConfig`; its `name` is a `Literal` of its systems,
by which plain data find their way back to it (`models.zoo.System`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models.objectives.objective import Objective
from raylift.models.volume_network import VolumeNetwork

LearnsFrom = Literal["volumes", "radiographs"]

DEFAULT_WINDOW = Window()


class SystemConfig(ABC):
    """Settings of a system."""

    name: str
    """The system of the literature this began as."""

    @property
    @abstractmethod
    def views(self) -> tuple[str, ...]:
        """Names of views of the archive's geometry, in the order of the network's inputs."""

    @property
    def learns_from(self) -> LearnsFrom:
        """Whether its objective compares with the CT of the views, or is given none.

        One that learns from radiographs trains on archives of both kinds and may look at CT of other people.
        """
        return "volumes"

    @property
    def needs_labels(self) -> bool:
        """Whether its loss looks at the archive's label volumes."""
        return False

    @property
    def pretrained(self) -> dict[str, str]:
        """Parts that begin as a trained model and stay as it is: field here and attribute of the network, to its URL.

        A URL may be empty until a run is started.
        """
        return {}

    def frame_of(self, part: str, grid: Grid, geometry: Geometry) -> tuple[Grid, Geometry]:  # noqa: ARG002
        """What such a part must have been trained on, where the whole is trained on `grid` and `geometry`."""
        return grid, geometry

    @abstractmethod
    def reconstructor(self, grid: Grid, geometry: Geometry) -> VolumeNetwork:
        """The network that makes volumes on `grid` from radiographs taken as `geometry` says, with fresh weights.

        Raises:
            ConfigError: the geometry lacks a view, or the grid cannot be halved as often as the network wants.
        """

    @abstractmethod
    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:
        """The players that train it, with fresh weights, on volumes whose [0, 1] is `window` in HU."""
