"""The tri-plane condition of DiffuX2CT: radiographs to three feature planes, and planes to a condition volume.

```
frontal -> encoder -+                     +-> coronal plane  (D, W) -+
                    +-> projected to each +-> sagittal plane (D, H) -+-> implicit decoder at (d, h, w) -> condition
lateral -> encoder -+                     +-> axial plane    (H, W) -+
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.serialization import require_minimum
from raylift.models.parts.blocks import norm_act_conv_2d, run
from raylift.models.parts.divisibility import require_divisible_size
from raylift.models.parts.encoders import EncoderConfig, at_size
from raylift.models.parts.rays import Rays, along_volume_axes

NORMALS = (2, 3, 4)
"""The axes of an N, C, D, H, W volume that are normal to the axial, coronal and sagittal planes."""
OCTAVES = 6


@dataclass(frozen=True)
class TriPlaneConfig:
    """DiffuX2CT names the parts and publishes no size. Chosen here: X2CT-GAN's encoder with fewer layers."""

    encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(
            init_features=32, growth_rate=16, bottleneck_channels=64, block_config=(4, 6, 8, 6)
        )
    )
    channels: int = 32
    """Channels of each plane."""
    hidden: int = 64
    """Width of the implicit decoder."""
    layers: int = 2
    """Hidden layers of the implicit decoder after the first."""
    condition_channels: int = 32
    """Channels of the condition that the denoiser receives at every voxel."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "channels", "hidden", "condition_channels")
        require_minimum(self, 0, "layers")


class TriPlane(nn.Module):
    """Radiographs to the condition of a denoiser, with an encoder for each view."""

    def __init__(
        self, config: TriPlaneConfig, views: Sequence[str], grid: Grid, geometry: Geometry, use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        if not views or len(set(views)) != len(views):
            raise ConfigError(f"views {tuple(views)}: name one or more, each once")
        step = 2 ** config.encoder.downsamplings()
        require_divisible_size(grid.size, step, "fewer stages of system.triplane.encoder.block_config")
        self.size, self.use_checkpoint = grid.size, use_checkpoint
        self.rays = [Rays(grid, geometry, geometry.view(name), follow_geometry=False) for name in views]
        self.encoders = nn.ModuleList(config.encoder.build(use_checkpoint) for _ in views)
        self.generator = PlaneGenerator(config, [rays.axis for rays in self.rays])
        self.decoder = ImplicitDecoder(config)

    def forward(
        self, radiographs: Float[Tensor, "n views rows columns"], sizes: Sequence[int]
    ) -> list[Float[Tensor, "n k _ _ _"]]:
        """A condition volume for each of the sizes, in voxels per side."""
        radiographs = along_volume_axes(at_size(radiographs, self.size), self.rays)
        features = [encoder(radiographs[:, k : k + 1]) for k, encoder in enumerate(self.encoders)]
        planes = self.generator(features)
        decode = partial(run, self.decoder, *planes, use_checkpoint=self.use_checkpoint)
        return [decode(_coordinate_encoding(size, planes[0])) for size in sizes]


class PlaneGenerator(nn.Module):
    """The features of the views to three planes, from the coarsest size of the features to the finest.

    Every plane depends on all views. A plane parallel to a view's image takes that image. Any other plane takes the
    mean of the image along the plane's normal, repeated along the axis of the view's rays.
    """

    def __init__(self, config: TriPlaneConfig, axes: Sequence[int]) -> None:
        super().__init__()
        self.axes = tuple(axes)
        widths = [len(axes) * width for width in config.encoder.channels()]
        self.convs = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, config.channels, 3, padding=1) for width in widths) for _ in NORMALS
        )
        self.refine = nn.ModuleList(
            nn.ModuleList(norm_act_conv_2d(config.channels, config.channels) for _ in widths) for _ in NORMALS
        )

    def forward(self, features: Sequence[Sequence[Float[Tensor, "n _ _ _"]]]) -> list[Float[Tensor, "n c s s"]]:
        """Features of every view from full size down, to the axial, coronal and sagittal plane."""
        planes = []
        for normal, convs, refine in zip(NORMALS, self.convs, self.refine, strict=True):
            assert isinstance(convs, nn.ModuleList)
            assert isinstance(refine, nn.ModuleList)
            plane: Tensor | None = None
            for k in reversed(range(len(convs))):
                pairs = zip(features, self.axes, strict=True)
                views = [project_to_plane(image[k], axis, normal) for image, axis in pairs]
                merged = convs[k](torch.cat(views, dim=1))
                if plane is not None:
                    merged = merged + F.interpolate(plane, size=merged.shape[2:], mode="bilinear", align_corners=False)
                plane = merged + refine[k](merged)
            assert plane is not None
            planes.append(plane)
        return planes


class ImplicitDecoder(nn.Module):
    """An implicit neural decoder: the planes' features at a point and the point's coordinates to the condition there.

    The first layer is linear in the concatenation of its inputs. It is therefore applied to planes and axes, and the
    results are added at the voxels: the same sum with a fraction of the work.
    """

    def __init__(self, config: TriPlaneConfig) -> None:
        super().__init__()
        self.plane_proj = nn.ModuleList(nn.Conv2d(config.channels, config.hidden, 1, bias=False) for _ in NORMALS)
        self.coordinate_proj = nn.ModuleList(nn.Linear(1 + 2 * OCTAVES, config.hidden, bias=False) for _ in NORMALS)
        self.bias = nn.Parameter(torch.zeros(config.hidden, 1, 1, 1))
        hidden = [nn.Sequential(nn.GELU(), nn.Conv3d(config.hidden, config.hidden, 1)) for _ in range(config.layers)]
        self.mlp = nn.Sequential(*hidden, nn.GELU(), nn.Conv3d(config.hidden, config.condition_channels, 1))
        # Torch's default initialization would give the condition a tenth of the scale of the noise.
        for module in self.mlp.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(
        self,
        axial: Float[Tensor, "n c s s"],
        coronal: Float[Tensor, "n c s s"],
        sagittal: Float[Tensor, "n c s s"],
        coordinates: Float[Tensor, "q encoding"],
    ) -> Float[Tensor, "n k q q q"]:
        """The condition at all voxels, given the encoded coordinates of the q voxel centers of an axis."""
        size = len(coordinates)
        planes = zip(NORMALS, (axial, coronal, sagittal), self.plane_proj, self.coordinate_proj, strict=True)
        total = self.bias
        for normal, plane, plane_proj, coordinate_proj in planes:
            shape = [1, -1, *(size if axis == normal else 1 for axis in NORMALS)]
            total = total + plane_proj(resize_plane(plane, size)).unsqueeze(normal)
            total = total + coordinate_proj(coordinates).T.reshape(shape)
        condition: Tensor = self.mlp(total)
        return condition


def project_to_plane(image: Float[Tensor, "n c s s"], axis: int, normal: int) -> Float[Tensor, "n c s s"]:
    """The features of a view whose rays run along `axis`, on the plane with normal `normal`."""
    size = image.shape[-1]
    line = image.unsqueeze(axis).mean(dim=normal, keepdim=True)
    return line.expand(*image.shape[:2], *(1 if a == normal else size for a in NORMALS)).squeeze(normal)


def resize_plane(plane: Float[Tensor, "n c s s"], size: int) -> Float[Tensor, "n c q q"]:
    """The plane at the centers of `size` voxels per side: interpolated, or averaged where the voxels are coarser."""
    if plane.shape[-1] == size:
        return plane
    if plane.shape[-1] % size == 0:
        return F.avg_pool2d(plane, plane.shape[-1] // size)
    return F.interpolate(plane, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def _coordinate_encoding(size: int, like: Tensor) -> Float[Tensor, "q encoding"]:
    """The voxel centers along an axis, in [-1, 1] from face to face, with a sinusoidal encoding of six octaves."""
    centers = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=torch.float32, device=like.device)[:, None]
    angles = centers * (math.pi / 2 * 2.0 ** torch.arange(OCTAVES, dtype=torch.float32, device=like.device))
    return torch.cat([centers, angles.sin(), angles.cos()], dim=1)
