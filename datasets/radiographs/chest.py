"""Contrast between regions of a chest radiograph: whether bone is bright, and whether the image shows a chest at all.

In a frontal image spine and mediastinum are denser than the lungs. In a lateral one shoulders and abdomen are denser
than the air anterior and posterior to the patient, in either orientation. In both the abdomen is denser than the chest
above it.

The limits of `is_chest` lie below every one of 156 images of 3 radiographs and 6 phantoms in two geometries,
unchanged, with a border, cropped, shifted, rotated by 7 degrees or with another gamma. The smallest values there were
0.075 and 0.472 for the contrasts, 0.088 for the abdomen and 0.75 for the correlation of neighbors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from raylift.datasets.intensity import normalize
from raylift.datasets.radiographs.borders import crop_uniform_margin
from raylift.datasets.radiographs.orientation import resample_body

MIN_FRONTAL, MIN_LATERAL, MIN_ABDOMEN = 0.04, 0.35, 0.05
"""Smallest contrasts of a chest, as fractions of the image's range."""
MAX_WIDTH = 1.5
"""Largest ratio of width to height without margins. Detectors have up to 1.25, two radiographs side by side more
than this."""
MIN_CORRELATION = 0.5
"""Smallest correlation of diagonal neighbors; noise and text are below."""


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
    contrast = contrasts(_without_margin(image))
    return {"frontal": contrast.frontal, "lateral": contrast.lateral}.get(view or "", sum(contrast)) < 0


def is_chest(image: Float32[np.ndarray, "rows columns"], view: str) -> bool:
    """Whether a bone-bright, upright image may be a chest radiograph of that view; True for views of other names.

    The check excludes noise, text, uniform gradients, two radiographs side by side and most other body parts and
    views, not every other image.
    """
    if view not in ("frontal", "lateral"):
        return True
    pixels = _without_margin(image)
    if pixels.shape[1] > MAX_WIDTH * pixels.shape[0]:
        return False
    with np.errstate(invalid="ignore", divide="ignore"):
        # Not a number for a constant image.
        diagonal = np.corrcoef(pixels[:-1, :-1].ravel(), pixels[1:, 1:].ravel())[0, 1]
    # Of 32 rows and columns within the body.
    center = resample_body(pixels)[:, 8:24]
    abdomen = float(center[24:31].mean() - center[10:19].mean())
    contrast = contrasts(pixels)
    enough = contrast.frontal > MIN_FRONTAL if view == "frontal" else contrast.lateral > MIN_LATERAL
    return bool(enough and abdomen > MIN_ABDOMEN and diagonal > MIN_CORRELATION)


def _without_margin(image: Float32[np.ndarray, "rows columns"]) -> Float[np.ndarray, "_ _"]:
    """The image at about 512 pixels, normalized after its margins were cropped."""
    step = max(1, max(image.shape) // 512)
    return normalize(crop_uniform_margin(image[::step, ::step]))
