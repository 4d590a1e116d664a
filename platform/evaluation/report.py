"""Reports of an evaluation: an HTML page with tables, figures and provenance, a JSON file, and terminal tables."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from raylift.platform.evaluation.plots import (
    plot_boxes,
    plot_history,
    plot_reprojections,
    plot_robustness,
    plot_slices,
    plot_volume_agreement,
)
from raylift.platform.evaluation.plots_ptx import plot_agreement
from raylift.platform.evaluation.predictors import FITTED
from raylift.platform.evaluation.results import DISPLAY_HU, Evaluation
from raylift.platform.evaluation.tables import TITLES, Section, cell
from raylift.platform.progress import console
from raylift.platform.reports.page import DISCLAIMER, base64_text, render

RESIDUAL = (
    "Relative L2 distance of each reprojection, after the gain and offset that fit it best, from the radiograph. The "
    "data-consistency fit minimizes it, so it is no measure of the volume."
)
TEMPLATE = "report.html.j2"
MAX_THUMBNAILS = 60
"""Number of scans with thumbnails."""


def write(evaluation: Evaluation, folder: Path, history: list[dict[str, float]] | None = None) -> Path:
    """Write the results to a folder; returns the path of the page.

    `report.html` is self-contained, `report.md` has its tables, `metrics.csv` a row for each scan and method,
    `metrics.json` everything, and `figures/*.png` the figures. `robustness.csv` has a row for each scan, perturbation
    and method.
    """
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    paths: list[tuple[str, Path]] = []
    if history:
        plot_history(history, figures / "training.png")
        paths.append(("Training", figures / "training.png"))
    table = evaluation.table
    for protocol in table.protocols:
        boxes = figures / f"{protocol}-boxes.png"
        plot_boxes(table, protocol, boxes)
        paths.append((f"Metrics of protocol {protocol} by method", boxes))
    if "segmentation" in table.protocols:
        agreement = figures / "lung-volumes.png"
        plot_volume_agreement(table, [p for p in table.predictors if p not in evaluation.baselines], agreement)
        paths.append(("Lung volumes: agreement with the ground truth (Bland-Altman)", agreement))
    if evaluation.pneumothorax and evaluation.pneumothorax.agreements:
        for predictor in (p for p in table.predictors if p not in evaluation.baselines):
            agreement = figures / f"{_file_name(predictor)}-pneumothorax.png"
            plot_agreement(evaluation.pneumothorax.pairs(predictor), agreement)
            paths.append((f"Pneumothorax of {predictor}: agreement with the CT", agreement))
    # Of an earlier comparison in the same folder.
    (folder / "robustness.csv").unlink(missing_ok=True)
    if evaluation.robustness:
        curves = figures / "robustness.png"
        primary_metric = evaluation.robustness.unperturbed.primary_metric
        plot_robustness(evaluation.robustness, *primary_metric, curves)
        paths.append((f"Robustness, protocol {primary_metric[0]}", curves))
        evaluation.robustness.write_csv(folder / "robustness.csv", evaluation.subjects)
    for case in evaluation.cases:
        if case.images is None:
            continue
        stem = _file_name(case.name)
        slices, reprojections = (figures / f"{stem}-{what}.png" for what in ("slices", "reprojections"))
        plot_slices(case.name, case.images, slices)
        plot_reprojections(case.images, reprojections)
        paths += [(f"{case.name}: slices", slices), (f"{case.name}: reprojections", reprojections)]
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1), encoding="utf-8")
    evaluation.table.write_csv(folder / "metrics.csv", evaluation.subjects)
    (folder / "report.md").write_text(_markdown(evaluation), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(evaluation, paths), encoding="utf-8")
    return page


def terminal_tables(evaluation: Evaluation) -> list[Table]:
    """The tables of the report for a terminal."""
    return [section.terminal() for section in _sections(evaluation)]


def _page(evaluation: Evaluation, figures: list[tuple[str, Path]]) -> str:
    protocol, name = evaluation.primary_metric
    return render(
        TEMPLATE,
        title=evaluation.title,
        verdicts=[(evaluation.verdict(name), evaluation.is_significant(name)) for name in evaluation.candidates],
        notes=_sentences(evaluation),
        sections=_sections(evaluation),
        cases=_case_rows(evaluation),
        thumbnails=_thumbnails(evaluation),
        order=_order(evaluation),
        primary_metric=f"{TITLES[name]} (protocol {protocol})",
        figures=[(title, base64_text(path.read_bytes())) for title, path in figures],
        provenance=json.dumps(evaluation.provenance, indent=1),
    )


def _markdown(evaluation: Evaluation) -> str:
    head = [f"# {evaluation.title}", evaluation.summary(), *(f"* {note}." for note in _sentences(evaluation))]
    sections = [section.markdown() for section in _sections(evaluation)]
    provenance = json.dumps(evaluation.provenance, indent=1)
    return "\n\n".join([*head, *sections, f"## Provenance\n\n```json\n{provenance}\n```", DISCLAIMER]) + "\n"


def _sentences(evaluation: Evaluation) -> list[str]:
    return [note[:1].upper() + note[1:] for note in evaluation.notes]


def _sections(evaluation: Evaluation) -> list[Section]:
    """A section for each protocol, its differences and each archive, for perturbed radiographs and for residuals."""
    sections = [*evaluation.table.sections(), *evaluation.paired.sections()]
    if evaluation.pneumothorax:
        sections += evaluation.pneumothorax.sections()
    for url, table in evaluation.by_archive.items():
        sections += table.sections(f", {url}")
    if evaluation.robustness:
        sections += evaluation.robustness.sections(evaluation.robustness.unperturbed.primary_metric[0])
    for name in evaluation.candidates:
        if residuals := evaluation.residuals(name):
            body = [[view, *(f"{value:.4f}" for value in pair)] for view, pair in residuals.items()]
            sections.append(Section("Reprojection residual", RESIDUAL, ["view", name, name + FITTED], body))
    return sections


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _case_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of PSNR by scan and predictor."""
    protocol, name = evaluation.primary_metric
    predictors = evaluation.table.predictors
    return ["scan", *predictors], [
        [case.name, *(cell(name, case.metrics[p][protocol][name]) for p in predictors)] for case in evaluation.cases
    ]


def _thumbnails(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Scans from the worst to the best, evenly spaced if there are many; predictor, PSNR and PNG of each image."""
    protocol, name = evaluation.primary_metric
    ranked = evaluation.ranked
    chosen = np.unique(np.linspace(0, len(ranked) - 1, min(MAX_THUMBNAILS, len(ranked))).round().astype(int))
    shown = []
    for case in (ranked[k] for k in chosen):
        images = []
        for predictor, gray in case.thumbnails.items():
            png = io.BytesIO()
            Image.fromarray(gray).save(png, "PNG")
            psnr = f"{cell(name, case.metrics[predictor][protocol][name])} dB" if predictor in case.metrics else ""
            images.append((predictor, psnr, base64_text(png.getvalue())))
        shown.append((case.name, images))
    return shown


def _order(evaluation: Evaluation) -> str:
    """What the thumbnails show, and their order."""
    protocol, name = evaluation.primary_metric
    count = len(evaluation.cases)
    some = f" {MAX_THUMBNAILS} of {count} scans, evenly spaced in that order." if count > MAX_THUMBNAILS else ""
    return (
        f"Coronal planes through the middle, {DISPLAY_HU[0]:g} to {DISPLAY_HU[1]:g} HU, from the lowest to the highest "
        f"{TITLES[name].removesuffix(', dB')} of {evaluation.candidates[0]} (protocol {protocol}).{some}"
    )


def print_summary(evaluation: Evaluation, page: Path) -> None:
    """Print the tables, the summary, the notes and the path of the page."""
    for table in terminal_tables(evaluation):
        console.print(table)
    print(evaluation.summary())
    for note in evaluation.notes:
        print(f"note: {note}")
    print(f"report: {page}")
