"""Digitally reconstructed radiographs (DRRs) of volumes, normalized as a batch's radiographs are; differentiable.

A batch's radiographs are normalized by their own percentiles, because the scale of a real one is unknown
(`intensity.normalize`). A loss that compares DRRs with them must normalize the DRRs too, and then does not
constrain their scale and offset: the line integrals at the percentiles are given with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import WATER_PER_MM, Window, hu_to_attenuation, normalize_by_percentiles
from raylift.datasets.projector import project, project_pose


@dataclass(frozen=True)
class NormalizedDRRs:
    """DRRs of volumes."""

    images: Float[Tensor, "n views rows columns"]
    """In [0, 1], bone bright, each normalized by its own percentiles."""
    range_mm: Float[Tensor, "n views 2"]
    """Millimeters of water at an image's two percentiles."""


class Reprojection:
    """DRRs of volumes in a system's views of a geometry."""

    def __init__(self, grid: Grid, geometry: Geometry, window: Window, views: Sequence[str]) -> None:
        self.grid, self.geometry, self.window = grid, geometry, window
        self.views = [geometry.view(name) for name in views]

    def __call__(self, volume: Float[Tensor, "n 1 d h w"]) -> NormalizedDRRs:
        """Every view of volumes in the window's [0, 1]."""
        with torch.autocast(volume.device.type, enabled=False):
            attenuation = self._attenuation(volume)
            images = [project(attenuation, self.grid.spacing_mm, self.geometry, view) for view in self.views]
            return normalized(torch.cat(images, dim=1))

    def rotated(self, volume: Float[Tensor, "n 1 d h w"], std_deg: float) -> NormalizedDRRs:
        """The views, each rotated about the patient's long axis by N(0, `std_deg`), sampled with torch's generator."""
        angles = (torch.randn(len(self.views), device="cpu") * std_deg).deg2rad().to(volume.device)
        with torch.autocast(volume.device.type, enabled=False):
            attenuation = self._attenuation(volume)
            images = []
            for view, angle in zip(self.views, angles, strict=True):
                axes = torch.as_tensor(view.axes(), dtype=attenuation.dtype, device=attenuation.device) @ _about_z(
                    angle
                )
                offset = attenuation.new_tensor(view.offset_mm)
                images.append(project_pose(attenuation, self.grid.spacing_mm, self.geometry, axes, offset))
            return normalized(torch.cat(images, dim=1))

    def _attenuation(self, volume: Tensor) -> Tensor:
        # Positions and sums of a hundred samples need more than bf16 has.
        return hu_to_attenuation(self.window.to_hu(volume.float()), self.geometry.attenuation)


def normalized(images: Float[Tensor, "n views rows columns"]) -> NormalizedDRRs:
    """Line integrals as `intensity.normalize` makes radiographs of them; its gradient reaches the percentiles too."""
    scaled, low, high = normalize_by_percentiles(images)
    return NormalizedDRRs(scaled, torch.stack([low, high], dim=-1) / WATER_PER_MM)


def _about_z(angle: Float[Tensor, ""]) -> Float[Tensor, "3 3"]:
    """A rotation in the axial plane, in radians."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = [angle.cos(), angle.sin(), zero, -angle.sin(), angle.cos(), zero, zero, zero, one]
    return torch.stack(rotation).reshape(3, 3)
