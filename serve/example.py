"""Radiographs of a synthetic thorax as files, to try a model without any of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from raylift.datasets.ingest import radiographs
from raylift.datasets.intensity import standardise
from raylift.datasets.phantom import thorax
from raylift.models.weights import Description

SEED = 7


def write(description: Description, folder: Path) -> dict[str, Path]:
    """16-bit PNG files by view, bone bright, as the model's geometry sees the phantom of `SEED`."""
    hu, _ = thorax(SEED, description.grid)
    paths = {}
    images = radiographs(hu, description.grid, description.geometry)
    for view, image in zip(description.geometry.views, images, strict=True):
        paths[view.name] = folder / f"synthetic-{view.name}.png"
        Image.fromarray((standardise(image) * 65535).astype(np.uint16)).save(paths[view.name])
    return paths
