"""Latent diffusion conditioned as DiffuX2CT: a KL autoencoder's latents are denoised.

```
volume -> autoencoder -> latents, 32^3 for 128^3 -> noised -> denoiser conditioned as in DiffuX2CT -> latents -> volume
```

No paper of its own: the sizes (128^3 to 32^3 with eight channels), the cosine schedule and sample-prediction are
DVG-Diffusion's (arXiv 2503.17804), whose autoencoder is another; the condition is DiffuX2CT's, at the latents' sizes.
Autoencoder and denoiser have one loss module and train together from the first step. The denoiser's input are the
latents of that step, and it passes no gradient to them. Latents change while the autoencoder learns, but there is one
run, one checkpoint and no first stage of a chosen length, and the learning rate's decay lets both converge. The
autoencoder has no discriminator and no perceptual loss, so its volumes are a little soft.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.models.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from raylift.models.diffusion.conditional import Condition, Data
from raylift.models.diffusion.denoiser import DenoiserConfig
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.objectives.diffusion import DenoisingLoss
from raylift.models.system_entry import SystemEntry
from raylift.models.systems import diffux2ct
from raylift.models.systems.diffux2ct import TriPlaneDiffusion, TriPlaneSystem

CLIP_SAMPLE_RANGE = 5.0
"""Standard deviations to which estimates of latents are clipped."""


@dataclass(frozen=True)
class LatentDiffusion(TriPlaneSystem):
    """Latents are denoised."""

    name: str = "latent-diffusion"
    denoiser: DenoiserConfig = field(
        default_factory=lambda: DenoiserConfig((64, 128, 256), attention_levels=(False, True, True))
    )
    scheduler: NoiseSchedulerConfig = field(
        default_factory=lambda: NoiseSchedulerConfig("cosine", prediction_type="sample")
    )
    loss: DenoisingLoss = field(default_factory=lambda: DenoisingLoss(projection_weight=0.0))
    """Without the projection term: a projection of latents is not a radiograph."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        if self.loss.projection_weight:
            raise ConfigError("latents have no projections to compare: set system.loss.projection_weight to 0")

    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> LatentNetwork:
        """Tri-planes, a denoiser of latents and the autoencoder."""
        return LatentNetwork(self, grid, geometry)


class LatentNetwork(TriPlaneDiffusion):
    """A diffusion of latents."""

    def __init__(self, system: LatentDiffusion, grid: Grid, geometry: Geometry) -> None:
        shape = (system.autoencoder.latent_channels, system.autoencoder.latent_size(grid.size))
        super().__init__(system, grid, geometry, CLIP_SAMPLE_RANGE, shape)
        self.autoencoder = Autoencoder(system.autoencoder, system.checkpointing == "all")
        self.kl_weight = system.autoencoder.kl_weight

    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:  # noqa: ARG002
        """The mean latents, detached from the autoencoder, and the autoencoder's own loss."""
        latents, error, divergence = self.autoencoder.losses(2 * volume - 1)
        return latents.detach(), {"autoencoder_l1": error, "kl": self.kl_weight * divergence}

    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:  # noqa: ARG002
        """The decoded latents, back from [-1, 1]."""
        return (self.autoencoder.decode(data) + 1) / 2


FULL = LatentDiffusion(
    name="latent-diffusion",
    views=("frontal", "lateral"),
    triplane=diffux2ct.FULL.triplane,
    denoiser=DenoiserConfig(
        channels=(64, 128, 256), blocks=2, attention_levels=(False, True, True), window=4, heads=4, patch=1
    ),
    scheduler=NoiseSchedulerConfig(beta_schedule="cosine", num_train_timesteps=1000, prediction_type="sample"),
    loss=DenoisingLoss(projection_weight=0.0),
    ema_decay=0.999,
    autoencoder=AutoencoderConfig(channels=(32, 64), latent_channels=8, blocks=1, kl_weight=1e-4),
    sampling=SamplingConfig(sampler="dpm_solver", steps=16),
    checkpointing="all",
)
SLIM = replace(
    FULL,
    triplane=diffux2ct.SLIM.triplane,
    denoiser=replace(diffux2ct.SLIM.denoiser, patch=1),
    sampling=diffux2ct.SLIM.sampling,
    autoencoder=AutoencoderConfig(channels=(16, 32), latent_channels=4),
    checkpointing="none",
)

LATENT_DIFFUSION = SystemEntry(
    title="latent DiffuX2CT",
    summary="DiffuX2CT's condition on the latents of an autoencoder, trained together",
    paper="none: DiffuX2CT's condition on latents",
    year=None,
    views="2",
    kind="diffusion",
    full=FULL,
    slim=SLIM,
    tiny=SLIM,
    training=diffux2ct.TRAINING,
    slim_training=diffux2ct.SLIM_TRAINING,
    tiny_training=diffux2ct.TINY_TRAINING,
)
