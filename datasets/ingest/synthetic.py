"""Add synthetic thorax phantoms to an archive."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

from raylift.datasets.archive.archive import Sample
from raylift.datasets.archive.entry import Entry
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.pipeline import IngestReport, Progress, Workers, map_in_order, open_writer
from raylift.datasets.phantom.pneumothorax import Pneumothorax
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs


def ingest_phantoms(
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    count: int,
    seed: int,
    pneumothorax_fraction: float = 0.0,
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    samples_per_shard: int = 8,
    workers: Workers | None = None,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Add `count` phantoms to the archive at `url`, skipping those already in it; see `ingest_ct`.

    Each phantom is sampled from `seed` and its number from 0, so a larger count extends a smaller one.
    `pneumothorax_fraction` of them have a `Pneumothorax`, which the entry's record states.
    """
    if not 0 <= pneumothorax_fraction <= 1:
        raise ConfigError(f"a fraction of {pneumothorax_fraction} with pneumothorax: give 0 to 1")
    if count < 1 or seed < 0:
        raise ConfigError(f"{count} phantoms from seed {seed}: give 1 or more, and a seed of 0 or more")
    seeds = [int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) for number in range(count)]
    phantoms = [
        _Phantom(f"phantom-{seed}-{number:04d}", phantom_seed, Pneumothorax.sample(phantom_seed, pneumothorax_fraction))
        for number, phantom_seed in enumerate(seeds)
    ]
    subjects = {phantom.subject for phantom in phantoms}
    writer = open_writer(url, grid, geometry, subjects, split_fractions, None, samples_per_shard)
    new = [phantom for phantom in phantoms if not writer.contains(phantom.sha256(grid))]
    outcome = IngestReport(already_present=count - len(new))
    with writer:
        names = iter([*(phantom.subject for phantom in new), ""])
        progress(outcome.already_present, count, next(names))
        for done, sample in enumerate(
            map_in_order(_MakeSample(grid, geometry), new, workers), outcome.already_present + 1
        ):
            writer.add(*sample)
            progress(done, count, next(names))
    outcome.added = writer.published
    outcome.already_present += writer.superseded
    return outcome


@dataclass(frozen=True)
class _Phantom:
    subject: str
    seed: int
    pneumothorax: Pneumothorax | None

    @property
    def name(self) -> str:
        return f"{self.subject}-pneumothorax" if self.pneumothorax else self.subject

    def sha256(self, grid: Grid) -> str:
        """A phantom has no file: the digest is of its name and grid."""
        return hashlib.sha256(f"{self.name} on {grid}".encode()).hexdigest()


@dataclass(frozen=True)
class _MakeSample:
    """Makes and projects a phantom."""

    grid: Grid
    geometry: Geometry

    def __call__(self, phantom: _Phantom) -> tuple[Entry, Sample]:
        hu, labels = thorax(phantom.seed, self.grid, phantom.pneumothorax)
        pneumothorax = {"pneumothorax": asdict(phantom.pneumothorax)} if phantom.pneumothorax else {}
        entry = Entry(
            id=phantom.name,
            subject=phantom.subject,
            source=f"phantom seed {phantom.seed}",
            source_sha256=phantom.sha256(self.grid),
            license="CC0-1.0",
            label_method="phantom",
            record={"phantom_seed": phantom.seed, **pneumothorax},
        )
        return entry, Sample(hu, render_drrs(hu, self.grid, self.geometry), labels)
