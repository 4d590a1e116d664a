"""Agreement of the pneumothorax in the volumes of every method with that in the CT, for a report and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from raylift.datasets import ptx_seg
from raylift.platform.evaluation.agreement import Agreement, agreement
from raylift.platform.evaluation.tables import MetricTable, Section

QUANTITIES = {"volume": ("pneumothorax_ml", "ml"), "occupancy": ("occupancy_percent", "%")}
"""Metric and unit by name; the metric of the CT has `ct_` before."""
FEW_SUBJECTS = 10
DEFINITION = (
    "Agreement of {name} in {unit} with that of the CT over {count} subjects; several scans of a subject count as "
    "their mean. ICC(2,1): two-way random effects, absolute agreement, single measurement. Bias is method minus CT, "
    "with Bland and Altman's 95 % limits of agreement. A correlation is undefined where all values are equal."
)
HEADER = ["method", "Pearson", "Spearman", "ICC(2,1)", "MAE, {}", "bias, {}", "limits of agreement, {}"]
Pair = tuple[Float64[np.ndarray, " subjects"], Float64[np.ndarray, " subjects"]]


@dataclass(frozen=True)
class PneumothoraxTable:
    """The same subjects' pneumothorax by every method and in the CT."""

    table: MetricTable
    subjects: Mapping[str, str]
    """The subject of each scan."""

    def pairs(self, predictor: str) -> dict[str, Pair]:
        """Values of a method and of the CT by subject, for each of `QUANTITIES`."""
        subjects = [
            self.subjects[scan] for scan, measured in zip(self.table.metrics, self._measured, strict=True) if measured
        ]
        _, groups = np.unique(subjects, return_inverse=True)
        return {
            name: (self._by_subject(predictor, metric, groups), self._by_subject(predictor, f"ct_{metric}", groups))
            for name, (metric, _) in QUANTITIES.items()
        }

    @property
    def _measured(self) -> Bool[np.ndarray, " scans"]:
        """Whether the CT of each scan was measured."""
        finite: Bool[np.ndarray, " scans"] = np.isfinite(
            self.table.values(self.table.predictors[0], "pneumothorax", "ct_pneumothorax_ml")
        )
        return finite

    @cached_property
    def agreements(self) -> dict[str, dict[str, Agreement]]:
        """By quantity and method."""
        if not self._measured.any():
            return {}
        pairs = {predictor: self.pairs(predictor) for predictor in self.table.predictors}
        return {name: {p: agreement(*of[name]) for p, of in pairs.items()} for name in QUANTITIES}

    @property
    def sentences(self) -> list[str]:
        """What limits the figures: few subjects, no pneumothorax in the CT, methods in whose volumes none is found."""
        _, ct_ml = self.pairs(self.table.predictors[0])["volume"]
        count, affected = len(ct_ml), int((ct_ml > 0).sum())
        found = []
        if without_lungs := [scan for scan, known in zip(self.table.metrics, self._measured, strict=True) if not known]:
            found.append(f"no lungs were found in the CT of {', '.join(without_lungs)}: pneumothorax is not measured")
        if not count:
            return found
        largest_ml = {predictor: self._largest_false_ml(predictor) for predictor in self.table.predictors}
        if false := [f"{ml:.0f} ml in those of {predictor}" for predictor, ml in largest_ml.items() if ml]:
            found.append(f"a pneumothorax was found in volumes whose CT has none: up to {', '.join(false)}")
        if not affected:
            return [f"no pneumothorax was found in the CT of {_subjects(count)}, so no correlation is defined", *found]
        if affected < FEW_SUBJECTS:
            found.append(
                f"a pneumothorax was found in the CT of {affected} of {_subjects(count)}: too few for correlations and "
                "limits of agreement that are more than an indication"
            )
        without = [p for p in self.table.predictors if not self.pairs(p)["volume"][0].any()]
        if without:
            found.append(
                f"a pneumothorax was found in the CT of {affected} of {_subjects(count)}, of up to "
                f"{ct_ml.max():.0f} ml, and in no volume of {', '.join(without)}: these have no compact gas below "
                f"{ptx_seg.CORE_HU} HU at the chest wall"
            )
        return found

    def sections(self) -> list[Section]:
        """A table for each quantity."""
        return [
            Section(
                f"Pneumothorax: agreement of {name} with the CT",
                DEFINITION.format(name=name, unit=unit, count=next(iter(self.agreements[name].values())).count),
                [column.format(unit) for column in HEADER],
                [[predictor, *cells(agreed)] for predictor, agreed in self.agreements[name].items()],
            )
            for name, (_, unit) in QUANTITIES.items()
            if self.agreements
        ]

    def to_json(self) -> dict[str, Any]:
        """Agreement by quantity and method; null where undefined."""
        return {name: {p: agreed.to_json() for p, agreed in of.items()} for name, of in self.agreements.items()}

    def _largest_false_ml(self, predictor: str) -> float:
        found, true = (
            self.table.values(predictor, "pneumothorax", name) for name in ("pneumothorax_ml", "ct_pneumothorax_ml")
        )
        return float(found[true == 0].max(initial=0.0))

    def _by_subject(self, predictor: str, metric: str, groups: np.ndarray) -> Float64[np.ndarray, " subjects"]:
        values = self.table.values(predictor, "pneumothorax", metric)[self._measured]
        return np.bincount(groups, weights=values) / np.bincount(groups)


def _subjects(count: int) -> str:
    return f"{count} subject{'s' * (count > 1)}"


def cells(agreed: Agreement) -> list[str]:
    """Correlations, mean absolute error, bias and limits, for a table."""
    correlations = (_defined(value, "z.3f") for value in (agreed.pearson, agreed.spearman, agreed.icc))
    limits = "undefined" if math.isnan(agreed.lower) else f"{agreed.lower:+.1f} to {agreed.upper:+.1f}"
    return [*correlations, f"{agreed.mean_absolute_error:.1f}", f"{agreed.bias:+.1f}", limits]


def _defined(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else format(value, form)
