"""What an evaluation compares on the same scans: models and the trivial baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.manifest import Entry
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, consistency
from raylift.models.generative import SamplingFlags
from raylift.models.reconstruction import Residuals, reconstruct
from raylift.models.weights import Description, Model
from raylift.platform.evaluation.protocols import Prediction

FITTED = ", fitted"
"""Ends the name of a model's volumes after a consistency fit."""
GroundTruth = Float32[np.ndarray, "d h w"] | None


@dataclass(frozen=True)
class Outcome:
    """The predictions of one scan."""

    predictions: dict[str, Prediction]
    """By name."""
    residuals: dict[str, Residuals] = field(default_factory=dict)
    """Residuals of consistency fits, by model; empty without any."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each network."""


class Predictor(Protocol):
    """Predicts the volume of a scan under one or several names."""

    def predict(self, archive: Archive, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The predictions of one scan."""
        ...


class ModelPredictor:
    """A model and, with consistency steps, its volumes after a fit to the radiographs.

    Args:
        name: of its volumes.
        model: the model.
        sampling: settings of a generative model.
        samples: number of samples of a generative model, whose mean is evaluated; each is fitted by itself.
        consistency_steps: of a fit to the radiographs (`raylift.models.consistency`); 0 for none.

    Raises:
        ConfigError: the steps are negative, or the model does not sample.
    """

    def __init__(
        self, name: str, model: Model, sampling: SamplingFlags | None, samples: int, consistency_steps: int
    ) -> None:
        consistency.require_steps(consistency_steps)
        self.name, self.model = name, model
        self.sampling = (sampling or SamplingFlags()).resolve(model.network, samples)
        self._samples, self._steps = samples, consistency_steps

    def predict(self, archive: Archive, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The model's volume and, with consistency steps, the fitted one."""
        description = self.model.description
        views = radiographs(archive, entry, description)
        (found,) = reconstruct(
            self.model.network,
            views,
            description.window,
            description.grid,
            description.geometry,
            sampling=self.sampling,
            samples=[self._samples],
            consistency_steps=self._steps,
        )
        volumes = {self.name: found.predicted}
        if found.fitted is not None:
            volumes[self.name + FITTED] = found.fitted
        return Outcome(
            {name: prediction(volume[None], views, description, ground_truth) for name, volume in volumes.items()},
            {self.name: found.residuals} if found.residuals else {},
            {self.name: found.prediction_time_s},
        )


class BaselinePredictor:
    """Trivial baselines, for radiographs as a model has them."""

    def __init__(self, networks: Mapping[str, nn.Module], description: Description) -> None:
        self.networks, self._description = networks, description

    def predict(self, archive: Archive, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The volume of each baseline."""
        views = radiographs(archive, entry, self._description)
        with torch.no_grad():
            volumes = {name: network(views).float() for name, network in self.networks.items()}
        return Outcome(
            {name: prediction(volume, views, self._description, ground_truth) for name, volume in volumes.items()}
        )


def trivial_baselines(model: Model, held_out: Sequence[Archive]) -> tuple[BaselinePredictor, str]:
    """The baselines of a model's own training data, and a sentence on what they are fitted to if it has none.

    Args:
        model: the model.
        held_out: archives with CT whose train split is not evaluated; baselines of a model without training data are
            fitted to these splits or, where they are empty, to nothing.
    """
    description = model.description
    frame = (description.grid, description.geometry)
    if model.training_data and model.training_data.baselines:
        return BaselinePredictor(model.training_data.baselines.predictors(*frame), description), ""
    without = f"this model of {description.system.name} has no CT of its training with it, so the trivial baselines are"
    if any(archive.entries("train") for archive in held_out):
        fit = baselines.fit(_train_batches(held_out, description), *frame)
        urls = ", ".join(archive.url for archive in held_out)
        return BaselinePredictor(fit.predictors(*frame), description), f"{without} fitted to the train split of {urls}"
    return BaselinePredictor(baselines.unfitted(*frame), description), f"{without} not fitted to any"


def radiographs(archive: Archive, entry: Entry, description: Description) -> Float[Tensor, "1 views rows columns"]:
    """The radiographs of a scan as the model has them as input."""
    return _load(archive, entry, description, volumes=False).views


def prediction(
    volume: Float[Tensor, "1 1 d h w"],
    views: Float[Tensor, "1 views rows columns"],
    description: Description,
    ground_truth: GroundTruth,
) -> Prediction:
    """A volume in the window's [0, 1] with what it is compared with."""
    return Prediction(
        volume,
        ground_truth,
        views,
        description.window,
        description.grid,
        description.geometry,
        description.normalization,
    )


def matching_views(description: Description, archive: Archive) -> list[int]:
    """Indices of a model's views among the archive's, if both have the same geometry.

    Raises:
        ConfigError: grid, distances, detector, attenuation or views differ.
    """
    manifest = archive.manifest
    if description.grid != manifest.grid:
        raise ConfigError(f"the model was trained on {description.grid}, {archive.url} holds {manifest.grid}")
    missing = [view for view in description.geometry.views if view not in manifest.geometry.views]
    compared = {"source_axis_mm", "source_detector_mm", "detector_px", "detector_pitch_mm", "beam", "attenuation"}
    differ = [
        name for name in sorted(compared) if getattr(description.geometry, name) != getattr(manifest.geometry, name)
    ]
    if missing or differ:
        what = differ or [view.name for view in missing]
        raise ConfigError(
            f"{archive.url} has another geometry than the model's training data ({', '.join(what)} differ): "
            "ingest it with the model's geometry"
        )
    return [manifest.geometry.views.index(view) for view in description.geometry.views]


def _train_batches(archives: Sequence[Archive], description: Description) -> Iterator[Batch]:
    for archive in archives:
        for entry in archive.entries("train"):
            yield _load(archive, entry, description, volumes=True)


def _load(archive: Archive, entry: Entry, description: Description, volumes: bool) -> Batch:
    return load_batch(
        archive,
        [entry],
        description.window,
        matching_views(description, archive),
        volumes=volumes,
        reference_quantiles=description.reference_quantiles,
        normalization=description.normalization,
    )
