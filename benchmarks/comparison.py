"""Reports of `raylift compare` as a dated result: for each its command, verdicts, metrics and differences.

Volumes of another program are those of `sart_volumes.py`:

    python benchmarks/sart_volumes.py archives/ct volumes/ct/sart
    raylift compare models/x2ct-gan models/diffux2ct volumes/ct/sart --archive archives/ct --output reports/ct
    python benchmarks/comparison.py "19 CT scans=reports/ct" > benchmarks/results/DATE-comparison.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from raylift.platform.evaluation.tables import TITLES, cell

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

METRICS = [
    ("volume", "mae_hu"),
    ("volume", "psnr_db"),
    ("volume", "ssim"),
    ("x2ct", "psnr_3d_db"),
    ("x2ct", "psnr_slices_db"),
    ("x2ct", "ssim_slices"),
    ("segmentation", "lung_dice"),
]
COMPARED = [("volume", "psnr_db"), ("volume", "ssim"), ("segmentation", "lung_dice")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", metavar="TITLE=FOLDER")
    parser.add_argument("--about", nargs="*", default=[], help="sentences on the models")
    options = parser.parse_args()
    sys.argv[1:] = options.reports  # the sentences follow
    header("comparison", ("torch", "numpy", "scikit-image"))
    for sentence in options.about:
        print(f"* {sentence}")
    print()
    for title, folder in (given.rsplit("=", 1) for given in options.reports):
        report(title, json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8")))


def report(title: str, metrics: dict[str, Any]) -> None:
    """Command, notes, verdicts and two tables of one report."""
    provenance, cases = metrics["provenance"], list(metrics["cases"])
    models = {name: of for name, of in provenance["models"].items() if "system" in of}
    print(f"### {title}\n\n{metrics['summary']}\n")
    print(f"* command: `{provenance['command']}`")
    print(f"* {provenance['date']}, {provenance['grid']}; {provenance['machine']}")
    print(f"* {len(cases)} scans: {', '.join(cases)}")
    for name, of in models.items():
        training = of["training"]
        print(
            f"* {name}: {of['system']}, {of['parameters']:,} parameters, {training['steps']} steps with batch size "
            f"{training['batch_size']} on {training['volumes']} volumes, SHA-256 {of['model_sha256'][:12]}"
        )
    for name, sampling in provenance.get("sampling", {}).items():
        print(f"* {name}: {', '.join(f'{key} {value}' for key, value in sampling.items())}")
    for note in metrics["notes"]:
        print(f"* {note.replace(f'{Path.cwd()}/', '')}")
    print()
    rows = [
        [
            method,
            *(
                cell(name, mean[protocol][name], metrics["standard_deviation"][method][protocol][name], len(cases))
                for protocol, name in METRICS
            ),
        ]
        for method, mean in metrics["mean"].items()
    ]
    columns = [f"{TITLES[name]} ({protocol})" for protocol, name in METRICS]
    table("Mean and standard deviation", ["method", *columns], rows)
    differences = metrics["differences"]
    rows = [
        [method, *(difference(name, of[protocol][name]) for protocol, name in COMPARED)]
        for method, of in differences["by_predictor"].items()
    ]
    columns = [f"{TITLES[name]} ({protocol})" for protocol, name in COMPARED]
    table(
        f"Difference to {differences['reference']}, its {differences['confidence']:.0%} interval over "
        f"{differences['subjects']} subjects, and p of Wilcoxon's test",
        ["method", *columns],
        rows,
    )


def difference(name: str, found: dict[str, float]) -> str:
    """A difference with its interval and p."""
    mean, low, high = (f"{found[key]:+.{2 if name.endswith('_db') else 3}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high}), p {found['p']:.2g}"


if __name__ == "__main__":
    main()
