"""Evaluation of a single model: a comparison whose only model is called `model`."""

from __future__ import annotations

from typing import Any

from raylift.datasets.archive.archive import Archive
from raylift.models.weights import Model
from raylift.platform.evaluation.compare import compare
from raylift.platform.evaluation.results import MODEL, Evaluation


def evaluate(model: Model, *archives: Archive, **options: Any) -> Evaluation:
    """Reconstruct every scan of a split and compute its metrics; see `compare` for the options and errors."""
    return compare({MODEL: model}, archives, **options)
