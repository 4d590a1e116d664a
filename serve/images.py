"""Slices, reprojections and radiographs as 8-bit images."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Int16, UInt8
from PIL import Image, ImageDraw, ImageFont

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Normalization, Window
from raylift.datasets.projector import normalized_drrs

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = get_args(Plane)
"""In the order of a volume's axes; a slice of a plane is one index along its axis."""

WINDOWS = {
    "wide": Window(-1024, 1476),
    "lung": Window(-1350, 150),
    "soft tissue": Window(-160, 240),
    "bone": Window(-500, 1300),
}
SIDE_PX = 448

DIRECTIONS = {
    "axial": "superior to inferior",
    "coronal": "anterior to posterior",
    "sagittal": "right to left",
}
"""Direction of the slices of a plane with increasing index."""
ORIENTATION_LETTERS = {
    "axial": "RLAP",
    "coronal": "RLSI",
    "sagittal": "APSI",
}
"""Patient directions at the left, right, upper and lower edge of a slice, by plane."""


def slice_image(
    hu: Int16[np.ndarray, "d h w"], plane: Plane, index: int, window: str
) -> UInt8[np.ndarray, "rows columns"]:
    """One slice in radiological convention (axial seen from the feet, the patient's right at the left), resized."""
    axis = PLANES.index(plane)
    index = min(max(index, 0), hu.shape[axis] - 1)
    values = np.take(hu, index, axis=axis).astype(np.float32)
    return with_orientation_letters(to_displayed(WINDOWS[window].to_unit(values)), ORIENTATION_LETTERS[plane])


def reprojections(
    hu: Int16[np.ndarray, "d h w"], grid: Grid, geometry: Geometry, normalization: Normalization = "percentiles"
) -> list[UInt8[np.ndarray, "rows columns"]]:
    """Digitally reconstructed radiographs (DRRs) of the volume, one for each view."""
    return [to_displayed(image) for image in normalized_drrs(hu, grid, geometry, normalization)]


def to_displayed(unit: Float32[np.ndarray, "_ _"]) -> UInt8[np.ndarray, "rows columns"]:
    """An image in [0, 1] as 8 bits, resized so that its longer side has `SIDE_PX` pixels."""
    image = Image.fromarray((unit.clip(0.0, 1.0) * 255).astype(np.uint8))
    scale = SIDE_PX / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def with_orientation_letters(
    image: UInt8[np.ndarray, "rows columns *colors"], letters: str
) -> UInt8[np.ndarray, "rows columns *colors"]:
    """The image with these letters at its left, right, upper and lower edge, as many as there are."""
    canvas = Image.fromarray(image)
    width, height = canvas.size
    positions = [
        (10, height / 2, "lm"),
        (width - 10, height / 2, "rm"),
        (width / 2, 8, "mt"),
        (width / 2, height - 8, "mb"),
    ]
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    for letter, (x, y, anchor) in zip(letters, positions, strict=False):
        text.text((x, y), letter, fill="white", font=font, anchor=anchor, stroke_width=2, stroke_fill="black")
    return np.asarray(canvas)
