"""The gray values of projections, as quantiles by view, and real radiographs brought to them.

A radiograph was developed for the eye: its curve from line integrals to gray values is unknown, so beside projections
it looks harder or softer. Mapping its quantiles to those of projections removes what a monotone curve can explain. It
is an option of a model, kept with it and applied alike when it is trained, measured and used; a network that is to see
radiographs as they are must be trained without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float, Float32

from raylift.datasets.intensity import standardize

Quantiles = tuple[float, ...]
ReferenceHistograms = Mapping[str, Quantiles]
"""Quantiles by the name of a view."""

LEVELS = 65
AIR = 0.01
"""Standardized values up to this are air round the patient or margin: how much of it there is says nothing."""


def standardize_and_match(
    image: Float32[np.ndarray, "rows columns"], reference: Quantiles | None = None
) -> Float32[np.ndarray, "rows columns"]:
    """A bone-bright image as a network sees it: standardized, and matched where quantiles are reference."""
    standard = standardize(image)
    return standard if reference is None else match_histogram(standard, reference)


def quantiles(image: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, " levels"]:
    """Evenly spaced quantiles of what is not air in a standardized image."""
    levels: Float[np.ndarray, " levels"] = np.quantile(image[image > AIR], np.linspace(0, 1, LEVELS))
    return levels


def mean_quantiles(images: Iterable[Float[np.ndarray, "rows columns"]]) -> Quantiles:
    """The mean quantiles of standardized projections of one view."""
    return tuple(float(value) for value in np.mean([quantiles(image) for image in images], axis=0))


def match_histogram(
    image: Float32[np.ndarray, "rows columns"], reference: Quantiles
) -> Float32[np.ndarray, "rows columns"]:
    """A standardized image with the quantiles of the reference; air stays as it is."""
    if not (image > AIR).any():
        return image
    # Of equal quantiles the mean counts, or a large even region would move to an end of its share.
    levels, inverse = np.unique(quantiles(image), return_inverse=True)
    targets = np.bincount(inverse, weights=np.asarray(reference)) / np.bincount(inverse)
    mapped: Float32[np.ndarray, "rows columns"]
    mapped = np.interp(image, [0.0, AIR, *levels], [0.0, AIR, *targets]).astype(np.float32)
    return mapped
