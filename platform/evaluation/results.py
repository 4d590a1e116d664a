"""Results of an evaluation: metrics by scan, predictor and protocol, and their provenance."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from raylift.datasets.archive.splits import SplitChoice
from raylift.datasets.intensity import Window
from raylift.datasets.projector import normalized_drrs
from raylift.models import consistency
from raylift.models.inference import Residuals
from raylift.models.metrics import Metrics
from raylift.platform.evaluation.predictors import FITTED
from raylift.platform.evaluation.protocols import PROTOCOLS, Prediction, ProtocolName
from raylift.platform.evaluation.ptx_table import PneumothoraxTable
from raylift.platform.evaluation.robustness import MetricsByPerturbation
from raylift.platform.evaluation.robustness_table import RobustnessTable
from raylift.platform.evaluation.significance import CONFIDENCE, Difference, Paired, between
from raylift.platform.evaluation.tables import MetricTable

MODEL = "model"
CT = "CT"
Planes = list[Float32[np.ndarray, "rows columns"]]
"""Axial, coronal and sagittal plane through the middle of a volume, in HU."""
DISPLAY_HU = (-1000.0, 500.0)
"""Shows lung and soft tissue at once; bone and contrast are white."""
LARGEST_THUMBNAIL = 96
"""Largest number of rows or columns of a thumbnail."""


@dataclass(frozen=True)
class Images:
    """What images show of one scan; volumes are not kept."""

    slices: dict[str, Planes]
    """By predictor, after the CT if there is one."""
    views: tuple[str, ...]
    radiographs: Float32[np.ndarray, "views rows columns"]
    """Input of the first predictor."""
    reprojections: dict[str, Float32[np.ndarray, "views rows columns"]]
    """DRRs of the volumes of models, normalized as the radiographs are."""

    @classmethod
    def of(cls, predictions: Mapping[str, Prediction], reprojected: Collection[str]) -> Images:
        """The images of one scan; `reprojected` names the predictors whose DRRs are shown."""
        first = next(iter(predictions.values()))
        volumes = _shown(predictions, predictions)
        reprojections = {
            name: normalized_drrs(predictions[name].hu, first.grid, first.geometry, first.normalization)
            for name in reprojected
        }
        views = tuple(view.name for view in first.geometry.views)
        slices = {name: _middle(hu) for name, hu in volumes.items()}
        return cls(slices, views, first.radiographs[0].numpy(), reprojections)


def thumbnails(
    predictions: Mapping[str, Prediction], shown: Collection[str]
) -> dict[str, UInt8[np.ndarray, "rows columns"]]:
    """The middle coronal plane of the CT, if there is one, and of the named predictors, from `DISPLAY_HU` to gray."""
    volumes = _shown(predictions, shown)
    step = -(-max(next(iter(volumes.values())).shape) // LARGEST_THUMBNAIL)
    planes = {name: _middle(hu)[1][::step, ::step] for name, hu in volumes.items()}
    grays = {name: np.nan_to_num(Window(*DISPLAY_HU).to_unit(plane), nan=1.0) for name, plane in planes.items()}
    return {name: (gray * 255).round().astype(np.uint8) for name, gray in grays.items()}


def _shown(predictions: Mapping[str, Prediction], names: Iterable[str]) -> dict[str, Float32[np.ndarray, "d h w"]]:
    """The CT, if there is one, and the named volumes, NaN outside the field of view of a CT with a mask."""
    ground_truth_hu = next(iter(predictions.values())).ground_truth_hu
    if ground_truth_hu is None:
        return {name: predictions[name].hu for name in names}
    outside = np.isnan(ground_truth_hu)
    return {CT: ground_truth_hu} | {name: np.where(outside, np.nan, predictions[name].hu) for name in names}


@dataclass(frozen=True)
class Case:
    """One held-out scan, or pair of radiographs without CT."""

    name: str
    subject: str
    archive: str
    metrics: dict[str, dict[str, Metrics]]
    """Metrics by predictor and protocol."""
    residuals: dict[str, Residuals] = field(default_factory=dict)
    """Residuals of data-consistency fits by model; empty without any."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each network."""
    images: Images | None = None
    thumbnails: dict[str, UInt8[np.ndarray, "rows columns"]] = field(default_factory=dict)
    """Middle coronal planes of the CT and the candidates in gray."""
    notes: tuple[str, ...] = ()
    """What was resampled or changed."""
    robustness: MetricsByPerturbation = field(default_factory=dict)
    """Metrics under perturbations of the radiographs; empty unless they are evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of all scans of a split."""

    cases: list[Case]
    candidates: tuple[str, ...]
    """Models and folders of volumes; the other predictors are their fitted volumes and the baselines."""
    protocols: tuple[ProtocolName, ...]
    split: SplitChoice
    has_ct: bool
    """Whether the archives have CT as ground truth."""
    provenance: dict[str, Any]
    """Data, seed, command, versions and machine."""
    reference: str = ""
    """The predictor to which differences are given."""
    notes: tuple[str, ...] = ()
    """Sentences on scans that were left out, and on the baselines."""

    @cached_property
    def table(self) -> MetricTable:
        """The metrics of all scans."""
        return self._table(self.cases)

    @cached_property
    def robustness(self) -> RobustnessTable | None:
        """The metrics under perturbations of the radiographs, if they were evaluated."""
        scans = {case.name: case.robustness for case in self.cases}
        definitions = {name: protocol.definition for name, protocol in PROTOCOLS.items()}
        return RobustnessTable.of(scans, definitions) if all(scans.values()) else None

    @cached_property
    def pneumothorax(self) -> PneumothoraxTable | None:
        """The agreement of the pneumothorax with that of the CT, if it was measured."""
        return PneumothoraxTable(self.table, self.subjects) if "pneumothorax" in self.table.protocols else None

    @property
    def by_archive(self) -> dict[str, MetricTable]:
        """The metrics of each archive's scans, if there are several archives."""
        urls = dict.fromkeys(case.archive for case in self.cases)
        if len(urls) == 1:
            return {}
        return {url: self._table([case for case in self.cases if case.archive == url]) for url in urls}

    def _table(self, cases: list[Case]) -> MetricTable:
        protocols = next(iter(cases[0].metrics.values()))
        return MetricTable(
            {case.name: case.metrics for case in cases}, {name: PROTOCOLS[name].definition for name in protocols}
        )

    def mean(self, predictor: str, protocol: str) -> Metrics:
        """Mean over the scans; infinite where a scan's metric is."""
        return self.table.mean(predictor, protocol)

    @property
    def scans(self) -> str:
        """The number of scans or pairs and their split, in words."""
        kind = "scan" if self.has_ct else "pair"
        count = f"one {kind}" if len(self.cases) == 1 else f"{len(self.cases)} {kind}s"
        return f"{count} of {'all splits' if self.split == 'all' else f'the {self.split} split'}"

    @cached_property
    def paired(self) -> Paired:
        """Differences of all predictors to the reference."""
        return Paired.of(self.table, self.subjects, self.reference)

    @property
    def subjects(self) -> dict[str, str]:
        """The subject of each scan."""
        return {case.name: case.subject for case in self.cases}

    @property
    def baselines(self) -> list[str]:
        """The trivial baselines."""
        own = {name + suffix for name in self.candidates for suffix in ("", FITTED)}
        return [predictor for predictor in self.table.predictors if predictor not in own]

    @property
    def title(self) -> str:
        """What was compared on how many scans."""
        alone = self.candidates == (MODEL,)
        what = self.provenance["system"] if alone else f"Comparison of {', '.join(self.candidates)}"
        return f"{what} on {self.scans}"

    @cached_property
    def primary_metric(self) -> tuple[str, str]:
        """Protocol and name of the PSNR that verdicts and the order of scans depend on."""
        return self.table.primary_metric

    @property
    def ranked(self) -> list[Case]:
        """The scans from the worst to the best PSNR of the first candidate."""
        protocol, name = self.primary_metric
        return sorted(self.cases, key=lambda case: case.metrics[self.candidates[0]][protocol][name])

    def beats_baselines(self, candidate: str) -> bool:
        """Whether a candidate's mean PSNR is above those of all trivial baselines, in hundredths of a decibel."""
        protocol, name = self.primary_metric
        own, *others = (self.mean(p, protocol)[name] for p in (candidate, *self.baselines))
        return round(own, 2) > round(max(others), 2)

    def is_significant(self, candidate: str) -> bool:
        """Whether a candidate beats the baselines, and the interval of the difference over subjects excludes zero."""
        protocol, name = self.primary_metric
        best = max(self.baselines, key=lambda baseline: self.mean(baseline, protocol)[name])
        return self.beats_baselines(candidate) and not self._difference_to(best, candidate).low <= 0

    def _difference_to(self, baseline: str, candidate: str) -> Difference:
        return between(self.table, self.subjects, (candidate, baseline), *self.primary_metric)

    def summary(self) -> str:
        """Whether each candidate has a higher PSNR than all trivial baselines, in words."""
        return " ".join(self.verdict(name) for name in self.candidates)

    def verdict(self, candidate: str) -> str:
        """Whether a candidate has a higher PSNR than all trivial baselines, in words."""
        who = "The model" if candidate == MODEL else candidate
        protocol, name = self.primary_metric
        scores = {predictor: self.mean(predictor, protocol)[name] for predictor in self.table.predictors}
        own, fitted = scores[candidate], scores.get(candidate + FITTED)
        best, score = max(((name, scores[name]) for name in self.baselines), key=lambda item: item[1])
        after = f" After the data-consistency fit it reaches {fitted:.2f} dB." if fitted is not None else ""
        if not self.has_ct:
            of = "" if candidate == MODEL else f" of {candidate}"
            return (
                f"No volume was compared: {self.provenance['archive']} holds radiographs without CT. PSNR of the "
                f"reprojections{of} (protocol {protocol}) on {self.scans}: {own:.2f} dB, "
                f"against {score:.2f} dB ({best}). It does not measure the accuracy along the rays.{after}"
            )
        where = f"PSNR (protocol {protocol}) on {self.scans}"
        if self.beats_baselines(candidate):
            count = "both" if len(self.baselines) == 2 else "all"
            beaten = f"{own:.2f} dB against {score:.2f} dB ({best})."
            found = self._difference_to(best, candidate)
            if found.low <= 0:
                beaten += (
                    f" It may be chance: the {CONFIDENCE:.0%} interval of the difference over subjects, "
                    f"{found.low:+.2f} to {found.high:+.2f} dB, contains zero."
                )
            return f"{who} beats {count} trivial baselines in {where}: {beaten}{after}"
        sentence = f"{who} does not beat the {best} in {where}: {own:.2f} dB against {score:.2f} dB."
        models = self.provenance.get("models", {MODEL: self.provenance})
        config = models[candidate].get("training", {})
        if config.get("steps", "?") != "?":
            sentence += (
                f" It was trained for {config['steps']} steps with batch size {config['batch_size']} on "
                f"{config['volumes']} volumes; the published X2CT-GAN was trained for 22,900 steps with batch size 4 "
                "on 916 volumes of 128 voxels per side."
            )
        return sentence + after

    def residuals(self, model: str = MODEL) -> Residuals:
        """Mean over the scans of a model's residuals before and after the data-consistency fit, by view."""
        return consistency.mean_residuals([case.residuals.get(model, {}) for case in self.cases])

    def to_json(self) -> dict[str, Any]:
        """All results and their provenance, without images, as plain data for JSON."""
        residuals = {
            name: {
                "mean": self.residuals(name),
                "cases": {case.name: case.residuals.get(name, {}) for case in self.cases},
            }
            for name in self.candidates
        }
        return {
            "summary": self.summary(),
            "notes": list(self.notes),
            "split": self.split,
            **self.table.to_json(),
            "archives": {url: table.means_to_json() for url, table in self.by_archive.items()},
            "projection_residuals": residuals[MODEL] if self.candidates == (MODEL,) else residuals,
            "differences": self.paired.to_json(),
            **({"pneumothorax": self.pneumothorax.to_json()} if self.pneumothorax else {}),
            **({"robustness": self.robustness.to_json()} if self.robustness else {}),
            "seconds_per_volume": {
                name: fmean(case.seconds[name] for case in self.cases) for name in self.cases[0].seconds
            },
            "provenance": self.provenance,
        }


def _middle(volume: Float32[np.ndarray, "d h w"]) -> Planes:
    d, h, w = (n // 2 for n in volume.shape)
    return [volume[d].copy(), volume[:, h].copy(), volume[:, :, w].copy()]
