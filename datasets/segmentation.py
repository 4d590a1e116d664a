"""Body, lungs and lung vessels by threshold: no weights, a fraction of a second at 128 voxels a side.

The lung mask is air (below -500 HU) inside the body in 6-connected components of 50 ml or more, closed by one voxel
and filled in each axial slice. Inside is what the body encloses in a slice, so a lung is not found in slices where a
side of the volume opens it. Vessels are what is denser than -500 HU inside the lungs eroded by a voxel, which keeps
the partial volume of the pleura out. Consolidated lung is lost by any threshold: the masks are for weighting losses
and for comparing a volume with its truth by the same rule, not for measuring disease. Bone has no threshold that a
contrast-filled heart does not pass too, so a CT gets no bone label; phantoms know theirs.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Int16, UInt8
from scipy import ndimage

LUNG_AIR_HU = -500
BODY_HU = -400
SMALLEST_LUNG_ML = 50.0


class Label(IntEnum):
    """What a voxel of a label volume may be."""

    OTHER = 0
    LUNG = 1
    VESSEL = 2
    BONE = 3


def body(hu: Int16[np.ndarray, "d h w"], spacing_mm: float) -> Bool[np.ndarray, "d h w"]:
    """The patient with everything inside, without the table: largest component after an opening of 5 mm, filled.

    All False where nothing is dense. What lies beyond the volume neither erodes nor dilates, so a body that the field
    of view cuts keeps its outermost slices and its flanks.
    """
    radius = max(1, round(5.0 / spacing_mm))
    dense = np.asarray(hu > BODY_HU)
    eroded = ndimage.binary_erosion(dense, iterations=radius, border_value=1)
    opened = ndimage.binary_dilation(eroded, iterations=radius)
    components, count = ndimage.label(opened)
    if count == 0:
        return np.zeros(hu.shape, dtype=bool)
    largest = components == 1 + np.argmax(np.bincount(components.ravel())[1:])
    # Grow back what the opening took from the skin, but not the table beyond it.
    grown = ndimage.binary_dilation(largest, iterations=radius) & (dense | largest)
    return _fill_slices(grown)


def lungs(hu: Int16[np.ndarray, "d h w"], spacing_mm: float) -> Bool[np.ndarray, "d h w"]:
    """Both lungs with their vessels and airways; all False where there are none."""
    # Inside the body: where a scan ends within the volume, the trachea opens into the air beyond it.
    components, count = ndimage.label((hu < LUNG_AIR_HU) & body(hu, spacing_mm))
    if count == 0:
        return np.zeros(hu.shape, dtype=bool)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    keep = sizes * spacing_mm**3 / 1000 >= SMALLEST_LUNG_ML
    keep[0] = False
    air = np.pad(keep[components], 1)
    return _fill_slices(ndimage.binary_closing(air)[1:-1, 1:-1, 1:-1])


def vessels(hu: Int16[np.ndarray, "d h w"], lung: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """Voxels above -500 HU inside the lungs eroded by one voxel, though not where the volume cuts a lung."""
    return ndimage.binary_erosion(lung, border_value=1) & (hu > LUNG_AIR_HU)


def labels(hu: Int16[np.ndarray, "d h w"], spacing_mm: float) -> UInt8[np.ndarray, "d h w"]:
    """A label volume with `Label.LUNG` and `Label.VESSEL` by the thresholds of this module."""
    lung = lungs(hu, spacing_mm)
    result = np.full(hu.shape, Label.OTHER, dtype=np.uint8)
    result[lung] = Label.LUNG
    result[vessels(hu, lung)] = Label.VESSEL
    return result


def _fill_slices(mask: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    return np.stack([ndimage.binary_fill_holes(plane) for plane in mask])
