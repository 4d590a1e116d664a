"""Write docs/results.md from reports and from what benchmarks printed.

python docs/render_results.py "TITLE=FOLDER" ... "TITLE=benchmarks/results/FILE.md" ... > docs/results.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from raylift.platform.evaluation.tables import TITLES

INTRODUCTION = """\
# Results

Written by `python docs/render_results.py` from the `metrics.json` of reports. Each result belongs to a
[protocol](explanation/protocols.md); results of different protocols cannot be compared. Results of the literature are
not listed, because they come from other data, geometry and definitions. Radiographs are digitally reconstructed
radiographs (DRRs) of the CT, computed by the projector of the archive.
"""
COLUMNS = {
    "volume": ("mae_hu", "psnr_db", "ssim"),
    "x2ct": ("psnr_3d_db", "psnr_slices_db", "ssim_slices"),
    "segmentation": ("lung_dice",),
}
DIGITS = {"mae_hu": 0, "psnr_db": 2, "psnr_3d_db": 2, "psnr_slices_db": 2}


def section(title: str, source: Path) -> str:
    """A report, or a benchmark's table under a title of its own."""
    if source.suffix != ".md":
        return evaluation(title, source)
    _, printed = source.read_text(encoding="utf-8").split("\n", 1)
    # Links start in benchmarks/results there, and in docs/ here.
    return f"\n## {title}\n{printed.rstrip().replace('](../../docs/', '](')}"


def evaluation(title: str, report: Path) -> str:
    """One evaluation: summary, table, and provenance."""
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    head = [f"{TITLES[name]} ({protocol})" for protocol, names in COLUMNS.items() for name in names]
    lines = [f"\n## {title}\n", metrics["summary"] + "\n", row(["method", *head]), row(["---"] * (1 + len(head)))]
    for predictor, mean in metrics["mean"].items():
        std = metrics["standard_deviation"][predictor]
        cells = [
            cell(name, mean[protocol][name], std[protocol][name], len(metrics["cases"]))
            for protocol, names in COLUMNS.items()
            for name in names
        ]
        lines.append(row([predictor, *cells]))
    return "\n".join([*lines, "", *conditions(metrics["provenance"], list(metrics["cases"]))])


def cell(name: str, mean: float, std: float, count: int) -> str:
    """Mean and, over several scans, standard deviation."""
    digits = DIGITS.get(name, 3)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if count > 1 else "")


def conditions(provenance: dict[str, Any], cases: list[str]) -> list[str]:
    """What made the results."""
    training, versions = provenance["training"], provenance["versions"]
    named = ", ".join(cases) if len(cases) <= 8 else f"{len(cases)} scans, {cases[0]} to {cases[-1]}"
    return [
        f"* {provenance['date']}, {provenance['system']} with {provenance['parameters']:,} parameters, "
        f"{provenance['grid']}, {training['steps']} steps with batch size {training['batch_size']} on "
        f"{training['volumes']} volumes, "
        f"seed {provenance['seed']}; evaluated on {named}",
        f"* command: `{provenance['command']}`",
        f"* {', '.join(f'{name} {number}' for name, number in versions.items())}; {provenance['machine']}",
    ]


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    named = [argument.rsplit("=", 1) for argument in sys.argv[1:]]
    print(INTRODUCTION + "\n".join(section(title, Path(folder)) for title, folder in named))
