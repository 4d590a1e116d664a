"""Scans to volumes: every CT on the one grid that a model is trained on, centred on the body, in HU."""

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk
from jaxtyping import Int16

from raylift.datasets import segmentation
from raylift.datasets.ct import Scan
from raylift.datasets.errors import RefusedFile
from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN


def resample(scan: Scan, grid: Grid, keep_table: bool = False) -> tuple[Int16[np.ndarray, "d h w"], dict[str, Any]]:
    """The scan on `grid`, in HU and volume order, centred on the body, with a record of what was done.

    HU is clamped to [-1024, 3071]; axes that become coarser are smoothed first (a Gaussian of half the loss in
    voxels, as scikit-image does); what lies outside the scan is air. Left-right and front-back the cube is centred on
    the body. Along the body it is centred on the lungs, moved as far as needed to stay inside the scan. Unless
    `keep_table`, everything outside the body becomes air.
    """
    clamped = sitk.Clamp(scan.image, sitk.sitkFloat32, HU_MIN, HU_MAX)
    smooth = _smooth_for(clamped, grid.spacing_mm)
    centre, lungs_found = _centre(clamped, grid)
    origin = centre - (grid.size - 1) / 2 * grid.spacing_mm * np.array([1, 1, -1])
    cube = _on_axes(smooth, origin, (grid.size,) * 3, grid.spacing_mm)
    hu = np.rint(sitk.GetArrayFromImage(cube)).clip(HU_MIN, HU_MAX).astype(np.int16)
    inside = segmentation.body(hu, grid.spacing_mm)
    if not inside.any():
        raise RefusedFile(
            f"{scan.source.where}: no body found in the central {grid.extent_mm:.0f} mm: not a CT of a person"
        )
    if not keep_table:
        hu[~inside] = HU_MIN
    record = {
        "source_size": list(scan.image.GetSize()),
        "source_spacing_mm": list(scan.spacing_mm),
        "source_orientation": scan.orientation,
        "centre_lps_mm": [round(float(value), 2) for value in centre],
        "centred_on": "lungs" if lungs_found else "scan",
        "table_removed": not keep_table,
    }
    return hu, record


def check_whole_thorax(scan: Scan) -> None:
    """Refuse a scan that does not hold two whole lungs.

    Raises:
        RefusedFile: a lung is missing, under 300 ml, or cut by the first or last slice.
    """
    coarse, spacing_mm = _coarse(sitk.Clamp(scan.image, sitk.sitkFloat32, HU_MIN, HU_MAX))
    lung = segmentation.lungs(coarse, spacing_mm)
    remedy = "ingest it without --require-whole-thorax, or leave it out"
    if not lung.any():
        raise RefusedFile(f"{scan.source.where}: no lungs inside the field of view: {remedy}")
    body = segmentation.body(coarse, spacing_mm)
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1]) // 2
    for side, half in (("right", lung[:, :, :middle]), ("left", lung[:, :, middle:])):
        volume_ml = half.sum() * spacing_mm**3 / 1000
        if volume_ml < 300:
            raise RefusedFile(f"{scan.source.where}: {volume_ml:.0f} ml of {side} lung in the field of view: {remedy}")
    area = lung.sum(axis=(1, 2))
    for end, cut in (("first", area[0]), ("last", area[-1])):
        if cut > 0.25 * area.max():
            raise RefusedFile(f"{scan.source.where}: the lungs are cut by the {end} slice: {remedy}")


def _smooth_for(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    for axis, spacing in enumerate(image.GetSpacing()):
        factor = spacing_mm / spacing
        if factor > 1.05:
            kernel = sitk.RecursiveGaussianImageFilter()
            kernel.SetDirection(axis)
            kernel.SetSigma((factor - 1) / 2 * spacing)
            image = kernel.Execute(image)
    return image


def _on_axes(image: sitk.Image, origin: np.ndarray, size: tuple[int, int, int], spacing_mm: float) -> sitk.Image:
    return sitk.Resample(
        image, list(size), sitk.Transform(), sitk.sitkLinear, [float(value) for value in origin], [spacing_mm] * 3,
        [1, 0, 0, 0, 1, 0, 0, 0, -1], float(HU_MIN), sitk.sitkFloat32,
    )  # fmt: skip


def _extent(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the scan's voxel centres in the patient frame, oblique scans by their box."""
    ends = [(0, n - 1) for n in image.GetSize()]
    corners = np.array(
        [image.TransformIndexToPhysicalPoint((i, j, k)) for i in ends[0] for j in ends[1] for k in ends[2]]
    )
    return corners.min(axis=0), corners.max(axis=0)


def _coarse(image: sitk.Image, spacing_mm: float = 4.0) -> tuple[Int16[np.ndarray, "d h w"], float]:
    """The whole scan in volume order on voxels large enough to segment in no time."""
    low, high = _extent(image)
    size = [int(n) for n in np.ceil((high - low) / spacing_mm) + 1]
    origin = np.array([low[0], low[1], high[2]])
    coarse = _on_axes(image, origin, (size[0], size[1], size[2]), spacing_mm)
    return np.rint(sitk.GetArrayFromImage(coarse)).astype(np.int16), spacing_mm


def _centre(image: sitk.Image, grid: Grid) -> tuple[np.ndarray, bool]:
    """Where the cube's centre goes, in the patient frame, and whether lungs decided its height."""
    low, high = _extent(image)
    hu, spacing_mm = _coarse(image)
    body = segmentation.body(hu, spacing_mm)
    lung = segmentation.lungs(hu, spacing_mm)
    centre = (low + high) / 2
    for axis, plane in ((0, (0, 1)), (1, (0, 2))):
        where = np.flatnonzero(body.any(axis=plane))
        if len(where):
            centre[axis] = low[axis] + (where[0] + where[-1]) / 2 * spacing_mm
    slices = np.flatnonzero(lung.any(axis=(1, 2)))
    half = grid.extent_mm / 2
    if len(slices) and high[2] - low[2] > grid.extent_mm:
        middle = high[2] - (slices[0] + slices[-1]) / 2 * spacing_mm
        centre[2] = np.clip(middle, low[2] + half, high[2] - half)
        return centre, True
    return centre, False
