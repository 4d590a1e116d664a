"""Diffusion refiner: samples the residual between the ground truth and the volume of any trained system.

```
radiographs -> base, frozen -> coarse volume -+-> condition -> U-Net at every sampling step -> residual
           `-> repeated along their rays -----+                     volume = coarse + residual
```

The idea is a student report's: a diffusion model as post-processing of volumes made from radiographs. There a network
was trained to denoise CT for five epochs without the volume to improve as a condition, and the 40.15 dB reported are
those of an array of random numbers with 1 % of noise. Here the residual, ground truth less coarse volume, is denoised
with sample-prediction: a network early in training predicts the mean residual, where epsilon- or v-prediction
would leave noise in the volume. All settings are chosen here.

The base's volume resembles the mean of the volumes that the radiographs allow; a sample is one of them. It is sharper,
and need not be nearer to the ground truth. The mean of several samples is.
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
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.objectives.diffusion import DenoisingLoss, denoising_objective
from raylift.models.objectives.objective import Objective
from raylift.models.parts.encoders import at_size
from raylift.models.parts.rays import Rays
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig
from raylift.models.system_entry import SLIM_TRAINING, TINY_TRAINING, SystemEntry, Training
from raylift.models.systems.x2ct import X2CT_GAN


@dataclass(frozen=True)
class Refiner(SystemConfig):
    """Settings; the defaults refine X2CT-GAN at its own resolution."""

    name: str = "refiner"
    base: SystemConfig = field(default_factory=lambda: X2CT_GAN.full)
    """The system whose volumes are refined; taken from `base_model` where that is given."""
    base_model: str = ""
    """The trained base: a run, a checkpoint or an exported model. Read when a run begins; from then on the base is part
    of the refiner's own weights."""
    upsampling: Literal[1, 2] = 1
    """How many times finer the volume is than the base's."""
    residual_scale: float = 0.1
    """The residual that is scaled to 1 for the denoiser, as a share of the window: about twice the base's root mean
    square error."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    scheduler: NoiseSchedulerConfig = field(
        default_factory=lambda: NoiseSchedulerConfig(beta_schedule="cosine", prediction_type="sample")
    )
    loss: DenoisingLoss = field(default_factory=DenoisingLoss)
    ema_decay: float = 0.999
    """Decay of the exponential moving average (EMA) of the weights, which is used for sampling, validation and export;
    0 for the weights themselves. Not published."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=1))
    """How `forward` samples: with one step a sample is nearest to the ground truth. More steps raise the standard
    deviation over samples, and each is then further from it: `docs/systems.md` has results."""
    checkpointing: Literal["none", "all"] = "none"
    """Activation checkpointing."""

    def __post_init__(self) -> None:
        if not 0 < self.residual_scale <= 1:
            raise ConfigError(f"system.residual_scale is {self.residual_scale}: give a fraction of the window, 0 to 1")

    @property
    def views(self) -> tuple[str, ...]:
        """The views of the base system."""
        return self.base.views

    @property
    def any_views(self) -> bool:
        """Its condition is the base's volume, and radiographs along their own rays."""
        return self.base.any_views

    @property
    def base_models(self) -> dict[str, str]:
        """The base."""
        return {"base": self.base_model}

    def part_geometry(self, part: str, grid: Grid, geometry: Geometry) -> tuple[Grid, Geometry]:  # noqa: ARG002
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

    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> ConditionalDiffusion:
        """The base and a denoiser of its residuals."""
        return ResidualDiffusion(self, grid, geometry)

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:  # noqa: ARG002
        """One network, whose base is frozen."""
        return denoising_objective(self.reconstruction_network(grid, geometry), self.loss, self.ema_decay)


class ResidualDiffusion(ConditionalDiffusion):
    """A diffusion of residuals, and the frozen network whose volume they are added to.

    A base that is a diffusion model gives its first sample.
    """

    def __init__(self, system: Refiner, grid: Grid, geometry: Geometry) -> None:
        scale = system.residual_scale
        super().__init__(system.scheduler, system.sampling, clip_sample_range=1 / scale, sample_shape=(1, grid.size))
        base_grid, base_geometry = system.part_geometry("base", grid, geometry)
        self.base = system.base.reconstruction_network(base_grid, base_geometry).requires_grad_(False).eval()
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
        repeated = [rays.backproject(images[:, k : k + 1]) for k, rays in enumerate(self.rays)]
        finest = space_to_depth(torch.cat([coarse, *repeated], dim=1), self.patch)
        return [finest if k == 0 else F.avg_pool3d(finest, 2**k) for k in range(len(self.sizes))]

    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:
        """The residual, scaled; nothing else is trained."""
        return (volume - self._coarse(condition)) / self.scale, {}

    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:
        """The base's volume plus the residual."""
        return self._coarse(condition) + self.scale * data

    def _coarse(self, condition: Condition) -> Float[Tensor, "n 1 d h w"]:
        return depth_to_space(condition[0][:, : self.patch**3], self.patch)


FULL = Refiner(
    name="refiner",
    base=X2CT_GAN.full,
    upsampling=1,
    residual_scale=0.1,
    denoiser=DenoiserConfig(
        channels=(32, 64, 128, 256), blocks=2, attention_levels=(False, False, True, True), window=4, heads=4, patch=1
    ),
    scheduler=NoiseSchedulerConfig(beta_schedule="cosine", num_train_timesteps=1000, prediction_type="sample"),
    loss=DenoisingLoss(projection_weight=1.0),
    ema_decay=0.999,
    sampling=SamplingConfig(sampler="dpm_solver", steps=1),
    checkpointing="all",
)
SLIM = replace(
    FULL,
    base=X2CT_GAN.slim,
    denoiser=DenoiserConfig(channels=(32, 48, 64), blocks=1, attention_levels=(False,) * 3, patch=2),
    checkpointing="none",
)
TINY = replace(
    SLIM,
    base=X2CT_GAN.tiny,
    denoiser=DenoiserConfig(channels=(8, 16), blocks=1, attention_levels=(False, False), patch=2),
)

REFINER = SystemEntry(
    title="diffusion refiner",
    summary="samples the residual of any trained model's volume (--system.base-model)",
    paper="Adwait et al. 2024, Boston University",
    year=2024,
    views="any",
    kind="diffusion",
    full=FULL,
    slim=SLIM,
    tiny=TINY,
    training=Training(steps=100_000, lr=2e-4, betas=(0.9, 0.999), gradient_clipping=1.0, precision="bf16"),
    slim_training=replace(SLIM_TRAINING, betas=(0.9, 0.999)),
    tiny_training=replace(TINY_TRAINING, betas=(0.9, 0.999)),
)
