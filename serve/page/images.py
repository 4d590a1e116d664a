"""Volumes and radiographs as 8-bit pictures for the page."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Int16, UInt8
from PIL import Image, ImageDraw, ImageFont

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.ct import radiographs
from raylift.datasets.intensity import Window, standardize

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = get_args(Plane)
"""In the order of a volume's axes: each plane is one index of its axis."""

WINDOWS = {
    "wide": Window(-1024, 1476),
    "lung": Window(-1350, 150),
    "soft tissue": Window(-160, 240),
    "bone": Window(-500, 1300),
}
SIDE_PX = 448
GAP_PX = 8

MARKS = {
    "axial": "RLAP",
    "coronal": "RLSI",
    "sagittal": "APSI",
    "frontal": "RL",
    "lateral": "AP",
}
"""Directions in the patient that a picture's left, right, upper and lower edge stand for."""


def slice_picture(
    hu: Int16[np.ndarray, "d h w"], plane: Plane, index: int, window: str
) -> UInt8[np.ndarray, "rows columns"]:
    """One slice, enlarged, hung as a reader expects: axial seen from the feet, the patient's right at the left."""
    axis = PLANES.index(plane)
    index = min(max(index, 0), hu.shape[axis] - 1)
    chosen = np.take(hu, index, axis=axis).astype(np.float32)
    return marked(enlarge(WINDOWS[window].to_unit(chosen)), plane)


def reprojections(
    hu: Int16[np.ndarray, "d h w"], grid: Grid, geometry: Geometry
) -> list[UInt8[np.ndarray, "rows columns"]]:
    """The volume's own radiographs, one a view."""
    return [enlarge(standardize(image)) for image in radiographs(hu, grid, geometry)]


def enlarge(unit: Float32[np.ndarray, "_ _"]) -> UInt8[np.ndarray, "rows columns"]:
    """An image in [0, 1] as 8 bits, its longer side as many pixels as the page shows."""
    picture = Image.fromarray((unit.clip(0.0, 1.0) * 255).astype(np.uint8))
    scale = SIDE_PX / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def beside(left: UInt8[np.ndarray, "rows a"], right: UInt8[np.ndarray, "rows b"]) -> UInt8[np.ndarray, "rows _"]:
    """Two pictures of the same height, a black gap between them."""
    return np.hstack([left, np.zeros((left.shape[0], GAP_PX), np.uint8), right])


def marked(picture: UInt8[np.ndarray, "rows columns *colors"], name: str) -> UInt8[np.ndarray, "rows columns *colors"]:
    """The picture with the patient's directions at its edges, as `MARKS` has them for that plane or view."""
    image = Image.fromarray(picture)
    width, height = image.size
    places = [
        (10, height / 2, "lm"),
        (width - 10, height / 2, "rm"),
        (width / 2, 8, "mt"),
        (width / 2, height - 8, "mb"),
    ]
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    for letter, (x, y, anchor) in zip(MARKS.get(name, ""), places, strict=False):
        draw.text((x, y), letter, fill="white", font=font, anchor=anchor, stroke_width=2, stroke_fill="black")
    return np.asarray(image)
