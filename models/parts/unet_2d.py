"""The 2-D U-Net (Ronneberger et al. 2015) as an encoder: down to the coarsest features and back to one map."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.parts.blocks import run


class ImageUNet(nn.Module):
    """Two convolutions a size, max pooling down, transposed convolutions up, skips concatenated.

    Args:
        widths: channels from full size down; each size is half the one before.
        recompute: whether activations are computed again in the backward pass.
    """

    def __init__(self, widths: tuple[int, ...], recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(_twice(before, width) for before, width in pairwise((1, *widths)))
        self.grow = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for width, below in pairwise(widths))
        self.up = nn.ModuleList(_twice(2 * width, width) for width in widths[:-1])

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n c s s"]]:
        """One map as large as the radiograph."""
        skips = [run(self.down[0], radiograph, recompute=self.recompute)]
        for block in self.down[1:]:
            skips.append(run(block, self.pool(skips[-1]), recompute=self.recompute))
        features = skips.pop()
        for index in reversed(range(len(self.up))):
            joined = torch.cat([self.grow[index](features), skips.pop()], dim=1)
            features = run(self.up[index], joined, recompute=self.recompute)
        return [features]


def _twice(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels),
        nn.ReLU(inplace=True),
    )
