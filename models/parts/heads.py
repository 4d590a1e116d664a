"""The last step: features to intensities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.models.parts.blocks import DepthTapConvolution

ActivationName = Literal["relu", "leaky_relu", "linear", "sigmoid"]
ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "linear": lambda intensities: intensities,
    "sigmoid": torch.sigmoid,
}


class Head(nn.Module):
    """One convolution and an activation chosen by name.

    X2CT-GAN publishes a ReLU, which is dead for good once all its inputs are negative, as happens to small networks
    on volumes that are mostly air; X-Recon's leaky one lives.
    """

    def __init__(self, channels: int, activation: ActivationName = "relu", kernel: int = 7) -> None:
        super().__init__()
        self.activation = activation
        self.convolve = DepthTapConvolution(channels, 1, kernel)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n 1 d h w"]:
        """One channel."""
        return ACTIVATIONS[self.activation](self.convolve(features))


class Rendering(nn.Module):
    """X-Recon's multi-scale fusion rendering: an intensity at each size, combined from coarse to fine.

    The running volume is brought to twice the size and averaged with the next size's intensities; the coarsest one is
    averaged with nothing, which is to say halved.
    """

    def __init__(self, channels: Sequence[int], activation: ActivationName = "leaky_relu") -> None:
        super().__init__()
        self.activation = activation
        self.convolve = nn.ModuleList(nn.Conv3d(width, 1, 1) for width in channels)

    def forward(self, features: Float[Tensor, "n c d h w"], index: int) -> Float[Tensor, "n 1 d h w"]:
        """The intensities of one size, 0 the coarsest that has any."""
        rendered: Tensor = F.leaky_relu(self.convolve[index](features))
        return rendered

    def combine(self, renders: Sequence[Float[Tensor, "n 1 _ _ _"]], coarser: bool) -> list[Float[Tensor, "n 1 d h w"]]:
        """The volume, then at will what it was at each coarser size, finest first, all brought to full size."""
        running = [renders[0] / 2]
        for render in renders[1:]:
            grown = F.interpolate(running[-1], scale_factor=2.0, mode="trilinear", align_corners=False)
            running.append((grown + render) / 2)
        activate, full = ACTIVATIONS[self.activation], renders[-1].shape[2:]
        volumes = [activate(running.pop())]
        while coarser and running:
            # After k sizes the weights add up to 1 - 2^-k; a volume that stands for itself wants them to be one.
            whole = 1 - 0.5 ** len(running)
            grown = F.interpolate(running.pop() / whole, size=full, mode="trilinear", align_corners=False)
            volumes.append(activate(grown))
        return volumes
