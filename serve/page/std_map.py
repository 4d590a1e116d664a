"""The standard deviation over samples for the page: color map, color bar and explanation."""

from __future__ import annotations

import math
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Int16, UInt8
from matplotlib.colors import to_hex

from raylift.serve.images import ORIENTATION_LETTERS, PLANES, Plane, to_displayed, with_orientation_letters

COLORS = mpl.colormaps["inferno"]
"""Lightness increases uniformly, so the map is legible in gray and to color-blind readers."""
EXPLANATION = (
    "**Standard deviation** over samples at each voxel, in HU: bright where the model's samples differ. It is not an "
    "error bar on the anatomy. Where all samples share the same error, it is dark."
)


class StdMap(NamedTuple):
    """Voxel-wise standard deviation over samples, and the HU of the brightest color in all slices."""

    std: Int16[np.ndarray, "d h w"]
    max_hu: int

    @classmethod
    def of(cls, std: Int16[np.ndarray, "d h w"]) -> StdMap:
        """The map whose brightest color is the 99.5th percentile, rounded up to a multiple of 40 HU."""
        return cls(std, max(40, 40 * math.ceil(float(np.quantile(std, 0.995)) / 40)))

    def slice_image(self, plane: Plane, index: int) -> UInt8[np.ndarray, "rows columns 3"]:
        """One slice in color, oriented and resized as those of the volume."""
        axis = PLANES.index(plane)
        index = min(max(index, 0), self.std.shape[axis] - 1)
        unit = np.take(self.std, index, axis=axis).astype(np.float32) / self.max_hu
        return with_orientation_letters(COLORS(to_displayed(unit), bytes=True)[..., :3], ORIENTATION_LETTERS[plane])

    def colorbar(self) -> str:
        """The colors from 0 HU to `max_hu` as HTML."""
        colors = ", ".join(to_hex(COLORS(k / 8)) for k in range(9))
        ticks = "".join(f"<span>{self.max_hu * k // 4} HU</span>" for k in range(5))
        label = f"Color bar from dark, 0 HU, to bright, {self.max_hu} HU and above"
        return (
            f'<div class="colorbar" role="img" aria-label="{label}">'
            f'<i style="background: linear-gradient(to right, {colors})"></i><div>{ticks}</div></div>'
        )
