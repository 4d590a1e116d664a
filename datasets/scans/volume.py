"""A volume as its file holds it: voxels in HU and the affine of their grid, which may be sheared.

Axes of a volume need not be perpendicular: a tilted gantry shears it. The affine is kept as it is, so that resampling
puts every voxel at its place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float, Num

from raylift.datasets.dicom import connected_to_border, padding_region
from raylift.datasets.errors import FileError
from raylift.datasets.intensity import HU_MIN

MAX_SHEAR_DEG = 35.0
"""Largest angle by which two axes may differ from perpendicular; gantries tilt up to 30 degrees."""
REPORTED_SHEAR_DEG = 0.02
"""From this angle on, a shear is reported. Rounding of positions and cosines remains below it."""
MAX_CT_HU = 31_743
"""Largest HU of any scanner: 16 signed bits and an intercept of -1024."""
MAX_BORDER_HU = 3_071
"""Largest HU of 12 bits and an intercept of -1024. Only metal has more, and metal does not reach the border."""
MIN_FILL = 0.01
"""Fraction of a slice from which a region of exactly 0 HU at its border is not tissue; it is below 1e-4 in 20 scans."""
MAX_OUTLIERS = 1e-3
"""Largest fraction of voxels over `MAX_CT_HU` inside a volume; metal saturates fewer."""

TORN = 3.0
"""Ratio of the roughness under the stated and another order of the sizes from which the stated one is wrong. On 21
scans, unchanged, with thick slices, or as coronal and sagittal slices, it was at most 1.56, and 2.6 to 57 with
exchanged sizes that differ."""
FEWEST_COMPARED = 16
"""Smallest size that is exchanged with another one; smaller ones are those of thick slices."""
THICK = 2.0
"""Ratio of the roughness along voxels and along slices of fewer than `FEWEST_COMPARED` from which it is the other way
round. On 20 scans of 8 to 15 slices in every order, of 0.67 and 2 mm pixels, the ratios of right sizes were at most
0.29 for this one and 0.39 for `TORN`, where an axis of few voxels is not the last; those of wrong sizes over 2.5."""

Affine = Float[np.ndarray, "4 4"]
"""Indices (column, row, slice) to millimeters in patient coordinates (LPS)."""


@dataclass(frozen=True)
class Volume:
    """The voxels of a file."""

    voxels: Num[np.ndarray, "slices rows columns"]
    """Values after the rescale that the file states."""
    affine: Affine
    changes: tuple[str, ...] = ()
    """What was changed, assumed, or preferred to a contradicting statement of the file, in sentences."""
    rescale: tuple[float, float] | None = (1.0, 0.0)
    """Slope and intercept that the file states for its values; None where slices differ."""


def spacing_mm(affine: Affine) -> tuple[float, float, float]:
    """Distances between neighbors along the three axes."""
    x, y, z = (float(value) for value in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def shear_deg(affine: Affine) -> float:
    """Largest angle by which two axes differ from perpendicular."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.rad2deg(np.arcsin(np.abs(axes.T @ axes - np.eye(3)).max().clip(0, 1))))


def check_affine(name: str, affine: Affine, size: Sequence[int]) -> tuple[str, ...]:
    """Report a shear; `size` is in voxels along the axes.

    Raises:
        FileError: not invertible, or sheared by more than a gantry tilts.
    """
    if not np.isfinite(affine).all() or not min(spacing_mm(affine)) > 0:
        raise FileError(f"{name}: the orientation is not invertible: {affine[:3, :3].tolist()}: correct the header")
    angle = shear_deg(affine)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if angle > MAX_SHEAR_DEG or abs(np.linalg.det(axes)) < 0.5:
        raise FileError(
            f"{name}: axes {angle:.1f} degrees from perpendicular, where a gantry tilts at most {MAX_SHEAR_DEG:g}: "
            "correct the header or resample the volume"
        )
    if angle < REPORTED_SHEAR_DEG:
        return ()
    extent = np.array(size[:3]) * spacing_mm(affine)
    shift_mm = float((np.abs(axes.T @ axes - np.eye(3)) * extent[None]).max())
    return (
        f"the axes are {angle:.2f} degrees from perpendicular: every slice is put at its position, "
        f"a shift of {shift_mm:.1f} mm from first to last",
    )


def check_order(name: str, voxels: Num[np.ndarray, "slices rows columns"]) -> None:
    """Refuse a volume with exchanged sizes: in another order of them its rows and slices continue each other better.

    Thick slices differ more than voxels of one row that lie few voxels apart, so small sizes keep their place, and are
    refused where neighbors along their axis differ less than those along an axis of many voxels.
    """
    flat = voxels.reshape(-1)
    size = voxels.shape[::-1]
    roughness = functools.cache(lambda distance: _roughness(flat, distance))
    stated = " x ".join(str(n) for n in size)
    distances = (1, size[0], size[0] * size[1])
    for axis, few in enumerate(size):
        if few >= FEWEST_COMPARED:
            continue
        is_smooth = axis < 2 and roughness(distances[axis + 1]) > TORN * roughness(distances[axis])
        # A distance of so many voxels is that of neighbors if the axis is an earlier one.
        if is_smooth or any(roughness(d) > THICK * roughness(d * few) > 0 for d in distances[:axis]):
            raise FileError(
                f"{name}: {stated} voxels contradict the values, which are not those of {few} slices along axis "
                f"{axis + 1}: correct the sizes in the header"
            )
    # Slices that alternate differ from the next, but not from the one after it.
    between_slices = min(roughness(size[0] * size[1]), roughness(2 * size[0] * size[1]))
    own = roughness(size[0]), between_slices
    orders = {
        order: (roughness(order[0]), roughness(order[0] * order[1]))
        for order in permutations(size)
        if all(a == b or min(a, b) >= FEWEST_COMPARED for a, b in zip(order, size, strict=True))
    }
    best = min(orders, key=lambda order: sum(orders[order]))
    ratios = [a / b if b else 0.0 for a, b in zip(own, orders[best], strict=True)]
    if min(ratios) > 0.8 and max(ratios) > TORN:
        raise FileError(
            f"{name}: {stated} voxels contradict the values, which continue each other as "
            f"{' x '.join(str(n) for n in best)} voxels: correct the sizes in the header"
        )


def _roughness(flat: Num[np.ndarray, " voxels"], distance: int) -> float:
    """Mean absolute difference of values at this distance, without the largest 5 %, in the middle half of a volume.

    It is 0 for volumes that have too few.
    """
    count = len(flat) - distance
    if count < 512:
        return 0.0
    first = np.linspace(count // 4, 3 * count // 4, 512).astype(int)
    place = (first[:, None] + np.arange(64)).ravel()
    steps = np.abs(flat[place + distance].astype(np.float64) - flat[place])
    return float(steps[steps <= np.quantile(steps, 0.95)].mean())


def to_image(volume: Volume) -> sitk.Image:
    """The volume on its own grid."""
    image = sitk.GetImageFromArray(volume.voxels)
    spacing = spacing_mm(volume.affine)
    image.SetSpacing(spacing)
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetDirection((volume.affine[:3, :3] / spacing).ravel().tolist())
    return image


def border_to_air(
    plane: Num[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows columns"], *, is_declared: bool = False
) -> int:
    """Set the pixels of a mask that are connected to the border of a slice to air, in place; returns how many were not.

    Padding surrounds the field of view; a voxel of the same value inside it is tissue. Of padding that the header
    declares, large regions of one value inside are set to air too.
    """
    if not mask.any():
        return 0
    reached = padding_region(mask, plane) if is_declared else connected_to_border(mask)
    count = int((plane[reached] > HU_MIN).sum())
    plane[reached] = HU_MIN
    return count


def outliers_to_air(
    name: str, voxels: Num[np.ndarray, "slices rows columns"]
) -> tuple[Num[np.ndarray, "slices rows columns"], tuple[str, ...]]:
    """Set what exceeds tissue at the border of the slices to air, in place or in a copy, and report it.

    Raises:
        FileError: many voxels over every scanner's range inside, as of negative values that were stored as unsigned.
    """
    highest = float(voxels.max())
    if not highest > MAX_BORDER_HU:
        return voxels, ()
    if voxels.dtype.kind == "u":
        voxels = voxels.astype(np.float32)
    count = sum(border_to_air(plane, plane > MAX_BORDER_HU) for plane in voxels)
    inside = float((voxels > MAX_CT_HU).mean())
    if inside > MAX_OUTLIERS:
        raise FileError(
            f"{name}: {inside:.1%} of the voxels inside are over {MAX_CT_HU} HU, up to {highest:g}: "
            "negative values stored as unsigned? Convert them to signed 16 bits"
        )
    return voxels, (f"{count} voxels over {MAX_BORDER_HU} HU at the border were set to air",) if count else ()


def fill_to_air(
    name: str, voxels: Num[np.ndarray, "slices rows columns"]
) -> tuple[Num[np.ndarray, "slices rows columns"], tuple[str, ...]]:
    """Set regions of exactly 0 HU at the border of the slices to air, in a copy, and report them.

    Tools that rotate, resample or pad a scan fill with 0, which is water.

    Raises:
        FileError: a slice of one value between others.
    """
    is_flat = np.array([plane.min() == plane.max() for plane in voxels])
    inside = np.flatnonzero(~is_flat)
    between = np.flatnonzero(is_flat[inside[0] : inside[-1]]) + inside[0] if len(inside) else inside
    if len(between):
        k = int(between[0])
        raise FileError(
            f"{name}: all voxels of slice {k} of {len(voxels)} are {voxels[k].flat[0]:g}, those of adjacent slices "
            "are not: it was damaged or not copied: copy the file again"
        )
    count, changed = 0, voxels
    for k, plane in enumerate(voxels):
        region = connected_to_border(plane == 0) if (plane == 0).mean() >= MIN_FILL else np.zeros(1)
        if region.mean() >= MIN_FILL:
            changed = voxels.copy() if changed is voxels else changed
            changed[k][region] = HU_MIN
            count += int(region.sum())
    return changed, (f"{count} voxels of exactly 0 HU at the border were set to air",) if count else ()
