"""Contrast between regions of a chest radiograph, which shows whether bone is bright.

In a frontal image spine and mediastinum are denser than the lungs. In a lateral one shoulders and abdomen are denser
than the air anterior and posterior to the patient, in either orientation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from raylift.datasets.intensity import normalize
from raylift.datasets.radiographs.borders import crop_uniform_margin


class Contrasts(NamedTuple):
    """Differences between mean values of regions, as fractions of the image's range."""

    frontal: float
    """Mediastinum over lungs."""
    lateral: float
    """Shoulders and abdomen over the upper corners."""


def contrasts(pixels: Float[np.ndarray, "rows columns"]) -> Contrasts:
    """The contrasts of a normalized image without margins."""

    def mean(top: float, bottom: float, left: float, right: float) -> float:
        """Mean of a region given in fractions of height and width, at least one pixel."""
        rows, columns = pixels.shape
        first, last = int(rows * top), max(int(rows * bottom), int(rows * top) + 1)
        start, end = int(columns * left), max(int(columns * right), int(columns * left) + 1)
        return float(pixels[first:last, start:end].mean())

    lungs = (mean(0.35, 0.75, 0.12, 0.32) + mean(0.35, 0.75, 0.68, 0.88)) / 2
    edges = (mean(0, 0.4, 0, 0.05) + mean(0, 0.4, 0.95, 1)) / 2
    return Contrasts(
        mean(0.35, 0.75, 0.44, 0.56) - lungs,
        (mean(0.05, 0.2, 0.4, 0.6) + mean(0.85, 0.97, 0.4, 0.6)) / 2 - edges,
    )


def is_bone_dark(image: Float32[np.ndarray, "rows columns"], view: str | None = None) -> bool:
    """Whether dense tissue is dark; uniform margins are cropped first. Without a view both contrasts are added."""
    contrast = contrasts(without_margin(image))
    return {"frontal": contrast.frontal, "lateral": contrast.lateral}.get(view or "", sum(contrast)) < 0


def without_margin(image: Float32[np.ndarray, "rows columns"]) -> Float[np.ndarray, "_ _"]:
    """The image at about 512 pixels, normalized after its margins were cropped."""
    step = max(1, max(image.shape) // 512)
    return normalize(crop_uniform_margin(image[::step, ::step]))
