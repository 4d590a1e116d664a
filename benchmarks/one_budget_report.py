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

from raylift.models.zoo import SYSTEMS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import table_lines
from one_budget import BASELINES, BATCH, FIT_STEPS, NAMES, reconstructed
from one_budget_data import GRID
from training_batches import WINDOW, Pairs

MEASURES = {"MAE, HU": ("mae_hu", 0), "PSNR, dB": ("psnr_db", 2), "SSIM": ("ssim", 3), "lung Dice": ("lung_dice", 3)}
STAGES = {"predicted": "network alone", "fitted": f"after {FIT_STEPS} steps of the consistency fit"}
WANTED = {"psnr_db": 1.5, "ssim": 0.05, "lung_dice": 0.93}
"""By how much the last system should be ahead of the first, and the Dice it should reach."""
LUNG_AND_TISSUE_HU = (-1000, 450)
TISSUES = {
    "air": (-1024, -950),
    "lung": (-950, -500),
    "between lung and soft tissue": (-500, -200),
    "soft tissue": (-200, 150),
    "bone": (150, 1477),
}
"""HU of the ground truth, from and below."""

Metrics = dict[str, dict[str, dict[str, float]]]
"""Metrics of one predictor by subject, by stage, by measure."""


def results(folder: Path, key: str = "test") -> tuple[dict[str, Metrics], dict[str, Metrics]]:
    """The metrics of every predictor on phantoms and, over all folds, on CT."""
    sets: tuple[dict[str, Metrics], dict[str, Metrics]] = ({}, {})
    for name in finished(folder):
        for data, files in zip(sets, (["phantoms.json"], folds_of(folder)), strict=True):
            for file in files:
                found = json.loads((folder / name / file).read_text()).get(key, {})
                found = found if name == BASELINES else {name: found}
                for predictor, values in found.items():
                    data.setdefault(predictor, {}).update(values)
    return sets


def finished(folder: Path) -> list[str]:
    """Systems with results, and the baselines."""
    return [name for name in (*NAMES, BASELINES) if (folder / name / "phantoms.json").exists()]


def folds_of(folder: Path) -> list[str]:
    """Files of the folds that every system has finished."""
    files = [{file.name for file in (folder / name).glob("fold-*.json")} for name in finished(folder)]
    return sorted(set.intersection(*files))


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
    complete = {name: values for name, values in data.items() if set(values) == set(reference)}
    for stage, words in STAGES.items():
        rows = [
            [title(name), *(cell(values, reference, stage, *measure) for measure in MEASURES.values())]
            for name, values in complete.items()
        ]
        heading = f"{what}, {words}: mean (difference to {title(NAMES[0])}; its 95 % interval)"
        lines += ["", *table_lines(heading, ["method", *MEASURES], rows)]
    return lines


def title(name: str) -> str:
    """The title of a system or a baseline."""
    return SYSTEMS[name].title if name in SYSTEMS else name


def verdict(data: dict[str, Metrics], what: str) -> str:
    """By how much the last system is ahead of the first, and the required difference."""
    first, last = data[NAMES[0]], data[NAMES[-1]]
    words = []
    for stage, where in STAGES.items():

        def mean(values: Metrics, measure: str, stage: str = stage) -> float:
            return fmean(one[stage][measure] for one in values.values())

        psnr, ssim = (mean(last, key) - mean(first, key) for key in ("psnr_db", "ssim"))
        dice = mean(last, "lung_dice")
        reached = psnr >= WANTED["psnr_db"] and ssim >= WANTED["ssim"] and dice >= WANTED["lung_dice"]
        state = "reached" if reached else "not reached"
        words.append(f"{where}, {psnr:+.2f} dB and {ssim:+.3f} SSIM with a lung Dice of {dice:.3f} ({state})")
    return f"* {title(NAMES[-1])} against {title(NAMES[0])} on {what}: {'; '.join(words)}"


def training_rows(folder: Path) -> list[list[str]]:
    """Parameters, steps and times of each system."""
    rows = []
    for name in (name for name in finished(folder) if name != BASELINES):
        one = json.loads((folder / name / "phantoms.json").read_text())
        fine = [json.loads((folder / name / file).read_text()) for file in folds_of(folder)]
        last, settings = one["last"], one["settings"]
        optimizer = f"{settings['lr']:g}, {settings['betas'][0]:g} and {settings['betas'][1]:g}"
        steps = ", ".join(str(fold["last"]["step"]) for fold in fine)
        milliseconds = f"{1000 * last['seconds'] / last['step']:.0f}"
        gain = validation_gain(folder / name / "phantoms.jsonl")
        rows.append(
            [title(name), f"{one['parameters']:,}", optimizer, str(last["step"]), milliseconds, steps, f"{gain:+.2f}"]
        )
    return rows


def validation_gain(log: Path) -> float:
    """PSNR that the last quarter of the time added to the curve, in dB."""
    rows = [row["measured"] for row in map(json.loads, log.read_text().splitlines()) if "measured" in row]
    before = [row for row in rows if row["seconds"] <= 0.76 * rows[-1]["seconds"]][-1]
    return float(rows[-1]["val_psnr_db"] - before["val_psnr_db"])


def tissue_rows(folder: Path, count: int) -> list[list[str]]:
    """Each system's mean error and share of the squared error by tissue, on some of the phantoms."""
    test = Pairs.load(folder / "data/test.npz")
    test = test.of_subjects(test.names[:count].tolist())
    ground_truth = WINDOW.to_hu(WINDOW.to_unit(test.hu.astype(np.float64)))
    rows = []
    for name in (name for name in finished(folder) if name != BASELINES):
        made = reconstructed(folder / name / "phantoms.safetensors", name, test)
        error = np.stack([made[f"{subject} predicted"] for subject in test.names]) - ground_truth
        cells = []
        for low, high in TISSUES.values():
            inside = error[(ground_truth >= low) & (ground_truth < high)]
            cells.append(f"{inside.mean():+.0f}, {100 * np.square(inside).sum() / np.square(error).sum():.0f} %")
        rows.append([title(name), *cells])
    return rows


def plot_curves(folder: Path, file: Path) -> None:
    """Loss and validation PSNR of every system against CPU seconds."""
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for name in (name for name in finished(folder) if name != BASELINES):
        rows = [json.loads(line) for line in (folder / name / "phantoms.jsonl").read_text().splitlines()]
        # A diffusion's error is that of denoising, on a scale twice as wide.
        losses = [(row["seconds"], row.get("voxel_mse", row.get("sample_mse", 0) / 4)) for row in rows if "lr" in row]
        left.semilogy(*zip(*losses, strict=True), label=title(name))
        measured = [row["measured"] for row in rows if "measured" in row]
        right.plot([row["seconds"] for row in measured], [row["val_psnr_db"] for row in measured], marker=".")
    left.set(xlabel="CPU seconds", ylabel="voxel MSE on training phantoms\n(DiffuX2CT: of denoising)")
    right.set(xlabel="CPU seconds", ylabel="PSNR on 8 held-out phantoms, dB")
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
    names = [name for name in finished(folder) if name != BASELINES]
    columns: dict[str, list[np.ndarray | None]] = {"ground truth": [test.hu[index], None]}
    if with_ct:
        scans = Pairs.load(folder / "data/ct.npz")
        columns["ground truth"][1] = scans.hu[scans.names.tolist().index(scan)]
    for name in names:
        made = reconstructed(folder / name / "phantoms.safetensors", name, test.of_subjects([subject]))
        volumes = [np.load(path) for path in sorted((folder / name).glob("fold-*.npz"))]
        of_ct = [one[f"{scan} fitted"] for one in volumes if f"{scan} fitted" in one.files]
        columns[title(name)] = [made[f"{subject} fitted"], of_ct[0] if of_ct else None]
    figure = Figure(figsize=(1.75 * len(columns), 7.4), facecolor="black", dpi=110)
    axes = figure.subplots(4, len(columns))
    low, high = LUNG_AND_TISSUE_HU
    d, h = GRID.size // 2, GRID.size // 2 - 1
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
    figure.subplots_adjust(left=0.025, right=0.995, bottom=0.01, top=0.96, wspace=0.03, hspace=0.03)
    figure.savefig(file, facecolor="black")


def report(folder: Path, plots: Path, output: Path) -> str:
    """The dated result as Markdown."""
    systems = [name for name in finished(folder) if name != BASELINES]
    first: dict[str, Any] = json.loads((folder / systems[0] / "phantoms.json").read_text())
    fold = json.loads((folder / systems[0] / "fold-0.json").read_text()) if folds_of(folder) else None
    phantoms, ct = results(folder)
    settings = first["settings"]
    lines = [f"## one_budget, {datetime.now(UTC):%Y-%m-%d}\n", *first["conditions"][:2]]
    command = f"python benchmarks/one_budget.py --output runs/one_budget --seconds {settings['seconds']:g}"
    if fold:
        command += f" --fold-seconds {fold['settings']['seconds']:g} --folds {len(folds_of(folder))}"
    lines += [
        f"* commands: `python benchmarks/one_budget.py --prepare --ct ct ct_more --phantoms {first['pairs']} --output "
        f"runs/one_budget`, `{command}`, `python benchmarks/one_budget_report.py runs/one_budget --output {output} "
        f"--plots {plots}`",
    ]
    lines += [
        f"* data: {GRID.size}^3 at {GRID.spacing_mm:g} mm, chest geometry, frontal and lateral DRRs, not augmented; "
        f"{first['pairs']:,} phantoms (seeds from 0) to train on, {len(phantoms[systems[0]])} others for the table",
        f"* budget: {settings['seconds']:g} CPU seconds of one thread on phantoms, batch {BATCH}, the same pairs in "
        f"the same order for every system, seed {settings['seed']}; measurements do not count; EMA weights",
    ]
    if fold:
        lines.append(
            f"* folds: {len(folds_of(folder))}, {len(ct[systems[0]])} CT of as many subjects of LIDC-IDRI, QIN LUNG CT "
            "and Lung-PET-CT-Dx (CC BY), each measured by a model that was not trained on it: "
            f"{fold['settings']['seconds']:g} more CPU seconds from the phantom weights, at half the learning rate, on "
            f"{fold['pairs']} deformations of {len(fold['subjects'])} CT in the first fold"
        )
    lines += [
        "* intervals: BCa bootstrap of the paired differences over subjects, 9,999 resamples; each system is trained "
        "once, so they do not contain the spread over seeds",
        "* the learning rate falls to zero at the end, so a curve that is flat there does not show convergence",
        verdict(phantoms, "held-out phantoms"),
        *([verdict(ct, "CT, three-fold cross-validation")] if fold else []),
        "",
    ]
    columns = ["system", "parameters", "lr, betas", "steps", "CPU ms/step", "steps of each fold"]
    columns.append("PSNR gain in the last quarter of training, dB")
    lines += table_lines("Training", columns, training_rows(folder))
    lines += tables(phantoms, f"{len(phantoms[systems[0]])} held-out phantoms")
    if fold:
        lines += tables(ct, f"{len(ct[systems[0]])} CT scans, three-fold cross-validation")
        _, before = results(folder, "phantom weights")
        complete = {name: one for name, one in before.items() if set(one) == set(before[systems[0]])}
        lines += tables(complete, f"{len(ct[systems[0]])} CT scans with the phantom weights, without fine-tuning")
    count = 12
    heading = f"Mean error in HU and share of the squared error by tissue, {count} of the phantoms, network alone"
    lines += ["", *table_lines(heading, ["system", *TISSUES], tissue_rows(folder, count))]
    at = Path(os.path.relpath(plots, output)).as_posix()
    lines += ["", f"![Loss and validation]({at}/one-budget-curves.png)", "", f"![Slices]({at}/one-budget-slices.png)"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder of the dated result")
    parser.add_argument("--plots", type=Path, required=True, help="folder of the plots, from the repository's root")
    parser.add_argument("--phantom", type=int, default=0, help="index of the phantom in the picture")
    parser.add_argument("--scan", default="lidc_idri_0007_2mm", help="whose reconstructions are in the picture")
    parser.add_argument("--with-ct", action="store_true", help="the CT too, in a picture that is not published")
    options = parser.parse_args()
    plot_curves(options.folder, options.plots / "one-budget-curves.png")
    plot_slices(options.folder, options.plots / "one-budget-slices.png", options.phantom, options.scan, options.with_ct)
    file = options.output / f"{datetime.now(UTC):%Y-%m-%d}-one_budget.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(report(options.folder, options.plots, options.output), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
