"""How the rays of a view cross the volume, for everything that carries an image into 3-D.

Volumes stand in the patient's order (D, H, W) whatever view they came from, so nothing after the lifting has to know
which way a view looked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid, View
from raylift.datasets.projector import backproject, in_view


def repeat_along_axis(features: Float[Tensor, "n c rows columns"], axis: int) -> Float[Tensor, "n c d h w"]:
    """Each pixel's features at every depth, rays running along axis 3 or 4 of N, C, D, H, W; the image is square."""
    shape = [*features.shape[:2], *(features.shape[2],) * 3]
    return features.unsqueeze(axis).expand(shape)


@dataclass(frozen=True)
class Rays:
    """The rays of one view, taken as straight lines along an axis of the volume or as the cone they are."""

    grid: Grid
    geometry: Geometry
    view: View
    are_true: bool
    """Whether the geometry's own rays are followed; otherwise the view must look along an axis."""

    @property
    def axis(self) -> int:
        """The axis of an N, C, D, H, W volume along which the rays run, if they run along one."""
        turns = (self.view.azimuth_deg, self.view.elevation_deg, self.view.roll_deg)
        if turns == (0.0, 0.0, 0.0):
            return 3
        if turns == (90.0, 0.0, 0.0):
            return 4
        raise ConfigError(
            f"view '{self.view.name}' is no frontal or lateral one: repeating features along an axis cannot follow it, "
            "use system.lifting.along rays"
        )

    def check(self) -> None:
        """Raise a ConfigError if these rays cannot be followed."""
        if not self.are_true:
            _ = self.axis

    def spread(self, features: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c s s s"]:
        """The features at every voxel that their ray meets, in a cube as fine as the image."""
        if not self.are_true:
            return repeat_along_axis(features, self.axis)
        size = features.shape[-1]
        # Positions need more than bf16 has.
        with torch.autocast(features.device.type, enabled=False):
            met = backproject(features.float(), (size,) * 3, self._spacing_mm(size), self.geometry, self.view)
        return met.to(features.dtype)

    def depth(self, size: int, like: Tensor) -> Float[Tensor, "1 1 s s s"]:
        """How far along its ray a voxel lies: 0 at the isocenter's depth, 1 half a volume's edge behind it."""
        if not self.are_true:
            line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size, dtype=like.dtype, device=like.device)
            return line.reshape([size if axis == self.axis else 1 for axis in range(5)]).expand(1, 1, *(size,) * 3)
        with torch.autocast(like.device.type, enabled=False):
            _, _, depth = in_view((size,) * 3, self._spacing_mm(size), self.view, like.float())
        return (depth / (self.grid.extent_mm / 2))[None, None].to(like.dtype)

    def stand_up(self, maps: Float[Tensor, "n s s s"]) -> Float[Tensor, "n 1 s s s"]:
        """Maps whose channels are depths along the rays, as a volume in the patient's order."""
        if not self.are_true:
            return maps.movedim(1, self.axis - 1).unsqueeze(1)
        size = maps.shape[-1]
        with torch.autocast(maps.device.type, enabled=False):
            column, row, depth = in_view((size,) * 3, self._spacing_mm(size), self.view, maps.float())
            scale = torch.ones_like(depth)
            if self.geometry.beam == "cone":
                scale = self.geometry.source_detector_mm / (depth + self.geometry.source_axis_mm)
            detector_mm = self.geometry.detector_px * self.geometry.detector_pitch_mm / 2
            points = torch.stack(
                [column * scale / detector_mm, row * scale / detector_mm, depth / (self.grid.extent_mm / 2)], dim=-1
            ).expand(len(maps), -1, -1, -1, -1)
            stood = F.grid_sample(maps.float().unsqueeze(1), points, padding_mode="border", align_corners=False)
        return stood.to(maps.dtype)

    def _spacing_mm(self, size: int) -> float:
        return self.grid.extent_mm / size
