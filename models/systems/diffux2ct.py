"""DiffuX2CT (Liu et al., ECCV 2024, arXiv 2407.13545): CT denoised under a condition made of two radiographs.

A tri-plane decoupling generator turns the radiographs into three feature planes, an implicit neural decoder asks them
at every voxel, and a 3-D U-Net with shifted-window attention denoises the volume under that condition. It tells the
noise; a geometry projection loss of weight 1/T compares mean projections of the one-step estimate along three axes.

Not published as far as we could read it, and chosen here: 1000 timesteps with beta from 1e-6 to 1e-2 in a straight line
(a public re-implementation of the same group's Diff2CT); every width; the condition enters at all sizes of the U-Net,
of which the two coarser ones have windows of 4 voxels; DPM-Solver++ for sampling; Adam at 2e-4 with betas 0.9 and
0.999; a moving average of the weights. The paper's one-step estimate lacks a square root: see `models.diffusion`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from raylift.datasets.geometry import Geometry, Grid
from raylift.models.conditional import Condition, ConditionalDiffusion, Data
from raylift.models.denoisers import Denoiser, DenoiserConfig
from raylift.models.diffusion import DiffusionConfig
from raylift.models.drawing import Draw
from raylift.models.objectives.diffusion import DenoisingLoss, denoising_objective
from raylift.models.objectives.turns import Objective
from raylift.models.system import SystemConfig
from raylift.models.triplane import TriPlane, TriPlaneConfig


@dataclass(frozen=True)
class DiffuX2CT(SystemConfig):
    """Settings; the defaults are for 128 voxels a side on a GPU."""

    name: Literal["diffux2ct"] = "diffux2ct"
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry that look along an axis."""
    triplane: TriPlaneConfig = field(default_factory=TriPlaneConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: DenoisingLoss = field(default_factory=DenoisingLoss)
    draw: Draw = field(default_factory=Draw)
    """How the network draws unless told otherwise."""
    checkpointing: bool = False
    """Whether activations are dropped after the forward pass and computed again in the backward pass."""

    def reconstructor(self, grid: Grid, geometry: Geometry) -> ConditionalDiffusion:
        """Tri-planes and the denoiser."""
        return VolumeDiffusion(self, grid, geometry)

    def objective(self, grid: Grid, geometry: Geometry) -> Objective:
        """One player."""
        return denoising_objective(self.reconstructor(grid, geometry), self.loss)


class VolumeDiffusion(ConditionalDiffusion):
    """A diffusion of volumes brought to [-1, 1]."""

    def __init__(self, system: DiffuX2CT, grid: Grid, geometry: Geometry) -> None:
        super().__init__(system.diffusion, system.draw, limit=1.0, shape=(1, grid.size))
        self.sizes = system.denoiser.sizes(grid.size)
        self.triplane = TriPlane(system.triplane, system.views, grid, geometry, system.checkpointing)
        self.denoiser = Denoiser(system.denoiser, 1, system.triplane.condition, system.checkpointing)

    def condition(self, radiographs: Float[Tensor, "n views rows columns"]) -> Condition:
        """The implicit decoder's answer at every size of the denoiser."""
        made: Condition = self.triplane(radiographs, self.sizes)
        return made

    def learn(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:  # noqa: ARG002
        """Nothing has to be learned about them."""
        return 2 * volume - 1, {}

    def volume(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:  # noqa: ARG002
        """Back from [-1, 1]."""
        return (data + 1) / 2
