"""Volumes and radiographs that the training benchmarks share: packed CT, phantoms, augmentation, pairs on the disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from raylift.datasets.augmentation.acquisition import RadiographAugmentation
from raylift.datasets.augmentation.augmentation import Augmentation, GeometryJitter, Parameters
from raylift.datasets.augmentation.deformation import VolumeAugmentation
from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window, hu_to_attenuation, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project_views

HELD_OUT_SEED = 10_000_000
"""Phantoms from this seed on are never trained on."""
WINDOW = Window()


@dataclass(frozen=True)
class Pairs:
    """Volumes in HU, their labels, and their digitally reconstructed radiographs (DRRs) without augmentation.

    Attributes:
        names: of the subjects, one per volume.
        hu: int16, (n, d, h, w).
        labels: uint8 values of `segmentation.Label`, (n, d, h, w).
        views: normalized DRRs, float32, (n, views, rows, columns).
    """

    names: np.ndarray
    hu: np.ndarray
    labels: np.ndarray
    views: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], hu: np.ndarray, labels: np.ndarray, grid: Grid, geometry: Geometry) -> Pairs:
        """Project volumes."""
        views = clean_views(torch.from_numpy(hu.astype(np.float32))[:, None], grid, geometry).numpy()
        return cls(np.array(names), hu, labels, views)

    @classmethod
    def load(cls, *files: Path) -> Pairs:
        """Read files that `save` wrote, one after the other."""
        read = [np.load(file) for file in files]
        return cls(*(np.concatenate([part[key] for part in read]) for key in ("names", "hu", "labels", "views")))

    def save(self, file: Path) -> None:
        """Write a file, which is complete or absent."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}")
        np.savez_compressed(part, **vars(self))
        part.rename(file)

    def of_subjects(self, names: Sequence[str]) -> Pairs:
        """The pairs of these subjects."""
        return Pairs(*(values[np.isin(self.names, names)] for values in vars(self).values()))

    def batch(self, indices: Sequence[int]) -> Batch:
        """A batch in the window's [0, 1], with labels."""
        hu, labels, views = (values[list(indices)] for values in (self.hu, self.labels, self.views))
        volume = WINDOW.to_unit(torch.from_numpy(hu.astype(np.float32))[:, None])
        return Batch(volume, torch.from_numpy(views), labels=torch.from_numpy(labels)[:, None])

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches without end: every pair once, in random order, before any comes again."""
        rng = np.random.default_rng([seed, 1])
        order: list[int] = []
        while True:
            while len(order) < size:
                order += rng.permutation(len(self.names)).tolist()
            yield self.batch(order[:size])
            del order[:size]


class ParameterStream(IterableDataset[list[Parameters]]):
    """Parameters of one batch after the other, sampled in worker processes."""

    def __init__(self, augmentation: Augmentation, geometry: Geometry, seed: int, batch: int) -> None:
        self.augmentation, self.geometry, self.seed, self.batch = augmentation, geometry, seed, batch

    def __iter__(self) -> Iterator[list[Parameters]]:
        """Without end; one worker after the other."""
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        index = worker
        while True:
            first = index * self.batch
            yield [self.augmentation.sample(self.seed, 0, first + k, self.geometry) for k in range(self.batch)]
            index += workers


def augmentations() -> dict[str, Augmentation]:
    """By name: everything, or deformation alone."""
    plain = Augmentation(geometry=GeometryJitter(probability=0), radiograph=RadiographAugmentation(probability=0))
    none = replace(plain, volume=VolumeAugmentation(probability=0))
    return {"full": Augmentation(), "volume": plain, "none": none}


def clean_views(hu: Tensor, grid: Grid, geometry: Geometry) -> Tensor:
    """Normalized DRRs of volumes in HU, as an archive holds them."""
    images = project_views(hu_to_attenuation(hu), grid.spacing_mm, geometry)
    standard = np.stack([[normalize(image) for image in views] for views in images.cpu().numpy()])
    return torch.from_numpy(standard).to(hu.device)


def pack(folders: list[Path], file: Path, grid: Grid, source: Grid) -> None:
    """Resample scans as ingest does and write them to one file.

    `source:NAME` and `ground_truth:NAME` are as in the scan; `extended-source:NAME` and
    `extended-ground_truth:NAME` have tissue where the field of view truncates the body.
    """
    from raylift.datasets.scans import reader
    from raylift.datasets.scans.resample import resample

    arrays = {}
    for found in reader.find(folders).sources:
        name = Path(str(found.where)).name.split(".")[0]
        scan = reader.read(found)
        for kind, field_of_view in (("", "keep"), ("extended-", "extend")):
            arrays[f"{kind}source:{name}"] = resample(scan, source, beyond_field_of_view=field_of_view)[0]
            arrays[f"{kind}ground_truth:{name}"] = resample(scan, grid, beyond_field_of_view=field_of_view)[0]
        print(name, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)


def phantom(grid: Grid, seed: int) -> np.ndarray:
    """The HU of a phantom."""
    return thorax(seed, grid)[0]


def phantoms(grid: Grid, seeds: Sequence[int], workers: int) -> np.ndarray:
    """Phantoms made in processes."""
    with multiprocessing.get_context("spawn").Pool(max(1, workers)) as pool:
        return np.stack(pool.map(partial(phantom, grid), seeds, chunksize=4))


def make_phantoms(folder: Path, grid: Grid, workers: int) -> None:
    """Write phantoms to a folder until the process is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for seed, hu in enumerate(pool.imap(partial(phantom, grid), range(100_000), chunksize=2)):
            temporary = folder / f"{seed:06d}.tmp"
            with temporary.open("wb") as file:
                np.save(file, hu)
            temporary.rename(folder / f"{seed:06d}.npy")
