"""Reports of an evaluation: an HTML page with tables, figures and provenance, a JSON file, and terminal tables."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import jinja2
from rich.table import Table

from raylift.platform.evaluation.plots import plot_history, plot_reprojections, plot_slices
from raylift.platform.evaluation.predictors import FITTED
from raylift.platform.evaluation.results import MODEL, Evaluation
from raylift.platform.evaluation.tables import TITLES, Section, cell
from raylift.platform.progress import console

DISCLAIMER = "raylift is research software. It is not a medical device and must not be used for diagnosis."
RESIDUAL = (
    "Relative L2 distance of each reprojection, after the gain and offset that fit it best, from the radiograph. The "
    "consistency fit minimizes it, so it is no measure of the volume."
)
TEMPLATE = "report.html.j2"

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(evaluation: Evaluation, folder: Path, history: list[dict[str, float]] | None = None) -> Path:
    """Write the results to a folder; returns the path of the page.

    `report.html` is self-contained, `report.md` has its tables, `metrics.csv` a row for each scan and predictor,
    `metrics.json` everything, and `figures/*.png` the figures.
    """
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    paths: list[tuple[str, Path]] = []
    if history:
        plot_history(history, figures / "training.png")
        paths.append(("Training", figures / "training.png"))
    for case in evaluation.cases:
        if case.images is None:
            continue
        stem = re.sub(r"[^\w.-]", "_", case.name)
        slices, reprojections = (figures / f"{stem}-{what}.png" for what in ("slices", "reprojections"))
        plot_slices(case.name, case.images, slices)
        plot_reprojections(case.images, reprojections)
        paths += [(f"{case.name}: slices", slices), (f"{case.name}: reprojections", reprojections)]
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1), encoding="utf-8")
    evaluation.table.write_csv(folder / "metrics.csv")
    (folder / "report.md").write_text(_markdown(evaluation), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(evaluation, paths), encoding="utf-8")
    return page


def terminal_tables(evaluation: Evaluation) -> list[Table]:
    """The tables of the report for a terminal."""
    return [section.terminal() for section in _sections(evaluation)]


def _page(evaluation: Evaluation, figures: list[tuple[str, Path]]) -> str:
    return _templates.get_template(TEMPLATE).render(
        title=evaluation.title,
        summary=evaluation.summary(),
        notes=_sentences(evaluation),
        sections=_sections(evaluation),
        cases=_case_rows(evaluation),
        figures=[(title, base64.b64encode(path.read_bytes()).decode()) for title, path in figures],
        provenance=json.dumps(evaluation.provenance, indent=1),
        disclaimer=DISCLAIMER,
    )


def _markdown(evaluation: Evaluation) -> str:
    head = [f"# {evaluation.title}", evaluation.summary(), *(f"* {note}." for note in _sentences(evaluation))]
    sections = [section.markdown() for section in _sections(evaluation)]
    provenance = json.dumps(evaluation.provenance, indent=1)
    return "\n\n".join([*head, *sections, f"## Provenance\n\n```json\n{provenance}\n```", DISCLAIMER]) + "\n"


def _sentences(evaluation: Evaluation) -> list[str]:
    return [note[:1].upper() + note[1:] for note in evaluation.notes]


def _sections(evaluation: Evaluation) -> list[Section]:
    """A section for each protocol, its differences and each archive, and for the residuals of a consistency fit."""
    sections = [*evaluation.table.sections(), *evaluation.paired.sections()]
    for url, table in evaluation.by_archive.items():
        sections += table.sections(f", {url}")
    if evaluation.residuals():
        body = [[view, *(f"{value:.4f}" for value in pair)] for view, pair in evaluation.residuals().items()]
        sections.append(Section("Reprojection residual", RESIDUAL, ["view", "model", MODEL + FITTED], body))
    return sections


def _case_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of PSNR by scan and predictor."""
    protocol, predictors = evaluation.protocols[0], evaluation.table.predictors
    name = next(key for key in evaluation.table.names(protocol) if key.startswith("psnr"))
    header = ["scan", *(f"{predictor}, {TITLES[name]} ({protocol})" for predictor in predictors)]
    body = [
        [case.name, *(cell(name, case.metrics[p][protocol][name], 0.0, 1) for p in predictors)]
        for case in evaluation.cases
    ]
    return header, body


def print_summary(evaluation: Evaluation, page: Path) -> None:
    """Print the tables, the summary, the notes and the path of the page."""
    for table in terminal_tables(evaluation):
        console.print(table)
    print(evaluation.summary())
    for note in evaluation.notes:
        print(f"note: {note}")
    print(f"report: {page}")
