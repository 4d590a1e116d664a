"""Radiographs to three feature planes, and planes to a condition at every voxel of a volume of any size.

```
frontal -> encoder -+                +-> coronal plane  (D, W) -+
                    +-> seen on each +-> sagittal plane (D, H) -+-> implicit decoder at (d, h, w) -> condition
lateral -> encoder -+                +-> axial plane    (H, W) -+
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.serialization import require_least
from raylift.models.parts.blocks import convolve_2d, run
from raylift.models.parts.encoders import EncoderConfig, at_size
from raylift.models.parts.rays import Rays

NORMALS = (2, 3, 4)
"""The axes of an N, C, D, H, W volume that the axial, coronal and sagittal planes lack."""
OCTAVES = 6


@dataclass(frozen=True)
class TriPlaneConfig:
    """DiffuX2CT names the parts and publishes no size: these are ours, of X2CT-GAN's encoder with fewer layers."""

    encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(stem=32, growth=16, bottleneck=64, layers=(4, 6, 8, 6))
    )
    channels: int = 32
    """Of each plane."""
    hidden: int = 64
    """Width of the implicit decoder."""
    layers: int = 2
    """Hidden layers of the implicit decoder after the first."""
    condition: int = 32
    """Channels of the condition."""

    def __post_init__(self) -> None:
        require_least(self, 1, "channels", "hidden", "condition")
        require_least(self, 0, "layers")


class TriPlane(nn.Module):
    """Two radiographs to the condition of a denoiser."""

    def __init__(
        self, config: TriPlaneConfig, views: Sequence[str], grid: Grid, geometry: Geometry, recompute: bool = False
    ) -> None:
        super().__init__()
        if not views or len(set(views)) != len(views):
            raise ConfigError(f"views {tuple(views)}: name one or more, each once")
        step = 2 ** config.encoder.halvings()
        if grid.size % step or grid.size < 2 * step:
            raise ConfigError(
                f"size {grid.size} cannot be divided by {step} to 2 or more: use a multiple of {step} from {2 * step} "
                "up, or fewer stages of system.triplane.encoder.layers"
            )
        self.size, self.recompute = grid.size, recompute
        axes = [Rays(grid, geometry, geometry.view(name), are_true=False).axis for name in views]
        self.encoders = nn.ModuleList(config.encoder.build(recompute) for _ in views)
        self.generator = PlaneGenerator(config, axes)
        self.decoder = ImplicitDecoder(config)

    def forward(
        self, radiographs: Float[Tensor, "n views rows columns"], sizes: Sequence[int]
    ) -> list[Float[Tensor, "n k _ _ _"]]:
        """A condition of each of the sizes, in voxels a side."""
        radiographs = at_size(radiographs, self.size)
        features = [encoder(radiographs[:, k : k + 1]) for k, encoder in enumerate(self.encoders)]
        planes = self.generator(features)
        return [run(self.decoder, *planes, *_coordinates(size, planes[0]), recompute=self.recompute) for size in sizes]


class PlaneGenerator(nn.Module):
    """The views' features to three planes, each from all views, from the coarsest size of the features to the finest.

    Where a plane is parallel to a view's image it sees that image. Elsewhere it sees the mean of the image along the
    axis that the plane lacks, repeated along the axis that the view lacks.
    """

    def __init__(self, config: TriPlaneConfig, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = tuple(axes)
        widths = [len(axes) * width for width in config.encoder.channels()]
        self.join = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, config.channels, 3, padding=1) for width in widths) for _ in NORMALS
        )
        self.refine = nn.ModuleList(
            nn.ModuleList(convolve_2d(config.channels, config.channels) for _ in widths) for _ in NORMALS
        )

    def forward(self, features: Sequence[Sequence[Float[Tensor, "n _ _ _"]]]) -> list[Float[Tensor, "n c s s"]]:
        """Features of every view from full size down, to the axial, coronal and sagittal plane."""
        planes = []
        for normal, join, refine in zip(NORMALS, self.join, self.refine, strict=True):
            assert isinstance(join, nn.ModuleList)
            assert isinstance(refine, nn.ModuleList)
            plane: Tensor | None = None
            for k in reversed(range(len(join))):
                views = [seen(image[k], axis, normal) for image, axis in zip(features, self.axes, strict=True)]
                joined = join[k](torch.cat(views, dim=1))
                if plane is not None:
                    joined = joined + F.interpolate(plane, size=joined.shape[2:], mode="bilinear", align_corners=False)
                plane = joined + refine[k](joined)
            assert plane is not None
            planes.append(plane)
        return planes


class ImplicitDecoder(nn.Module):
    """A network that answers for any point of the volume, given the three planes there and the point.

    Its first layer is linear in what it is given side by side, so it is applied to planes and axes, and the answers
    are added up at the voxels: the same sum, at a fraction of the work.
    """

    def __init__(self, config: TriPlaneConfig) -> None:
        super().__init__()
        self.planes = nn.ModuleList(nn.Conv2d(config.channels, config.hidden, 1, bias=False) for _ in NORMALS)
        self.axes = nn.ModuleList(nn.Linear(1 + 2 * OCTAVES, config.hidden, bias=False) for _ in NORMALS)
        self.bias = nn.Parameter(torch.zeros(config.hidden, 1, 1, 1))
        hidden = [nn.Sequential(nn.GELU(), nn.Conv3d(config.hidden, config.hidden, 1)) for _ in range(config.layers)]
        self.think = nn.Sequential(*hidden, nn.GELU(), nn.Conv3d(config.hidden, config.condition, 1))
        # Torch's own start would shrink the condition to a tenth of the noise it has to be heard over.
        for module in self.think.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(
        self,
        axial: Float[Tensor, "n c s s"],
        coronal: Float[Tensor, "n c s s"],
        sagittal: Float[Tensor, "n c s s"],
        along: Float[Tensor, "q waves"],
    ) -> Float[Tensor, "n k q q q"]:
        """`along` has the waves of the voxels' centers on an axis, and so says how many there are."""
        size = len(along)
        total = self.bias
        for normal, plane, layer, axis in zip(NORMALS, (axial, coronal, sagittal), self.planes, self.axes, strict=True):
            shape = [1, -1, *(size if a == normal else 1 for a in NORMALS)]
            total = total + layer(resized(plane, size)).unsqueeze(normal) + axis(along).T.reshape(shape)
        condition: Tensor = self.think(total)
        return condition


def seen(image: Float[Tensor, "n c s s"], axis: int, normal: int) -> Float[Tensor, "n c s s"]:
    """A view's image, whose rays run along `axis`, as the plane without the axis `normal` sees it."""
    size = image.shape[-1]
    line = image.unsqueeze(axis).mean(dim=normal, keepdim=True)
    return line.expand(*image.shape[:2], *(1 if a == normal else size for a in NORMALS)).squeeze(normal)


def resized(plane: Float[Tensor, "n c s s"], size: int) -> Float[Tensor, "n c q q"]:
    """The plane at the centers of `size` voxels a side: interpolated, or averaged where they are coarser."""
    if plane.shape[-1] == size:
        return plane
    if plane.shape[-1] % size == 0:
        return F.avg_pool2d(plane, plane.shape[-1] // size)
    return F.interpolate(plane, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def _coordinates(size: int, like: Tensor) -> tuple[Float[Tensor, "q waves"]]:
    """The centers of the voxels along an axis, -1 to 1 from face to face, with sines and cosines of six octaves."""
    place = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=torch.float32, device=like.device)[:, None]
    angles = place * (math.pi / 2 * 2.0 ** torch.arange(OCTAVES, dtype=torch.float32, device=like.device))
    return (torch.cat([place, angles.sin(), angles.cos()], dim=1),)
