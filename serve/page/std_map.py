"""Where a model's draws differ, for the page: the standard deviation as a map in color, its bar, and what it means."""

from __future__ import annotations

import math
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Int16, UInt8
from matplotlib.colors import to_hex

from raylift.serve.page.images import PLANES, Plane, enlarge, marked

COLORS = mpl.colormaps["inferno"]
"""Rises evenly in lightness, so that it reads the same in gray and to the color-blind."""
MEANING = (
    "**Spread** is the standard deviation of the draws at each voxel, in HU: bright is where the model's own draws "
    "differ. It is not an error bar on the anatomy. Where all draws are wrong in the same way, it is dark."
)


class SpreadMap(NamedTuple):
    """The standard deviation over draws, and the HU of the brightest color, the same for all slices."""

    deviation: Int16[np.ndarray, "d h w"]
    top_hu: int

    @classmethod
    def of(cls, deviation: Int16[np.ndarray, "d h w"]) -> SpreadMap:
        """With a top that is a multiple of 40 and has at most 0.5 % of the voxels above it."""
        return cls(deviation, max(40, 40 * math.ceil(float(np.quantile(deviation, 0.995)) / 40)))

    def slice_picture(self, plane: Plane, index: int) -> UInt8[np.ndarray, "rows columns 3"]:
        """One slice, hung and enlarged as the volume's are."""
        axis = PLANES.index(plane)
        index = min(max(index, 0), self.deviation.shape[axis] - 1)
        unit = np.take(self.deviation, index, axis=axis).astype(np.float32) / self.top_hu
        return marked(COLORS(enlarge(unit), bytes=True)[..., :3], plane)

    def bar(self) -> str:
        """The colors from 0 HU to the top, as HTML."""
        colors = ", ".join(to_hex(COLORS(k / 8)) for k in range(9))
        ticks = "".join(f"<span>{self.top_hu * k // 4} HU</span>" for k in range(5))
        return (
            f'<div class="bar" role="img" aria-label="Colors from dark, 0 HU, to bright, {self.top_hu} HU and more">'
            f'<i style="background: linear-gradient(to right, {colors})"></i><div>{ticks}</div></div>'
        )
