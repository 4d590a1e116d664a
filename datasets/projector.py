"""X-ray projection that can be differentiated: line integrals of a volume, and their spread back along the rays.

A pose whose rays run along an axis of the volume is projected slice by slice (Joseph's method): each plane of voxels
is magnified onto the detector by one 2-D `grid_sample` and the planes are summed. Other poses sample a frustum of
planes perpendicular to the central ray with one 3-D `grid_sample`. Both interpolate linearly, and both treat what lies
outside the volume as vacuum.

Frames and units are those of `geometry`; attenuation is in 1/mm, so a line integral has no unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, View

# Row k of a volume index (d, h, w) in the patient frame: d runs to the feet, h to the back, w to the left.
INDEX_TO_PATIENT = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def project(
    attenuation: Float[Tensor, "n 1 d h w"], spacing_mm: float, geometry: Geometry, view: View
) -> Float[Tensor, "n 1 rows columns"]:
    """Line integrals of `attenuation` (1/mm) seen by `view`, without unit.

    Args:
        attenuation: linear attenuation per voxel in volume order; any sizes.
        spacing_mm: edge of a voxel.
        geometry: beam, distances and detector; the detector is square.
        view: the pose. Rays along an axis take the slice-wise path, others the frustum.

    Raises:
        ConfigError: the source of a cone beam stands inside the volume.
    """
    _require_source_outside(attenuation.shape[2:], spacing_mm, geometry, view)
    if np.isin(np.abs(view.axes()), (0.0, 1.0)).all() and not any(view.offset_mm):
        return _project_slices(attenuation, spacing_mm, geometry, view)
    return _project_frustum(attenuation, spacing_mm, geometry, view, _axes(view, attenuation))


def backproject(
    image: Float[Tensor, "n c rows columns"],
    shape: tuple[int, int, int],
    spacing_mm: float,
    geometry: Geometry,
    view: View,
) -> Float[Tensor, "n c d h w"]:
    """Every voxel takes the value of the pixel its ray meets (bilinear; zero beside the detector), in volume order.

    Raises:
        ConfigError: the source of a cone beam stands inside the volume.
    """
    _require_source_outside(shape, spacing_mm, geometry, view)
    column, row, depth = view_coordinates(shape, spacing_mm, view, image)
    scale = torch.ones_like(depth)
    if geometry.beam == "cone":
        scale = geometry.source_detector_mm / (depth + geometry.source_axis_mm)
    half = geometry.detector_px * geometry.detector_pitch_mm / 2
    grid = torch.stack([column * scale, row * scale], dim=-1) / half
    grid = grid.reshape(1, shape[0] * shape[1], shape[2], 2).expand(image.shape[0], -1, -1, -1)
    sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.reshape(image.shape[0], image.shape[1], *shape)


def view_coordinates(
    shape: tuple[int, int, int], spacing_mm: float, view: View, like: Tensor
) -> tuple[Float[Tensor, "d h w"], Float[Tensor, "d h w"], Float[Tensor, "d h w"]]:
    """Where voxel centers stand as a view sees them, in mm: along its columns, its rows and its central ray."""
    points = _voxel_centers(shape, spacing_mm, like) - like.new_tensor(view.offset_mm)
    column, row, depth = (points @ _axes(view, like).T).unbind(-1)
    return column, row, depth


def project_pose(
    attenuation: Float[Tensor, "n 1 d h w"],
    spacing_mm: float,
    geometry: Geometry,
    axes: Float[Tensor, "3 3"],
    offset_mm: Float[Tensor, " 3"],
) -> Float[Tensor, "n 1 rows columns"]:
    """Line integrals from a pose that is itself tensors, as losses with random poses want it.

    Args:
        attenuation: per mm, in volume order; any sizes.
        spacing_mm: edge of a voxel.
        geometry: beam, distances and detector; its views are not looked at.
        axes: unit vectors (rows: column, row and ray direction) in the patient frame.
        offset_mm: the point imaged at the detector's center. The planes that are sampled cover the volume's sphere
            about this point, so what an offset moves out of it is cut.
    """
    sizes_mm = [n * spacing_mm for n in attenuation.shape[2:]]
    reach_mm = float(np.linalg.norm(sizes_mm)) / 2
    return _sample_frustum(attenuation, spacing_mm, geometry, axes, offset_mm, reach_mm)


@dataclass(frozen=True)
class Poses:
    """Cone-beam poses, one a volume of a batch, as tensors on the volumes' device."""

    axes: Float[Tensor, "n 3 3"]
    """Unit vectors (rows: column, row and ray direction) in the patient frame."""
    offset_mm: Float[Tensor, "n 3"]
    """The point imaged at the detector's center."""
    source_axis_mm: Float[Tensor, " n"]
    source_detector_mm: Float[Tensor, " n"]
    detector_pitch_mm: Float[Tensor, " n"]
    detector_px: int


def project_batch(
    attenuation: Float[Tensor, "n c d h w"], spacing_mm: float, poses: Poses
) -> Float[Tensor, "n c rows columns"]:
    """Line integrals, each volume from its own pose; all channels are projected alike.

    The planes that are sampled cover the volume's sphere about its center in steps of at most a voxel.
    """
    shape = attenuation.shape[2:]
    sizes = attenuation.new_tensor([shape[2], shape[1], shape[0]]) * spacing_mm
    reach_mm = float(np.linalg.norm(shape)) * spacing_mm / 2
    planes = max(2, int(2 * reach_mm / spacing_mm + 0.999))
    step_mm = 2 * reach_mm / planes
    index = torch.arange(poses.detector_px, dtype=attenuation.dtype, device=attenuation.device)
    offsets = (index - (poses.detector_px - 1) / 2) * poses.detector_pitch_mm[:, None]
    depth = (torch.arange(planes, dtype=offsets.dtype, device=offsets.device) - (planes - 1) / 2) * step_mm
    shrink = (poses.source_axis_mm[:, None] + depth) / poses.source_detector_mm[:, None]
    along = offsets[:, None, :] * shrink[:, :, None]
    column, row, ray = (poses.axes[:, k, None, None, None, :] for k in range(3))
    points = along[:, :, None, :, None] * column + along[:, :, :, None, None] * row
    points = points + depth[None, :, None, None, None] * ray + poses.offset_mm[:, None, None, None, :]
    grid = points * offsets.new_tensor([1.0, 1.0, -1.0]) / (sizes / 2)
    sampled = F.grid_sample(attenuation, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    squared = offsets[:, :, None] ** 2 + offsets[:, None, :] ** 2
    path = (1 + squared / poses.source_detector_mm[:, None, None] ** 2).sqrt()
    return sampled.sum(dim=2) * step_mm * path[:, None]


def _require_source_outside(shape: Sequence[int], spacing_mm: float, geometry: Geometry, view: View) -> None:
    if geometry.beam == "parallel":
        return
    ray = view.axes()[2]
    half_mm = np.array([shape[2], shape[1], shape[0]]) * spacing_mm / 2
    reach_mm = float(np.abs(ray) @ half_mm + ray @ np.array(view.offset_mm))
    if reach_mm >= geometry.source_axis_mm:
        raise ConfigError(
            f"view '{view.name}': the volume reaches {reach_mm:.0f} mm towards the source, which stands "
            f"{geometry.source_axis_mm:.0f} mm from the isocenter: use a larger source-axis distance"
        )


def _axes(view: View, like: Tensor) -> Float[Tensor, "3 3"]:
    return torch.as_tensor(view.axes(), dtype=like.dtype, device=like.device)


def _pixel_offsets(geometry: Geometry, like: Tensor) -> Float[Tensor, " px"]:
    """Distances of pixel centers from the detector's center along one side, in mm."""
    index = torch.arange(geometry.detector_px, dtype=like.dtype, device=like.device)
    return (index - (geometry.detector_px - 1) / 2) * geometry.detector_pitch_mm


def _path_per_depth(geometry: Geometry, offsets: Float[Tensor, " px"]) -> Float[Tensor, "px px"]:
    """Length of ray per mm traveled along the central ray, for each pixel: 1 / cos of the ray's angle."""
    if geometry.beam == "parallel":
        return torch.ones(len(offsets), len(offsets), dtype=offsets.dtype, device=offsets.device)
    squared = offsets[:, None] ** 2 + offsets[None, :] ** 2
    return torch.sqrt(squared + geometry.source_detector_mm**2) / geometry.source_detector_mm


def _voxel_centers(shape: tuple[int, int, int], spacing_mm: float, like: Tensor) -> Float[Tensor, "d h w 3"]:
    index = [torch.arange(n, dtype=like.dtype, device=like.device) - (n - 1) / 2 for n in shape]
    to_patient = torch.as_tensor(INDEX_TO_PATIENT).to(like)
    return torch.stack(torch.meshgrid(*index, indexing="ij"), dim=-1) * spacing_mm @ to_patient


def _project_slices(
    attenuation: Float[Tensor, "n 1 d h w"], spacing_mm: float, geometry: Geometry, view: View
) -> Float[Tensor, "n 1 rows columns"]:
    # Bring the volume into (ray, row, column) order, each index increasing along its axis of the view.
    in_index = view.axes() @ INDEX_TO_PATIENT.T
    order = [int(np.abs(in_index[k]).argmax()) for k in (2, 1, 0)]
    signs = [float(in_index[k, axis]) for k, axis in zip((2, 1, 0), order, strict=True)]
    volume = attenuation.permute(0, 1, *(2 + axis for axis in order))
    volume = volume.flip([2 + k for k, sign in enumerate(signs) if sign < 0])
    n, _, planes, rows, columns = volume.shape

    offsets = _pixel_offsets(geometry, attenuation)
    depth = (torch.arange(planes, dtype=offsets.dtype, device=offsets.device) - (planes - 1) / 2) * spacing_mm
    shrink = torch.ones_like(depth)
    if geometry.beam == "cone":
        # The plane at this depth is magnified onto the detector by SDD / (SAD + depth).
        shrink = (geometry.source_axis_mm + depth) / geometry.source_detector_mm
    along = offsets[None, :] * shrink[:, None]
    grid = torch.stack(
        [
            (along / (columns * spacing_mm / 2))[:, None, :].expand(-1, len(offsets), -1),
            (along / (rows * spacing_mm / 2))[:, :, None].expand(-1, -1, len(offsets)),
        ],
        dim=-1,
    )
    sampled = F.grid_sample(
        volume.reshape(n * planes, 1, rows, columns),
        grid.repeat(n, 1, 1, 1),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    summed = sampled.reshape(n, planes, len(offsets), len(offsets)).sum(dim=1, keepdim=True)
    return summed * spacing_mm * _path_per_depth(geometry, offsets)


def _project_frustum(
    attenuation: Float[Tensor, "n 1 d h w"],
    spacing_mm: float,
    geometry: Geometry,
    view: View,
    axes: Float[Tensor, "3 3"],
) -> Float[Tensor, "n 1 rows columns"]:
    _, _, *shape = attenuation.shape
    sizes = torch.tensor([shape[2], shape[1], shape[0]], dtype=axes.dtype, device=axes.device) * spacing_mm
    # Planes over the depth that the volume's corners span.
    reach = float((axes[2].abs() * sizes).sum()) / 2 + float(np.linalg.norm(view.offset_mm))
    return _sample_frustum(attenuation, spacing_mm, geometry, axes, axes.new_tensor(view.offset_mm), reach)


def _sample_frustum(
    attenuation: Float[Tensor, "n 1 d h w"],
    spacing_mm: float,
    geometry: Geometry,
    axes: Float[Tensor, "3 3"],
    offset_mm: Float[Tensor, " 3"],
    reach_mm: float,
) -> Float[Tensor, "n 1 rows columns"]:
    n, _, *shape = attenuation.shape
    column, row, ray = axes
    offsets = _pixel_offsets(geometry, attenuation)
    sizes = torch.tensor([shape[2], shape[1], shape[0]], dtype=offsets.dtype, device=offsets.device) * spacing_mm
    # Planes a voxel apart or less.
    planes = max(2, int(2 * reach_mm / spacing_mm + 0.999))
    step = 2 * reach_mm / planes
    depth = (torch.arange(planes, dtype=offsets.dtype, device=offsets.device) - (planes - 1) / 2) * step

    shrink = torch.ones_like(depth)
    if geometry.beam == "cone":
        shrink = (geometry.source_axis_mm + depth) / geometry.source_detector_mm
    along = offsets[None, :] * shrink[:, None]
    points = (
        along[:, None, :, None] * column + along[:, :, None, None] * row + depth[:, None, None, None] * ray
    ) + offset_mm
    # Patient LPS to grid_sample's (w, h, d), each in [-1, 1] between the outer faces.
    grid = points * offsets.new_tensor([1.0, 1.0, -1.0]) / (sizes / 2)
    sampled = F.grid_sample(
        attenuation, grid.expand(n, -1, -1, -1, -1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.sum(dim=2) * step * _path_per_depth(geometry, offsets)
