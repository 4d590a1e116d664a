"""A volume to radiographs by a network: CycleGAN's second generator."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.geometry import Grid
from raylift.models.parts.blocks import initialize
from raylift.models.parts.divisibility import require_divisible_size
from raylift.models.parts.rays import Rays, along_volume_axes


class RadiographGenerator(nn.Module):
    """A volume to radiographs: rotated such that the rays run along its depth, downsampled in 3-D, depth to channels.

    All views share the convolutions; each has its own last layer, which gives a pixel of the smallest size as many
    channels as it has pixels of the radiograph. (Published: one channel, enlarged eight times, from a layer that was
    made anew with random weights at every call.)

    Args:
        channels: after each downsampling of the volume.
        grid: of the volume.
        detector_px: pixels per side of the radiographs.
        rays: how each view's rays cross the volume.

    Raises:
        ConfigError: the grid cannot be halved so often.
    """

    def __init__(self, channels: tuple[int, ...], grid: Grid, detector_px: int, rays: list[Rays]) -> None:
        super().__init__()
        downsamplings = len(channels)
        require_divisible_size(grid.size, 2**downsamplings, "fewer channels")
        self.rays, self.pixels = rays, detector_px
        layers: list[nn.Module] = []
        for width, next_width in pairwise((1, *channels)):
            layers += [
                nn.Conv3d(width, next_width, 4, stride=2, padding=1),
                nn.InstanceNorm3d(next_width),
                nn.ReLU(inplace=True),
            ]
        self.down = nn.Sequential(*layers)
        depth_channels = channels[-1] * (grid.size >> downsamplings)
        self.conv_out = nn.ModuleList(nn.Conv2d(depth_channels, 4**downsamplings, 1) for _ in rays)
        self.pixel_shuffle = nn.PixelShuffle(2**downsamplings)
        initialize(self)

    def forward(self, volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, "n views rows columns"]:
        """Radiographs in [0, 1], as batches have them."""
        images = [
            self.pixel_shuffle(conv_out(self.down(volume.movedim(rays.axis, 2)).flatten(1, 2)))
            for rays, conv_out in zip(self.rays, self.conv_out, strict=True)
        ]
        radiographs = torch.sigmoid(along_volume_axes(torch.cat(images, dim=1), self.rays))
        if radiographs.shape[-1] != self.pixels:
            size = (self.pixels, self.pixels)
            radiographs = F.interpolate(radiographs, size=size, mode="bilinear", antialias=True)
        return radiographs
