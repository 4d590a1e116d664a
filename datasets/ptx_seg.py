"""PTX-Seg: pneumothorax and lungs of a CT by thresholds and shape, without a network (X-Recon, arXiv 2407.15356).

The paper gives no thresholds; these are raylift's own. The pleural cavities are the air inside the chest without the
trachea. A core of pneumothorax is gas in one compact region with a broad contact with the chest wall: emphysema is gas
too, but porous and inside the lung, bronchi have no contact with the wall, and bowel gas stays below the middle of the
lungs. On a side with a core, pneumothorax is what is connected to it in the cavity outside the lung and its pleura.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int16, UInt8
from scipy import ndimage
from skimage.morphology import convex_hull_image

from raylift.datasets import segmentation
from raylift.datasets.errors import FileError
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter

Mask = Bool[np.ndarray, "d h w"]
Side = Literal["right", "left"]
SIDES: tuple[Side, Side] = ("right", "left")
CAVITY_HU, CORE_HU, GAS_HU, LUNG_HU = -400, -960, -990, -450
"""Upper limits of air in the chest and of a core, gas without noise, and the upper limit for the median of a lung."""
PLEURA_CONTRAST_HU = 140
"""How far a lung's pleura is above its median."""
SMALLEST_CAVITY_ML, SMALLEST_CORE_ML = 50.0, 2.0
WALL_MM, LEAST_CONTACT, LEAST_SOLIDITY = 5.0, 0.3, 0.8
"""Share of a core's surface within 5 mm of the chest wall, and of its voxels in the core closed by two voxels."""
COARSE_WALL_MM = 7.5
"""The same distance in a volume of coarser voxels that was resampled to 2.5 mm. Emphysema can be a core then."""
SPACING_MM = 2.5
"""Voxels for which these values hold: contact, closing and pleura are lengths in voxels too."""


class Region(IntEnum):
    """The value of a voxel in a mask."""

    OTHER = 0
    RIGHT_LUNG = 1
    LEFT_LUNG = 2
    RIGHT_PNEUMOTHORAX = 3
    LEFT_PNEUMOTHORAX = 4


@dataclass(frozen=True)
class Hemithorax:
    """Volumes of one side, in ml."""

    pneumothorax_ml: float
    lung_ml: float

    @property
    def occupancy_percent(self) -> float:
        """Share of the pleural cavity that is pneumothorax; 0 for a side without a cavity."""
        cavity_ml = self.pneumothorax_ml + self.lung_ml
        return 100 * self.pneumothorax_ml / cavity_ml if cavity_ml else 0.0


def segment(
    hu: Int16[np.ndarray, "d h w"], spacing_mm: float, wall_mm: float = WALL_MM, segmenter: Segmenter = THRESHOLDS
) -> UInt8[np.ndarray, "d h w"]:
    """A volume of `Region` of a CT in HU and volume order; lungs include their vessels and bronchi.

    Args:
        hu: the CT.
        spacing_mm: edge of its voxels.
        wall_mm: distance up to which gas is at the chest wall.
        segmenter: finds lungs that thresholds miss; its lungs are parts of the pleural cavities.

    Raises:
        FileError: the volume has no lungs.
    """
    body = segmentation.body(hu, spacing_mm)
    field = _lung_field(hu, body, spacing_mm)
    cavities = (field | segmenter.lungs(hu, field)) & ~segmentation.trachea(field, body, spacing_mm)
    if not cavities.any():
        raise FileError(
            f"no lungs: no air below {CAVITY_HU} HU of {SMALLEST_CAVITY_ML:g} ml or more inside the body; it must be a "
            "CT of the chest in HU"
        )
    hull = np.stack([convex_hull_image(plane) if plane.any() else plane for plane in cavities])
    depth_mm = ndimage.distance_transform_edt(hull) * spacing_mm
    middle = int(segmentation.middle_column(body))
    result = np.full(hu.shape, Region.OTHER, dtype=np.uint8)
    for side, columns in zip(SIDES, (slice(None, middle), slice(middle, None)), strict=True):
        cavity = np.zeros_like(cavities)
        cavity[:, :, columns] = cavities[:, :, columns]
        result[cavity] = Region[f"{side.upper()}_LUNG"]
        result[_pneumothorax(hu, cavity, depth_mm <= wall_mm, spacing_mm)] = Region[f"{side.upper()}_PNEUMOTHORAX"]
    return result


def measure(regions: UInt8[np.ndarray, "d h w"], voxel_ml: float) -> dict[Side, Hemithorax]:
    """Volumes of both sides from a volume of `Region`."""
    ml = np.bincount(regions.ravel(), minlength=len(Region)) * voxel_ml
    return {
        "right": Hemithorax(float(ml[Region.RIGHT_PNEUMOTHORAX]), float(ml[Region.RIGHT_LUNG])),
        "left": Hemithorax(float(ml[Region.LEFT_PNEUMOTHORAX]), float(ml[Region.LEFT_LUNG])),
    }


def _lung_field(hu: Int16[np.ndarray, "d h w"], body: Mask, spacing_mm: float) -> Mask:
    """Air inside the body in components that reach above the middle of the largest, closed, filled in axial slices."""
    components, count = ndimage.label((hu < CAVITY_HU) & body)
    if count == 0:
        return np.zeros_like(body)
    sizes = np.bincount(components.ravel())[1:] * spacing_mm**3 / 1000
    heights = [box[0] for box in ndimage.find_objects(components)]
    largest = heights[int(np.argmax(sizes))]
    reaches = np.array([height.start < (largest.start + largest.stop) / 2 for height in heights])
    kept = np.concatenate([[False], (sizes >= SMALLEST_CAVITY_ML) & reaches])[components]
    return np.stack([ndimage.binary_fill_holes(plane) for plane in _closed(kept, 1)])


def _pneumothorax(hu: Int16[np.ndarray, "d h w"], cavity: Mask, at_wall: Mask, spacing_mm: float) -> Mask:
    """The pneumothorax of one pleural cavity."""
    core = _core(hu, cavity, at_wall, spacing_mm)
    inner = hu[ndimage.binary_erosion(cavity)]
    parenchyma = inner[(inner >= CORE_HU) & (inner < LUNG_HU)]
    if not core.any() or not parenchyma.size:
        return core
    median = float(np.median(parenchyma))
    gas = core | (ndimage.binary_dilation(core) & cavity & (hu < max(CORE_HU, (median + GAS_HU) / 2)))
    lung = cavity & ~gas & (hu <= median + PLEURA_CONTRAST_HU) & (hu >= (median + GAS_HU) / 2)
    lung = _largest(_closed(ndimage.binary_opening(lung), 2) & cavity & ~gas)
    lung = np.stack([ndimage.binary_fill_holes(plane) for plane in lung]) & ~gas
    # The voxels around the lung are its pleura, or where it touches the wall a mixture of both.
    outside = gas | (cavity & ~ndimage.binary_dilation(lung))
    return ndimage.binary_propagation(gas, mask=outside)


def _core(hu: Int16[np.ndarray, "d h w"], cavity: Mask, at_wall: Mask, spacing_mm: float) -> Mask:
    """Gas in compact components with a broad contact with the chest wall."""
    core = np.zeros_like(cavity)
    components, _ = ndimage.label((hu < CORE_HU) & cavity)
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    for number in np.flatnonzero(sizes * spacing_mm**3 / 1000 >= SMALLEST_CORE_ML):
        component = components == number
        closed = _closed(component, 2)
        surface = closed & ~ndimage.binary_erosion(closed)
        if component.sum() >= LEAST_SOLIDITY * closed.sum() and at_wall[surface].mean() >= LEAST_CONTACT:
            core |= component
    return core


def _largest(mask: Mask) -> Mask:
    components, count = ndimage.label(mask)
    return components == 1 + np.argmax(np.bincount(components.ravel())[1:]) if count else mask


def _closed(mask: Mask, voxels: int) -> Mask:
    """Closing that does not erode from the border of the volume."""
    inside = (slice(voxels, -voxels),) * 3
    return np.asarray(ndimage.binary_closing(np.pad(mask, voxels), iterations=voxels)[inside])
