"""Where a model's draws differ, for the page: the standard deviation as a map in colour, its bar, and what it means."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
from jaxtyping import Int16, UInt8
from matplotlib.colors import to_hex

from raylift.serve.figures import PLANES, Plane, enlarge, marked

COLOURS = mpl.colormaps["inferno"]
"""Rises evenly in lightness, so that it reads the same in grey and to the colour-blind."""
MEANING = (
    "**Spread** is the standard deviation of the draws at each voxel, in HU: bright is where the model's own draws "
    "differ. It is not an error bar on the anatomy. Where all draws are wrong in the same way, it is dark."
)


def top_hu(deviation: Int16[np.ndarray, "d h w"]) -> int:
    """The HU of the brightest colour, the same for all slices: all but 0.5 % of the voxels are below it."""
    return max(10, 10 * math.ceil(float(np.quantile(deviation, 0.995)) / 10))


def slice_picture(deviation: Int16[np.ndarray, "d h w"], plane: Plane, index: int) -> UInt8[np.ndarray, "rows cols 3"]:
    """One slice of the map, hung and enlarged as the volume's are."""
    axis = PLANES.index(plane)
    index = min(max(index, 0), deviation.shape[axis] - 1)
    unit = np.take(deviation, index, axis=axis).astype(np.float32) / top_hu(deviation)
    return marked(COLOURS(enlarge(unit), bytes=True)[..., :3], plane)


def bar(top: int) -> str:
    """The colours from 0 HU to the top, as HTML."""
    colours = ", ".join(to_hex(COLOURS(k / 8)) for k in range(9))
    ticks = "".join(f"<span>{round(top * k / 4)}</span>" for k in range(5))
    return (
        f'<div class="bar" role="img" aria-label="Colours from dark, 0 HU, to bright, {top} HU and more">'
        f'<i style="background: linear-gradient(to right, {colours})"></i><div>{ticks} HU</div></div>'
    )
