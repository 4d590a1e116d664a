"""An evaluation as a page a person reads: verdict, tables, pictures, and where every number comes from."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from raylift.datasets.geometry import Geometry, Grid
from raylift.models.metrics import PROTOCOLS
from raylift.platform.evaluation.evaluate import FITTED, REPROJECTION, Evaluation
from raylift.platform.evaluation.plots import draw_case, draw_history, draw_projections

DISCLAIMER = "raylift is research software. It is not a medical device and must not be used for diagnosis."
RESIDUAL = (
    "Relative L2 distance of each projection, after the gain and offset that suit it best, from the radiograph; the "
    "fit makes it small by design, so it says nothing about the volume."
)
CASES_DRAWN = 4

TITLES = {
    "mae_hu": "MAE, HU",
    "mse": "MSE",
    "psnr_db": "PSNR, dB",
    "psnr_3d_db": "PSNR 3-D, dB",
    "psnr_slices_db": "PSNR slices, dB",
    "ssim": "SSIM",
    "ssim_slices": "SSIM slices",
    "cosine": "cosine",
    "lung_dice": "lung Dice",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #1c2330; }
tbody tr + tr td { border-top: 1px solid #d5d9e0; } .verdict { background: #eef3fa; padding: .8rem 1rem; }
img { max-width: 100%; } pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; font-size: 13px; }
footer { margin-top: 3rem; color: #5a6372; }
"""


def write(
    evaluation: Evaluation, folder: Path, grid: Grid, geometry: Geometry, history: list[dict[str, float]] | None = None
) -> Path:
    """Write `report.html` (complete in itself), `metrics.json` and `figures/*.png`; returns the page."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Path]] = []
    if history:
        draw_history(history, figures / "training.png")
        pictures.append(("Training", figures / "training.png"))
    for case in evaluation.cases[:CASES_DRAWN]:
        draw_case(case, figures / f"{case.entry.id}-slices.png")
        draw_projections(case, grid, geometry, figures / f"{case.entry.id}-projections.png")
        pictures.append((f"{case.entry.id}: slices", figures / f"{case.entry.id}-slices.png"))
        pictures.append((f"{case.entry.id}: projections", figures / f"{case.entry.id}-projections.png"))
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(evaluation, pictures), encoding="utf-8")
    return page


def rows(evaluation: Evaluation, protocol: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a protocol's table: a row a predictor, mean and standard deviation over scans."""
    names = list(evaluation.mean(evaluation.predictors[0], protocol))
    body = []
    for predictor in evaluation.predictors:
        mean, spread = evaluation.mean(predictor, protocol), evaluation.spread(predictor, protocol)
        body.append([predictor, *(_cell(name, mean[name], spread[name], len(evaluation.cases)) for name in names)])
    return ["predictor", *(TITLES.get(name, name) for name in names)], body


def residual_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what the consistency fit did to the projections: a row a view."""
    body = [[view, *(f"{value:.4f}" for value in pair)] for view, pair in evaluation.residuals().items()]
    return ["view", "model", FITTED], body


def terminal_tables(evaluation: Evaluation) -> list[Table]:
    """The same tables for a terminal."""
    tables = [
        _terminal_table(f"protocol {name}" if name in evaluation.protocols else name, *rows(evaluation, name))
        for name in evaluation.protocols_and_extra
    ]
    if evaluation.residuals():
        tables.append(_terminal_table("projection residual", *residual_rows(evaluation)))
    return tables


def _terminal_table(title: str, header: list[str], body: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in body:
        table.add_row(*row)
    return table


def _cell(name: str, mean: float, spread: float, count: int) -> str:
    digits = 2 if name.endswith("_db") else 0 if name.endswith("_hu") else 5 if name == "mse" else 4
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if count > 1 else "")


def _page(evaluation: Evaluation, pictures: list[tuple[str, Path]]) -> str:
    provenance = evaluation.provenance
    head = f"{provenance['system']} on {evaluation.scans} of the {evaluation.split} split"
    parts = [f"<h1>{_escape(head)}</h1>", f'<p class="verdict">{_escape(evaluation.verdict())}</p>']
    for protocol in evaluation.protocols_and_extra:
        title = f"Protocol {protocol}" if protocol in evaluation.protocols else "Segmentation"
        parts += [f"<h2>{_escape(title)}</h2>", f"<p>{_escape(_definition(protocol))}</p>"]
        parts.append(_table(*rows(evaluation, protocol)))
    if evaluation.residuals():
        parts += ["<h2>Projection residual</h2>", f"<p>{_escape(RESIDUAL)}</p>"]
        parts.append(_table(*residual_rows(evaluation)))
    parts.append("<h2>Scan by scan</h2>")
    parts.append(_table(*_case_rows(evaluation)))
    for title, path in pictures:
        encoded = base64.b64encode(path.read_bytes()).decode()
        parts.append(f'<h2>{_escape(title)}</h2><img alt="{_escape(title)}" src="data:image/png;base64,{encoded}">')
    parts.append(f"<h2>Where this comes from</h2><pre>{_escape(json.dumps(provenance, indent=1))}</pre>")
    parts.append(
        f"<footer>{_escape(DISCLAIMER)} Protocols differ by decibels: compare numbers of one protocol only.</footer>"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_escape(head)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _definition(protocol: str) -> str:
    if protocol == REPROJECTION:
        return (
            "Projections of the volumes against the radiographs they were made of, each after the gain and offset that "
            "suit it best: PSNR against the radiograph's own range, and relative L2 distance. No volume is compared."
        )
    if protocol not in PROTOCOLS:
        return "Lungs of both volumes by the same threshold, -500 HU inside the body."
    window = PROTOCOLS[protocol].window
    return f"{window.low_hu:g} to {window.high_hu:g} HU. {PROTOCOLS[protocol].definition}."


def _case_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    protocol = evaluation.protocols[0]
    name = next(key for key in evaluation.mean(evaluation.predictors[0], protocol) if key.startswith("psnr"))
    header = ["scan", *(f"{predictor}, {TITLES[name]} ({protocol})" for predictor in evaluation.predictors)]
    body = [
        [case.entry.id, *(_cell(name, case.figures[p][protocol][name], 0.0, 1) for p in evaluation.predictors)]
        for case in evaluation.cases
    ]
    return header, body


def _table(header: list[str], body: list[list[str]]) -> str:
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _escape(text: Any) -> str:
    return html.escape(str(text))
