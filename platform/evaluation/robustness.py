"""Robustness: the metrics of models under errors of known size in the radiographs of the scans.

The radiographs are projected again from the archive's volumes, the unperturbed ones too, so that each difference is of
the error alone. Models have the nominal geometry as input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float32

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.manifest import Manifest
from raylift.datasets.augmentation.perturbation import (
    PERTURBATIONS,
    UNPERTURBED,
    Perturbation,
    RadiographSimulator,
    shows_both_sides,
)
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry
from raylift.models.baselines import BackProjection
from raylift.models.metrics import Metrics
from raylift.models.weights import Model
from raylift.platform.evaluation.predictors import BaselinePredictor, ModelPredictor
from raylift.platform.evaluation.protocols import PROTOCOLS

SEED = 0
UNPERTURBED_LABEL = "unperturbed"
MetricsByPerturbation = dict[str, dict[str, dict[str, Metrics]]]
"""Metrics of one scan by label of a perturbation, predictor and protocol."""


@dataclass(frozen=True)
class PerturbedArchive:
    """An archive in which the radiographs of one scan are others."""

    archive: Archive
    radiographs: Float32[np.ndarray, "views rows columns"]

    @property
    def url(self) -> str:
        """That of the archive."""
        return self.archive.url

    @property
    def manifest(self) -> Manifest:
        """That of the archive."""
        return self.archive.manifest

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """One array of the scan."""
        return self.radiographs if name == "radiographs" else self.archive.read_array(entry, name)


@dataclass(frozen=True)
class RobustnessEvaluator:
    """Predictors whose radiographs are perturbed."""

    predictors: Sequence[ModelPredictor | BaselinePredictor]
    without_lateral: Sequence[ModelPredictor | BaselinePredictor]
    """The same for the other views alone, of those that can be used without lateral radiographs."""
    protocols: Sequence[str]

    def evaluate(
        self, archive: Archive, entry: Entry, ground_truth: Float32[np.ndarray, "d h w"]
    ) -> MetricsByPerturbation:
        """The metrics of one scan under each perturbation that its geometry allows."""
        geometry = archive.manifest.geometry
        stored = archive.read_array(entry, "volumes").astype(np.float32)
        simulator = RadiographSimulator(stored, archive.manifest.grid, geometry)
        seed = seed_of(entry)
        metrics: MetricsByPerturbation = {}
        for perturbation in (UNPERTURBED, *PERTURBATIONS):
            if not applies(perturbation, geometry):
                continue
            reader = PerturbedArchive(archive, simulator.expose(perturbation.exposure(geometry, seed)))
            predictors = self.without_lateral if perturbation.kind == "missing" else self.predictors
            outcomes = [predictor.predict(reader, entry, ground_truth) for predictor in predictors]
            metrics[label_of(perturbation)] = {
                name: {key: PROTOCOLS[key].evaluate(prediction) for key in self.protocols}
                for outcome in outcomes
                for name, prediction in outcome.predictions.items()
            }
        return metrics


def seed_of(entry: Entry) -> tuple[int, int]:
    """The seed of a scan's random numbers, which depends on the scan's name alone."""
    return SEED, int(hashlib.sha256(entry.id.encode()).hexdigest()[:15], 16)


def label_of(perturbation: Perturbation) -> str:
    """The label of a row."""
    return UNPERTURBED_LABEL if perturbation == UNPERTURBED else perturbation.label


def applies(perturbation: Perturbation, geometry: Geometry) -> bool:
    """Whether radiographs of the geometry can have that error."""
    if perturbation.kind == "flip":
        return any(shows_both_sides(view) for view in geometry.views)
    if perturbation.kind == "missing":
        return other_views(geometry) is not None
    return True


def require_perturbable(archives: Sequence[Archive]) -> None:
    """Raise a ConfigError if an archive's radiographs cannot be projected again."""
    for archive in archives:
        archive.require_volumes("--robustness")
        if archive.manifest.geometry.beam != "cone":
            raise ConfigError(
                f"--robustness projects cone beams only, and {archive.url} has a parallel one: ingest the CT with "
                "geometry chest or x2ct"
            )


def robustness_of(
    models: Sequence[ModelPredictor], baselines: Sequence[BaselinePredictor], protocols: Sequence[str]
) -> tuple[RobustnessEvaluator, list[str]]:
    """What is evaluated under perturbations, and sentences on what is not possible.

    Baselines that ignore the radiographs are left out.
    """
    notes = []
    fewer: list[ModelPredictor | BaselinePredictor] = []
    for predictor in models:
        geometry = predictor.model.description.geometry
        if not has_lateral(geometry):
            fewer.append(predictor)
        elif reduced := without_lateral(predictor.model):
            fewer.append(predictor.of(reduced))
        else:
            views = ", ".join(view.name for view in geometry.views)
            notes.append(
                f"a missing lateral is not possible for {predictor.name}, whose weights need the views {views}"
            )
    given = []
    for baseline in baselines:
        projected = {name: net for name, net in baseline.networks.items() if isinstance(net, BackProjection)}
        if not projected:
            continue
        given.append(BaselinePredictor(projected, baseline.description))
        if not has_lateral(baseline.description.geometry):
            fewer.append(given[-1])
        elif others := other_views(baseline.description.geometry):
            networks = {
                name: BackProjection(net.grid, others, net.scale, net.offset) for name, net in projected.items()
            }
            fewer.append(BaselinePredictor(networks, replace(baseline.description, geometry=others)))
    compared = tuple(name for name in protocols if PROTOCOLS[name].needs_ct) or ("volume",)
    return RobustnessEvaluator([*models, *given], fewer, (*compared, "segmentation")), notes


def has_lateral(geometry: Geometry) -> bool:
    """Whether a view is lateral."""
    return any(view.is_lateral for view in geometry.views)


def other_views(geometry: Geometry) -> Geometry | None:
    """The views that are not lateral; None if there are none, or no others."""
    views = tuple(view for view in geometry.views if not view.is_lateral)
    return replace(geometry, views=views) if 0 < len(views) < len(geometry.views) else None


def without_lateral(model: Model) -> Model | None:
    """The model for the other views with the same weights; None if its system has other weights for them."""
    description = model.description
    geometry = other_views(description.geometry)
    if geometry is None or "views" not in {setting.name for setting in fields(description.system)}:
        return None
    system = replace(description.system, views=tuple(view.name for view in geometry.views))  # type: ignore[call-arg]
    try:
        network = system.reconstruction_network(description.grid, geometry)
    except ConfigError:
        return None
    state = model.network.state_dict()
    if {key: value.shape for key, value in network.state_dict().items()} != {k: v.shape for k, v in state.items()}:
        return None
    network.load_state_dict(state)
    return replace(model, network=network.eval(), description=replace(description, system=system, geometry=geometry))
