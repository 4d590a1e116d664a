"""The denoiser: a 3-D U-Net on noisy data, their timestep and a condition, with shifted-window attention.

```
noisy -> patches -> [blocks, attention] -> downsample -> [blocks, attention] -> ... -> blocks -> upsample -> ...
                       ^ condition                          ^ condition of that size
... -> depth to space -> prediction
```
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_minimum
from raylift.models.parts.blocks import ResnetBlock, group_norm, run
from raylift.models.parts.divisibility import require_divisible_channels, require_divisible_size


@dataclass(frozen=True)
class DenoiserConfig:
    """Settings of the U-Net; DiffuX2CT publishes none of them."""

    channels: tuple[int, ...] = (32, 64, 128, 256)
    """At each size, finest first."""
    blocks: int = 2
    """Residual blocks at each size, in the downsampling path and again in the upsampling path."""
    attention_levels: tuple[bool, ...] = (False, False, True, True)
    """Whether each size has window attention, finest first."""
    window: int = 4
    """Voxels per side of an attention window."""
    heads: int = 4
    """Attention heads of a shifted-window block."""
    patch: int = 1
    """Voxels per side that space-to-depth turns into channels at the finest size: 2 is an eighth of the work."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "channels", "blocks", "window", "heads", "patch")
        if not self.channels:
            raise ConfigError("no denoiser.channels: give one width or more")
        if len(self.attention_levels) != len(self.channels):
            raise ConfigError("denoiser.attention_levels and denoiser.channels: give as many of each")
        attended = [
            width for width, has_attention in zip(self.channels, self.attention_levels, strict=True) if has_attention
        ]
        require_divisible_channels(attended, self.heads, "set denoiser.heads to a divisor of each")

    def sizes(self, size: int) -> tuple[int, ...]:
        """Voxels per side at each size for data of `size`, finest first.

        Raises:
            ConfigError: the data are not divisible by all downsamplings.
        """
        step = self.patch * 2 ** (len(self.channels) - 1)
        require_divisible_size(size, step, "fewer denoiser.channels or a smaller denoiser.patch")
        return tuple(size // self.patch // 2**k for k in range(len(self.channels)))


def downsample(in_channels: int, out_channels: int) -> nn.Conv3d:
    """A strided convolution to half the size."""
    return nn.Conv3d(in_channels, out_channels, 3, stride=2, padding=1)


def upsample(in_channels: int, out_channels: int) -> nn.Sequential:
    """Nearest-neighbor interpolation to twice the size and a convolution, which avoids checkerboard artifacts."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv3d(in_channels, out_channels, 3, padding=1)
    )


def shifted_window_attention(channels: int, heads: int, window: int) -> nn.Module:
    """A regular and a shifted layer of window attention (Liu et al. 2021, in 3-D), MONAI's."""
    # The import takes seconds, and only denoisers need it.
    from monai.networks.nets.swin_unetr import BasicLayer

    layer: nn.Module = BasicLayer(channels, 2, heads, [window] * 3, drop_path=[0.0, 0.0], qkv_bias=True)
    return layer


class Stage(nn.Module):
    """Residual blocks of one size, then window attention where the size has any."""

    def __init__(self, widths: Sequence[int], embedding: int, attention: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(3, width, next_width, embedding) for width, next_width in itertools.pairwise(widths)
        )
        self.attention = attention if attention is not None else nn.Identity()

    def forward(self, features: Float[Tensor, "n c d h w"], embedding: Float[Tensor, "n e"]) -> Tensor:
        """Features of the same size."""
        for resnet in self.resnets:
            features = resnet(features, embedding)
        attended: Tensor = self.attention(features)
        return attended


class Denoiser(nn.Module):
    """Noisy data to the prediction of a diffusion model.

    The condition is added at every size after a 1 x 1 x 1 convolution; at the finest size this equals concatenation
    with the noisy data. The last convolution starts at zero.
    """

    def __init__(self, config: DenoiserConfig, channels: int, condition: int, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.patch, self.use_checkpoint = config.patch, use_checkpoint
        widths, embedding = config.channels, 4 * config.channels[0]
        self.embedding_channels = widths[0]
        patch_channels = channels * config.patch**3
        self.time_embedding = nn.Sequential(
            nn.Linear(config.channels[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )

        def stage(index: int, in_channels: int) -> Stage:
            width = widths[index]
            has_attention = config.attention_levels[index]
            attention = shifted_window_attention(width, config.heads, config.window) if has_attention else None
            return Stage((in_channels, *(width,) * config.blocks), embedding, attention)

        self.conv_in = nn.Conv3d(patch_channels, widths[0], 3, padding=1)
        self.cond_proj = nn.ModuleList(nn.Conv3d(condition, width, 1) for width in widths)
        self.down_blocks = nn.ModuleList(stage(k, width) for k, width in enumerate(widths))
        self.downsamplers = nn.ModuleList(downsample(*pair) for pair in itertools.pairwise(widths))
        self.upsamplers = nn.ModuleList(upsample(widths[k + 1], widths[k]) for k in range(len(widths) - 1))
        self.up_blocks = nn.ModuleList(stage(k, 2 * widths[k]) for k in range(len(widths) - 1))
        self.conv_out = nn.Sequential(
            group_norm(widths[0]), nn.SiLU(), nn.Conv3d(widths[0], patch_channels, 3, padding=1)
        )
        for layer in self.cond_proj:
            assert isinstance(layer, nn.Conv3d)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        for parameter in self.conv_out[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        noisy: Float[Tensor, "n c s s s"],
        timesteps: Int[Tensor, " n"],
        condition: Sequence[Float[Tensor, "n k _ _ _"]],
    ) -> Float[Tensor, "n c s s s"]:
        """A prediction as large as the data; the condition is finest first, in the sizes of `DenoiserConfig.sizes`."""
        checkpointed = partial(run, use_checkpoint=self.use_checkpoint)
        embedding = self.time_embedding(timestep_embedding(timesteps, self.embedding_channels))
        features = self.conv_in(space_to_depth(noisy, self.patch))
        skips: list[Tensor] = []
        for k, stage in enumerate(self.down_blocks):
            features = features if k == 0 else self.downsamplers[k - 1](features)
            features = checkpointed(stage, features + self.cond_proj[k](condition[k]), embedding)
            skips.append(features)
        skips.pop()
        while skips:
            features = checkpointed(partial(self._up, len(skips) - 1), features, skips.pop(), embedding)
        return depth_to_space(checkpointed(self.conv_out, features), self.patch)

    def _up(self, index: int, features: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        upsampled = self.upsamplers[index](features)
        output: Tensor = self.up_blocks[index](torch.cat([upsampled, skip], dim=1), embedding)
        return output


def timestep_embedding(timesteps: Int[Tensor, " n"], channels: int) -> Float[Tensor, "n channels"]:
    """The sinusoidal embedding of timesteps, from one radian per timestep to one radian in ten thousand."""
    half = (channels + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10_000) / max(half - 1, 1)))
    angles = timesteps[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :channels]


def space_to_depth(data: Float[Tensor, "n c s s s"], patch: int) -> Float[Tensor, "n patches q q q"]:
    """Cubes of `patch` voxels per side as channels: pixel unshuffle in 3-D."""
    n, c, s, *_ = data.shape
    q = s // patch
    cubes = data.reshape(n, c, q, patch, q, patch, q, patch)
    return cubes.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, c * patch**3, q, q, q)


def depth_to_space(data: Float[Tensor, "n patches q q q"], patch: int) -> Float[Tensor, "n c s s s"]:
    """The inverse of `space_to_depth`: pixel shuffle in 3-D."""
    n, channels, q, *_ = data.shape
    cubes = data.reshape(n, channels // patch**3, patch, patch, patch, q, q, q)
    return cubes.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, channels // patch**3, *(q * patch,) * 3)
