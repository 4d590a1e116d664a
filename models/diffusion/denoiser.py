"""A 3-D U-Net that looks at noisy data, their timestep and a condition, with shifted windows at its coarser sizes.

```
noisy -> patches -> [blocks, windows] -> halve -> [blocks, windows] -> ... -> blocks -> double -> ... -> patches -> told
                       ^ condition               ^ condition of that size
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
from raylift.datasets.serialization import require_least
from raylift.models.parts.blocks import run


@dataclass(frozen=True)
class DenoiserConfig:
    """The U-Net's settings; DiffuX2CT publishes none of them."""

    channels: tuple[int, ...] = (32, 64, 128, 256)
    """At each size, finest first."""
    blocks: int = 2
    """Residual blocks at each size, on the way down and again on the way up."""
    plain_sizes: int = 2
    """Sizes, from the finest, that do without windows."""
    window: int = 4
    """Voxels a side of a window."""
    heads: int = 4
    patch: int = 1
    """Voxels a side that become channels of one at the finest size: 2 is an eighth of the work."""

    def __post_init__(self) -> None:
        require_least(self, 1, "channels", "blocks", "window", "heads", "patch")
        require_least(self, 0, "plain_sizes")
        if not self.channels:
            raise ConfigError("no denoiser.channels: give one width or more")
        attending = self.channels[self.plain_sizes :]
        if any(width % self.heads for width in attending):
            raise ConfigError(f"{self.heads} heads cannot share {attending} channels: use a divisor of each")

    def sizes(self, size: int) -> tuple[int, ...]:
        """Voxels a side at each size for data of `size`, finest first.

        Raises:
            ConfigError: the data cannot be divided so often.
        """
        step = self.patch * 2 ** (len(self.channels) - 1)
        if size % step or size < 2 * step:
            raise ConfigError(
                f"data of {size} voxels a side cannot be divided by {step} to 2 or more: use a multiple of {step} from "
                f"{2 * step} up, fewer denoiser.channels or a smaller denoiser.patch"
            )
        return tuple(size // self.patch // 2**k for k in range(len(self.channels)))


def group_norm(channels: int) -> nn.GroupNorm:
    """Eight groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class DenoisingBlock(nn.Module):
    """Two normed convolutions beside a straight path; an embedding scales and shifts what stands between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int = 0) -> None:
        super().__init__()
        self.before = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv3d(in_channels, out_channels, 3, padding=1)
        )
        self.norm = group_norm(out_channels)
        self.after = nn.Sequential(nn.SiLU(), nn.Conv3d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.straight = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)
        if embedding:
            self.modulate = nn.Linear(embedding, 2 * out_channels)

    def forward(
        self, features: Float[Tensor, "n c d h w"], embedded: Float[Tensor, "n e"] | None = None
    ) -> Float[Tensor, "n out d h w"]:
        """The same size."""
        bend = self.norm(self.before(features))
        if embedded is not None:
            scale, shift = self.modulate(embedded)[..., None, None, None].chunk(2, dim=1)
            bend = bend * (1 + scale) + shift
        summed: Tensor = self.straight(features) + self.after(bend)
        return summed


def halve(in_channels: int, out_channels: int) -> nn.Conv3d:
    """A strided convolution to half the size."""
    return nn.Conv3d(in_channels, out_channels, 3, stride=2, padding=1)


def double(in_channels: int, out_channels: int) -> nn.Sequential:
    """Nearest neighbors to twice the size, then a convolution: no chequerboard."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv3d(in_channels, out_channels, 3, padding=1)
    )


def shifted_windows(channels: int, heads: int, window: int) -> nn.Module:
    """A plain and a shifted layer of window attention (Liu et al. 2021, in 3-D), MONAI's."""
    # Takes seconds to import, so nobody who builds no denoiser pays for it.
    from monai.networks.nets.swin_unetr import BasicLayer

    layer: nn.Module = BasicLayer(channels, 2, heads, [window] * 3, drop_path=[0.0, 0.0], qkv_bias=True)
    return layer


class Stage(nn.Module):
    """What happens at one size."""

    def __init__(self, widths: Sequence[int], embedding: int, windows: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DenoisingBlock(come, go, embedding) for come, go in itertools.pairwise(widths))
        self.windows = windows if windows is not None else nn.Identity()

    def forward(self, features: Float[Tensor, "n c d h w"], embedded: Float[Tensor, "n e"]) -> Tensor:
        """Blocks, then windows."""
        for block in self.blocks:
            features = block(features, embedded)
        attended: Tensor = self.windows(features)
        return attended


class Denoiser(nn.Module):
    """Noisy data to what a diffusion asks for.

    The condition enters at every size through a convolution of 1 x 1 x 1 whose answer is added, which for the finest
    is what concatenating it with the noisy data would do. The last convolution starts at zero.
    """

    def __init__(self, config: DenoiserConfig, channels: int, condition: int, recompute: bool = False) -> None:
        super().__init__()
        self.patch, self.recompute = config.patch, recompute
        widths, embedding = config.channels, 4 * config.channels[0]
        self.waves = widths[0]
        inside = channels * config.patch**3
        self.embed = nn.Sequential(
            nn.Linear(config.channels[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )

        def stage(index: int, come: int) -> Stage:
            width = widths[index]
            attends = index >= config.plain_sizes
            windows = shifted_windows(width, config.heads, config.window) if attends else None
            return Stage((come, *(width,) * config.blocks), embedding, windows)

        self.enter = nn.Conv3d(inside, widths[0], 3, padding=1)
        self.take_in = nn.ModuleList(nn.Conv3d(condition, width, 1) for width in widths)
        self.down = nn.ModuleList(stage(k, width) for k, width in enumerate(widths))
        self.shrink = nn.ModuleList(halve(widths[k], widths[k + 1]) for k in range(len(widths) - 1))
        self.grow = nn.ModuleList(double(widths[k + 1], widths[k]) for k in range(len(widths) - 1))
        self.up = nn.ModuleList(stage(k, 2 * widths[k]) for k in range(len(widths) - 1))
        self.leave = nn.Sequential(group_norm(widths[0]), nn.SiLU(), nn.Conv3d(widths[0], inside, 3, padding=1))
        for layer in self.take_in:
            assert isinstance(layer, nn.Conv3d)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        for parameter in self.leave[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        noisy: Float[Tensor, "n c s s s"],
        times: Int[Tensor, " n"],
        condition: Sequence[Float[Tensor, "n k _ _ _"]],
    ) -> Float[Tensor, "n c s s s"]:
        """The condition comes finest first, each as large as `DenoiserConfig.sizes` says."""
        embedded = self.embed(_waves(times, self.waves))
        features = self.enter(fold(noisy, self.patch))
        skips: list[Tensor] = []
        for k, stage in enumerate(self.down):
            features = features if k == 0 else self.shrink[k - 1](features)
            features = run(stage, features + self.take_in[k](condition[k]), embedded, recompute=self.recompute)
            skips.append(features)
        skips.pop()
        while skips:
            rise = partial(self._rise, len(skips) - 1)
            features = run(rise, features, skips.pop(), embedded, recompute=self.recompute)
        return unfold(run(self.leave, features, recompute=self.recompute), self.patch)

    def _rise(self, index: int, features: Tensor, skip: Tensor, embedded: Tensor) -> Tensor:
        risen: Tensor = self.up[index](torch.cat([self.grow[index](features), skip], dim=1), embedded)
        return risen


def _waves(times: Int[Tensor, " n"], channels: int) -> Float[Tensor, "n channels"]:
    """Sines and cosines of timesteps, from one radian a step to one in ten thousand."""
    half = (channels + 1) // 2
    rates = torch.exp(torch.arange(half, device=times.device) * (-math.log(10_000) / max(half - 1, 1)))
    angles = times[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :channels]


def fold(data: Float[Tensor, "n c s s s"], patch: int) -> Float[Tensor, "n folded q q q"]:
    """Cubes of `patch` voxels a side as channels."""
    n, c, s, *_ = data.shape
    q = s // patch
    cubes = data.reshape(n, c, q, patch, q, patch, q, patch)
    return cubes.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(n, c * patch**3, q, q, q)


def unfold(data: Float[Tensor, "n folded q q q"], patch: int) -> Float[Tensor, "n c s s s"]:
    """Undoes `fold`."""
    n, folded, q, *_ = data.shape
    cubes = data.reshape(n, folded // patch**3, patch, patch, patch, q, q, q)
    return cubes.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, folded // patch**3, *(q * patch,) * 3)
