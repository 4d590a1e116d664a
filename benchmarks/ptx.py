"""PTX-Seg on phantoms with and without pneumothorax, and on CT without a known one.

    python benchmarks/ptx.py [--with 200] [--without 100] [--coarse 20] [--ct FOLDER...] [--output FILE]

True volumes are voxels of the phantom's labels; occupancy is a percentage of the pleural cavity of that side. Phantoms
with pneumothorax are seeds from 0 with the collapse of `Pneumothorax.sample`, those without are the seeds after them.
Coarser voxels are those of phantoms with pneumothorax from seed 2000 and of the CT, smoothed and resampled.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from raylift.datasets import ptx_seg
from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.pneumothorax import Pneumothorax
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.ptx_seg import SIDES, Region
from raylift.datasets.scans import reader, resample
from raylift.datasets.segmentation import Label
from raylift.platform.evaluation.agreement import agreement
from raylift.platform.evaluation.ptx import segment_scan

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import conditions, table_lines

GRID = Grid(128, 2.5)
VOXEL_ML = GRID.spacing_mm**3 / 1000
LARGEST_FALSE_ML = 10.0
PACKAGES = ("numpy", "scipy", "scikit-image", "SimpleITK")
COARSE_MM = (2.5, 3.0, 4.0, 5.0)
SLICES_MM = (4.0, 5.0, 6.0)
FIRST_COARSE_SEED = 2000
CLASSES = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)
"""Bounds of classes of true occupancy, in per cent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="affected", type=int, default=200)
    parser.add_argument("--without", type=int, default=100)
    parser.add_argument("--coarse", type=int, default=20, help="phantoms at several spacings")
    parser.add_argument("--ct", type=Path, nargs="*", default=[], help="folders or files")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="no phantom is started after this time")
    options = parser.parse_args()
    lines = [*conditions("ptx", PACKAGES), ""]
    began = time.monotonic()
    seeds = interleaved(options.affected, options.without)
    cases = []
    for seed, affected in seeds:
        if time.monotonic() - began > 60 * options.minutes:
            break
        cases.append(phantom(seed, affected))
        print(seed, cases[-1], flush=True)
    lines += [*phantom_lines(cases), ""]
    lines += [*coarse_lines(options.coarse, options.ct), ""]
    lines += ct_lines(options.ct)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def interleaved(affected: int, without: int) -> list[tuple[int, bool]]:
    """Seeds, each with whether it has a pneumothorax, both kinds spread evenly."""
    places = [((n + 0.5) / affected, n, True) for n in range(affected)]
    places += [((n + 0.5) / without, affected + n, False) for n in range(without)]
    return [(seed, has_pneumothorax) for _, seed, has_pneumothorax in sorted(places)]


def phantom(seed: int, affected: bool) -> tuple[float, float, float, float, float, float]:
    """True and found volume in ml, true and found occupancy in per cent, volume on the other side, seconds.

    Without a pneumothorax the found volume is that of the right side.
    """
    pneumothorax = Pneumothorax.sample(seed) if affected else None
    hu, labels = thorax(seed, GRID, pneumothorax)
    began = time.perf_counter()
    sides = ptx_seg.measure(ptx_seg.segment(hu, GRID.spacing_mm), VOXEL_ML)
    seconds = time.perf_counter() - began
    side = pneumothorax.side if pneumothorax else "right"
    half = labels[:, :, : GRID.size // 2] if side == "right" else labels[:, :, GRID.size // 2 :]
    air = (half == Label.PNEUMOTHORAX).sum()
    cavity = air + np.isin(half, (Label.LUNG, Label.VESSEL)).sum()
    (other,) = (sides[name] for name in SIDES if name != side)
    found = sides[side]
    return (
        float(air * VOXEL_ML), found.pneumothorax_ml, float(100 * air / cavity), found.occupancy_percent,
        other.pneumothorax_ml, seconds,
    )  # fmt: skip


def phantom_lines(cases: list[tuple[float, ...]]) -> list[str]:
    """Agreement over phantoms with pneumothorax, by class of occupancy, and false positives."""
    true_ml, found_ml, true_percent, found_percent, other_ml, seconds = np.array(cases, dtype=np.float64).T
    has = true_ml > 0
    columns = ["", "Pearson", "Spearman", "ICC(2,1)", "mean absolute error", "bias", "95 % limits of agreement"]
    rows = []
    for name, found, true in (
        ("volume, ml", found_ml[has], true_ml[has]), ("occupancy, %", found_percent[has], true_percent[has])
    ):  # fmt: skip
        a = agreement(found, true)
        rows.append([
            name, f"{a.pearson:.4f}", f"{a.spearman:.4f}", f"{a.icc:.4f}", f"{a.mean_absolute_error:.1f}",
            f"{a.bias:+.1f}", f"{a.lower:+.1f} to {a.upper:+.1f}",
        ])  # fmt: skip
    size = f"{GRID.size}^3 voxels of {GRID.spacing_mm} mm"
    lines = table_lines(f"{has.sum()} phantoms with pneumothorax, {size}, on ground-truth volumes", columns, rows)
    rows = []
    for low, high in pairwise(CLASSES):
        at = has & (true_percent > low) & (true_percent <= high)
        errors = np.abs(found_ml - true_ml)[at]
        if at.any():
            rows.append([
                f"{low:g} to {high:g} %", str(at.sum()), f"{errors.mean():.0f}", f"{errors.max():.0f}",
                str((found_ml[at] == 0).sum()),
            ])  # fmt: skip
    columns = ["true occupancy", "phantoms", "mean absolute error, ml", "largest, ml", "not found"]
    lines += ["", *table_lines("By size", columns, rows), ""]
    healthy = np.concatenate([other_ml, found_ml[~has]])
    lines.append(
        f"Healthy sides: both of {(~has).sum()} phantoms without pneumothorax, and the other of the {has.sum()} above. "
        f"More than {LARGEST_FALSE_ML:g} ml were found on {(healthy > LARGEST_FALSE_ML).sum()} sides; the most was "
        f"{healthy.max():.1f} ml. A volume takes {np.median(seconds):.1f} s (median, one thread)."
    )
    return lines


def coarse_lines(count: int, folders: list[Path]) -> list[str]:
    """Volumes of phantoms and false positives of CT at several spacings, cubes and slices."""
    grids = [*((mm,) * 3 for mm in COARSE_MM), *((GRID.spacing_mm, GRID.spacing_mm, mm) for mm in SLICES_MM)]
    found: dict[tuple[float, ...], list[tuple[float, float]]] = {grid: [] for grid in grids}
    false_ml: dict[tuple[float, ...], list[float]] = {grid: [] for grid in grids}
    for seed in range(FIRST_COARSE_SEED, FIRST_COARSE_SEED + count):
        pneumothorax = Pneumothorax.sample(seed)
        assert pneumothorax is not None
        hu, labels = thorax(seed, GRID, pneumothorax)
        true_ml = float((labels == Label.PNEUMOTHORAX).sum() * VOXEL_ML)
        for grid in grids:
            sides = measured(coarser(resample.archive_image(hu, GRID), grid))
            found[grid].append((sides.pop(pneumothorax.side), true_ml))
            false_ml[grid] += sides.values()
        print(seed, true_ml, [cases[-1][0] for cases in found.values()], flush=True)
    for source in reader.find(folders).sources if folders else []:
        image = reader.read(source).image
        for grid in grids:
            false_ml[grid] += measured(coarser(image, grid)).values()
    rows = []
    for grid, cases in found.items():
        values, true = np.array(cases).T
        seen = values > 0
        relative = 100 * (values / true - 1)[seen]
        rows.append([
            " x ".join(f"{mm:g}" for mm in grid), f"{seen.sum()} of {len(seen)}",
            f"{true[~seen].max(initial=0):.0f}",
            f"{relative.mean():+.0f} ({relative.min():+.0f} to {relative.max():+.0f})" if seen.any() else "",
            f"{max(false_ml[grid], default=0):.1f}",
        ])  # fmt: skip
    columns = [
        "voxels, mm", "found", "largest not found, ml", "error of those found, %", "most on a healthy side, ml",
    ]  # fmt: skip
    return table_lines(
        "Coarser voxels of the same volumes; healthy sides are also those of the CT below", columns, rows
    )


def coarser(image: sitk.Image, spacing_mm: tuple[float, ...]) -> sitk.Image:
    """An image of coarser voxels from the same first one, smoothed as an archive is; finer axes are interpolated."""
    smooth = sitk.Cast(image, sitk.sitkFloat32)
    for axis, (mm, wanted) in enumerate(zip(image.GetSpacing(), spacing_mm, strict=True)):
        if wanted > mm * 1.05:
            kernel = sitk.RecursiveGaussianImageFilter()
            kernel.SetDirection(axis)
            kernel.SetSigma((wanted / mm - 1) / 2 * mm)
            smooth = kernel.Execute(smooth)
    size = [int(n * mm / wanted) for n, mm, wanted in zip(image.GetSize(), image.GetSpacing(), spacing_mm, strict=True)]
    return sitk.Resample(
        smooth, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing_mm, image.GetDirection(), -1000.0
    )


def measured(image: sitk.Image, wall_mm: float = ptx_seg.WALL_MM) -> dict[str, float]:
    """Pneumothorax of an image by side, in ml; with the default distance to the wall as `raylift ptx` measures it."""
    hu = sitk.GetArrayFromImage(resample.whole_scan(image, ptx_seg.SPACING_MM)).round().astype(np.int16)
    sides = ptx_seg.measure(ptx_seg.segment(hu, ptx_seg.SPACING_MM, wall_mm), ptx_seg.SPACING_MM**3 / 1000)
    return {side: of_side.pneumothorax_ml for side, of_side in sides.items()}


def ct_lines(folders: list[Path]) -> list[str]:
    """What is found in each CT."""
    rows = []
    for source in reader.find(folders).sources if folders else []:
        regions = segment_scan(reader.read(source))
        sides = regions.sides.values()
        air = [f"{side.pneumothorax_ml:.1f}" for side in sides]
        rows.append([
            source.subject, *air,
            *(f"{side.lung_ml:.0f}" for side in sides), str(air_voxels_below(regions.hu, regions.regions)),
        ])  # fmt: skip
    columns = [
        "scan", "pneumothorax right, ml", "left, ml", "lung right, ml", "left, ml",
        f"lung below {ptx_seg.CORE_HU} HU, ml",
    ]  # fmt: skip
    return table_lines(f"{len(rows)} CT without a known pneumothorax", columns, rows) if rows else []


def air_voxels_below(hu: np.ndarray, regions: np.ndarray) -> int:
    """Volume of gas in the lungs, in ml: emphysema and bronchi."""
    lung = np.isin(regions, (Region.RIGHT_LUNG, Region.LEFT_LUNG))
    return round(float((lung & (hu < ptx_seg.CORE_HU)).sum()) * ptx_seg.SPACING_MM**3 / 1000)


if __name__ == "__main__":
    main()
