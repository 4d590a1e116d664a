"""Table and figures of robustness reports: models with and without augmentation, and the model in the package.

    python benchmarks/robustness.py runs/robustness --plots docs/images

`COMMANDS` fill the folder, those of small models, of the model in the package, or both; the Markdown is printed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from raylift.datasets.augmentation.perturbation import KINDS, PERTURBATIONS, UNPERTURBED, Perturbation
from raylift.platform.evaluation.robustness import label_of

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

PANELS = 3
COMMANDS = (
    "python benchmarks/robustness_training.py unrolled:none unrolled:full x2ct-gan:full x2ct-gan:none --workers 2 "
    "--output runs/robustness",
    "cd runs/robustness",
    "raylift phantom --archive held-out-32 --count 16 --seed 10000000 --size 32 --spacing-mm 10",
    "raylift compare unrolled-none unrolled-full x2ct-gan-none x2ct-gan-full --archive held-out-32 --split all "
    "--protocols volume --robustness --output small",
)
"""All with OMP_NUM_THREADS=1."""
IN_PACKAGE = (
    "raylift phantom --archive held-out-64 --count 16 --seed 10000000 --size 64 --spacing-mm 5",
    "raylift evaluate models:chest-64 --archive held-out-64 --split all --protocols volume --robustness --output "
    "shipped",
)
"""Commands for the model in the package."""
STYLES = {
    "unrolled-none": ("unrolled, without augmentation", "tab:blue", "--"),
    "unrolled-full": ("unrolled, with augmentation", "tab:blue", "-"),
    "x2ct-gan-none": ("X2CT-GAN, without augmentation", "tab:orange", "--"),
    "x2ct-gan-full": ("X2CT-GAN, with augmentation", "tab:orange", "-"),
}
"""Label, color and line of each small model."""


class Report:
    """The robustness rows of a comparison's folder."""

    def __init__(self, folder: Path) -> None:
        found = json.loads((folder / "metrics.json").read_text())
        self.rows: dict[str, Any] = found["robustness"]["by_perturbation"]
        self.mean_volume = found["mean"]["mean volume"]["volume"]["psnr_db"]
        self.stored = {name: by["volume"]["psnr_db"] for name, by in found["mean"].items()}
        self.scans = len(found["cases"])
        self.provenance = found["provenance"]

    def value(
        self, label: str, method: str, key: str = "mean", of: str = "volume", name: str = "psnr_db"
    ) -> float | None:
        """A metric's mean or difference to unperturbed radiographs; None where the row is not possible."""
        row = self.rows.get(label, {}).get(key, {}).get(method)
        return row and row[of][name]


def text(report: Report, label: str, method: str) -> str:
    """PSNR and its difference, and the lung Dice."""
    psnr, change = (report.value(label, method, key) for key in ("mean", "difference"))
    if psnr is None or change is None:
        return "not possible"
    dice = report.value(label, method, of="segmentation", name="lung_dice")
    return f"{psnr:.2f} ({change:+.2f}), {dice:.3f}" if label != label_of(UNPERTURBED) else f"{psnr:.2f}, {dice:.3f}"


def rows_of(report: Report, methods: list[str]) -> list[list[str]]:
    """A row for each perturbation."""
    labels = [label_of(perturbation) for perturbation in (UNPERTURBED, *PERTURBATIONS)]
    return [[label, *(text(report, label, method) for method in methods)] for label in labels]


def summary(report: Report, system: str) -> list[list[str]]:
    """For each kind of perturbation, the largest loss without and with augmentation, and the means there."""
    result = []
    for kind in KINDS:
        labels = [perturbation.label for perturbation in PERTURBATIONS if perturbation.kind == kind]
        columns = []
        for method in (f"{system}-none", f"{system}-full"):
            losses = [
                (value, label) for label in labels if (value := report.value(label, method, "difference")) is not None
            ]
            if losses:
                loss, label = min(losses)
                columns += [f"{loss:+.2f} ({label})", f"{report.value(label, method):.2f}"]
            else:
                columns += ["not possible", ""]
        result.append([KINDS[kind].title, *columns])
    return result


def plot_losses(report: Report, path: Path) -> None:
    """PSNR minus that of unperturbed radiographs, by strength."""
    kinds = list(KINDS)
    figure = Figure(figsize=(9.6, 7.6), layout="constrained", dpi=110)
    grid = figure.subplots(-(-len(kinds) // PANELS), PANELS, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=True):
        strengths = KINDS[kind].strengths
        for method, (label, color, line) in STYLES.items():
            changes = [
                0.0
                if strength == KINDS[kind].neutral
                else report.value(Perturbation(kind, strength).label, method, "difference")
                for strength in strengths
            ]
            points = [(k, change) for k, change in enumerate(changes) if change is not None]
            axes.plot(*zip(*points, strict=True), line, color=color, marker="o", markersize=3, label=label)
        axes.set_xticks(range(len(strengths)), [KINDS[kind].tick(strength) for strength in strengths])
        axes.set_xlabel(KINDS[kind].title)
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("change of PSNR, dB")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def print_small(small: Report, folder: Path) -> None:
    """Training and tables of the small models."""
    training = {
        method: json.loads((folder / method / "model.json").read_text())["model"]["provenance"] for method in STYLES
    }
    first = next(iter(training.values()))
    settings = first["config"]["train"]
    print(
        f"* data: {len(first['training_samples']):,} phantoms at 32^3 and 10 mm (seeds from 0), batch "
        f"{settings['batch_size']}, seed {settings['seed']}, the same phantoms in the same order for every model; EMA "
        "weights; tiny X2CT-GAN and slim `unrolled`, each trained once, and none is the model of the package",
        end="\n\n",
    )
    table(
        "Training",
        ["model", "steps", "CPU seconds", "PSNR of 8 validation phantoms, dB", "stored radiographs of the test, dB"],
        [
            [
                STYLES[method][0],
                str(known["step"]),
                str(known["cpu_s"]),
                f"{known['last']['val_psnr_db']:.2f}",
                f"{small.stored[method]:.2f}",
            ]
            for method, known in training.items()
        ],
    )
    for system in ("unrolled", "x2ct-gan"):
        table(
            f"{system}: largest loss of PSNR, dB, by kind of perturbation",
            ["kind", "without augmentation", "PSNR there", "with augmentation", "PSNR there"],
            summary(small, system),
        )
    table(
        f"{small.scans} held-out phantoms, 32^3 at 10 mm: PSNR in dB (difference), lung Dice; the mean volume has "
        f"{small.mean_volume:.2f} dB",
        ["radiographs", *(label for label, _, _ in STYLES.values()), "back-projection"],
        rows_of(small, [*STYLES, "back-projection"]),
    )


def print_shipped(report: Report) -> None:
    """The table of the model in the package."""
    print(
        "* no model of its size was trained without augmentation: with and without is compared for small models only",
        end="\n\n",
    )
    table(
        f"`models:chest-64` on {report.scans} held-out phantoms, 64^3 at 5 mm: PSNR in dB (difference), lung Dice; "
        f"the mean volume has {report.mean_volume:.2f} dB",
        ["radiographs", "models:chest-64", "back-projection"],
        rows_of(report, ["model", "back-projection"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plots", type=Path, required=True, help="folder of the figures")
    options = parser.parse_args()
    parts = {"small": (COMMANDS, "robustness.png"), "shipped": (IN_PACKAGE, "robustness-chest-64.png")}
    present = {name: part for name, part in parts.items() if (options.folder / name).exists()}
    header("robustness")
    print("\n".join(f"* `{command}`" for commands, _ in present.values() for command in commands), end="\n\n")
    for name, (_, figure) in present.items():
        shutil.copy(options.folder / name / "figures/robustness.png", options.plots / figure)
    if "small" in present:
        print_small(Report(options.folder / "small"), options.folder)
        plot_losses(Report(options.folder / "small"), options.plots / "robustness-augmentation.png")
    if "shipped" in present:
        print_shipped(Report(options.folder / "shipped"))


if __name__ == "__main__":
    main()
