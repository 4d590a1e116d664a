"""DiffuX2CT (Liu et al., ECCV 2024, arXiv 2407.13545): conditional diffusion of CT volumes.

```
frontal -> encoder -+-> coronal, sagittal and axial plane -> implicit decoder at every voxel -> condition
lateral -> encoder -+                                                                               |
noisy volume ------------------------------> 3-D U-Net with shifted windows <-----------------------+
                                                     `-> epsilon
```

A tri-plane decoupling generator maps the radiographs to three feature planes, an implicit neural decoder samples
them at every voxel, and a 3-D U-Net with shifted-window attention denoises the volume under that condition. It predicts
epsilon; a geometry projection loss of weight 1/T compares mean projections of the predicted x0 along three axes.

Not published, as far as the text is legible; chosen here: 1000 timesteps with beta linear from 1e-6 to 1e-2
(a public re-implementation of the same group's Diff2CT); every width; the condition enters at all sizes of the U-Net,
of which the two coarser ones have windows of 4 voxels; DPM-Solver++ for sampling; Adam at 2e-4 with betas 0.9 and
0.999 (of that re-implementation); an exponential moving average of the weights. The paper's estimate of x0 lacks a
square root: see `models.diffusion.noise_schedule`. The network's output is preconditioned, which leaves the published
loss as it is. The slim variant predicts the sample under a cosine schedule: with epsilon-prediction, training takes
many times as long until samples show the patient's outline.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models import system_entry
from raylift.models.diffusion.conditional import Condition, ConditionalDiffusion, Data
from raylift.models.diffusion.denoiser import Denoiser, DenoiserConfig
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.diffusion.triplane import TriPlane, TriPlaneConfig
from raylift.models.objectives.diffusion import DenoisingLoss, denoising_objective
from raylift.models.objectives.objective import Objective
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig
from raylift.models.system_entry import SystemEntry, Training


@dataclass(frozen=True)
class TriPlaneSystem(SystemConfig):
    """Settings of a denoiser under a tri-plane condition; the defaults are for 128 voxels per side on a GPU."""

    name: str = ""
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry whose rays run along an axis."""
    triplane: TriPlaneConfig = field(default_factory=TriPlaneConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    scheduler: NoiseSchedulerConfig = field(default_factory=NoiseSchedulerConfig)
    loss: DenoisingLoss = field(default_factory=DenoisingLoss)
    ema_decay: float = 0.999
    """Decay of the exponential moving average (EMA) of the weights, which is used for sampling, validation and export;
    0 for the weights themselves. Not published."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How `forward` samples."""
    checkpointing: Literal["none", "all"] = "none"
    """Activation checkpointing."""

    @abstractmethod
    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> TriPlaneDiffusion:
        """Tri-planes and the denoiser."""

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:  # noqa: ARG002
        """The denoising loss, minimized by one network."""
        return denoising_objective(self.reconstruction_network(grid, geometry), self.loss, self.ema_decay)


@dataclass(frozen=True)
class DiffuX2CT(TriPlaneSystem):
    """The volume itself is denoised."""

    name: str = "diffux2ct"

    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> VolumeDiffusion:
        """Tri-planes and a denoiser of volumes."""
        return VolumeDiffusion(self, grid, geometry, clip_sample_range=1.0, sample_shape=(1, grid.size))


class TriPlaneDiffusion(ConditionalDiffusion):
    """A denoiser whose condition is the implicit decoder's output at each of its sizes."""

    def __init__(
        self,
        system: TriPlaneSystem,
        grid: Grid,
        geometry: Geometry,
        clip_sample_range: float,
        sample_shape: tuple[int, int],
    ) -> None:
        super().__init__(system.scheduler, system.sampling, clip_sample_range, sample_shape)
        channels, size = sample_shape
        self.sizes = system.denoiser.sizes(size)
        use_checkpoint = system.checkpointing == "all"
        self.triplane = TriPlane(system.triplane, system.views, grid, geometry, use_checkpoint)
        self.denoiser = Denoiser(system.denoiser, channels, system.triplane.condition_channels, use_checkpoint)

    def condition(self, radiographs: Float[Tensor, "n views rows columns"]) -> Condition:
        """Feature volumes at the sizes of the denoiser, finest first."""
        condition: Condition = self.triplane(radiographs, self.sizes)
        return condition


class VolumeDiffusion(TriPlaneDiffusion):
    """A diffusion of volumes scaled to [-1, 1]."""

    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:  # noqa: ARG002
        """Volumes scaled to [-1, 1]; no losses, because nothing is learned."""
        return 2 * volume - 1, {}

    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:  # noqa: ARG002
        """Back from [-1, 1]."""
        return (data + 1) / 2


FULL = DiffuX2CT(
    name="diffux2ct",
    views=("frontal", "lateral"),
    triplane=TriPlaneConfig(
        encoder=EncoderConfig(
            kind="dense", init_features=32, growth_rate=16, bottleneck_channels=64, block_config=(4, 6, 8, 6)
        ),
        channels=32,
        hidden=64,
        layers=2,
        condition_channels=32,
    ),
    denoiser=DenoiserConfig(
        channels=(32, 64, 128, 256), blocks=2, attention_levels=(False, False, True, True), window=4, heads=4, patch=1
    ),
    scheduler=NoiseSchedulerConfig(
        beta_schedule="linear",
        num_train_timesteps=1000,
        beta_start=1e-6,
        beta_end=1e-2,
        prediction_type="epsilon",
        preconditioning=True,
    ),
    loss=DenoisingLoss(projection_weight=1.0),
    ema_decay=0.999,
    sampling=SamplingConfig(sampler="dpm_solver", steps=16),
    checkpointing="all",
)
SLIM = replace(
    FULL,
    triplane=TriPlaneConfig(
        EncoderConfig(init_features=16, growth_rate=8, bottleneck_channels=32, block_config=(2, 3, 3)),
        channels=16,
        hidden=32,
        layers=1,
        condition_channels=16,
    ),
    denoiser=DenoiserConfig(channels=(32, 48, 64), blocks=1, attention_levels=(False, True, True), patch=2),
    scheduler=NoiseSchedulerConfig(beta_schedule="cosine", prediction_type="sample"),
    # On trained slim models the fewest of 1 to 32 steps within 0.1 dB of the best, for every sampler.
    sampling=SamplingConfig(steps=2),
    checkpointing="none",
)

TRAINING = Training(steps=100_000, lr=2e-4, betas=(0.9, 0.999), gradient_clipping=1.0, precision="bf16")
SLIM_TRAINING = replace(system_entry.SLIM_TRAINING, betas=(0.9, 0.999))
TINY_TRAINING = replace(system_entry.TINY_TRAINING, betas=(0.9, 0.999))

DIFFUX2CT = SystemEntry(
    title="DiffuX2CT",
    summary="a volume denoised conditionally on tri-plane features",
    paper="Liu et al. 2024, arXiv 2407.13545",
    year=2024,
    views="2",
    kind="diffusion",
    full=FULL,
    slim=SLIM,
    tiny=SLIM,
    training=TRAINING,
    slim_training=SLIM_TRAINING,
    tiny_training=TINY_TRAINING,
)
