"""Figures of volumes and of training, plotted with matplotlib and saved as PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylift.platform.evaluation.results import CT, MODEL, Images
from raylift.platform.monitor import PROTOCOL_OF, monitored

DISPLAY_HU = (-1000.0, 500.0)
"""Shows lung and soft tissue at once; bone and contrast are white."""
ERROR_HU = 600.0

mpl.rcParams.update({"font.size": 9, "figure.dpi": 110, "savefig.bbox": "tight"})


def plot_slices(title: str, images: Images, path: Path) -> None:
    """Central axial, coronal and sagittal slices of CT and predictors, and the errors of models on one scale.

    Without CT, ground truth and error are left out.
    """
    slices, compared = images.slices, list(images.reprojections) if CT in images.slices else []
    width = len(slices) + len(compared)
    figure = Figure(figsize=(2.1 * width, 6.6), layout="constrained")
    grid = figure.subplots(3, width)
    for column, (name, planes) in enumerate(slices.items()):
        for row, plane in enumerate(planes):
            _show(grid[row, column], plane, *DISPLAY_HU)
        grid[0, column].set_title(name)
    for column, name in enumerate(compared, start=len(slices)):
        for row, (predicted, ct) in enumerate(zip(slices[name], slices[CT], strict=True)):
            axes, error = grid[row, column], predicted - ct
            shown = axes.imshow(error, cmap="RdBu_r", vmin=-ERROR_HU, vmax=ERROR_HU, interpolation="nearest")
            _hide_axes(axes)
        grid[0, column].set_title(f"{name} - CT")
    if compared:
        figure.colorbar(shown, ax=list(grid[:, -1]), label="HU", shrink=0.6)
    for row, name in enumerate(("axial", "coronal", "sagittal")):
        grid[row, 0].set_ylabel(name)
    figure.suptitle(f"{title}   (gray: {DISPLAY_HU[0]:g} to {DISPLAY_HU[1]:g} HU)")
    figure.savefig(path)


def plot_reprojections(images: Images, path: Path) -> None:
    """Each input radiograph beside the reprojection (DRR) of every model's volume in the same view."""
    columns = {"input": images.radiographs} | {
        "reprojection" if name == MODEL else f"reprojection, {name}": drrs
        for name, drrs in images.reprojections.items()
    }
    figure = Figure(figsize=(2.3 * len(columns), 2.5 * len(images.views)), layout="constrained")
    axes = figure.subplots(len(images.views), len(columns), squeeze=False)
    for row, view in enumerate(images.views):
        for column, (title, shown) in enumerate(columns.items()):
            _show(axes[row, column], shown[row], 0.0, 1.0)
            axes[row, column].set_title(f"{view}, {title}")
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
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _show(axes: Axes, image: np.ndarray, low: float, high: float) -> None:
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    _hide_axes(axes)


def _hide_axes(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
