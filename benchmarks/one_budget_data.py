"""The data of `one_budget.py`, made once: phantoms, and real CT with their deformations and folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from training_batches import HELD_OUT_SEED, Pairs, deformed, pack

from raylift.datasets import segmentation
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.phantom.thorax import thorax

GRID = Grid(32, 10.0)
SOURCE = Grid(48, 8.0)
"""Twenty percent larger than the result, so that a deformation finds anatomy outside."""
GEOMETRY = chest(GRID)
PHANTOMS_A_FILE = 100
VALIDATION, TEST = range(HELD_OUT_SEED, HELD_OUT_SEED + 16), range(HELD_OUT_SEED + 100, HELD_OUT_SEED + 148)
"""Seeds of held-out phantoms: for the curves, and for the table."""
DEFORMATIONS = 40
"""Number for each CT."""


def prepare(folder: Path, scans: list[Path], phantoms: int) -> None:
    """Make what is not there yet.

    Args:
        folder: of the data.
        scans: folders of CT, each file another subject.
        phantoms: number of phantoms to train on, rounded up to whole files.
    """
    make(folder / "validation.npz", VALIDATION)
    make(folder / "test.npz", TEST)
    if scans:
        if not (folder / "packed.npz").exists():
            pack(scans, folder / "packed.npz", GRID, SOURCE)
        prepare_ct(folder)
    for first in range(0, phantoms, PHANTOMS_A_FILE):
        make(folder / f"phantoms-{first:05d}.npz", range(first, first + PHANTOMS_A_FILE))


def make(file: Path, seeds: range) -> None:
    """A file of phantoms."""
    if file.exists():
        return
    made = [thorax(seed, GRID) for seed in seeds]
    hu, labels = (np.stack(values) for values in zip(*made, strict=True))
    Pairs.of([f"phantom {seed}" for seed in seeds], hu, labels, GRID, GEOMETRY).save(file)
    print(file, flush=True)


def prepare_ct(folder: Path) -> None:
    """Pairs of the packed CT as they are, to measure on, and deformed, to train on."""
    packed = np.load(folder / "packed.npz")
    names = sorted(key.removeprefix("source:") for key in packed.files if key.startswith("source:"))
    if not (folder / "ct.npz").exists():
        hu = np.stack([packed[f"ground_truth:{name}"] for name in names])
        labels = np.stack([segmentation.labels(volume, GRID.spacing_mm) for volume in hu])
        Pairs.of(names, hu, labels, GRID, GEOMETRY).save(folder / "ct.npz")
    if not (folder / "deformed.npz").exists():
        source = np.stack([packed[f"source:{name}"] for name in names])
        owners, hu_list, label_list = zip(*deformed(names, source, SOURCE, GRID, DEFORMATIONS, seed=0), strict=True)
        Pairs.of(owners, np.stack(hu_list), np.stack(label_list), GRID, GEOMETRY).save(folder / "deformed.npz")


def folds(names: list[str], count: int) -> list[list[str]]:
    """Test subjects of each fold; the collections are spread evenly, because names are sorted by collection."""
    return [sorted(names)[k::count] for k in range(count)]
