"""Metrics under perturbations of the radiographs, as tables for a report, CSV and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylift.datasets.augmentation.perturbation import PERTURBATIONS, UNPERTURBED
from raylift.datasets.csv_file import write_rows
from raylift.models.metrics import Metrics
from raylift.platform.evaluation.robustness import SEED, MetricsByPerturbation, label_of
from raylift.platform.evaluation.tables import MetricTable, Section, cell, digits_of, finite, title_of

DEFINITION = (
    "Mean over scans and, in parentheses, the difference to unperturbed radiographs. The radiographs of every row, "
    "also of the unperturbed one, are projected again from the CT by the projector of augmentation, so the first row "
    "differs slightly from the tables above. Models have the nominal geometry as input. Directions of errors, noise "
    "and fields are random (seed {seed}) and equal for all strengths."
)


@dataclass(frozen=True)
class RobustnessTable:
    """A table of the same scans for each perturbation."""

    tables: Mapping[str, MetricTable]
    """By label; the first is of unperturbed radiographs."""

    @classmethod
    def of(cls, scans: Mapping[str, MetricsByPerturbation], definitions: Mapping[str, str]) -> RobustnessTable:
        """The tables of the perturbations that every scan has.

        Args:
            scans: metrics of each scan.
            definitions: how each protocol computes its metrics.
        """
        every = list(scans.values())
        protocols = next(iter(next(iter(every[0].values())).values()))
        return cls(
            {
                label: MetricTable(
                    {scan: metrics[label] for scan, metrics in scans.items()},
                    {protocol: definitions[protocol] for protocol in protocols},
                )
                for label in every[0]
                if all(metrics.get(label) for metrics in every)
            }
        )

    @property
    def unperturbed(self) -> MetricTable:
        """The metrics without an error."""
        return self.tables[label_of(UNPERTURBED)]

    @property
    def predictors(self) -> list[str]:
        """Models and baselines, in order."""
        return self.unperturbed.predictors

    def difference(self, label: str, predictor: str, protocol: str) -> Metrics:
        """Mean over scans minus that of unperturbed radiographs."""
        mean, unperturbed = (table.mean(predictor, protocol) for table in (self.tables[label], self.unperturbed))
        return {name: value - unperturbed[name] for name, value in mean.items()}

    def has(self, label: str, predictor: str) -> bool:
        """Whether the predictor can be used under the perturbation."""
        return label in self.tables and predictor in self.tables[label].predictors

    def sections(self, protocol: str) -> list[Section]:
        """For each predictor the metrics of a protocol and the lung Dice, a row for each perturbation."""
        columns = [(protocol, name) for name in self.unperturbed.names(protocol)] + [("segmentation", "lung_dice")]
        return [
            Section(
                f"Robustness of {predictor} (protocol {protocol})",
                DEFINITION.format(seed=SEED),
                ["radiographs", *(title_of(name) for _, name in columns)],
                [
                    [label, *(self._cell(label, predictor, *column) for column in columns)]
                    for label in map(label_of, (UNPERTURBED, *PERTURBATIONS))
                ],
            )
            for predictor in self.predictors
        ]

    def write_csv(self, path: Path, subjects: Mapping[str, str]) -> None:
        """A row for each scan, perturbation and method; `subjects` has the subject of each scan."""
        columns = [
            (protocol, name) for protocol in self.unperturbed.protocols for name in self.unperturbed.names(protocol)
        ]
        rows = (
            [scan, subjects[scan], label, method, *(values[protocol][name] for protocol, name in columns)]
            for label, table in self.tables.items()
            for scan, by_predictor in table.metrics.items()
            for method, values in by_predictor.items()
        )
        write_rows(path, ["scan", "subject", "radiographs", "method", *(".".join(column) for column in columns)], rows)

    def to_json(self) -> dict[str, Any]:
        """Means over scans and their differences to unperturbed radiographs, by perturbation."""
        return {
            "seed": SEED,
            "by_perturbation": {
                label: {
                    **table.means_to_json(),
                    "difference": {
                        p: {q: finite(self.difference(label, p, q)) for q in table.protocols} for p in table.predictors
                    },
                }
                for label, table in self.tables.items()
            },
        }

    def _cell(self, label: str, predictor: str, protocol: str, name: str) -> str:
        if not self.has(label, predictor):
            return "not possible"
        mean = cell(name, self.tables[label].mean(predictor, protocol)[name])
        if label == label_of(UNPERTURBED):
            return mean
        return f"{mean} ({self.difference(label, predictor, protocol)[name]:+.{digits_of(name)}f})"
