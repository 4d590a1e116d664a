"""A checkpoint on held-out scans, under named protocols, beside two predictors that know nothing.

Every figure in the result names its protocol, and the result names its data, seed, command, versions and machine.
"""

from __future__ import annotations

import platform as machine
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from raylift import __version__
from raylift.datasets.archive.archive import Archive, Entry
from raylift.datasets.archive.splits import Split
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, consistency, generative
from raylift.models.generative import RunningStatistics, SamplingConfig, SamplingFlags
from raylift.models.metrics import PROTOCOLS, Figures, lung_dice
from raylift.models.weights import Model

MODEL = "model"
FITTED = "model, fitted"
"""The model's volumes after a consistency fit."""
ProtocolName = Literal["volume", "x2ct", "cvaa", "reprojection"]
REPROJECTION: ProtocolName = "reprojection"
"""Compares projections with radiographs, and so needs no CT."""
OF_VOLUMES: tuple[ProtocolName, ...] = ("volume", "x2ct", "cvaa")
ScanPrediction = dict[str, Float32[np.ndarray, "d h w"]]


@dataclass(frozen=True)
class Case:
    """One held-out scan or pair: HU volumes by predictor, the truth if it is known, and figures by predictor."""

    entry: Entry
    truth: Float32[np.ndarray, "d h w"] | None
    radiographs: Float32[np.ndarray, "views rows columns"]
    predictions: ScanPrediction
    figures: dict[str, dict[str, Figures]]
    residuals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By view, before and after the consistency fit; empty where there was none."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what."""

    cases: list[Case]
    protocols: tuple[ProtocolName, ...]
    split: Split
    provenance: dict[str, Any]
    seconds_a_volume: float

    def mean(self, predictor: str, protocol: str) -> Figures:
        """A predictor's figures averaged over the scans."""
        rows = [case.figures[predictor][protocol] for case in self.cases]
        return {name: fmean(row[name] for row in rows) for name in rows[0]}

    def spread(self, predictor: str, protocol: str) -> Figures:
        """Standard deviation over the scans; 0 where there is one."""
        rows = [case.figures[predictor][protocol] for case in self.cases]
        return {name: pstdev([row[name] for row in rows]) for name in rows[0]}

    @property
    def scans(self) -> str:
        """How many there are, in words."""
        kind = "scan" if self.has_truth else "pair"
        return f"one {kind}" if len(self.cases) == 1 else f"{len(self.cases)} {kind}s"

    @property
    def has_truth(self) -> bool:
        """Whether there was CT to compare with."""
        return self.cases[0].truth is not None

    @property
    def predictors(self) -> list[str]:
        """The model first, then its fitted volumes if there are any, then the baselines."""
        return list(self.cases[0].figures)

    def verdict(self) -> str:
        """Whether the model beats the predictors that know nothing, in a sentence."""
        protocol = "volume" if "volume" in self.protocols else self.protocols[0]
        name = next(key for key in self.mean(MODEL, protocol) if key.startswith("psnr"))
        scores = {predictor: self.mean(predictor, protocol)[name] for predictor in self.predictors}
        own, fitted = scores.pop(MODEL), scores.pop(FITTED, None)
        best, score = max(scores.items(), key=lambda item: item[1])
        after = f" Fitted to the radiographs it reaches {fitted:.2f} dB." if fitted is not None else ""
        if not self.has_truth:
            return (
                f"No volume was compared: {self.provenance['archive']} holds radiographs without CT. PSNR of "
                f"projections (protocol {protocol}) on {self.scans} of the {self.split} split: {own:.2f} dB, against "
                f"{score:.2f} dB ({best}), which says nothing of what lies along the rays.{after}"
            )
        where = f"PSNR (protocol {protocol}) on {self.scans} of the {self.split} split"
        if own > score:
            beaten = f"{own:.2f} dB against {score:.2f} dB ({best})"
            return f"The model beats both trivial predictors in {where}: {beaten}.{after}"
        config = self.provenance["training"]
        return (
            f"The model does NOT beat the {best} in {where}: {own:.2f} dB against {score:.2f} dB. It was trained for "
            f"{config['steps']} steps of {config['batch']} on {config['volumes']} volumes; the published X2CT-GAN took "
            f"22,900 steps of 4 on 916 volumes at 128 voxels a side, which is what such a comparison needs.{after}"
        )

    def residuals(self) -> dict[str, tuple[float, float]]:
        """By view, how far projections are from radiographs before and after the fit, averaged over the scans."""
        return consistency.mean_residuals([case.residuals for case in self.cases])

    def to_json(self) -> dict[str, Any]:
        """Everything but the voxels."""
        return {
            "verdict": self.verdict(),
            "split": self.split,
            "mean": {p: {q: self.mean(p, q) for q in self.protocols_and_extra} for p in self.predictors},
            "standard_deviation": {
                p: {q: self.spread(p, q) for q in self.protocols_and_extra} for p in self.predictors
            },
            "cases": {case.entry.id: case.figures for case in self.cases},
            "projection_residuals": {
                "mean": self.residuals(),
                "cases": {case.entry.id: case.residuals for case in self.cases},
            },
            "seconds_a_volume": self.seconds_a_volume,
            "provenance": self.provenance,
        }

    @property
    def protocols_and_extra(self) -> tuple[str, ...]:
        """The protocols, and the group of figures that belong to none."""
        return (*self.protocols, "segmentation") if self.has_truth else self.protocols


def evaluate(
    model: Model,
    archive: Archive,
    *,
    split: Split = "test",
    protocols: Sequence[ProtocolName] = (),
    command: str = "",
    consistency_steps: int = 0,
    draw: SamplingFlags | None = None,
    samples: int = 1,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Evaluation:
    """Reconstruct every scan of a split and measure it, with the baselines fitted to the train split.

    With `consistency_steps` the model's volumes are measured a second time, after so many steps of a fit to the
    radiographs (`raylift.models.consistency`). Of a model that draws, the mean of `samples` draws is measured, each of
    them fitted by itself; residuals are the mean of theirs.

    Without protocols all that compare volumes are reported, or of an archive without CT the re-projection.

    Raises:
        ConfigError: the archive's grid or geometry is not the model's, it has no CT and a protocol needs it, the split
            is empty, steps are negative, or something was asked of the drawing that the model cannot do.
    """
    consistency.require_steps(consistency_steps)
    settings = (draw or SamplingFlags()).resolve(model.network, samples)
    description = model.description
    views = matching_views(model, archive)
    entries = archive.entries(split)
    if not entries:
        raise ConfigError(f"{archive.url} has no sample in the {split} split")
    has_truth = archive.manifest.contents == "volumes"
    protocols = tuple(protocols) or (OF_VOLUMES if has_truth else (REPROJECTION,))
    for name in protocols:
        if name != REPROJECTION:
            archive.require_volumes(f"protocol {name}")
    window, frame = description.window, (description.grid, description.geometry)
    fitted = baselines.fit(_batches(archive, model, views), *frame) if has_truth else baselines.unfitted(*frame)
    cases, seconds = [], 0.0
    for done, entry in enumerate(entries):
        progress(done, len(entries), entry.id)
        batch = load_batch(
            archive, [entry], window, views, volumes=has_truth, reference_quantiles=description.reference_quantiles
        )
        truth = archive.read_array(entry, "volumes").astype(np.float32) if has_truth else None
        own = _reconstruct(model, batch, settings, samples, consistency_steps)
        seconds += own.seconds
        with torch.no_grad():
            unit = own.volumes | {name: network(batch.views).float() for name, network in fitted.items()}
        predictions: ScanPrediction = {name: window.to_hu(one)[0, 0].numpy() for name, one in unit.items()}
        figures = {name: _figures(one, truth, batch, protocols, model) for name, one in unit.items()}
        cases.append(Case(entry, truth, batch.views[0].numpy(), predictions, figures, own.residuals))
    progress(len(entries), len(entries), "")
    provenance = _provenance(model, archive, command)
    if settings:
        provenance["drawing"] = {**vars(settings), "samples": samples}
    if consistency_steps:
        provenance["consistency"] = {"steps": consistency_steps, "strength": consistency.STRENGTH}
    return Evaluation(cases, protocols, split, provenance, seconds / len(entries))


@dataclass(frozen=True)
class _Own:
    """What the model makes of one scan, in [0, 1]: as it is, and fitted to the radiographs if that was asked for."""

    volumes: dict[str, Tensor]
    residuals: dict[str, tuple[float, float]]
    seconds: float
    """For the volume, all its draws, without the fit."""


@torch.no_grad()
def _reconstruct(model: Model, batch: Batch, settings: SamplingConfig | None, samples: int, steps: int) -> _Own:
    made, moved = RunningStatistics(), RunningStatistics()
    residuals: list[dict[str, tuple[float, float]]] = []
    seconds, of = 0.0, model.description
    for k in range(samples):
        started = time.perf_counter()
        unit = generative.predict(model.network, batch.views, settings, k)
        seconds += time.perf_counter() - started
        made.add(unit)
        if steps:
            fit = consistency.fit(unit, batch.views, of.window, of.grid, of.geometry, steps)
            moved.add(fit.volume)
            residuals += fit.by_view(of.geometry)
    volumes = {MODEL: made.mean, **({FITTED: moved.mean} if steps else {})}
    return _Own(volumes, consistency.mean_residuals(residuals), seconds)


def matching_views(model: Model, archive: Archive) -> list[int]:
    """Where the model's views stand in the archive, if both were made by the same geometry.

    Raises:
        ConfigError: grid, distances, detector or views differ.
    """
    wanted, there = model.description, archive.manifest
    if wanted.grid != there.grid:
        raise ConfigError(f"the model was trained on {wanted.grid}, {archive.url} holds {there.grid}")
    missing = [view for view in wanted.geometry.views if view not in there.geometry.views]
    distances = {"source_axis_mm", "source_detector_mm", "detector_px", "detector_pitch_mm", "beam"}
    differ = [name for name in sorted(distances) if getattr(wanted.geometry, name) != getattr(there.geometry, name)]
    if missing or differ:
        what = differ or [view.name for view in missing]
        raise ConfigError(
            f"{archive.url} was projected otherwise than the model's training data ({', '.join(what)} differ): "
            "ingest it with the model's geometry"
        )
    return [there.geometry.views.index(view) for view in wanted.geometry.views]


def _batches(archive: Archive, model: Model, views: list[int]) -> Iterator[Batch]:
    for entry in archive.entries("train"):
        yield load_batch(
            archive, [entry], model.description.window, views, reference_quantiles=model.description.reference_quantiles
        )


def _figures(
    unit: Tensor,
    truth: Float32[np.ndarray, "d h w"] | None,
    batch: Batch,
    protocols: Sequence[ProtocolName],
    model: Model,
) -> dict[str, Figures]:
    """Figures of one volume in the window's [0, 1], by protocol."""
    of = model.description
    hu = of.window.to_hu(unit)[0, 0].numpy()
    figures: dict[str, Figures] = {}
    for name in protocols:
        if truth is None or name == REPROJECTION:
            found = consistency.agreement(unit, batch.views, of.window, of.grid, of.geometry)
            by_view = zip(of.geometry.views, found.residual[0].tolist(), strict=True)
            figures[name] = {"psnr_db": float(found.psnr_db.mean()), "residual": float(found.residual.mean())}
            figures[name] |= {f"residual_{view.name}": value for view, value in by_view}
        else:
            figures[name] = PROTOCOLS[name].evaluate(hu, truth)
    if truth is not None:
        figures["segmentation"] = {"lung_dice": lung_dice(hu, truth, of.grid.spacing_mm)}
    return figures


def _provenance(model: Model, archive: Archive, command: str) -> dict[str, Any]:
    training = model.description.provenance.get("config", {}).get("train", {})
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "system": model.description.system.name,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "model_sha256": model.sha256,
        "config_sha256": model.description.provenance.get("config_sha256", ""),
        "archive": archive.url,
        "archive_generation": archive.manifest.generation,
        "grid": f"{archive.manifest.grid.size}^3 at {archive.manifest.grid.spacing_mm:g} mm",
        "training": {
            "steps": model.description.provenance.get("step", training.get("steps", "?")),
            "batch": training.get("batch", "?"),
            "volumes": len(model.description.provenance.get("training_samples", [])),
        },
        "seed": training.get("seed", "?"),
        "command": command,
        "versions": {"raylift": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{machine.system()} {machine.machine()}, {torch.get_num_threads()} threads",
    }
