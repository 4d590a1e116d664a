"""Add synthetic thorax phantoms to an archive."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import numpy as np

from raylift.datasets.archive.archive import Sample
from raylift.datasets.archive.manifest import Entry
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.pipeline import IngestReport, Progress, open_writer
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
    phantoms = {f"phantom-{seed}-{number:04d}": phantom_seed for number, phantom_seed in enumerate(seeds)}
    writer = open_writer(url, grid, geometry, set(phantoms), split_fractions, None, samples_per_shard)
    outcome = IngestReport()
    with writer:
        for done, (subject, phantom_seed) in enumerate(phantoms.items()):
            progress(done, count, subject)
            pneumothorax = Pneumothorax.sample(phantom_seed, pneumothorax_fraction)
            name = f"{subject}-pneumothorax" if pneumothorax else subject
            # A phantom has no file: the digest is of its name and grid.
            sha256 = hashlib.sha256(f"{name} on {grid}".encode()).hexdigest()
            if writer.contains(sha256):
                outcome.already_present += 1
                continue
            hu, labels = thorax(phantom_seed, grid, pneumothorax)
            entry = Entry(
                id=name,
                subject=subject,
                source=f"phantom seed {phantom_seed}",
                source_sha256=sha256,
                license="CC0-1.0",
                label_method="phantom",
                record={
                    "phantom_seed": phantom_seed,
                    **({"pneumothorax": asdict(pneumothorax)} if pneumothorax else {}),
                },
            )
            writer.add(entry, Sample(hu, render_drrs(hu, grid, geometry), labels))
        progress(count, count, "")
    outcome.added = writer.published
    outcome.already_present += writer.superseded
    return outcome
