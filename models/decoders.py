"""From the coarsest volume to the finest: levels that join a skip, refine, and double the size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.models.blocks import convolve_3d, upsample_3d

ActivationName = Literal["relu", "leaky_relu", "linear"]
ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "linear": lambda intensities: intensities,
}


class DecoderLevel(nn.Module):
    """One size of a decoder: join what comes from below with a skip, refine, and go up.

    `join` and `refine` are two steps because X2CT-GAN fuses the views between them.
    """

    def __init__(self, channels: int, skip_channels: int, blocks: int, up_channels: int | None) -> None:
        super().__init__()
        self.compress = convolve_3d(channels + skip_channels, channels) if skip_channels else None
        self.blocks = nn.Sequential(*(convolve_3d(channels, channels) for _ in range(blocks)))
        self.up = upsample_3d(channels, up_channels) if up_channels else nn.Identity()

    def join(
        self, features: Float[Tensor, "n c d h w"], skip: Float[Tensor, "n skip d h w"]
    ) -> Float[Tensor, "n c d h w"]:
        """Concatenate and bring back to the level's width."""
        assert self.compress is not None
        joined: Tensor = self.compress(torch.cat([features, skip], dim=1))
        return joined

    def refine(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n up d2 h2 w2"]:
        """The level's blocks, then the step to twice the size, where there is one."""
        refined: Tensor = self.up(self.blocks(features))
        return refined


class Decoder(nn.ModuleList):
    """A level for each width, coarsest first: the first only goes up, the last only refines."""

    def __init__(self, channels: tuple[int, ...], blocks: int, last_blocks: int) -> None:
        inner = [DecoderLevel(width, width, blocks, above) for width, above in pairwise(channels[1:])]
        last = DecoderLevel(channels[-1], channels[-1], last_blocks, None)
        super().__init__([DecoderLevel(channels[0], 0, 0, channels[1]), *inner, last])

    def level(self, index: int) -> DecoderLevel:
        """One level, 0 the coarsest."""
        level = self[index]
        assert isinstance(level, DecoderLevel)
        return level

    def forward(self, skips: list[Float[Tensor, "n _ _ _ _"]]) -> Float[Tensor, "n c d h w"]:
        """Decode with a skip for each level; the first is where decoding starts."""
        volume = self.level(0).refine(skips[0])
        for index in range(1, len(self)):
            volume = self.level(index).refine(self.level(index).join(volume, skips[index]))
        return volume


class Head(nn.Module):
    """Features to intensities: a 7 x 7 x 7 convolution and an activation chosen by name.

    X2CT-GAN publishes a ReLU, which is dead for good once all its inputs are negative, as happens to small networks
    on volumes that are mostly air; X-Recon's leaky one lives.

    A convolution to a single channel leaves most of a vector unit idle, so the depth taps are computed as channels of
    their own and added up shifted: the same sum, seven times faster on a CPU.
    """

    def __init__(self, channels: int, activation: ActivationName = "relu", kernel: int = 7) -> None:
        super().__init__()
        self.activation = activation
        self.convolve = nn.Conv3d(channels, 1, kernel, padding=kernel // 2)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n 1 d h w"]:
        """One channel."""
        weight, reach = self.convolve.weight, self.convolve.kernel_size[0] // 2
        taps = F.conv3d(features, weight[0].transpose(0, 1).unsqueeze(2), padding=(0, reach, reach))
        taps = F.pad(taps, (0, 0, 0, 0, reach, reach))
        depth = features.shape[2]
        summed = torch.stack([taps[:, k : k + 1, k : k + depth] for k in range(2 * reach + 1)]).sum(dim=0)
        assert self.convolve.bias is not None
        return ACTIVATIONS[self.activation](summed + self.convolve.bias)
