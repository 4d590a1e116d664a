"""The small parts that encoders, decoders and discriminators are made of."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def convolve_2d(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Instance norm, ReLU, convolution: the order inside dense networks."""
    return nn.Sequential(
        nn.InstanceNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2),
    )


def convolve_3d(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, instance norm, ReLU at the same size."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


def upsample_3d(in_channels: int, out_channels: int) -> nn.Sequential:
    """Transposed convolution to twice the size, instance norm, ReLU."""
    return nn.Sequential(
        nn.ConvTranspose3d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


class DenseLayer(nn.Module):
    """A DenseNet layer: a bottleneck of 1 x 1, then 3 x 3, joined to what came in."""

    def __init__(self, in_channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.narrow = convolve_2d(in_channels, bottleneck, kernel=1)
        self.grow = convolve_2d(bottleneck, growth)

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n grown h w"]:
        """`in_channels` to `in_channels + growth`."""
        return torch.cat([features, self.grow(self.narrow(features))], dim=1)


def initialise(network: nn.Module, std: float = 0.02) -> None:
    """Weights from N(0, std), biases zero, as X2CT-GAN and pix2pix start their networks."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
