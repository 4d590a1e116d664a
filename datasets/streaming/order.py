"""The order of samples in training as a pure function, so that every worker can compute any position.

A run is an endless sequence of positions. Position p is in epoch p // count, and each epoch is a permutation of all
samples that depends on (seed, epoch) only. Global batch k has the positions k*B to (k+1)*B - 1 for any number of
workers, which partition it. A batch may span two epochs, so no sample is lost or repeated between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from raylift.datasets.errors import ConfigError


@dataclass(frozen=True)
class SampleOrder:
    """The order of `count` samples in every epoch."""

    count: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError("no samples: the split is empty")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative")

    def epoch(self, position: int) -> int:
        """The epoch of a global position."""
        return position // self.count

    def at(self, position: int) -> int:
        """The sample index at a global position."""
        epoch, offset = divmod(position, self.count)
        return int(_permutation(self.count, self.seed, epoch)[offset])


@dataclass(frozen=True)
class BatchPartition:
    """The part of every global batch that one of `world_size` workers gets, in `accumulation` micro-batches."""

    rank: int
    world_size: int
    global_batch: int
    accumulation: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is outside 0 to {self.world_size - 1}")
        if min(self.global_batch, self.accumulation) < 1:
            raise ConfigError(
                f"a global batch of {self.global_batch} in {self.accumulation} micro-batches: both must be 1 or more"
            )
        if self.global_batch % (self.world_size * self.accumulation):
            raise ConfigError(
                f"a global batch of {self.global_batch} cannot be divided among {self.world_size} workers in "
                f"{self.accumulation} micro-batches each: choose a multiple of {self.world_size * self.accumulation}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples in one micro-batch of one worker."""
        return self.global_batch // (self.world_size * self.accumulation)

    def positions(self, start: int) -> list[list[int]]:
        """Positions of this worker's micro-batches in the global batch that begins at position `start`."""
        stride = self.world_size * self.micro_batch
        first = start + self.rank * self.micro_batch
        return [
            list(range(first + micro * stride, first + micro * stride + self.micro_batch))
            for micro in range(self.accumulation)
        ]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    # NumPy guarantees the raw stream of a bit generator across versions, but not the methods of Generator.
    return np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count), kind="stable")
