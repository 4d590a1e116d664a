"""Paired differences between predictors on the same subjects: mean, bootstrap interval and Wilcoxon's test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy import stats

from raylift.platform.evaluation.tables import MetricTable, Section, digits_of, finite, title_of

CONFIDENCE, RESAMPLES, SEED = 0.95, 10_000, 0
DESCRIPTIVE = {
    "lung_volume_ml",
    "pneumothorax_ml",
    "ct_pneumothorax_ml",
    "occupancy_percent",
    "ct_occupancy_percent",
}
"""Metrics of a prediction or of the CT alone: their differences are those of their errors."""
BATCH = 500
"""Number of resamples in memory at a time."""
DEFINITION = (
    "Method minus {reference} on the same {count} subjects: mean, percentile bootstrap interval of {confidence:.0%} "
    "over subjects ({resamples:,} resamples, seed {seed}), and p of Wilcoxon's two-sided signed-rank test. Several "
    "scans of a subject count as their mean. The p-values are not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Difference:
    """A mean difference over subjects; NaN where it is undefined."""

    mean: float
    low: float
    high: float
    """Ends of the bootstrap interval."""
    p: float
    """The p-value of Wilcoxon's signed-rank test."""


def difference(differences: Float64[np.ndarray, " subjects"]) -> Difference:
    """Mean of paired differences with its uncertainty.

    With a single subject there is no interval and no test; with an infinite metric, such as the PSNR of an exact
    volume, nothing is defined.
    """
    if not np.isfinite(differences).all():
        return Difference(math.nan, math.nan, math.nan, math.nan)
    mean = float(differences.mean())
    if len(differences) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    if np.ptp(differences) == 0:
        interval = (mean, mean)
    else:
        bootstrapped = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=BATCH,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        interval = (float(bootstrapped.low), float(bootstrapped.high))
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return Difference(mean, *interval, p)


def between(
    table: MetricTable, subjects: Mapping[str, str], predictors: tuple[str, str], protocol: str, name: str
) -> Difference:
    """The difference of a metric, the first predictor's minus the second's; `subjects` has the subject of each scan."""
    _, groups = np.unique([subjects[scan] for scan in table.metrics], return_inverse=True)
    first, second = (table.values(predictor, protocol, name) for predictor in predictors)
    with np.errstate(invalid="ignore"):
        return difference(np.bincount(groups, weights=first - second) / np.bincount(groups))


@dataclass(frozen=True)
class Paired:
    """Differences of every other predictor to a reference, by predictor, protocol and metric."""

    reference: str
    subjects: int
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]

    @classmethod
    def of(cls, table: MetricTable, subjects: Mapping[str, str], reference: str) -> Paired:
        """The differences in a table; `subjects` has the subject of each of its scans."""
        others = [predictor for predictor in table.predictors if predictor != reference]
        names = {q: [name for name in table.names(q) if name not in DESCRIPTIVE] for q in table.protocols}
        differences = {
            p: {q: {name: between(table, subjects, (p, reference), q, name) for name in names[q]} for q in names}
            for p in others
        }
        return cls(reference, len({subjects[scan] for scan in table.metrics}), differences)

    def sections(self) -> list[Section]:
        """A table for each protocol."""
        first = next(iter(self.differences.values()), {})
        definition = DEFINITION.format(
            reference=self.reference, count=self.subjects, confidence=CONFIDENCE, resamples=RESAMPLES, seed=SEED
        )
        sections = [
            Section(
                f"Difference to {self.reference} (protocol {protocol})",
                definition,
                ["method", *(title_of(name) for name in values)],
                [
                    [p, *(_cell(name, difference) for name, difference in by[protocol].items())]
                    for p, by in self.differences.items()
                ],
            )
            for protocol, values in first.items()
        ]
        return [part for section in sections for part in section.parts()]

    def to_json(self) -> dict[str, object]:
        """Everything; undefined numbers are null."""
        by_predictor = {
            p: {q: {name: finite(vars(difference)) for name, difference in row.items()} for q, row in by.items()}
            for p, by in self.differences.items()
        }
        return {
            "reference": self.reference,
            "subjects": self.subjects,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": SEED,
            "by_predictor": by_predictor,
        }


def _cell(name: str, difference: Difference) -> str:
    if math.isnan(difference.mean):
        return "undefined"
    digits = digits_of(name)
    text = f"{difference.mean:+.{digits}f}"
    if math.isnan(difference.p):
        return text
    p = f"p {difference.p:.2g}" if difference.p >= 0.001 else "p < 0.001"
    return f"{text} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}], {p}"
