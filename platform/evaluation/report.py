"""Reports of an evaluation: an HTML page with tables, figures and provenance, a JSON file, and terminal tables."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jinja2
from rich.table import Table

from raylift.models.weights import Description
from raylift.platform.evaluation.plots import plot_history, plot_reprojections, plot_slices
from raylift.platform.evaluation.protocols import PROTOCOLS
from raylift.platform.evaluation.results import FITTED, Evaluation
from raylift.platform.evaluation.tables import TITLES, Section, cell

DISCLAIMER = "raylift is research software. It is not a medical device and must not be used for diagnosis."
RESIDUAL = (
    "Relative L2 distance of each reprojection, after the gain and offset that fit it best, from the radiograph. The "
    "consistency fit minimizes it, so it is no measure of the volume."
)
MAX_CASES_PLOTTED = 4
TEMPLATE = "report.html.j2"

_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(
    evaluation: Evaluation, folder: Path, description: Description, history: list[dict[str, float]] | None = None
) -> Path:
    """Write `report.html` (self-contained), `metrics.json` and `figures/*.png`; returns the path of the page."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    paths: list[tuple[str, Path]] = []
    if history:
        plot_history(history, figures / "training.png")
        paths.append(("Training", figures / "training.png"))
    for case in evaluation.cases[:MAX_CASES_PLOTTED]:
        slices, reprojections = (figures / f"{case.entry.id}-{what}.png" for what in ("slices", "reprojections"))
        plot_slices(case, slices)
        plot_reprojections(case, description, reprojections)
        paths += [(f"{case.entry.id}: slices", slices), (f"{case.entry.id}: reprojections", reprojections)]
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(evaluation, paths), encoding="utf-8")
    return page


def terminal_tables(evaluation: Evaluation) -> list[Table]:
    """The tables of the report for a terminal."""
    return [section.terminal() for section in _sections(evaluation)]


def _page(evaluation: Evaluation, figures: list[tuple[str, Path]]) -> str:
    return _templates.get_template(TEMPLATE).render(
        title=f"{evaluation.provenance['system']} on {evaluation.scans} of the {evaluation.split} split",
        summary=evaluation.summary(),
        sections=_sections(evaluation),
        cases=_case_rows(evaluation),
        figures=[(title, base64.b64encode(path.read_bytes()).decode()) for title, path in figures],
        provenance=json.dumps(evaluation.provenance, indent=1),
        disclaimer=DISCLAIMER,
    )


def _sections(evaluation: Evaluation) -> list[Section]:
    """A section for each protocol and, after a consistency fit, one for its residuals."""
    sections = [
        Section(
            f"Protocol {name}" if name in evaluation.protocols else name.capitalize(),
            PROTOCOLS[name].definition,
            *_protocol_rows(evaluation, name),
        )
        for name in evaluation.all_protocols
    ]
    if evaluation.residuals():
        body = [[view, *(f"{value:.4f}" for value in pair)] for view, pair in evaluation.residuals().items()]
        sections.append(Section("Reprojection residual", RESIDUAL, ["view", "model", FITTED], body))
    return sections


def _protocol_rows(evaluation: Evaluation, protocol: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a protocol's table: by predictor, mean and standard deviation over scans."""
    names = list(evaluation.mean(evaluation.predictors[0], protocol))
    body = []
    for predictor in evaluation.predictors:
        mean, std = evaluation.mean(predictor, protocol), evaluation.std(predictor, protocol)
        body.append([predictor, *(cell(name, mean[name], std[name], len(evaluation.cases)) for name in names)])
    return ["predictor", *(TITLES.get(name, name) for name in names)], body


def _case_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of PSNR by scan and predictor."""
    protocol = evaluation.protocols[0]
    name = next(key for key in evaluation.mean(evaluation.predictors[0], protocol) if key.startswith("psnr"))
    header = ["scan", *(f"{predictor}, {TITLES[name]} ({protocol})" for predictor in evaluation.predictors)]
    body = [
        [case.entry.id, *(cell(name, case.metrics[p][protocol][name], 0.0, 1) for p in evaluation.predictors)]
        for case in evaluation.cases
    ]
    return header, body
