"""Differentiable X-ray projection, digitally reconstructed radiographs (DRRs) and back-projection.

A pose with its central ray along an axis of the volume is projected slice by slice (Joseph's method): each plane of
voxels is magnified onto the detector by one 2-D `grid_sample` and the planes are summed. Other poses sample a frustum
of planes perpendicular to the central ray with one 3-D `grid_sample`. Both interpolate linearly and assume vacuum
outside the volume.

Frames and units are those of `geometry`; attenuation is in 1/mm, so a line integral is dimensionless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid, View
from raylift.datasets.intensity import Normalization, hu_to_attenuation, normalize

# Rows: the directions of the volume indices d, h and w (inferior, posterior, left) in patient coordinates.
INDEX_TO_PATIENT = np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def project(
    attenuation: Float[Tensor, "n 1 d h w"], spacing_mm: float, geometry: Geometry, view: View
) -> Float[Tensor, "n 1 rows columns"]:
    """Line integrals of `attenuation` along the rays of `view`, dimensionless.

    Args:
        attenuation: in 1/mm per voxel, in volume order, of any size.
        spacing_mm: voxel spacing.
        geometry: beam, distances and detector; the detector is square.
        view: the pose. Axis-aligned poses use the slice-wise path, others the frustum.

    Raises:
        ConfigError: the source of a cone beam is inside the volume.
    """
    require_source_outside(attenuation.shape[2:], spacing_mm, geometry, view)
    if _axis_aligned(view):
        return _project_slices(attenuation, spacing_mm, geometry, view)
    return _project_frustum(attenuation, spacing_mm, geometry, view, _axes(view, attenuation))


def project_views(
    attenuation: Float[Tensor, "n 1 d h w"], spacing_mm: float, geometry: Geometry
) -> Float[Tensor, "n views rows columns"]:
    """`project` in every view of the geometry."""
    return torch.cat([project(attenuation, spacing_mm, geometry, view) for view in geometry.views], dim=1)


def render_drrs(
    hu: Shaped[np.ndarray, "d h w"], grid: Grid, geometry: Geometry
) -> Float32[np.ndarray, "views rows columns"]:
    """Digitally reconstructed radiographs (DRRs) of a CT volume in HU: line integrals in every view."""
    volume = torch.from_numpy(np.ascontiguousarray(hu, dtype=np.float32))
    attenuation = hu_to_attenuation(volume, geometry.attenuation)
    return project_views(attenuation[None, None], grid.spacing_mm, geometry)[0].numpy()


def normalized_drrs(
    hu: Shaped[np.ndarray, "d h w"], grid: Grid, geometry: Geometry, normalization: Normalization = "percentiles"
) -> Float32[np.ndarray, "views rows columns"]:
    """`render_drrs`, each in [0, 1] as networks take them."""
    return np.stack([normalize(image, normalization) for image in render_drrs(hu, grid, geometry)])


def backproject(
    image: Float[Tensor, "n c rows columns"],
    shape: tuple[int, int, int],
    spacing_mm: float,
    geometry: Geometry,
    view: View,
) -> Float[Tensor, "n c d h w"]:
    """Back-projection: each voxel gets the value at which its ray meets the detector, in volume order.

    Sampling is bilinear; the value is zero outside the detector.

    Raises:
        ConfigError: the source of a cone beam is inside the volume.
    """
    require_source_outside(shape, spacing_mm, geometry, view)
    if image.is_cuda and _axis_aligned(view):
        # The gradient of `grid_sample` adds atomically, many voxels to one pixel; that of a product does not.
        return _backproject_slices(image, shape, spacing_mm, geometry, view)
    column, row, depth = view_coordinates(shape, spacing_mm, view, image)
    magnification = torch.ones_like(depth)
    if geometry.beam == "cone":
        magnification = geometry.source_detector_mm / (depth + geometry.source_isocenter_mm)
    half = geometry.detector_px * geometry.detector_pitch_mm / 2
    grid = torch.stack([column * magnification, row * magnification], dim=-1) / half
    grid = grid.reshape(1, shape[0] * shape[1], shape[2], 2).expand(image.shape[0], -1, -1, -1)
    sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.reshape(image.shape[0], image.shape[1], *shape)


def view_coordinates(
    shape: tuple[int, int, int], spacing_mm: float, view: View, like: Tensor
) -> tuple[Float[Tensor, "d h w"], Float[Tensor, "d h w"], Float[Tensor, "d h w"]]:
    """Positions of voxel centers in the frame of a view in mm: along its columns, its rows and its central ray."""
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
    """Line integrals of a pose given as tensors, for losses with random poses.

    Args:
        attenuation: in 1/mm per voxel, in volume order, of any size.
        spacing_mm: voxel spacing.
        geometry: beam, distances and detector; its views are ignored.
        axes: unit vectors (rows: column, row and ray direction) in patient coordinates.
        offset_mm: the point imaged at the detector's center. The sampled planes cover the volume's circumscribed
            sphere about this point, so parts that an offset moves outside of it are cropped.
    """
    sizes_mm = [n * spacing_mm for n in attenuation.shape[2:]]
    reach_mm = float(np.linalg.norm(sizes_mm)) / 2
    return _sample_frustum(attenuation, spacing_mm, geometry, axes, offset_mm, reach_mm)


@dataclass(frozen=True)
class Poses:
    """Cone-beam poses, one per volume of a batch, as tensors on the volumes' device."""

    axes: Float[Tensor, "n 3 3"]
    """Unit vectors (rows: column, row and ray direction) in patient coordinates."""
    offset_mm: Float[Tensor, "n 3"]
    """The point imaged at the detector's center."""
    source_isocenter_mm: Float[Tensor, " n"]
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
    shrink = (poses.source_isocenter_mm[:, None] + depth) / poses.source_detector_mm[:, None]
    along = offsets[:, None, :] * shrink[:, :, None]
    column, row, ray = (poses.axes[:, k, None, None, None, :] for k in range(3))
    points = along[:, :, None, :, None] * column + along[:, :, :, None, None] * row
    points = points + depth[None, :, None, None, None] * ray + poses.offset_mm[:, None, None, None, :]
    grid = points * offsets.new_tensor([1.0, 1.0, -1.0]) / (sizes / 2)
    sampled = F.grid_sample(attenuation, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    squared = offsets[:, :, None] ** 2 + offsets[:, None, :] ** 2
    path = (1 + squared / poses.source_detector_mm[:, None, None] ** 2).sqrt()
    return sampled.sum(dim=2) * step_mm * path[:, None]


def require_source_outside(shape: Sequence[int], spacing_mm: float, geometry: Geometry, view: View) -> None:
    """Raise a ConfigError if the source of a cone beam is inside a volume of this shape."""
    if geometry.beam == "parallel":
        return
    ray = view.axes()[2]
    half_mm = np.array([shape[2], shape[1], shape[0]]) * spacing_mm / 2
    reach_mm = float(np.abs(ray) @ half_mm + ray @ np.array(view.offset_mm))
    if reach_mm >= geometry.source_isocenter_mm:
        raise ConfigError(
            f"view '{view.name}': the volume reaches {reach_mm:.0f} mm towards the source, which is "
            f"{geometry.source_isocenter_mm:.0f} mm from the isocenter: use a larger source-isocenter distance"
        )


def _axes(view: View, like: Tensor) -> Float[Tensor, "3 3"]:
    return torch.as_tensor(view.axes(), dtype=like.dtype, device=like.device)


def _pixel_offsets(geometry: Geometry, like: Tensor) -> Float[Tensor, " px"]:
    """Distances of pixel centers from the detector's center along one side, in mm."""
    index = torch.arange(geometry.detector_px, dtype=like.dtype, device=like.device)
    return (index - (geometry.detector_px - 1) / 2) * geometry.detector_pitch_mm


def _path_per_depth(geometry: Geometry, offsets: Float[Tensor, " px"]) -> Float[Tensor, "px px"]:
    """Ray length per mm of depth for each pixel: 1 / cos of the angle to the central ray."""
    if geometry.beam == "parallel":
        return torch.ones(len(offsets), len(offsets), dtype=offsets.dtype, device=offsets.device)
    squared = offsets[:, None] ** 2 + offsets[None, :] ** 2
    return torch.sqrt(squared + geometry.source_detector_mm**2) / geometry.source_detector_mm


def _voxel_centers(shape: tuple[int, int, int], spacing_mm: float, like: Tensor) -> Float[Tensor, "d h w 3"]:
    index = [torch.arange(n, dtype=like.dtype, device=like.device) - (n - 1) / 2 for n in shape]
    to_patient = torch.as_tensor(INDEX_TO_PATIENT).to(like)
    return torch.stack(torch.meshgrid(*index, indexing="ij"), dim=-1) * spacing_mm @ to_patient


def _axis_aligned(view: View) -> bool:
    """Whether every axis of the view is one of the volume's and the central ray meets the volume's center."""
    return bool(np.isin(np.abs(view.axes()), (0.0, 1.0)).all()) and not any(view.offset_mm)


def _index_axes(view: View) -> tuple[list[int], list[float]]:
    """The volume's axes along the ray, rows and columns of an axis-aligned view, and the direction along each."""
    in_index = view.axes() @ INDEX_TO_PATIENT.T
    order = [int(np.abs(in_index[k]).argmax()) for k in (2, 1, 0)]
    return order, [float(in_index[k, axis]) for k, axis in zip((2, 1, 0), order, strict=True)]


def _backproject_slices(
    image: Float[Tensor, "n c rows columns"],
    shape: tuple[int, int, int],
    spacing_mm: float,
    geometry: Geometry,
    view: View,
) -> Float[Tensor, "n c d h w"]:
    """Back-projection of an axis-aligned view: linear interpolation of rows and columns as two matrix products."""
    order, signs = _index_axes(view)
    precision = torch.promote_types(image.dtype, torch.float32)

    def index(count: int) -> Tensor:
        return torch.arange(count, dtype=precision, device=image.device)

    ray, down, across = (
        sign * (index(shape[axis]) - (shape[axis] - 1) / 2) * spacing_mm
        for axis, sign in zip(order, signs, strict=True)
    )
    magnification = torch.ones_like(ray)
    if geometry.beam == "cone":
        magnification = geometry.source_detector_mm / (ray + geometry.source_isocenter_mm)
    side_mm = geometry.detector_px * geometry.detector_pitch_mm

    def weights(along: Tensor, pixels: int) -> Float[Tensor, "planes voxels pixels"]:
        position = (along * magnification[:, None] / side_mm + 0.5) * pixels - 0.5
        return (1 - (position[..., None] - index(pixels)).abs()).clamp_min(0).to(image)

    columns = torch.einsum("ncrq,kaq->ncrka", image, weights(across, image.shape[3]))
    planes = torch.einsum("ncrka,kbr->nckba", columns, weights(down, image.shape[2]))
    place = [2 + order.index(axis) for axis in range(3)]
    return planes.permute(0, 1, *place)


def _project_slices(
    attenuation: Float[Tensor, "n 1 d h w"], spacing_mm: float, geometry: Geometry, view: View
) -> Float[Tensor, "n 1 rows columns"]:
    # Reorder the volume to (ray, row, column), each index increasing along its axis of the view.
    order, signs = _index_axes(view)
    volume = attenuation.permute(0, 1, *(2 + axis for axis in order))
    volume = volume.flip([2 + k for k, sign in enumerate(signs) if sign < 0])
    n, _, planes, rows, columns = volume.shape

    offsets = _pixel_offsets(geometry, attenuation)
    depth = (torch.arange(planes, dtype=offsets.dtype, device=offsets.device) - (planes - 1) / 2) * spacing_mm
    scale = torch.ones_like(depth)
    if geometry.beam == "cone":
        # The plane at this depth is magnified onto the detector by SDD / (SAD + depth).
        scale = (geometry.source_isocenter_mm + depth) / geometry.source_detector_mm
    along = offsets[None, :] * scale[:, None]
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
    # Planes over the depth range of the volume's corners.
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
    # At most a voxel between planes.
    planes = max(2, int(2 * reach_mm / spacing_mm + 0.999))
    step = 2 * reach_mm / planes
    depth = (torch.arange(planes, dtype=offsets.dtype, device=offsets.device) - (planes - 1) / 2) * step

    scale = torch.ones_like(depth)
    if geometry.beam == "cone":
        scale = (geometry.source_isocenter_mm + depth) / geometry.source_detector_mm
    along = offsets[None, :] * scale[:, None]
    points = (
        along[:, None, :, None] * column + along[:, :, None, None] * row + depth[:, None, None, None] * ray
    ) + offset_mm
    # Patient LPS to grid_sample's (w, h, d), each in [-1, 1] between the outer faces.
    grid = points * offsets.new_tensor([1.0, 1.0, -1.0]) / (sizes / 2)
    sampled = F.grid_sample(
        attenuation, grid.expand(n, -1, -1, -1, -1), mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return sampled.sum(dim=2) * step * _path_per_depth(geometry, offsets)
