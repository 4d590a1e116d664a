"""Organs of the chest by thresholds and shape, without a network; a second for 128^3 voxels.

The lung mask is air (below -500 HU) inside the body in 6-connected components of 50 ml or more, closed by one voxel and
filled in each axial slice. Inside means enclosed by the body in a slice, or by the body and the right or left side of
the volume: a lung is not found in slices where the front, the back or a field of view cuts it open. Vessels are voxels
above -500 HU inside the lungs eroded by a voxel, which excludes the partial volume of the pleura. With the lungs of a
network they are only where the lungs of thresholds are too: consolidated lung is above -500 HU. Thresholds miss
consolidated lung: the masks are for weighting losses and for comparing a volume with its ground truth by the same rule,
not for measuring disease. No threshold separates bone from a contrast-enhanced heart, so a CT has no bone label;
phantoms have one. `bone` therefore includes contrast agent.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int16, UInt8
from scipy import ndimage
from skimage.morphology import convex_hull_image

from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter

LUNG_AIR_HU = -500
BODY_HU = -400
BONE_HU = 226
SMALLEST_LUNG_ML = 50.0
LARGEST_TRACHEA_CM2, TRACHEA_OFF_CENTER_MM = 9.0, 30.0


class Label(IntEnum):
    """The value of a voxel in a label volume."""

    OTHER = 0
    LUNG = 1
    VESSEL = 2
    BONE = 3
    PNEUMOTHORAX = 4
    OUTSIDE_FIELD_OF_VIEW = 5


def body(
    hu: Int16[np.ndarray, "d h w"], spacing_mm: float, measured: Bool[np.ndarray, "d h w"] | None = None
) -> Bool[np.ndarray, "d h w"]:
    """Mask of the patient without the table: largest component after an opening of 5 mm, filled in each slice.

    All False if nothing is dense. A lung that the right or left side of the volume cuts open is part of it. The outside
    of the volume and of `measured`, the field of view, does not erode, so a body that is truncated by the field of view
    keeps its outermost slices and its flanks.
    """
    radius = max(1, round(5.0 / spacing_mm))
    dense = np.asarray(hu > BODY_HU)
    if measured is None:
        eroded = ndimage.binary_erosion(dense, iterations=radius, border_value=1)
    else:
        eroded = ndimage.binary_erosion(dense | ~measured, iterations=radius, border_value=1) & dense & measured
    opened = ndimage.binary_dilation(eroded, iterations=radius) & dense
    components, count = ndimage.label(opened)
    if count == 0:
        return np.zeros(hu.shape, dtype=bool)
    largest = components == 1 + np.argmax(np.bincount(components.ravel())[1:])
    # Restore the skin that the opening removed, but not the table.
    dilated = ndimage.binary_dilation(largest, iterations=radius) & (dense | largest)
    closed = np.pad(dilated, ((0, 0), (0, 0), (1, 1)))
    for side in (0, -1):
        # From the first to the last row of the body in each slice.
        face = dilated[:, :, side]
        closed[:, :, side] = np.logical_or.accumulate(face, 1) & np.logical_or.accumulate(face[:, ::-1], 1)[:, ::-1]
    return _fill_slices(closed)[:, :, 1:-1]


def lungs(
    hu: Int16[np.ndarray, "d h w"], spacing_mm: float, inside: Bool[np.ndarray, "d h w"] | None = None
) -> Bool[np.ndarray, "d h w"]:
    """Mask of both lungs with their vessels and airways; all False if there are none.

    `inside` is the mask of the body, by default that of `body` without a field of view.
    """
    # Restricted to the body: where a scan ends inside the volume, the trachea opens into the air beyond it.
    components, count = ndimage.label((hu < LUNG_AIR_HU) & (body(hu, spacing_mm) if inside is None else inside))
    if count == 0:
        return np.zeros(hu.shape, dtype=bool)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    keep = sizes * spacing_mm**3 / 1000 >= SMALLEST_LUNG_ML
    keep[0] = False
    air = np.pad(keep[components], 1)
    return _fill_slices(ndimage.binary_closing(air)[1:-1, 1:-1, 1:-1])


def vessels(hu: Int16[np.ndarray, "d h w"], lung: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """Mask of voxels above -500 HU inside the lungs eroded by one voxel, except at the border of the volume."""
    return ndimage.binary_erosion(lung, border_value=1) & (hu > LUNG_AIR_HU)


def middle_column(body: Bool[np.ndarray, "d h w"]) -> float:
    """Middle between the first and the last column of the body; to its right, columns are the patient's left."""
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    return float(columns[0] + columns[-1] + 1) / 2 if len(columns) else body.shape[2] / 2


def trachea(
    air: Bool[np.ndarray, "d h w"], body: Bool[np.ndarray, "d h w"], spacing_mm: float
) -> Bool[np.ndarray, "d h w"]:
    """The trachea to its bifurcation: air followed downwards from the first section near the middle.

    It is dilated by a voxel. A section has up to 9 cm^2, and the first is within 30 mm of the middle of the body.
    """
    result = np.zeros_like(air)
    middle = middle_column(body)
    above: Bool[np.ndarray, "h w"] | None = None
    for plane, traced in zip(air, result, strict=True):
        sections, count = ndimage.label(plane)
        for section in (sections == number for number in range(1, count + 1)):
            off_center_mm = abs(np.flatnonzero(section) % plane.shape[1] - middle).mean() * spacing_mm
            follows = off_center_mm <= TRACHEA_OFF_CENTER_MM if above is None else bool((section & above).any())
            if follows and section.sum() * spacing_mm**2 / 100 <= LARGEST_TRACHEA_CM2:
                traced |= section
        if traced.any():
            above = traced
        elif above is not None:
            break
    return ndimage.binary_dilation(result)


def bone(hu: Int16[np.ndarray, "d h w"], body: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """Mask of voxels above 226 HU inside the body, contrast agent and implants included; marrow is mostly below."""
    return np.asarray(body & (hu > BONE_HU))


def mediastinum(hu: Int16[np.ndarray, "d h w"], lung: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """Mask of what is neither lung nor bone inside the convex hull of the lungs in each axial slice.

    It includes the heart and, where the lungs surround it, the dome of the liver, which no threshold separates.
    """
    hull = np.stack([convex_hull_image(plane) if plane.any() else plane for plane in lung])
    return np.asarray(hull & ~lung & (hu <= BONE_HU))


def labels(
    hu: Int16[np.ndarray, "d h w"],
    spacing_mm: float,
    inside: Bool[np.ndarray, "d h w"] | None = None,
    segmenter: Segmenter = THRESHOLDS,
) -> UInt8[np.ndarray, "d h w"]:
    """A label volume with `Label.LUNG` and `Label.VESSEL`; `inside` is the mask of the body, as in `lungs`."""
    air = lungs(hu, spacing_mm, inside)
    lung = segmenter.lungs(hu, air)
    result = np.full(hu.shape, Label.OTHER, dtype=np.uint8)
    result[lung] = Label.LUNG
    result[vessels(hu, lung & air)] = Label.VESSEL
    return result


def _fill_slices(mask: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    return np.stack([ndimage.binary_fill_holes(plane) for plane in mask])
