"""Systems of the parts of a composition that are supervised by reprojection."""

from __future__ import annotations

from dataclasses import dataclass, field

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models.composition import Parts
from raylift.models.drr import Reprojection
from raylift.models.objectives.objective import Objective
from raylift.models.objectives.reprojection import ReprojectionLoss, reprojection_objective
from raylift.models.parts.discriminators import ViewDiscriminatorConfig
from raylift.models.system_config import DEFAULT_WINDOW, Supervision


@dataclass(frozen=True)
class ReprojectionComposition(Parts):
    """Settings of u-X2CTGAN and cGAN-128."""

    name: str = "u-x2ctgan"
    discriminator: ViewDiscriminatorConfig = field(default_factory=ViewDiscriminatorConfig)
    loss: ReprojectionLoss = field(default_factory=ReprojectionLoss)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.loss.max_thickness_mm) != len(self.views):
            raise ConfigError(
                f"system.loss.max_thickness_mm {self.loss.max_thickness_mm} for {len(self.views)} views: give one for "
                "each, and of min_thickness_mm too"
            )
        if self.discriminator.conditional and (self.loss.rotation_std_deg or len(self.views) < 2):
            raise ConfigError(
                "a conditional discriminator compares a view with the others given: give two views or more and set "
                "system.loss.rotation_std_deg to 0, or set system.discriminator.conditional to false"
            )

    @property
    def supervision(self) -> Supervision:
        """`radiographs`: training needs no CT of the patients whose radiographs these are."""
        return "radiographs"

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:
        """The reconstruction network, and a discriminator of radiographs if the adversarial term has a weight."""
        discriminator = self.discriminator.build(len(self.views)) if self.loss.adversarial_weight else None
        reprojection = Reprojection(grid, geometry, window, self.views)
        return reprojection_objective(
            self.reconstruction_network(grid, geometry), discriminator, reprojection, self.loss
        )
