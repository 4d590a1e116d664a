"""Tables and plots of a folder that `one_budget.py` filled; the first system is the reference of the others.

python benchmarks/one_budget_report.py runs/one_budget --output benchmarks/results --plots docs/images
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from raylift.datasets.geometry import Grid
from raylift.models.zoo import SYSTEMS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import table_lines
from one_budget import BASELINES, FIT_STEPS, NAMES, PUBLISHED_SCHEDULE, TISSUES
from training_batches import Pairs

MEASURES = {"MAE, HU": ("mae_hu", 0), "PSNR, dB": ("psnr_db", 2), "SSIM": ("ssim", 3), "lung Dice": ("lung_dice", 3)}
STAGES = {"predicted": "network alone", "fitted": f"after {FIT_STEPS} steps of the data-consistency fit"}
BASELINE_TITLES = {f"{BASELINES}-mean-volume": "mean volume", f"{BASELINES}-back-projection": "back-projection"}
LUNG_AND_TISSUE_HU = (-1000, 450)
Metrics = dict[str, dict[str, dict[str, float]]]
"""Metrics of one predictor by subject, by stage, by measure."""


def results(folder: Path, pattern: str) -> dict[str, Metrics]:
    """The metrics of every method in files of that name; of methods that have all of them."""
    found: dict[str, Metrics] = {}
    counts = {}
    for name in (*NAMES, *sorted(path.name for path in folder.glob(f"{BASELINES}-*"))):
        files = sorted((folder / name).glob(f"{pattern}-metrics.json"))
        counts[name] = len(files)
        for file in files:
            found.setdefault(name, {}).update(json.loads(file.read_text()))
    return {name: values for name, values in found.items() if counts[name] == max(counts.values())}


def finished(folder: Path) -> list[str]:
    """Systems that trained to the end on phantoms."""
    return [name for name in NAMES if (folder / name / "phantoms.json").exists()]


def cell(metrics: Metrics, reference: Metrics, stage: str, measure: str, digits: int) -> str:
    """The mean, and its difference to the reference with a 95 % interval over the same subjects."""
    subjects = sorted(reference)
    values = np.array([metrics[name][stage][measure] for name in subjects])
    mean = f"{values.mean():.{digits}f}"
    if metrics is reference:
        return mean
    difference = values - [reference[name][stage][measure] for name in subjects]
    if np.ptp(difference) == 0:
        return f"{mean} ({difference[0]:+.{digits}f} for every subject)"
    interval = bootstrap((difference,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return f"{mean} ({difference.mean():+.{digits}f}; {interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def tables(data: dict[str, Metrics], what: str) -> list[str]:
    """A table before the fit and one after it."""
    lines = []
    reference = data[NAMES[0]]
    for stage, words in STAGES.items():
        rows = [
            [title(name), *(cell(values, reference, stage, *measure) for measure in MEASURES.values())]
            for name, values in data.items()
        ]
        heading = f"{what}, {words}: mean (difference to {title(NAMES[0])}; its 95 % interval)"
        lines += ["", *table_lines(heading, ["method", *MEASURES], rows)]
    return lines


def title(name: str) -> str:
    """The title of a system or a baseline."""
    if name == PUBLISHED_SCHEDULE:
        return "DiffuX2CT, published schedule and epsilon-prediction"
    return SYSTEMS[name].title if name in SYSTEMS else BASELINE_TITLES.get(name, name)


def verdict(data: dict[str, Metrics], what: str) -> str:
    """By how much the last system is ahead of the first."""
    if NAMES[-1] not in data:
        return f"* {title(NAMES[-1])} on {what}: not finished"
    first, last = data[NAMES[0]], data[NAMES[-1]]
    words = []
    for stage, where in STAGES.items():

        def mean(values: Metrics, measure: str, stage: str = stage) -> float:
            return fmean(one[stage][measure] for one in values.values())

        psnr, ssim = (mean(last, key) - mean(first, key) for key in ("psnr_db", "ssim"))
        words.append(f"{where}, {psnr:+.2f} dB and {ssim:+.3f} SSIM; lung Dice {mean(last, 'lung_dice'):.3f}")
    return f"* {title(NAMES[-1])} against {title(NAMES[0])} on {what}: {'; '.join(words)}"


def training_rows(folder: Path) -> list[list[str]]:
    """Parameters, steps and times of each system."""
    rows = []
    for name in finished(folder):
        stage = json.loads((folder / name / "phantoms.json").read_text())
        folds = [json.loads(file.read_text()) for file in sorted((folder / name).glob("fold-?.json"))]
        last, settings = stage["last"], stage["settings"]
        optimizer = f"{settings['lr']:g}, {settings['betas'][0]:g} and {settings['betas'][1]:g}"
        steps = ", ".join(str(fold["last"]["step"]) for fold in folds)
        milliseconds = f"{1000 * last['seconds'] / last['step']:.0f}"
        gain = validation_gain(folder / name / "phantoms.jsonl")
        rows.append(
            [title(name), f"{stage['parameters']:,}", optimizer, str(last["step"]), milliseconds, steps, f"{gain:+.2f}"]
        )
    return rows


def validation_gain(log: Path) -> float:
    """PSNR that the last quarter of the time added to the curve, in dB."""
    rows = [row["measured"] for row in map(json.loads, log.read_text().splitlines()) if "measured" in row]
    before = [row for row in rows if row["seconds"] <= 0.76 * rows[-1]["seconds"]][-1]
    return float(rows[-1]["val_psnr_db"] - before["val_psnr_db"])


def tissue_rows(data: dict[str, Metrics]) -> list[list[str]]:
    """Each system's mean error and share of the squared error by tissue, network alone."""
    rows = []
    for name in (name for name in data if name in NAMES):
        subjects = [values["predicted"] for values in data[name].values()]
        total = sum(subject[f"{tissue} squares"] for subject in subjects for tissue in TISSUES)
        cells = []
        for tissue in TISSUES:
            error, squares, voxels = (
                sum(subject[f"{tissue} {kind}"] for subject in subjects) for kind in ("sum", "squares", "voxels")
            )
            cells.append(f"{error / voxels:+.0f}, {100 * squares / total:.0f} %")
        rows.append([title(name), *cells])
    return rows


def plot_curves(folder: Path, file: Path) -> None:
    """Loss and validation PSNR of every system against wall time."""
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for name in finished(folder):
        rows = [json.loads(line) for line in (folder / name / "phantoms.jsonl").read_text().splitlines()]
        # A diffusion's error is that of denoising, on a scale twice as wide.
        losses = [(row["seconds"], row.get("voxel_mse", row.get("sample_mse", 0) / 4)) for row in rows if "lr" in row]
        left.semilogy(*zip(*losses, strict=True), label=title(name))
        measured = [row["measured"] for row in rows if "measured" in row]
        right.plot([row["seconds"] for row in measured], [row["val_psnr_db"] for row in measured], marker=".")
    left.set(xlabel="seconds", ylabel="voxel MSE on training phantoms\n(DiffuX2CT: of denoising)")
    right.set(xlabel="seconds", ylabel="PSNR on 8 held-out phantoms, dB")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def plot_slices(folder: Path, file: Path, index: int, scan: str, with_ct: bool) -> None:
    """Mid-slices of one phantom, its reconstructions, and reconstructions of one CT, all after the fit."""
    test = Pairs.load(folder / "data/test.npz")
    subject = test.names[index]
    columns: dict[str, list[np.ndarray | None]] = {"ground truth": [test.hu[index], None]}
    if with_ct:
        scans = Pairs.load(folder / "data/ct.npz")
        columns["ground truth"][1] = scans.hu[scans.names.tolist().index(scan)]
    for name in finished(folder):
        files = [np.load(path) for path in sorted((folder / name).glob("*.npz")) if "weights" not in path.stem]
        volumes = {key: made[key] for made in files for key in (f"{subject} fitted", f"{scan} fitted") if key in made}
        short = title(name).replace(", ", ",\n")
        columns[short] = [volumes.get(f"{subject} fitted"), volumes.get(f"{scan} fitted")]
    figure = Figure(figsize=(1.75 * len(columns), 7.4), facecolor="black", dpi=110)
    axes = figure.subplots(4, len(columns))
    low, high = LUNG_AND_TISSUE_HU
    d, h = len(test.hu[index]) // 2, len(test.hu[index]) // 2 - 1
    for panels, (name, volumes) in zip(axes.T, columns.items(), strict=True):
        planes = [plane for hu in volumes for plane in ((None, None) if hu is None else (hu[d], hu[:, h]))]
        for panel, plane in zip(panels, planes, strict=True):
            panel.axis("off")
            if plane is not None:
                panel.imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        panels[0].set_title(name, color="0.85", fontsize=10)
    for panel, words in zip(
        axes[:, 0], ("phantom, axial", "phantom, coronal", "CT, axial", "CT, coronal"), strict=True
    ):
        panel.text(-0.08, 0.5, words, color="0.85", rotation=90, transform=panel.transAxes, va="center", ha="center")
    figure.subplots_adjust(left=0.025, right=0.995, bottom=0.01, top=0.945, wspace=0.03, hspace=0.03)
    figure.savefig(file, facecolor="black")


def report(folder: Path, plots: Path, output: Path) -> str:
    """The dated result as Markdown."""
    systems = finished(folder)
    first: dict[str, Any] = json.loads((folder / systems[0] / "phantoms.json").read_text())
    fold_files = sorted((folder / systems[0]).glob("fold-?.json"))
    fold = json.loads(fold_files[0].read_text()) if fold_files else None
    phantoms, ct = results(folder, "phantoms"), results(folder, "fold-?")
    settings, grid = first["settings"], Grid(**first["grid"])
    machine, versions, _, card = first["conditions"]
    command = f"python benchmarks/one_budget.py --output runs/one_budget --seconds {settings['seconds']:g}"
    if fold:
        command += f" --fold-seconds {fold['settings']['seconds']:g} --folds {len(fold_files)}"
    lines = [
        f"## one_budget, {datetime.now(UTC):%Y-%m-%d}\n",
        machine,
        card,
        versions,
        "* commands: `python benchmarks/gpu_training.py --pack ct ct_more --ct ct.npz`, "
        f"`python benchmarks/one_budget.py --prepare --ct ct.npz --phantoms {first['volumes'][0]} --output "
        f"runs/one_budget`, `{command}`, `python benchmarks/one_budget_report.py runs/one_budget --output {output} "
        f"--plots {plots}`",
        f"* data: {grid.size}^3 at {grid.spacing_mm:g} mm, chest geometry, frontal and lateral DRRs without simulated "
        f"acquisition; {first['volumes'][0]:,} phantoms (seeds from 0) to train on, deformed anew in every sample; "
        f"{len(phantoms[systems[0]])} others for the tables",
        f"* budget: {settings['seconds']:g} s of wall time on phantoms, batch {settings['batch']}, "
        f"{settings['precision']}, the same samples in the same order for every system, seed {settings['seed']}; "
        f"{len(systems)} networks trained at once (DiffuX2CT twice), each in a process of its own, on one card; "
        "validation does not count; EMA weights, in fp16",
    ]
    if fold:
        lines.append(
            f"* {len(fold_files)}-fold cross-validation: {len(ct[systems[0]])} CT scans of as many subjects of "
            "LIDC-IDRI, QIN LUNG CT and Lung-PET-CT-Dx (CC BY), each measured by a model that was not trained on it: "
            f"{fold['settings']['seconds']:g} more seconds from the phantom weights, at half the learning rate; half "
            f"of the samples are deformations of the other folds' CT ({fold['volumes'][1]} in the first fold)"
        )
    lines += [
        "* intervals: BCa bootstrap of the paired differences over subjects, 9,999 resamples; each system is trained "
        "once, so they do not contain the variation between seeds",
        "* the learning rate falls to zero at the end, so a curve that is flat there does not show convergence",
        verdict(phantoms, "held-out phantoms"),
        *([verdict(ct, f"CT, {len(fold_files)}-fold cross-validation")] if fold else []),
        "",
    ]
    columns = ["system", "parameters", "lr, betas", "steps", "ms/step", "steps of each fold"]
    columns.append("PSNR gain in the last quarter of training, dB")
    lines += table_lines("Training", columns, training_rows(folder))
    lines += tables(phantoms, f"{len(phantoms[systems[0]])} held-out phantoms")
    if fold:
        lines += tables(ct, f"{len(ct[systems[0]])} CT scans, {len(fold_files)}-fold cross-validation")
        before = results(folder, "ct-phantom-weights")
        lines += tables(before, f"{len(ct[systems[0]])} CT scans with the phantom weights, without fine-tuning")
    heading = "Mean error in HU and share of the squared error by tissue, held-out phantoms, network alone"
    lines += ["", *table_lines(heading, ["system", *TISSUES], tissue_rows(phantoms))]
    at = Path(os.path.relpath(plots, output)).as_posix()
    lines += ["", f"![Loss and validation]({at}/one-budget-curves.png)", "", f"![Slices]({at}/one-budget-slices.png)"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--plots", type=Path, required=True, help="folder of the plots, from the repository's root")
    parser.add_argument("--phantom", type=int, default=0, help="index of the phantom in the figure")
    parser.add_argument("--scan", default="lidc_idri_0007_2mm", help="whose reconstructions are in the figure")
    parser.add_argument("--with-ct", action="store_true", help="the CT too, in a figure that is not published")
    options = parser.parse_args()
    plot_curves(options.folder, options.plots / "one-budget-curves.png")
    plot_slices(options.folder, options.plots / "one-budget-slices.png", options.phantom, options.scan, options.with_ct)
    file = options.output / f"{datetime.now(UTC):%Y-%m-%d}-one_budget.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(report(options.folder, options.plots, options.output), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
