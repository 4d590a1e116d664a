"""Agreement of two measurements of the same subjects, such as volumes of a reconstruction and of its CT."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float64
from scipy import stats

LIMITS = 1.96
"""Standard deviations of the differences between the mean and the limits of agreement."""


@dataclass(frozen=True)
class Agreement:
    """Figures of measured and true values, in their unit; NaN where undefined."""

    count: int
    pearson: float
    spearman: float
    icc: float
    """ICC(2,1): two-way random effects, absolute agreement, single measurement (Shrout and Fleiss 1979)."""
    mean_absolute_error: float
    bias: float
    """Mean of measured minus true."""
    lower: float
    upper: float
    """Bland and Altman's 95 % limits of agreement."""

    def text(self) -> str:
        """All figures in a line."""
        return (
            f"Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, ICC(2,1) {self.icc:.3f}, mean absolute error "
            f"{self.mean_absolute_error:.1f}, bias {self.bias:+.1f}, limits {self.lower:+.1f} to {self.upper:+.1f}"
        )

    def to_json(self) -> dict[str, float | None]:
        """By name, with null for NaN."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def agreement(measured: Float64[np.ndarray, " n"], true: Float64[np.ndarray, " n"]) -> Agreement:
    """Agreement over at least one pair; correlations need two different values, limits and ICC two pairs."""
    differences = measured - true
    several = len(differences) > 1
    varied = several and np.ptp(measured) > 0 and np.ptp(true) > 0
    bias = float(differences.mean())
    half_width = LIMITS * float(differences.std(ddof=1)) if several else math.nan
    return Agreement(
        len(differences),
        float(stats.pearsonr(measured, true).statistic) if varied else math.nan,
        float(stats.spearmanr(measured, true).statistic) if varied else math.nan,
        icc(np.stack([measured, true], axis=1)) if several else math.nan,
        float(np.abs(differences).mean()),
        bias,
        bias - half_width,
        bias + half_width,
    )


def icc(ratings: Float64[np.ndarray, "n k"]) -> float:
    """ICC(2,1) of n >= 2 subjects by k >= 2 raters, from the mean squares of a two-way ANOVA; NaN if all are equal."""
    n, k = ratings.shape
    mean, rows, columns = ratings.mean(), ratings.mean(axis=1), ratings.mean(axis=0)
    subjects = k * np.square(rows - mean).sum() / (n - 1)
    raters = n * np.square(columns - mean).sum() / (k - 1)
    residual = np.square(ratings - rows[:, None] - columns + mean).sum() / ((n - 1) * (k - 1))
    total = subjects + (k - 1) * residual + k * (raters - residual) / n
    return float((subjects - residual) / total) if total else math.nan
