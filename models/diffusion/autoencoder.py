"""A KL autoencoder for latent diffusion (Rombach et al. 2022): volumes to latents and back.

The mean of a volume's latents is normalized over that volume: mean 0 and variance 1 over all channels and voxels. The
diffusion model therefore has data of unit variance from the first step, without running statistics that ranks must
agree on and checkpoints must keep. The encoder can write the two numbers that a volume loses into any channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_minimum
from raylift.models.diffusion.denoiser import downsample, upsample
from raylift.models.parts.blocks import ResnetBlock, group_norm, run
from raylift.models.parts.divisibility import require_divisible_size


@dataclass(frozen=True)
class AutoencoderConfig:
    """Widths and loss weights; DVG-Diffusion, whose autoencoder is a VQGAN, has latents of this shape."""

    channels: tuple[int, ...] = (32, 64)
    """After each downsampling, finest first."""
    latent_channels: int = 8
    """Channels of the latents."""
    blocks: int = 1
    """Residual blocks at each size, in the encoder and in the decoder."""
    kl_weight: float = 1e-4
    """Weight of the mean KL divergence, relative to the mean absolute error, whose weight is 1."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "channels", "latent_channels", "blocks")
        require_minimum(self, 0, "kl_weight")
        if not self.channels:
            raise ConfigError("no autoencoder.channels: give one width or more")

    def latent_size(self, size: int) -> int:
        """Voxels per side of the latents.

        Raises:
            ConfigError: the volume is not divisible by all downsamplings.
        """
        step: int = 2 ** len(self.channels)
        require_divisible_size(size, step, "fewer autoencoder.channels", least=1)
        return size // step


class Autoencoder(nn.Module):
    """Encoder and decoder of volumes in [-1, 1]."""

    def __init__(self, config: AutoencoderConfig, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        widths, latent = config.channels, config.latent_channels

        def blocks(width: int) -> list[nn.Module]:
            return [ResnetBlock(3, width, width) for _ in range(config.blocks)]

        # No block works at full size, where most of the time would be spent.
        encoder: list[nn.Module] = [nn.Conv3d(1, widths[0], 4, stride=2, padding=1), *blocks(widths[0])]
        for finer, coarser in pairwise(widths):
            encoder += [downsample(finer, coarser), *blocks(coarser)]
        encoder += [group_norm(widths[-1]), nn.SiLU(), nn.Conv3d(widths[-1], 2 * latent, 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv3d(latent, widths[-1], 3, padding=1), *blocks(widths[-1])]
        for coarser, finer in pairwise(reversed(widths)):
            decoder += [upsample(coarser, finer), *blocks(finer)]
        decoder += [group_norm(widths[0]), nn.SiLU(), nn.ConvTranspose3d(widths[0], 1, 4, stride=2, padding=1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def encode(
        self, volume: Float[Tensor, "n 1 d h w"]
    ) -> tuple[Float[Tensor, "n c s s s"], Float[Tensor, "n c s s s"]]:
        """The normalized mean and the log-variance, which starts near -6: little noise to a variance of 1."""
        moments = run(self.encoder, volume, use_checkpoint=self.use_checkpoint).float()
        mean, log_variance = moments.chunk(2, dim=1)
        return F.group_norm(mean, 1), (log_variance - 6).clip(-20, 5)

    def decode(self, latents: Float[Tensor, "n c s s s"]) -> Float[Tensor, "n 1 d h w"]:
        """Volumes; values outside [-1, 1] can occur."""
        volume: Tensor = run(self.decoder, latents, use_checkpoint=self.use_checkpoint)
        return volume.float()

    def losses(
        self, volume: Float[Tensor, "n 1 d h w"]
    ) -> tuple[Float[Tensor, "n c s s s"], Float[Tensor, ""], Float[Tensor, ""]]:
        """The mean latents, the mean absolute error of a decoded sample of the latents, and the KL divergence."""
        mean, log_variance = self.encode(volume)
        sample = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return mean, F.l1_loss(self.decode(sample), volume), divergence
