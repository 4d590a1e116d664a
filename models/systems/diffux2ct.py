"""DiffuX2CT (Liu et al., ECCV 2024, arXiv 2407.13545): CT denoised under a condition made of two radiographs.

A tri-plane decoupling generator turns the radiographs into three feature planes, an implicit neural decoder asks them
at every voxel, and a 3-D U-Net with shifted-window attention denoises the volume under that condition. It tells the
noise; a geometry projection loss of weight 1/T compares mean projections of the one-step estimate along three axes.

Not published as far as we could read it, and chosen here: 1000 timesteps with beta from 1e-6 to 1e-2 in a straight line
(a public re-implementation of the same group's Diff2CT); every width; the condition enters at all sizes of the U-Net,
of which the two coarser ones have windows of 4 voxels; DPM-Solver++ for sampling; Adam at 2e-4 with betas 0.9 and
0.999; a moving average of the weights. The paper's one-step estimate lacks a square root: see
`models.diffusion.noise_schedule`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models.diffusion.conditional import Condition, ConditionalDiffusion, Data
from raylift.models.diffusion.denoiser import Denoiser, DenoiserConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.diffusion.triplane import TriPlane, TriPlaneConfig
from raylift.models.generative import SamplingConfig
from raylift.models.objectives.denoising import DenoisingLoss, denoising_objective
from raylift.models.objectives.objective import Objective
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig


@dataclass(frozen=True)
class TriPlaneSystem(SystemConfig):
    """Settings of a denoiser under a tri-plane condition; the defaults are for 128 voxels a side on a GPU."""

    name: str = ""
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry that look along an axis."""
    triplane: TriPlaneConfig = field(default_factory=TriPlaneConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    scheduler: NoiseSchedulerConfig = field(default_factory=NoiseSchedulerConfig)
    loss: DenoisingLoss = field(default_factory=DenoisingLoss)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the network draws unless told otherwise."""
    checkpointing: Literal["none", "all"] = "none"
    """Which activations are dropped after the forward pass and computed again in the backward pass."""

    @abstractmethod
    def reconstructor(self, grid: Grid, geometry: Geometry) -> TriPlaneDiffusion:
        """Tri-planes and the denoiser."""

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:  # noqa: ARG002
        """One player."""
        return denoising_objective(self.reconstructor(grid, geometry), self.loss)


@dataclass(frozen=True)
class DiffuX2CT(TriPlaneSystem):
    """The volume itself is denoised."""

    name: Literal["diffux2ct"] = "diffux2ct"

    def reconstructor(self, grid: Grid, geometry: Geometry) -> VolumeDiffusion:
        """Tri-planes and a denoiser of volumes."""
        return VolumeDiffusion(self, grid, geometry, limit=1.0, shape=(1, grid.size))


class TriPlaneDiffusion(ConditionalDiffusion):
    """A denoiser whose condition is the implicit decoder's answer at each of its sizes."""

    def __init__(
        self, system: TriPlaneSystem, grid: Grid, geometry: Geometry, limit: float, shape: tuple[int, int]
    ) -> None:
        super().__init__(system.scheduler, system.sampling, limit, shape)
        channels, size = shape
        self.sizes = system.denoiser.sizes(size)
        again = system.checkpointing == "all"
        self.triplane = TriPlane(system.triplane, system.views, grid, geometry, again)
        self.denoiser = Denoiser(system.denoiser, channels, system.triplane.condition_channels, again)

    def condition(self, radiographs: Float[Tensor, "n views rows columns"]) -> Condition:
        """Finest first."""
        made: Condition = self.triplane(radiographs, self.sizes)
        return made


class VolumeDiffusion(TriPlaneDiffusion):
    """A diffusion of volumes brought to [-1, 1]."""

    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:  # noqa: ARG002
        """Nothing has to be learned about them."""
        return 2 * volume - 1, {}

    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:  # noqa: ARG002
        """Back from [-1, 1]."""
        return (data + 1) / 2
