"""Metrics by scan, predictor and protocol, as tables for a terminal, CSV, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.table import Table

from raylift.datasets.csv_file import write_rows
from raylift.models.metrics import Metrics
from raylift.platform.evaluation.protocols import ADDED

MetricsByScan = Mapping[str, Mapping[str, Mapping[str, Metrics]]]
"""Metrics by scan, predictor and protocol."""

TITLES = {
    "mae_hu": "MAE, HU",
    "mse": "MSE",
    "psnr_db": "PSNR, dB",
    "psnr_3d_db": "PSNR 3-D, dB",
    "psnr_slices_db": "PSNR slices, dB",
    "ssim": "SSIM",
    "ssim_slices": "SSIM slices",
    "cosine_similarity": "cosine similarity",
    "lung_dice": "lung Dice",
    "right_lung_dice": "right lung Dice",
    "left_lung_dice": "left lung Dice",
    "lung_surface_dice": "lung surface Dice",
    "lung_hd95_mm": "lung HD95, mm",
    "lung_assd_mm": "lung ASSD, mm",
    "lung_volume_ml": "lung volume, ml",
    "lung_volume_error_ml": "lung volume error, ml",
    "mediastinum_dice": "mediastinum Dice",
    "mediastinum_volume_error_ml": "mediastinum volume error, ml",
    "trachea_dice": "trachea Dice",
    "vessel_cldice": "vessel clDice",
    "bone_dice": "bone Dice",
    "lung_bias_hu": "lung bias, HU",
    "soft_tissue_bias_hu": "soft tissue bias, HU",
    "bone_bias_hu": "bone bias, HU",
    "pneumothorax_ml": "pneumothorax, ml",
    "ct_pneumothorax_ml": "CT pneumothorax, ml",
    "pneumothorax_absolute_error_ml": "absolute error of volume, ml",
    "occupancy_percent": "occupancy, %",
    "ct_occupancy_percent": "CT occupancy, %",
    "occupancy_absolute_error_percent": "absolute error of occupancy, %",
}


COLUMNS = 8
"""Largest number of metrics in a table."""


@dataclass(frozen=True)
class Section:
    """A table with its title and the definition of its numbers."""

    title: str
    definition: str
    header: list[str]
    body: list[list[str]]

    def terminal(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for row in self.body:
            table.add_row(*row)
        return table

    def parts(self) -> list[Section]:
        """The table, or several with up to `COLUMNS` columns after the first."""
        starts = range(1, len(self.header), COLUMNS)
        if len(starts) < 2:
            return [self]
        return [
            Section(
                f"{self.title} ({number} of {len(starts)})",
                self.definition,
                [self.header[0], *self.header[start : start + COLUMNS]],
                [[row[0], *row[start : start + COLUMNS]] for row in self.body],
            )
            for number, start in enumerate(starts, 1)
        ]

    def markdown(self) -> str:
        """Title, definition and table in Markdown."""
        rows = [self.header, ["---"] * len(self.header), *self.body]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        return f"## {self.title}\n\n{self.definition}\n\n{table}\n"


@dataclass(frozen=True)
class MetricTable:
    """Metrics of every predictor on the same scans, under the same protocols."""

    metrics: MetricsByScan
    definitions: Mapping[str, str]
    """How each protocol computes its metrics, a sentence by name."""

    @property
    def predictors(self) -> list[str]:
        """The predictors, in order."""
        return list(next(iter(self.metrics.values())))

    @property
    def protocols(self) -> list[str]:
        """The protocols, in order."""
        return list(self.definitions)

    @property
    def primary_metric(self) -> tuple[str, str]:
        """`volume`, or else the first protocol, and the name of its PSNR."""
        protocol = "volume" if "volume" in self.definitions else self.protocols[0]
        return protocol, next(name for name in self.names(protocol) if name.startswith("psnr"))

    def names(self, protocol: str) -> list[str]:
        """Names of a protocol's metrics."""
        return list(next(iter(self.metrics.values()))[self.predictors[0]][protocol])

    def values(self, predictor: str, protocol: str, name: str) -> Float64[np.ndarray, " scans"]:
        """One metric of one predictor by scan."""
        return np.array([by_predictor[predictor][protocol][name] for by_predictor in self.metrics.values()])

    def mean(self, predictor: str, protocol: str) -> Metrics:
        """Mean over scans; infinite where a scan's metric is."""
        return {name: float(self.values(predictor, protocol, name).mean()) for name in self.names(protocol)}

    def std(self, predictor: str, protocol: str) -> Metrics:
        """Sample standard deviation over scans (n - 1); NaN for a single one and where a metric is infinite."""
        deviations = {}
        for name in self.names(protocol):
            values = self.values(predictor, protocol, name)
            defined = len(values) > 1 and np.isfinite(values).all()
            deviations[name] = float(values.std(ddof=1)) if defined else math.nan
        return deviations

    def sections(self, where: str = "") -> list[Section]:
        """For each protocol, mean and sample standard deviation of every predictor; `where` ends the titles."""
        sections = [
            Section(
                f"{protocol.capitalize() if protocol in ADDED else f'Protocol {protocol}'}{where}",
                definition,
                ["method", *(title_of(name) for name in self.names(protocol))],
                [[predictor, *self._cells(predictor, protocol)] for predictor in self.predictors],
            )
            for protocol, definition in self.definitions.items()
        ]
        return [part for section in sections for part in section.parts()]

    def write_csv(self, path: Path, subjects: Mapping[str, str] | None = None) -> None:
        """A row for each scan and predictor, with a column `protocol.metric` for each metric.

        Args:
            path: the file.
            subjects: the subject of each scan, for a column.
        """
        columns = [(protocol, name) for protocol in self.protocols for name in self.names(protocol)]
        rows = (
            [
                scan,
                *([subjects[scan]] if subjects else []),
                method,
                *(values[protocol][name] for protocol, name in columns),
            ]
            for scan, by_predictor in self.metrics.items()
            for method, values in by_predictor.items()
        )
        labels = ["scan", "subject", "method"] if subjects else ["scan", "method"]
        write_rows(path, [*labels, *(".".join(column) for column in columns)], rows)

    def to_json(self) -> dict[str, Any]:
        """Means and standard deviations by predictor and protocol, and the metrics of every scan."""
        return {
            "protocols": dict(self.definitions),
            **self.means_to_json(),
            "cases": {
                scan: {p: {q: finite(values) for q, values in by.items()} for p, by in by_predictor.items()}
                for scan, by_predictor in self.metrics.items()
            },
        }

    def means_to_json(self) -> dict[str, Any]:
        """Means and sample standard deviations by predictor and protocol; null where undefined."""
        return {
            "mean": {p: {q: finite(self.mean(p, q)) for q in self.protocols} for p in self.predictors},
            "standard_deviation": {p: {q: finite(self.std(p, q)) for q in self.protocols} for p in self.predictors},
        }

    def _cells(self, predictor: str, protocol: str) -> list[str]:
        mean, std = self.mean(predictor, protocol), self.std(predictor, protocol)
        return [cell(name, mean[name], std[name], len(self.metrics)) for name in mean]


def finite(values: Metrics) -> dict[str, float | None]:
    """The metrics for JSON, which has no infinity: the PSNR of an exact volume becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def cell(name: str, mean: float, std: float = 0.0, count: int = 1) -> str:
    """A metric with the digits that its unit needs and, over several subjects, its sample standard deviation.

    A distance is infinite where a volume lacks the organ, and then has no standard deviation.
    """
    if math.isnan(mean):
        return "undefined"
    digits = digits_of(name)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if count > 1 and not math.isnan(std) else "")


def title_of(name: str) -> str:
    """A metric with its unit, for people."""
    return TITLES.get(name, name.replace("_", " "))


def digits_of(name: str) -> int:
    """Decimal places of a metric."""
    return (
        2
        if name.endswith("_db")
        else 0
        if name.endswith(("_hu", "_ml"))
        else 1
        if name.endswith(("_mm", "_percent"))
        else 5
        if name == "mse"
        else 4
    )
