"""Synthetic example radiographs: digitally reconstructed radiographs (DRRs) of a phantom thorax as PNG files."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float32
from PIL import Image

from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import normalized_drrs
from raylift.models.weights import Description

SEED = 7


def files(description: Description) -> dict[str, bytes]:
    """16-bit PNG files by view, bone bright: DRRs of the phantom with seed `SEED` in the model's geometry."""
    hu, _ = thorax(SEED, description.grid)
    images = normalized_drrs(hu, description.grid, description.geometry, description.normalization)
    return {view.name: _png(image) for view, image in zip(description.geometry.views, images, strict=True)}


def _png(image: Float32[np.ndarray, "rows columns"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray((image * 65535).astype(np.uint16)).save(file, "PNG")
    return file.getvalue()
