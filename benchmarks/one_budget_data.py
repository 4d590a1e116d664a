"""The data of `one_budget.py`, made once: phantoms and CT to train on, pairs to evaluate on, and folds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from training_batches import HELD_OUT_SEED, WINDOW, Pairs, ParameterStream, augmentations

from raylift.datasets import segmentation
from raylift.datasets.augmentation.augmentation import augment
from raylift.datasets.augmentation.deformation import deform_labels
from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid, chest
from raylift.datasets.phantom.thorax import thorax

GRIDS = {64: (Grid(64, 5.0), Grid(96, 4.0)), 32: (Grid(32, 10.0), Grid(48, 8.0))}
"""By voxels per side, the grid of results and the source, twenty percent larger, so that a deformation finds anatomy
outside."""
VALIDATED, TESTED = 8, 32
"""Held-out phantoms of the curves and of the tables."""


def prepare(folder: Path, ct: str, phantoms: int, size: int, workers: int) -> None:
    """Make the data.

    Args:
        folder: a new folder.
        ct: file of packed scans (`gpu_training.py --pack`), or an empty string.
        phantoms: number of phantoms to train on.
        size: voxels per side of the results.
        workers: processes.
    """
    grid, source = GRIDS[size]
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        made = pool.map(partial(thorax, grid=grid), range(HELD_OUT_SEED, HELD_OUT_SEED + VALIDATED + TESTED))
        names = [f"phantom {HELD_OUT_SEED + k}" for k in range(len(made))]
        for name, part in (("validation", slice(VALIDATED)), ("test", slice(VALIDATED, None))):
            hu, labels = (np.stack(values) for values in zip(*made[part], strict=True))
            Pairs.of(names[part], hu, labels, grid, chest(grid)).save(folder / f"{name}.npz")
        if ct:
            packed = np.load(ct)
            scans = sorted(key.removeprefix("source:") for key in packed.files if key.startswith("source:"))
            for name, kind, voxels in (("ct", "ground_truth", grid), ("ct-source", "source", source)):
                hu = np.stack([packed[f"{kind}:{scan}"] for scan in scans])
                labels = np.stack(pool.map(partial(segmentation.labels, spacing_mm=voxels.spacing_mm), hu))
                if name == "ct":
                    Pairs.of(scans, hu, labels, grid, chest(grid)).save(folder / "ct.npz")
                else:
                    np.save(folder / f"{name}-hu.npy", hu)
                    np.save(folder / f"{name}-labels.npy", labels)
        all_hu = np.lib.format.open_memmap(folder / "phantoms-hu.npy", "w+", np.int16, (phantoms, *source.shape))
        all_labels = np.lib.format.open_memmap(folder / "phantoms-labels.npy", "w+", np.uint8, all_hu.shape)
        for k, (hu, labels) in enumerate(pool.imap(partial(thorax, grid=source), range(phantoms), chunksize=4)):
            all_hu[k], all_labels[k] = hu, labels


def load(folder: Path, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """HU and labels of `phantoms` or `ct-source` on the device."""
    hu, labels = (torch.from_numpy(np.load(folder / f"{name}-{kind}.npy")).to(device) for kind in ("hu", "labels"))
    return hu, labels


def batches(
    kinds: Sequence[tuple[Tensor, Tensor]], grid: Grid, geometry: Geometry, batch: int, seed: int, workers: int = 1
) -> Iterator[Batch]:
    """Batches without end, the same for one seed: each sample is a new deformation of a volume of one of the kinds,
    with equal probability, and its DRRs without simulated acquisition.

    Args:
        kinds: HU and labels on the source grid, (n, d, h, w).
        grid: of the results.
        geometry: of the DRRs.
        batch: samples in a batch.
        seed: of the choice of volumes and of their deformations.
        workers: processes that sample the deformations.
    """
    source = next(voxels for results, voxels in GRIDS.values() if results == grid)
    stream = ParameterStream(augmentations()["volume"], geometry, seed, batch)
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None))
    rng = np.random.default_rng([seed, 1])
    while True:
        picked = [(kind, int(rng.integers(len(kinds[kind][0])))) for kind in rng.integers(len(kinds), size=batch)]
        hu, labels = (torch.stack([kinds[kind][part][k] for kind, k in picked])[:, None] for part in (0, 1))
        parameters = next(loader)
        with torch.no_grad():
            volume, images = augment(hu.float(), source.spacing_mm, grid, parameters)
            moved = deform_labels(labels, source.spacing_mm, grid, [one.deformation for one in parameters])
        yield Batch(WINDOW.to_unit(volume), images, labels=moved)


def folds(names: list[str], count: int) -> list[list[str]]:
    """Test subjects of each fold; the collections are spread evenly, because names are sorted by collection."""
    return [sorted(names)[k::count] for k in range(count)]
