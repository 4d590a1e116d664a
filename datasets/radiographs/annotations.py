"""Removal of burned-in annotations: letters and boxes of full brightness near the edges of a radiograph.

Digitally reconstructed radiographs (DRRs), on which networks are trained, have none, and annotations shift the
percentiles by which an image is normalized. Only regions unlike any anatomy are removed: small, of the image's
highest brightness, near an edge, and surrounded by much darker pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

COARSE_PX = 1024
SMALLEST_PX = 128
"""Smaller images are left unchanged: letters would be illegible, and the end of a rib is as small as a letter."""
BRIGHT, SURROUNDINGS = 0.97, 0.75
"""Fractions of the image's range: lower limit of an annotation, upper limit of nine tenths of its surroundings."""
EDGE, MAX_HEIGHT, MAX_WIDTH = 0.25, 0.1, 0.4
"""Fractions of the image size: distance from an edge, largest height and width."""
MAX_REGIONS = 200
"""More bright regions than this are a pattern rather than annotations, and are kept."""


def remove_annotations(image: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """The image with each annotation replaced by the median of its surroundings; the input if there are none."""
    if min(image.shape) < SMALLEST_PX:
        return image
    step = -(-max(image.shape) // COARSE_PX)
    rows, columns = image.shape
    padded = np.pad(image, ((0, -rows % step), (0, -columns % step)), mode="edge")
    coarse = padded.reshape(len(padded) // step, step, -1, step).max(axis=(1, 3))
    low, high = float(coarse.min()), float(coarse.max())
    # Dilated over the soft edges of letters, so that the letters of a word form one region.
    bright = ndimage.binary_dilation(coarse > low + BRIGHT * (high - low), iterations=2)
    regions, count = ndimage.label(bright)
    if not 0 < count <= MAX_REGIONS:
        return image
    filling = np.full(coarse.shape, np.nan, np.float32)
    for number, place in enumerate(ndimage.find_objects(regions), start=1):
        if not _is_small_near_edge(place, coarse.shape):
            continue
        around = tuple(slice(max(0, side.start - 3), side.stop + 3) for side in place)
        ring = coarse[around][~bright[around]]
        if ring.size and np.quantile(ring, 0.9) < low + SURROUNDINGS * (high - low):
            filling[place][regions[place] == number] = np.median(ring)
    if np.isnan(filling).all():
        return image
    fine = filling.repeat(step, axis=0).repeat(step, axis=1)[:rows, :columns]
    return np.where(np.isnan(fine), image, fine)


def _is_small_near_edge(place: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    heights = [(side.stop - side.start) / length for side, length in zip(place, shape, strict=True)]
    near = [
        side.stop < EDGE * length or side.start > (1 - EDGE) * length for side, length in zip(place, shape, strict=True)
    ]
    return heights[0] < MAX_HEIGHT and heights[1] < MAX_WIDTH and any(near)
