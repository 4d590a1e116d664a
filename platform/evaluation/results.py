"""Results of an evaluation: metrics by scan, predictor and protocol, and their provenance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from raylift.datasets.archive.manifest import Entry
from raylift.datasets.archive.splits import Split
from raylift.models import consistency
from raylift.models.metrics import Figures
from raylift.models.reconstruction import Residuals
from raylift.platform.evaluation.protocols import ProtocolName
from raylift.platform.evaluation.tables import MetricTable, finite

MODEL = "model"
FITTED = "model, fitted"
"""The model's volumes after a consistency fit."""


@dataclass(frozen=True)
class Case:
    """One held-out scan, or pair of radiographs without CT."""

    entry: Entry
    ground_truth: Float32[np.ndarray, "d h w"] | None
    """CT in HU, if there is one."""
    radiographs: Float32[np.ndarray, "views rows columns"]
    predictions: dict[str, Float32[np.ndarray, "d h w"]]
    """Volumes in HU by predictor."""
    metrics: dict[str, dict[str, Figures]]
    """Metrics by predictor and protocol."""
    residuals: Residuals = field(default_factory=dict)
    """Residuals of the consistency fit; empty without one."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of all scans of a split."""

    cases: list[Case]
    protocols: tuple[ProtocolName, ...]
    split: Split
    provenance: dict[str, Any]
    """Data, seed, command, versions and machine."""
    seconds_per_volume: float

    @property
    def _table(self) -> MetricTable:
        return MetricTable({case.entry.id: case.metrics for case in self.cases}, {})

    def mean(self, predictor: str, protocol: str) -> Figures:
        """Mean over the scans; infinite where a scan's figure is."""
        return self._table.mean(predictor, protocol)

    def std(self, predictor: str, protocol: str) -> Figures:
        """Standard deviation over the scans; 0 for a single scan, NaN where a figure is infinite."""
        return self._table.std(predictor, protocol)

    @property
    def scans(self) -> str:
        """The number of scans or pairs, in words."""
        kind = "scan" if self.has_ct else "pair"
        return f"one {kind}" if len(self.cases) == 1 else f"{len(self.cases)} {kind}s"

    @property
    def has_ct(self) -> bool:
        """Whether the archive has CT as ground truth."""
        return self.cases[0].ground_truth is not None

    @property
    def predictors(self) -> list[str]:
        """The model, its fitted volumes if there are any, and the baselines."""
        return list(self.cases[0].metrics)

    @property
    def all_protocols(self) -> tuple[str, ...]:
        """The chosen protocols and, with CT, `segmentation`."""
        return (*self.protocols, "segmentation") if self.has_ct else self.protocols

    def summary(self) -> str:
        """Whether the model has a higher PSNR than the trivial baselines, in a sentence."""
        protocol = "volume" if "volume" in self.protocols else self.protocols[0]
        name = next(key for key in self.mean(MODEL, protocol) if key.startswith("psnr"))
        scores = {predictor: self.mean(predictor, protocol)[name] for predictor in self.predictors}
        own, fitted = scores.pop(MODEL), scores.pop(FITTED, None)
        best, score = max(scores.items(), key=lambda item: item[1])
        after = f" Fitted to the radiographs it reaches {fitted:.2f} dB." if fitted is not None else ""
        if not self.has_ct:
            return (
                f"No volume was compared: {self.provenance['archive']} holds radiographs without CT. PSNR of the "
                f"reprojections (protocol {protocol}) on {self.scans} of the {self.split} split: {own:.2f} dB, against "
                f"{score:.2f} dB ({best}). It does not measure the accuracy along the rays.{after}"
            )
        where = f"PSNR (protocol {protocol}) on {self.scans} of the {self.split} split"
        if own > score:
            beaten = f"{own:.2f} dB against {score:.2f} dB ({best})"
            return f"The model beats both trivial baselines in {where}: {beaten}.{after}"
        config = self.provenance["training"]
        return (
            f"The model does NOT beat the {best} in {where}: {own:.2f} dB against {score:.2f} dB. It was trained for "
            f"{config['steps']} steps of {config['batch_size']} on {config['volumes']} volumes; the published X2CT-GAN "
            f"took 22,900 steps of 4 on 916 volumes at 128 voxels per side, which such a comparison needs.{after}"
        )

    def residuals(self) -> Residuals:
        """Mean over the scans of the residuals before and after the consistency fit, by view."""
        return consistency.mean_residuals([case.residuals for case in self.cases])

    def to_json(self) -> dict[str, Any]:
        """Everything but the voxels."""
        return {
            "summary": self.summary(),
            "split": self.split,
            "mean": {p: {q: finite(self.mean(p, q)) for q in self.all_protocols} for p in self.predictors},
            "standard_deviation": {p: {q: finite(self.std(p, q)) for q in self.all_protocols} for p in self.predictors},
            "cases": {
                case.entry.id: {p: {q: finite(row) for q, row in rows.items()} for p, rows in case.metrics.items()}
                for case in self.cases
            },
            "projection_residuals": {
                "mean": self.residuals(),
                "cases": {case.entry.id: case.residuals for case in self.cases},
            },
            "seconds_per_volume": self.seconds_per_volume,
            "provenance": self.provenance,
        }
