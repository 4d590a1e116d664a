"""Figures of pneumothorax: regions over the CT, and the agreement of two measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from raylift.datasets.ptx_seg import Region
from raylift.platform.evaluation.agreement import agreement
from raylift.platform.evaluation.ptx import Segmented

DISPLAY_HU = (-1050.0, 200.0)
COLORS = {
    Region.RIGHT_LUNG: "tab:blue",
    Region.LEFT_LUNG: "tab:green",
    Region.RIGHT_PNEUMOTHORAX: "tab:red",
    Region.LEFT_PNEUMOTHORAX: "tab:orange",
}
OPACITY = 0.4
SMALLEST_SCALE = 10.0
"""Largest value on an axis, in ml or per cent, where all values are smaller."""
UNITS = {"volume": "ml", "occupancy": "%"}


def plot_regions(title: str, segmented: Segmented, path: Path) -> None:
    """Axial, coronal and sagittal slices with most pneumothorax, or without one with most lung."""
    regions = segmented.regions
    shown = regions >= Region.RIGHT_PNEUMOTHORAX
    if not shown.any():
        shown = regions > 0
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for axis, (axes, name) in enumerate(zip(figure.subplots(1, 3), ("axial", "coronal", "sagittal"), strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        index = int(np.argmax(shown.sum(axis=others)))
        plane, labels = (volume.take(index, axis=axis) for volume in (segmented.hu, regions))
        low, high = DISPLAY_HU
        image = np.repeat(np.clip((plane - low) / (high - low), 0, 1)[..., None], 3, axis=-1)
        for region, color in COLORS.items():
            at = labels == region
            image[at] = (1 - OPACITY) * image[at] + OPACITY * np.array(to_rgb(color))
        axes.imshow(image, interpolation="nearest")
        axes.set(xticks=[], yticks=[], title=name)
    for side, of_side in segmented.sides.items():
        title += f"   {side}: {of_side.pneumothorax_ml:.0f} ml, {of_side.occupancy_percent:.1f} %"
    patches = [Patch(color=color, label=region.name.lower().replace("_", " ")) for region, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def plot_agreement(
    pairs: Mapping[str, tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]], path: Path
) -> None:
    """Measured over ground-truth values with the line of identity, and Bland-Altman plots with limits of agreement."""
    figure = Figure(figsize=(8.0, 3.4 * len(pairs)), layout="constrained")
    for row, (name, (measured, true)) in zip(figure.subplots(len(pairs), 2, squeeze=False), pairs.items(), strict=True):
        agreed, unit = agreement(measured, true), UNITS[name]
        scatter, differences = row
        scatter.plot(true, measured, "o", color="tab:blue", markersize=4, alpha=0.7)
        scatter.axline((0, 0), slope=1, color="black", linewidth=0.8)
        largest = max(measured.max(), true.max(), SMALLEST_SCALE)
        limits = (-0.05 * largest, 1.05 * largest)
        scatter.set(xlim=limits, ylim=limits)
        differences.set_xlim(limits)
        r = f"r = {agreed.pearson:.3f}" if np.isfinite(agreed.pearson) else "r undefined"
        scatter.set(xlabel=f"ground truth {name}, {unit}", ylabel=f"measured {name}, {unit}", title=r)
        differences.plot((measured + true) / 2, measured - true, "o", color="tab:blue", markersize=4, alpha=0.7)
        for value, style in ((agreed.bias, "-"), (agreed.lower, "--"), (agreed.upper, "--")):
            if np.isfinite(value):
                differences.axhline(value, color="tab:red", linewidth=1, linestyle=style)
        differences.set(
            xlabel=f"mean of measured and ground truth {name}, {unit}",
            ylabel=f"measured - ground truth, {unit}",
            title=f"bias {agreed.bias:+.1f} {unit}",
        )
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
    figure.savefig(path)
