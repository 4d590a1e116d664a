"""Diffusion refiner: any system's volume is the condition under which what it lacks is drawn.

```
radiographs -> base, frozen -> coarse volume -+-> condition -> U-Net, asked at every step -> residual
           `-> spread along their rays -------+                      volume = coarse + residual
```

The idea is a student report's: a diffusion model as post-processing of volumes made from radiographs. There a network
learned to denoise CT for five epochs, nothing tied it to the volume it was to improve, and the 40.15 dB that are
reported are those of an array of random numbers with 1 % of noise. Here what is denoised is the residual, truth less
coarse volume, and the network tells it as it is: one that has learned little gives the mean residual, where one that
told the noise, or v, would leave noise in the volume. All settings are ours.

Where the base gives something like the mean of what the radiographs allow, a draw is one of the possibilities: it is
sharper, and need not be nearer to the truth. The mean of several draws is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models.diffusion.conditional import Condition, ConditionalDiffusion, Data
from raylift.models.diffusion.denoiser import Denoiser, DenoiserConfig, depth_to_space, space_to_depth
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.generative import SamplingConfig
from raylift.models.objectives.denoising import DenoisingLoss, denoising_objective
from raylift.models.objectives.objective import Objective
from raylift.models.parts.encoders import at_size
from raylift.models.parts.rays import Rays
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig
from raylift.models.systems.x2ct import x2ct_gan


@dataclass(frozen=True)
class Refiner(SystemConfig):
    """Settings; the defaults refine X2CT-GAN at its own resolution."""

    name: Literal["refiner"] = "refiner"
    base: SystemConfig = field(default_factory=x2ct_gan)
    """The system whose volumes are refined; taken from `base_model` where that is given."""
    base_model: str = ""
    """The trained base: a run, a checkpoint or an exported model. Read when a run begins; from then on the base is part
    of the refiner's own weights."""
    upsampling: Literal[1, 2] = 1
    """How many times finer the volume is than the base's."""
    residual_scale: float = 0.1
    """What is 1 to the denoiser, as a share of the window: about twice the base's root mean square error."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    scheduler: NoiseSchedulerConfig = field(
        default_factory=lambda: NoiseSchedulerConfig(beta_schedule="cosine", prediction_type="sample")
    )
    loss: DenoisingLoss = field(default_factory=DenoisingLoss)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=1))
    """How the network draws unless told otherwise: with one step a draw is nearest to the truth. More steps spread the
    draws more, and each is then further from it: `docs/systems.md` has figures."""
    checkpointing: Literal["none", "all"] = "none"
    """Whether activations are dropped after the forward pass and computed again in the backward pass."""

    def __post_init__(self) -> None:
        if not 0 < self.residual_scale <= 1:
            raise ConfigError(f"system.residual_scale is {self.residual_scale}: give a share of the window, 0 to 1")

    @property
    def views(self) -> tuple[str, ...]:
        """The base's."""
        return self.base.views

    @property
    def pretrained(self) -> dict[str, str]:
        """The base."""
        return {"base": self.base_model}

    def frame_of(self, part: str, grid: Grid, geometry: Geometry) -> tuple[Grid, Geometry]:  # noqa: ARG002
        """The same field of view, with voxels and pixels as coarse as the base's."""
        times = self.upsampling
        if grid.size % times or geometry.detector_px % times:
            raise ConfigError(f"size {grid.size} is no multiple of {times}: set system.upsampling to 1")
        return (
            Grid(grid.size // times, grid.spacing_mm * times),
            replace(
                geometry,
                detector_px=geometry.detector_px // times,
                detector_pitch_mm=geometry.detector_pitch_mm * times,
            ),
        )

    def reconstructor(self, grid: Grid, geometry: Geometry) -> ConditionalDiffusion:
        """The base and a denoiser of its residuals."""
        return ResidualDiffusion(self, grid, geometry)

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:  # noqa: ARG002
        """One player, whose base stays as it is."""
        return denoising_objective(self.reconstructor(grid, geometry), self.loss)


class ResidualDiffusion(ConditionalDiffusion):
    """A diffusion of residuals, and the frozen network that makes what they are added to.

    A base that draws gives its first draw.
    """

    def __init__(self, system: Refiner, grid: Grid, geometry: Geometry) -> None:
        scale = system.residual_scale
        super().__init__(system.scheduler, system.sampling, clip_sample_range=1 / scale, sample_shape=(1, grid.size))
        base_grid, base_geometry = system.frame_of("base", grid, geometry)
        self.base = system.base.reconstructor(base_grid, base_geometry).requires_grad_(False).eval()
        self.base_px, self.size, self.scale = base_geometry.detector_px, grid.size, scale
        self.rays = [Rays(grid, geometry, geometry.view(name), follow_geometry=True) for name in system.views]
        self.sizes, self.patch = system.denoiser.sizes(grid.size), system.denoiser.patch
        channels = (1 + len(self.rays)) * self.patch**3
        self.denoiser = Denoiser(system.denoiser, 1, channels, system.checkpointing == "all")

    def train(self, mode: bool = True) -> ResidualDiffusion:
        """The base stays in evaluation mode: neither dropout nor running statistics."""
        super().train(mode)
        self.base.eval()
        return self

    @torch.no_grad()
    def condition(self, radiographs: Float[Tensor, "n views rows columns"]) -> Condition:
        """The base's volume and the radiographs along their rays, as large as each size of the denoiser."""
        coarse = self.base(at_size(radiographs, self.base_px)).float().clip(0.0, 1.0)
        if coarse.shape[-1] != self.size:
            coarse = F.interpolate(coarse, size=(self.size,) * 3, mode="trilinear", align_corners=False)
        images = at_size(radiographs, self.size)
        seen = [rays.backproject(images[:, k : k + 1]) for k, rays in enumerate(self.rays)]
        finest = space_to_depth(torch.cat([coarse, *seen], dim=1), self.patch)
        return [finest if k == 0 else F.avg_pool3d(finest, 2**k) for k in range(len(self.sizes))]

    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:
        """What the base's volume lacks; nothing has to be learned about it."""
        return (volume - self._coarse(condition)) / self.scale, {}

    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:
        """The base's volume and what it lacks."""
        return self._coarse(condition) + self.scale * data

    def _coarse(self, condition: Condition) -> Float[Tensor, "n 1 d h w"]:
        return depth_to_space(condition[0][:, : self.patch**3], self.patch)
