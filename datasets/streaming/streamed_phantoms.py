"""Phantoms made while a stream is read, in addition to the samples of an archive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs

FIRST_SEED = 2**32
"""Seeds of phantoms in archives and benchmarks are below, so no stream makes one that is held out."""


@dataclass(frozen=True)
class StreamedPhantoms:
    """New phantoms in every epoch, each a function of (seed, epoch, number)."""

    count: int
    """Phantoms in an epoch."""
    seed: int
    grid: Grid
    geometry: Geometry
    """Geometry and views of their radiographs."""

    def at(self, epoch: int, number: int) -> StreamedPhantom:
        """A phantom of an epoch, numbered from 0; it is made when it is read."""
        state = int(np.random.SeedSequence([self.seed, epoch, number]).generate_state(1)[0])
        return StreamedPhantom(FIRST_SEED + state, self.grid, self.geometry)


@dataclass(frozen=True)
class StreamedPhantom:
    """One phantom, with the arrays that an archive would hold of it."""

    seed: int
    grid: Grid
    geometry: Geometry

    @property
    def id(self) -> str:
        """Its name in batches."""
        return f"phantom-{self.seed}"

    def read(self, name: str) -> np.ndarray:
        """Volumes, radiographs or labels, as `Archive.read_array`."""
        hu, labels = self._thorax
        if name == "radiographs":
            return render_drrs(hu, self.grid, self.geometry)
        return {"volumes": hu, "labels": labels}[name]

    @cached_property
    def _thorax(self) -> tuple[np.ndarray, np.ndarray]:
        return thorax(self.seed, self.grid)
