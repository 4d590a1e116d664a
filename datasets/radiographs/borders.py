"""Cropping of bright borders and uniform margins of a radiograph."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32


def crop_bright_border(image: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "_ _"]:
    """Crop the outer rows and columns whose pixels are all in the upper 5 % of the image's range."""
    low, high = np.percentile(image, (0.5, 99.5))
    bright = high - 0.05 * (high - low)
    return _cropped(image, image.min(axis=1) < bright, image.min(axis=0) < bright)


def crop_uniform_margin(image: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "_ _"]:
    """Crop the outer rows and columns whose range is below 5 % of the image's."""
    span = 0.05 * float(image.max() - image.min())
    return _cropped(image, np.ptp(image, axis=1) > span, np.ptp(image, axis=0) > span)


def _cropped(
    image: Float32[np.ndarray, "rows columns"], rows: Bool[np.ndarray, " rows"], columns: Bool[np.ndarray, " columns"]
) -> Float32[np.ndarray, "_ _"]:
    """The image from the first to the last marked row and column, or the input if less than half would remain."""
    inner_rows, inner_columns = np.flatnonzero(rows), np.flatnonzero(columns)
    if 2 * len(inner_rows) < len(rows) or 2 * len(inner_columns) < len(columns):
        return image
    return image[inner_rows[0] : inner_rows[-1] + 1, inner_columns[0] : inner_columns[-1] + 1]
