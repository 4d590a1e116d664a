"""Resampling of scans to the grid of an archive, centered on the body, in HU."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Int16, UInt8
from scipy import ndimage

from raylift.datasets import segmentation
from raylift.datasets.errors import FileError
from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.datasets.scans import field_of_view
from raylift.datasets.scans.reader import Scan

COARSE_MM = 4.0
"""Voxel spacing at which a whole scan is segmented."""

FieldOfView = Literal["keep", "extend", "mask"]
"""Beyond a field of view that truncates the body: air as in the file, tissue by `field_of_view.extend_body`, or air
that losses of supervised CNNs and GANs, metrics and figures leave out."""


def resample(
    scan: Scan,
    grid: Grid,
    keep_table: bool = False,
    beyond_field_of_view: FieldOfView = "keep",
    segmenter: Segmenter = THRESHOLDS,
) -> tuple[Int16[np.ndarray, "d h w"], dict[str, Any], UInt8[np.ndarray, "d h w"]]:
    """The scan on `grid`, in HU and volume order, centered on the body, a record of its provenance, and its labels.

    HU is clamped to [-1024, 3071]. Axes that become coarser are smoothed first, with a Gaussian whose sigma is half the
    downsampling factor minus one, in voxels, as in scikit-image. The outside of the scan is air. Left to right and
    anterior to posterior the cube is centered on the body. Along the body it is centered on the lungs and moved to
    stay inside the scan. Unless `keep_table`, everything outside the body becomes air. The record has the
    share of slices in which the field of view truncates the body at each side. Labels are those of
    `segmentation.labels` and, for "mask", `Label.OUTSIDE_FIELD_OF_VIEW` in the voxels of `field_of_view.unmeasured`.

    Raises:
        FileError: no body inside the cube.
        RuntimeError: an error of ITK, such as an axis too short to smooth.
    """
    clamped = sitk.Clamp(scan.image, sitk.sitkFloat32, HU_MIN, HU_MAX)
    smooth = _smooth_for(clamped, grid.spacing_mm)
    whole = _coarse(clamped)
    coarse = _voxels(whole)
    measured = field_of_view.measured_region(coarse, _covered(scan.image, whole))
    body = segmentation.body(coarse, COARSE_MM, measured)
    lung = segmentation.lungs(coarse, COARSE_MM, body)
    center, lungs_found = _center(clamped, body, lung, grid)
    origin = center - (grid.size - 1) / 2 * grid.spacing_mm * np.array([1, 1, -1])
    hu = _voxels(_on_axes(smooth, origin, grid.shape, grid.spacing_mm))
    # Interpolation mixes the outermost voxels with the air beyond.
    measured_cube = field_of_view.inner(_in_cube(measured, whole, origin, grid))
    inside = segmentation.body(hu, grid.spacing_mm, measured_cube) | _inner(whole, body, origin, grid)
    if not inside.any():
        raise FileError(
            f"{scan.source.where}: no body found in the central {grid.extent_mm:.0f} mm: not a CT of a person"
        )
    if not keep_table:
        hu[~inside] = HU_MIN
    if beyond_field_of_view == "extend":
        hu = field_of_view.extend_body(hu, inside, measured_cube, grid.spacing_mm)
    # The body of the cube alone lacks lungs behind a flank that the cube truncates or the field of view cuts thin.
    labels = segmentation.labels(hu, grid.spacing_mm, inside, segmenter)
    if beyond_field_of_view == "mask":
        labels[field_of_view.unmeasured(inside, measured_cube)] = segmentation.Label.OUTSIDE_FIELD_OF_VIEW
    record = {
        "source_size": list(scan.image.GetSize()),
        "source_spacing_mm": list(scan.spacing_mm),
        "source_orientation": scan.orientation,
        "source_rescale": None if scan.rescale is None else list(scan.rescale),
        "changes": list(scan.changes),
        "center_lps_mm": [round(float(value), 2) for value in center],
        "centered_on": "lungs" if lungs_found else "scan",
        "table_removed": not keep_table,
        "field_of_view_truncation": field_of_view.truncated_sides(body),
        "beyond_field_of_view": beyond_field_of_view,
        "masked_fraction": float((labels == segmentation.Label.OUTSIDE_FIELD_OF_VIEW).mean()),
    }
    return hu, record, labels


def whole_scan(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """All of a scan in HU and volume order on isotropic voxels; clamped, and smoothed as in `resample`.

    Raises:
        RuntimeError: an error of ITK, such as an axis too short to smooth.
    """
    clamped = sitk.Clamp(image, sitk.sitkFloat32, HU_MIN, HU_MAX)
    return _coarse(_smooth_for(clamped, spacing_mm), spacing_mm)


def archive_image(hu: np.ndarray, grid: Grid) -> sitk.Image:
    """A volume in volume order as an image: spacing in mm, LPS axes, centered on the origin."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(hu[::-1]))
    image.SetSpacing((grid.spacing_mm,) * 3)
    image.SetOrigin([-(n - 1) / 2 * grid.spacing_mm for n in image.GetSize()])
    return image


def check_whole_thorax(scan: Scan) -> None:
    """Refuse a scan without two whole lungs.

    Raises:
        FileError: a lung is missing, under 300 ml, or truncated by the first or last slice or by a side.
    """
    whole = _coarse(sitk.Clamp(scan.image, sitk.sitkFloat32, HU_MIN, HU_MAX))
    hu = _voxels(whole)
    body = segmentation.body(hu, COARSE_MM, field_of_view.measured_region(hu, _covered(scan.image, whole)))
    lung = segmentation.lungs(hu, COARSE_MM, body)
    remedy = "ingest it without --require-whole-thorax, or leave it out"
    if not lung.any():
        raise FileError(f"{scan.source.where}: no lungs inside the field of view: {remedy}")
    for side, face in (("right", lung[:, :, 0]), ("left", lung[:, :, -1])):
        if face.sum() * COARSE_MM**2 > 500:
            raise FileError(f"{scan.source.where}: the lungs are truncated by the {side} side: {remedy}")
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1]) // 2
    for side, half in (("right", lung[:, :, :middle]), ("left", lung[:, :, middle:])):
        volume_ml = half.sum() * COARSE_MM**3 / 1000
        if volume_ml < 300:
            raise FileError(f"{scan.source.where}: {volume_ml:.0f} ml of {side} lung in the field of view: {remedy}")
    area = lung.sum(axis=(1, 2))
    for end, cut in (("first", area[0]), ("last", area[-1])):
        if cut > 0.25 * area.max():
            raise FileError(f"{scan.source.where}: the lungs are truncated by the {end} slice: {remedy}")


def _smooth_for(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    for axis, spacing in enumerate(image.GetSpacing()):
        factor = spacing_mm / spacing
        if factor > 1.05:
            kernel = sitk.RecursiveGaussianImageFilter()
            kernel.SetDirection(axis)
            kernel.SetSigma((factor - 1) / 2 * spacing)
            image = kernel.Execute(image)
    return image


def _on_axes(
    image: sitk.Image,
    origin: np.ndarray,
    shape: tuple[int, int, int],
    spacing_mm: float,
    interpolator: int = sitk.sitkLinear,
    outside: float = HU_MIN,
) -> sitk.Image:
    """Resample to `shape` voxels in volume order; `origin` is the first voxel center in patient coordinates."""
    return sitk.Resample(
        image, shape[::-1], sitk.Transform(), interpolator, [float(value) for value in origin], [spacing_mm] * 3,
        [1, 0, 0, 0, 1, 0, 0, 0, -1], outside, sitk.sitkFloat32,
    )  # fmt: skip


def _voxels(image: sitk.Image) -> Int16[np.ndarray, "d h w"]:
    hu: Int16[np.ndarray, "d h w"] = np.rint(sitk.GetArrayViewFromImage(image)).clip(HU_MIN, HU_MAX).astype(np.int16)
    return hu


def _extent(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the bounding box of the scan's voxel centers in patient coordinates."""
    ends = [(0, n - 1) for n in image.GetSize()]
    corners = np.array(
        [image.TransformIndexToPhysicalPoint((i, j, k)) for i in ends[0] for j in ends[1] for k in ends[2]]
    )
    return corners.min(axis=0), corners.max(axis=0)


def _coarse(image: sitk.Image, spacing_mm: float = COARSE_MM) -> sitk.Image:
    """The whole scan in volume order at `spacing_mm`, for fast segmentation."""
    low, high = _extent(image)
    width, height, depth = (int(n) for n in np.ceil((high - low) / spacing_mm) + 1)
    return _on_axes(image, np.array([low[0], low[1], high[2]]), (depth, height, width), spacing_mm)


def _center(
    image: sitk.Image, body: Bool[np.ndarray, "d h w"], lung: Bool[np.ndarray, "d h w"], grid: Grid
) -> tuple[np.ndarray, bool]:
    """The cube's center in patient coordinates, and whether its height is that of the lungs."""
    low, high = _extent(image)
    center = (low + high) / 2
    for axis, plane in ((0, (0, 1)), (1, (0, 2))):
        where = np.flatnonzero(body.any(axis=plane))
        if len(where):
            center[axis] = low[axis] + (where[0] + where[-1]) / 2 * COARSE_MM
    slices = np.flatnonzero(lung.any(axis=(1, 2)))
    half = grid.extent_mm / 2
    if len(slices) and high[2] - low[2] > grid.extent_mm:
        middle = high[2] - (slices[0] + slices[-1]) / 2 * COARSE_MM
        center[2] = np.clip(middle, low[2] + half, high[2] - half)
        return center, True
    return center, False


def _inner(
    whole: sitk.Image, body: Bool[np.ndarray, "d h w"], origin: np.ndarray, grid: Grid
) -> Bool[np.ndarray, "n n n"]:
    """Mask of the cube's voxels that are well inside the body of the whole scan.

    In a cube that truncates a flank the lung behind it is connected to the outside air; in the whole scan it is not.
    """
    return _in_cube(ndimage.binary_erosion(body, border_value=1), whole, origin, grid)


def _in_cube(
    mask: Bool[np.ndarray, "d h w"], whole: sitk.Image, origin: np.ndarray, grid: Grid
) -> Bool[np.ndarray, "n n n"]:
    """A mask of the whole scan at the cube's voxels; False outside the scan."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.CopyInformation(whole)
    cube = _on_axes(image, origin, grid.shape, grid.spacing_mm, sitk.sitkNearestNeighbor, outside=0)
    return np.asarray(sitk.GetArrayViewFromImage(cube) > 0)


def _covered(image: sitk.Image, whole: sitk.Image) -> Bool[np.ndarray, "d h w"]:
    """The voxels of the coarse scan that lie inside the file's extent, which is smaller if its axes are oblique."""
    ones = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(image)
    width, height, depth = whole.GetSize()
    shape = (depth, height, width)
    coarse = _on_axes(ones, np.array(whole.GetOrigin()), shape, COARSE_MM, sitk.sitkNearestNeighbor, outside=0)
    return np.asarray(sitk.GetArrayViewFromImage(coarse) > 0)
