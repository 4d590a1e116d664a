"""The 2-D U-Net (Ronneberger et al. 2015) as an encoder: its output is one map of full size."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.parts.blocks import run


class ImageUNet(nn.Module):
    """Two convolutions at each size, max pooling, transposed convolutions, concatenated skip connections.

    Args:
        widths: channels from full size down; each size is half the previous one.
        use_checkpoint: whether activations are recomputed in the backward pass.
    """

    def __init__(self, widths: tuple[int, ...], use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(_double_conv(width, next_width) for width, next_width in pairwise((1, *widths)))
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(below, width, 2, stride=2) for width, below in pairwise(widths)
        )
        self.up = nn.ModuleList(_double_conv(2 * width, width) for width in widths[:-1])

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n c s s"]]:
        """One map as large as the radiograph."""
        skips = [run(self.down[0], radiograph, use_checkpoint=self.use_checkpoint)]
        for block in self.down[1:]:
            skips.append(run(block, self.pool(skips[-1]), use_checkpoint=self.use_checkpoint))
        features = skips.pop()
        for index in reversed(range(len(self.up))):
            concatenated = torch.cat([self.upsamplers[index](features), skips.pop()], dim=1)
            features = run(self.up[index], concatenated, use_checkpoint=self.use_checkpoint)
        return [features]


def _double_conv(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels),
        nn.ReLU(inplace=True),
    )
