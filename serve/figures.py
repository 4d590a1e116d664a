"""Volumes and radiographs as 8-bit pictures for the page."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int16, UInt8
from PIL import Image

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window, attenuation, standardise
from raylift.datasets.projector import project

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: dict[Plane, int] = {"axial": 0, "coronal": 1, "sagittal": 2}
WINDOWS = {"lung": Window(-1000, 200), "soft tissue": Window(-160, 240), "wide": Window(-1000, 1000)}
SIDE_PX = 448


def slice_picture(
    hu: Int16[np.ndarray, "d h w"], plane: Plane, index: int, window: str
) -> UInt8[np.ndarray, "rows columns"]:
    """One slice, enlarged, hung as a reader expects: axial seen from the feet, the patient's right at the left."""
    index = min(max(index, 0), hu.shape[PLANES[plane]] - 1)
    chosen = np.take(hu, index, axis=PLANES[plane]).astype(np.float32)
    return enlarge(WINDOWS[window].to_unit(chosen))


def reprojections(
    hu: Int16[np.ndarray, "d h w"], grid: Grid, geometry: Geometry
) -> list[UInt8[np.ndarray, "rows columns"]]:
    """The volume's own radiographs, one a view."""
    density = attenuation(torch.from_numpy(hu.astype(np.float32)))[None, None]
    images = [project(density, grid.spacing_mm, geometry, view)[0, 0].numpy() for view in geometry.views]
    return [enlarge(standardise(image)) for image in images]


def enlarge(unit: Float32[np.ndarray, "_ _"]) -> UInt8[np.ndarray, "rows columns"]:
    """An image in [0, 1] as 8 bits, its longer side as many pixels as the page shows."""
    picture = Image.fromarray((unit.clip(0.0, 1.0) * 255).astype(np.uint8))
    scale = SIDE_PX / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
