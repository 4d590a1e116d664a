"""Output heads: features to intensities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.choices import KeyOf
from raylift.models.parts.blocks import DepthTapConvolution

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "linear": lambda intensities: intensities,
    "sigmoid": torch.sigmoid,
}
ActivationName = KeyOf[str, ACTIVATIONS]


class Head(nn.Module):
    """One convolution and an activation chosen by name.

    X2CT-GAN publishes a ReLU, whose gradient vanishes permanently once all inputs are negative. This happens in small
    networks on volumes that are mostly air; X-Recon's leaky ReLU avoids it.
    """

    def __init__(self, channels: int, activation: ActivationName = "relu", kernel: int = 7) -> None:
        super().__init__()
        self.activation = activation
        self.conv = DepthTapConvolution(channels, 1, kernel)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n 1 d h w"]:
        """A volume of one channel."""
        return ACTIVATIONS[self.activation](self.conv(features))


class Rendering(nn.Module):
    """X-Recon's multi-scale fusion rendering: intensities at each size, combined from coarse to fine.

    The running volume is upsampled to twice the size and averaged with the next size's intensities. The coarsest
    intensities are halved, as an average with zeros.
    """

    def __init__(self, channels: Sequence[int], activation: ActivationName = "leaky_relu") -> None:
        super().__init__()
        self.activation = activation
        self.conv = nn.ModuleList(nn.Conv3d(width, 1, 1) for width in channels)

    def forward(self, features: Float[Tensor, "n c d h w"], index: int) -> Float[Tensor, "n 1 d h w"]:
        """The intensities of one size; index 0 is the coarsest."""
        intensities: Tensor = F.leaky_relu(self.conv[index](features))
        return intensities

    def combine(
        self, intensities: Sequence[Float[Tensor, "n 1 _ _ _"]], auxiliaries: bool
    ) -> list[Float[Tensor, "n 1 d h w"]]:
        """The volume, then with `auxiliaries` the running volume of each coarser size, finest first, at full size."""
        running = [intensities[0] / 2]
        for finer in intensities[1:]:
            upsampled = F.interpolate(running[-1], scale_factor=2.0, mode="trilinear", align_corners=False)
            running.append((upsampled + finer) / 2)
        activate, full = ACTIVATIONS[self.activation], intensities[-1].shape[2:]
        volumes = [activate(running.pop())]
        while auxiliaries and running:
            # The weights of k sizes add up to 1 - 2^-k and must be 1 for a volume of its own.
            total = 1 - 0.5 ** len(running)
            upsampled = F.interpolate(running.pop() / total, size=full, mode="trilinear", align_corners=False)
            volumes.append(activate(upsampled))
        return volumes
