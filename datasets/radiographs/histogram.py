"""Histogram matching of real radiographs to digitally reconstructed radiographs (DRRs), by view.

A real radiograph is processed for display by an unknown monotone curve, so its contrast differs from that of DRRs.
Mapping its quantiles to those of DRRs removes the effect of any such curve. It is an option of a model, stored with it
and applied in training, evaluation and inference alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Float32

from raylift.datasets.intensity import Normalization, normalize

Quantiles = tuple[float, ...]
ReferenceHistograms = Mapping[str, Quantiles]
"""Reference quantiles by name of the view."""

LEVELS = 65
AIR = 0.01
"""Normalized values up to this are air or margin, and are excluded from the quantiles."""


def normalize_and_match(
    image: Float32[np.ndarray, "rows columns"],
    reference: Quantiles | None = None,
    normalization: Normalization = "percentiles",
) -> Float32[np.ndarray, "rows columns"]:
    """A bone-bright image in [0, 1], with reference quantiles matched to them."""
    normalized = normalize(image, normalization)
    return normalized if reference is None else match_histogram(normalized, reference)


def quantiles(image: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, " levels"]:
    """Evenly spaced quantiles of a normalized image without air."""
    levels: Float[np.ndarray, " levels"] = np.quantile(image[image > AIR], np.linspace(0, 1, LEVELS))
    return levels


def mean_quantiles(images: Iterable[Float[np.ndarray, "rows columns"]]) -> Quantiles:
    """Mean quantiles of normalized DRRs of one view."""
    return tuple(float(value) for value in np.mean([quantiles(image) for image in images], axis=0))


def match_histogram(
    image: Float32[np.ndarray, "rows columns"], reference: Quantiles
) -> Float32[np.ndarray, "rows columns"]:
    """A normalized image mapped to the reference quantiles; air is unchanged."""
    if not (image > AIR).any():
        return image
    # Equal quantiles map to the mean of their references, or a large uniform region would move to one end of them.
    levels, inverse = np.unique(quantiles(image), return_inverse=True)
    targets = np.bincount(inverse, weights=np.asarray(reference)) / np.bincount(inverse)
    mapped: Float32[np.ndarray, "rows columns"]
    mapped = np.interp(image, [0.0, AIR, *levels], [0.0, AIR, *targets]).astype(np.float32)
    return mapped
