"""What was written on a radiograph after it was taken: letters and boxes of full brightness near the edges.

A network that was trained on projections has never seen any, and they pull the percentiles by which an image is
standardized. Only what no anatomy looks like is taken away: small, as bright as the image gets, near a side, and with
something much darker all round.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

LOOKED_AT_PX = 1024
SMALLEST_PX = 128
"""On a smaller image no letter could be read, and a rib's end is as small as one."""
FULL, DARKER = 0.97, 0.75
"""Shares of the range: what a mark reaches, and what nine tenths of its surroundings stay below."""
EDGE, HIGH, WIDE = 0.25, 0.1, 0.4
"""Shares of the sides: how far from a side a mark ends, and its largest height and width."""
MOST = 200
"""More marks than anyone writes: then it is a pattern, and stays."""


def remove_annotations(image: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """The image with such marks filled by the median of what surrounds each; the image itself where there are none."""
    if min(image.shape) < SMALLEST_PX:
        return image
    step = -(-max(image.shape) // LOOKED_AT_PX)
    rows, columns = image.shape
    padded = np.pad(image, ((0, -rows % step), (0, -columns % step)), mode="edge")
    coarse = padded.reshape(len(padded) // step, step, -1, step).max(axis=(1, 3))
    low, high = float(coarse.min()), float(coarse.max())
    # Grown over the soft edge of letters, so that those of a word are one mark.
    bright = ndimage.binary_dilation(coarse > low + FULL * (high - low), iterations=2)
    marks, count = ndimage.label(bright)
    if not 0 < count <= MOST:
        return image
    filling = np.full(coarse.shape, np.nan, np.float32)
    for number, place in enumerate(ndimage.find_objects(marks), start=1):
        if not _is_small_at_a_side(place, coarse.shape):
            continue
        around = tuple(slice(max(0, side.start - 3), side.stop + 3) for side in place)
        ring = coarse[around][~bright[around]]
        if ring.size and np.quantile(ring, 0.9) < low + DARKER * (high - low):
            filling[place][marks[place] == number] = np.median(ring)
    if np.isnan(filling).all():
        return image
    fine = filling.repeat(step, axis=0).repeat(step, axis=1)[:rows, :columns]
    return np.where(np.isnan(fine), image, fine)


def _is_small_at_a_side(place: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    heights = [(side.stop - side.start) / length for side, length in zip(place, shape, strict=True)]
    near = [
        side.stop < EDGE * length or side.start > (1 - EDGE) * length for side, length in zip(place, shape, strict=True)
    ]
    return heights[0] < HIGH and heights[1] < WIDE and any(near)
