"""A KL autoencoder: volumes to latents a quarter as large on each side, and back (Rombach et al. 2022).

The mean of a volume's latents is normalized over that volume: mean 0, variance 1 over all channels and places. So a
diffusion meets the scale it was made for from the first step on, and no running statistic has to agree between ranks
or outlive a resume. The two numbers a volume loses by it the encoder can write into any channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_least
from raylift.models.diffusion.denoiser import DenoisingBlock, double, group_norm, halve
from raylift.models.parts.blocks import run


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes and weights; DVG-Diffusion, whose coder is a VQGAN, has latents of this shape."""

    channels: tuple[int, ...] = (32, 64)
    """After each halving, finest first."""
    latent: int = 8
    """Channels of the latents."""
    blocks: int = 1
    """Residual blocks at each size, on either way."""
    kl: float = 1e-4
    """Weight of the mean KL divergence beside the mean absolute error, whose weight is 1."""

    def __post_init__(self) -> None:
        require_least(self, 1, "channels", "latent", "blocks")
        require_least(self, 0, "kl")
        if not self.channels:
            raise ConfigError("no autoencoder.channels: give one width or more")

    def latent_size(self, size: int) -> int:
        """Voxels a side of the latents.

        Raises:
            ConfigError: the volume cannot be halved so often.
        """
        step: int = 2 ** len(self.channels)
        if size % step:
            raise ConfigError(f"size {size} cannot be halved {len(self.channels)} times: use a multiple of {step}")
        return size // step


class Autoencoder(nn.Module):
    """Both ways; volumes are in [-1, 1]."""

    def __init__(self, config: AutoencoderConfig, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        widths = config.channels

        def blocks(width: int) -> list[nn.Module]:
            return [DenoisingBlock(width, width) for _ in range(config.blocks)]

        # The finest voxels are never looked at in many channels, which is where the time would go.
        down: list[nn.Module] = [nn.Conv3d(1, widths[0], 4, stride=2, padding=1), *blocks(widths[0])]
        for finer, coarser in pairwise(widths):
            down += [halve(finer, coarser), *blocks(coarser)]
        down += [group_norm(widths[-1]), nn.SiLU(), nn.Conv3d(widths[-1], 2 * config.latent, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv3d(config.latent, widths[-1], 3, padding=1), *blocks(widths[-1])]
        for coarser, finer in pairwise(reversed(widths)):
            up += [double(coarser, finer), *blocks(finer)]
        up += [group_norm(widths[0]), nn.SiLU(), nn.ConvTranspose3d(widths[0], 1, 4, stride=2, padding=1)]
        self.down, self.up = nn.Sequential(*down), nn.Sequential(*up)

    def encode(
        self, volume: Float[Tensor, "n 1 d h w"]
    ) -> tuple[Float[Tensor, "n c s s s"], Float[Tensor, "n c s s s"]]:
        """Mean, normalized, and logarithm of the variance, which starts near -6: little noise beside a mean of 1."""
        mean, log_variance = run(self.down, volume, recompute=self.recompute).float().chunk(2, dim=1)
        return F.group_norm(mean, 1), (log_variance - 6).clip(-20, 5)

    def decode(self, latents: Float[Tensor, "n c s s s"]) -> Float[Tensor, "n 1 d h w"]:
        """Volumes; values beyond [-1, 1] can occur."""
        volume: Tensor = run(self.up, latents, recompute=self.recompute)
        return volume.float()

    def losses(
        self, volume: Float[Tensor, "n 1 d h w"]
    ) -> tuple[Float[Tensor, "n c s s s"], Float[Tensor, ""], Float[Tensor, ""]]:
        """The mean latents, the mean absolute error of what a draw around them decodes to, and the KL divergence."""
        mean, log_variance = self.encode(volume)
        drawn = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return mean, F.l1_loss(self.decode(drawn), volume), divergence
