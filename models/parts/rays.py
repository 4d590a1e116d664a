"""The rays of a view through the volume: every lifting from 2-D to 3-D uses them.

Lifted volumes are in the patient's axis order (D, H, W) for every view, so that the parts after the lifting are
independent of the view's direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid, View
from raylift.datasets.projector import backproject, view_coordinates


def repeat_along_axis(features: Float[Tensor, "n c rows columns"], axis: int) -> Float[Tensor, "n c d h w"]:
    """Each pixel's features at every depth, with rays along axis 3 or 4 of N, C, D, H, W; the image is square."""
    shape = [*features.shape[:2], *(features.shape[2],) * 3]
    return features.unsqueeze(axis).expand(shape)


def along_volume_axes(
    images: Float[Tensor, "n views rows columns"], rays: Sequence[Rays]
) -> Float[Tensor, "n views rows columns"]:
    """The images with those flipped whose columns run against the volume's axis, which lifting along axes needs."""
    if not any(ray.is_flipped for ray in rays):
        return images
    pairs = zip(images.unbind(1), rays, strict=True)
    return torch.stack([image.flip(-1) if ray.is_flipped else image for image, ray in pairs], dim=1)


@dataclass(frozen=True)
class Rays:
    """The rays of one view, either parallel to an axis of the volume or as the geometry has them."""

    grid: Grid
    geometry: Geometry
    view: View
    follow_geometry: bool
    """Whether rays follow the geometry; otherwise they are parallel to an axis, and the view must be too."""

    def __post_init__(self) -> None:
        if not self.follow_geometry:
            _ = self.axis

    @property
    def axis(self) -> int:
        """The axis of an N, C, D, H, W volume to which the rays are parallel.

        Raises:
            ConfigError: the view is neither frontal nor lateral.
        """
        upright = self.view.axes()[1, 2] == -1.0
        if upright and self.view.left_edge:
            return 4 if self.view.is_lateral else 3
        raise ConfigError(
            f"view '{self.view.name}' is neither frontal nor lateral, so features cannot be repeated along an axis: "
            "use system.lifting.along rays"
        )

    @property
    def is_flipped(self) -> bool:
        """Whether the image's columns run against the volume's axis: azimuth 180 or 270 degrees, along an axis."""
        return not self.follow_geometry and self.view.left_edge in ("left side", "posterior side")

    def backproject(self, features: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c s s s"]:
        """The features at every voxel that their ray crosses, in a cube with the image's resolution."""
        if not self.follow_geometry:
            return repeat_along_axis(features, self.axis)
        size = features.shape[-1]
        # bf16 is too coarse for coordinates.
        with torch.autocast(features.device.type, enabled=False):
            volume = backproject(features.float(), (size,) * 3, self._spacing_mm(size), self.geometry, self.view)
        return volume.to(features.dtype)

    def depth(self, size: int, like: Tensor) -> Float[Tensor, "1 1 s s s"]:
        """The depth of each voxel along its ray: 0 at the isocenter's depth, 1 half a volume's edge behind it."""
        if not self.follow_geometry:
            line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=like.dtype, device=like.device)
            return line.reshape([size if axis == self.axis else 1 for axis in range(5)]).expand(1, 1, *(size,) * 3)
        with torch.autocast(like.device.type, enabled=False):
            _, _, depth = view_coordinates((size,) * 3, self._spacing_mm(size), self.view, like.float())
        return (depth / (self.grid.extent_mm / 2))[None, None].to(like.dtype)

    def depths_to_volume(self, maps: Float[Tensor, "n s s s"]) -> Float[Tensor, "n 1 s s s"]:
        """Maps whose channels are depths along the rays, as a volume in the patient's axis order."""
        if not self.follow_geometry:
            return maps.movedim(1, self.axis - 1).unsqueeze(1)
        size = maps.shape[-1]
        with torch.autocast(maps.device.type, enabled=False):
            column, row, depth = view_coordinates((size,) * 3, self._spacing_mm(size), self.view, maps.float())
            scale = torch.ones_like(depth)
            if self.geometry.beam == "cone":
                scale = self.geometry.source_detector_mm / (depth + self.geometry.source_isocenter_mm)
            detector_mm = self.geometry.detector_px * self.geometry.detector_pitch_mm / 2
            points = torch.stack(
                [column * scale / detector_mm, row * scale / detector_mm, depth / (self.grid.extent_mm / 2)], dim=-1
            ).expand(len(maps), -1, -1, -1, -1)
            volume = F.grid_sample(maps.float().unsqueeze(1), points, padding_mode="border", align_corners=False)
        return volume.to(maps.dtype)

    def _spacing_mm(self, size: int) -> float:
        return self.grid.extent_mm / size
