"""DiffuX2CT's condition on the latents of a KL autoencoder: the variant that is plausible on modest hardware.

No paper of its own: the sizes (128^3 to 32^3 with eight channels), the cosine schedule and an estimate of the data as
what the network tells are DVG-Diffusion's (arXiv 2503.17804), whose autoencoder is another; the condition is
DiffuX2CT's, asked at the latents' sizes. Autoencoder and denoiser are one player and train together from the first
step. The denoiser sees latents as they are at that step and passes no gradient to them; what it learned of earlier ones
it has to unlearn, but there is one run, one checkpoint and no first stage to choose the length of, and the rate's
decay lets both come to rest. The autoencoder has no discriminator and no perceptual loss, so it is a little soft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.models.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from raylift.models.diffusion.conditional import Condition, Data
from raylift.models.diffusion.denoiser import DenoiserConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.objectives.denoising import DenoisingLoss
from raylift.models.systems.diffux2ct import TriPlaneDiffusion, TriPlaneSystem

LIMIT = 5.0
"""Standard deviations beyond which no estimate of a latent goes."""


@dataclass(frozen=True)
class LatentDiffusion(TriPlaneSystem):
    """Latents are denoised."""

    name: Literal["latent-diffusion"] = "latent-diffusion"
    denoiser: DenoiserConfig = field(default_factory=lambda: DenoiserConfig((64, 128, 256), levels_without_attention=1))
    scheduler: NoiseSchedulerConfig = field(
        default_factory=lambda: NoiseSchedulerConfig("cosine", prediction_type="sample")
    )
    loss: DenoisingLoss = field(default_factory=lambda: DenoisingLoss(projection=0.0))
    """Without the projection term: a projection of latents is no radiograph."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        if self.loss.projection:
            raise ConfigError("latents have no projections to compare: set system.loss.projection to 0")

    def reconstructor(self, grid: Grid, geometry: Geometry) -> LatentNetwork:
        """Tri-planes, a denoiser of latents and the autoencoder."""
        return LatentNetwork(self, grid, geometry)


class LatentNetwork(TriPlaneDiffusion):
    """A diffusion of latents."""

    def __init__(self, system: LatentDiffusion, grid: Grid, geometry: Geometry) -> None:
        shape = (system.autoencoder.latent_channels, system.autoencoder.latent_size(grid.size))
        super().__init__(system, grid, geometry, LIMIT, shape)
        self.autoencoder = Autoencoder(system.autoencoder, system.checkpointing == "all")
        self.kl = system.autoencoder.kl

    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:  # noqa: ARG002
        """The mean latents, cut off from the autoencoder, and the autoencoder's own loss."""
        latents, error, divergence = self.autoencoder.losses(2 * volume - 1)
        return latents.detach(), {"autoencoder_l1": error, "kl": self.kl * divergence}

    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:  # noqa: ARG002
        """What the latents decode to, back from [-1, 1]."""
        return (self.autoencoder.decode(data) + 1) / 2
