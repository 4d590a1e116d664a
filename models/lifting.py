"""From 2-D to 3-D: how the features of a radiograph become a volume, in volume order.

A lifted volume stands in the patient's order (D, H, W) at once, whatever view it came from, so nothing after this file
has to know which way a view looked.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

RAY_AXIS = {"frontal": 3, "lateral": 4}
"""The axis of an N, C, D, H, W volume along which a view's rays run."""


def repeat_along_rays(features: Float[Tensor, "n c rows columns"], view: str) -> Float[Tensor, "n c d h w"]:
    """Each pixel's features at every depth of its (axis-aligned) ray; the image must be square."""
    axis = RAY_AXIS[view]
    shape = [*features.shape[:2], *(features.shape[2],) * 3]
    return features.unsqueeze(axis).expand(shape)


class RepeatLift(nn.Module):
    """X2CT-GAN's connection B: narrow by 1 x 1, repeat along the rays, let a 3-D convolution tell depths apart.

    Repeated features differ along the rays only where the zero padding of the convolution reaches, in the first and
    the last plane. So three 2-D convolutions, with the kernel's depth taps summed, give the same result as the 3-D one
    for a fraction of its work: the planes between are all one plane.
    """

    def __init__(self, in_channels: int, out_channels: int, view: str) -> None:
        super().__init__()
        self.ray_axis = RAY_AXIS[view]
        self.narrow = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1),
            nn.InstanceNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        self.mix = nn.Conv3d(out_channels, out_channels, 3, padding=1)

    def forward(self, features: Float[Tensor, "n c s s"]) -> Float[Tensor, "n out s s s"]:
        """A cube as large as the image."""
        size = features.shape[-1]
        narrow = self.narrow(features)
        # What taps meet features: all but the one before the first plane, all, all but the one after the last.
        planes = [self._convolve(narrow, taps) for taps in ((1, 2), (0, 1, 2), (0, 1))]
        counts = (1, size - 2, 1)
        lifted = torch.cat(
            [
                plane.unsqueeze(self.ray_axis).expand(*plane.shape[:2], *_cube(size, self.ray_axis, count))
                for plane, count in zip(_normalise(planes, counts), counts, strict=True)
            ],
            dim=self.ray_axis,
        )
        return torch.relu(lifted)

    def _convolve(self, image: Float[Tensor, "n c s s"], taps: tuple[int, ...]) -> Float[Tensor, "n c s s"]:
        weight = sum(self.mix.weight.select(self.ray_axis, tap) for tap in taps)
        assert isinstance(weight, Tensor)
        return F.conv2d(image, weight, self.mix.bias, padding=1)


class VectorLift(nn.Module):
    """X2CT-GAN's connection A: a vector becomes the coarsest volume through one fully connected layer."""

    def __init__(self, in_channels: int, out_channels: int, size: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.shape = (out_channels, size, size, size)
        self.connect = nn.Linear(in_channels, out_channels * size**3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, vector: Float[Tensor, "n c"]) -> Float[Tensor, "n out s s s"]:
        """A cube of the size given at construction."""
        return torch.relu(self.dropout(self.connect(vector))).reshape(-1, *self.shape)


def _cube(size: int, axis: int, count: int) -> tuple[int, ...]:
    return tuple(count if dim == axis else size for dim in (2, 3, 4))


def _normalise(planes: list[Tensor], counts: tuple[int, ...], eps: float = 1e-5) -> list[Tensor]:
    """Instance norm over a volume given as planes and how often each occurs."""
    total = sum(counts)
    mean = sum(p.mean(dim=(2, 3), keepdim=True) * (n / total) for p, n in zip(planes, counts, strict=True))
    spread = [(p - mean).square().mean(dim=(2, 3), keepdim=True) for p in planes]
    variance = torch.stack([s * (n / total) for s, n in zip(spread, counts, strict=True)]).sum(0)
    return [(p - mean) * torch.rsqrt(variance + eps) for p in planes]
