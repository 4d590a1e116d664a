"""Figures of volumes, metrics and training, plotted with matplotlib and saved as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylift.datasets.augmentation.perturbation import KINDS, UNPERTURBED, Perturbation
from raylift.platform.evaluation.results import CT, DISPLAY_HU, MODEL, Images
from raylift.platform.evaluation.robustness import label_of
from raylift.platform.evaluation.robustness_table import RobustnessTable
from raylift.platform.evaluation.tables import MetricTable, title_of
from raylift.platform.monitor import PROTOCOL_OF, monitored

ERROR_HU = 600.0
"""Errors of planes are shown from minus to plus this value."""
PANELS = 3
"""Panels in a row of box plots."""
COLUMN_CHARACTERS = 18
"""Characters in a line of a title above a plane."""

mpl.rcParams.update({"font.size": 9, "figure.dpi": 110, "savefig.bbox": "tight"})


def plot_slices(title: str, images: Images, path: Path) -> None:
    """Central axial, coronal and sagittal slices of CT and predictors, with errors below them on one scale.

    Without CT, ground truth and errors are left out.
    """
    slices, ct = images.slices, images.slices.get(CT)
    rows = 2 if ct else 1
    figure = Figure(figsize=(1.6 * len(slices) + 0.8 * (rows - 1), 4.8 * rows + 0.7), layout="constrained")
    grid = figure.subplots(3 * rows, len(slices), squeeze=False)
    for column, (name, planes) in enumerate(slices.items()):
        _set_title(grid[0, column], name)
        for row, plane in enumerate(planes):
            _show(grid[rows * row, column], plane, *DISPLAY_HU)
            if ct:
                axes = grid[2 * row + 1, column]
                _hide_axes(axes)
                if name != CT:
                    limits = {"vmin": -ERROR_HU, "vmax": ERROR_HU}
                    errors = axes.imshow(plane - ct[row], cmap="RdBu_r", interpolation="nearest", **limits)
    if ct:
        figure.colorbar(errors, ax=list(grid[:, -1]), label="error, HU", shrink=0.3, extend="both")
    for row, name in enumerate(("axial", "coronal", "sagittal")):
        grid[rows * row, 0].set_ylabel(name)
    figure.suptitle(f"{title}   (gray: {DISPLAY_HU[0]:g} to {DISPLAY_HU[1]:g} HU)")
    figure.savefig(path)


def plot_reprojections(images: Images, path: Path) -> None:
    """Each input radiograph next to the reprojection (DRR) of every model's volume in the same view."""
    columns = {"input": images.radiographs} | {
        "reprojection" if name == MODEL else f"reprojection, {name}": drrs
        for name, drrs in images.reprojections.items()
    }
    figure = Figure(figsize=(2.3 * len(columns), 2.5 * len(images.views)), layout="constrained")
    axes = figure.subplots(len(images.views), len(columns), squeeze=False)
    for row, view in enumerate(images.views):
        for column, (title, shown) in enumerate(columns.items()):
            _show(axes[row, column], shown[row], 0.0, 1.0)
            _set_title(axes[0, column], title)
        axes[row, 0].set_ylabel(view)
    figure.savefig(path)


def plot_boxes(table: MetricTable, protocol: str, path: Path) -> None:
    """Quartiles of every metric of a protocol by predictor, and each scan as a point; infinite metrics are left out."""
    names, predictors = table.names(protocol), table.predictors
    rows = -(-len(names) // PANELS)
    figure = Figure(figsize=(9.6, rows * (0.9 + 0.32 * len(predictors))), layout="constrained")
    grid = figure.subplots(rows, PANELS, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        values = [table.values(predictor, protocol, name) for predictor in predictors]
        values = [each[np.isfinite(each)] for each in values]
        axes.boxplot(values, orientation="horizontal", manage_ticks=False, showfliers=False, widths=0.6)
        for row, each in enumerate(values, start=1):
            axes.plot(each, np.full(len(each), row), "o", color="tab:blue", markersize=3, alpha=0.5)
        axes.set_xlabel(title_of(name))
        axes.locator_params(axis="x", nbins=5)
        _open(axes)
    labels = [textwrap.fill(predictor, 28, break_long_words=False) for predictor in predictors]
    grid[0, 0].set_yticks(range(1, len(labels) + 1), labels)
    grid[0, 0].set_ylim(len(labels) + 0.6, 0.4)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    figure.savefig(path)


def plot_volume_agreement(table: MetricTable, predictors: Sequence[str], path: Path) -> None:
    """Bland-Altman plots of the lung volume: errors over the mean of prediction and ground truth, by predictor.

    Lines are the mean error and, from two scans on, its limits of agreement (1.96 standard deviations); titles have
    their values.
    """
    rows = -(-len(predictors) // 2)
    figure = Figure(figsize=(9.6, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, sharey=True, squeeze=False)
    for axes, predictor in zip(grid.flat, predictors, strict=False):
        volumes, errors = (table.values(predictor, "segmentation", f"lung_volume{part}_ml") for part in ("", "_error"))
        axes.plot(volumes - errors / 2, errors, "o", color="tab:blue", markersize=4, alpha=0.7)
        axes.axhline(0, color="black", linewidth=0.8)
        mean = errors.mean()
        axes.axhline(mean, color="tab:red", linewidth=1)
        values = f"mean {mean:+.0f} ml"
        if len(errors) > 1:
            limits = mean + 1.96 * errors.std(ddof=1) * np.array([-1.0, 1.0])
            for limit in limits:
                axes.axhline(limit, color="tab:red", linewidth=1, linestyle="--")
            values += f", ±1.96 SD {limits[0]:+.0f} to {limits[1]:+.0f} ml"
        axes.set_title(f"{predictor}\n{values}", fontsize="medium")
        axes.set_xlabel("mean of prediction and ground truth, ml")
        _open(axes)
    figure.supylabel("prediction - ground truth, ml", fontsize="medium")
    for axes in grid.flat[len(predictors) :]:
        axes.remove()
    figure.savefig(path)


def plot_robustness(robustness: RobustnessTable, protocol: str, name: str, path: Path) -> None:
    """Mean of a metric over scans against the strength of each kind of perturbation, a line for each method.

    Perturbations that a method cannot be used under are left out.
    """
    kinds = [
        kind for kind in KINDS if any(Perturbation(kind, s).label in robustness.tables for s in KINDS[kind].strengths)
    ]
    rows = -(-len(kinds) // PANELS)
    figure = Figure(figsize=(9.6, 2.3 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, PANELS, sharey=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        strengths = KINDS[kind].strengths
        labels = [
            label_of(UNPERTURBED if strength == KINDS[kind].neutral else Perturbation(kind, strength))
            for strength in strengths
        ]
        for predictor in robustness.predictors:
            points = [
                (k, robustness.tables[label].mean(predictor, protocol)[name])
                for k, label in enumerate(labels)
                if robustness.has(label, predictor)
            ]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=predictor)
        axes.set_xticks(range(len(labels)), [KINDS[kind].tick(strength) for strength in strengths])
        axes.set_xlabel(KINDS[kind].title)
        axes.margins(x=0.1)
        _open(axes)
    for axes in grid.flat[len(kinds) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(title_of(name))
    handles, names = grid[0, 0].get_legend_handles_labels()
    names = [textwrap.fill(label, 28, break_long_words=False) for label in names]
    figure.legend(handles, names, loc="outside lower center", ncols=PANELS, frameon=False)
    figure.savefig(path)


def plot_history(history: list[dict[str, float]], path: Path) -> None:
    """Losses and validation PSNR over steps."""
    losses = sorted({name for entry in history for name in entry if name.endswith("/loss")})
    figure = Figure(figsize=(8.0, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in losses:
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        left.plot(*zip(*points, strict=True), label=name.removesuffix("/loss"))
    left.set(yscale="log", xlabel="step", ylabel="loss")
    left.legend(frameon=False)
    metric = monitored(name for entry in history for name in entry)
    points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
    if points:
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, color="tab:green")
    right.set(xlabel="step", ylabel=f"validation PSNR, dB\n(protocol {PROTOCOL_OF[metric]})")
    _open(left)
    _open(right)
    figure.savefig(path)


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _set_title(axes: Axes, title: str) -> None:
    axes.set_title(textwrap.fill(title, COLUMN_CHARACTERS, break_long_words=False), fontsize=8)


def _show(axes: Axes, image: np.ndarray, low: float, high: float) -> None:
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    _hide_axes(axes)


def _hide_axes(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
