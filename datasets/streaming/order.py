"""Which sample stands where in training: a pure function, so that any worker can work out any position.

A run is one endless row of positions. Position p lies in epoch p // count, and each epoch is a permutation of all
samples drawn from (seed, epoch) alone. Global batch k is the positions k*B to (k+1)*B - 1 whatever the number of
workers; they share it out, and a batch may straddle two epochs, so no sample is lost or repeated at their border.
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
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError("no samples to put in order: the split is empty")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} is negative")

    def at(self, position: int) -> int:
        """The sample index at a global position."""
        epoch, offset = divmod(position, self.count)
        return int(_permutation(self.count, self.seed, epoch)[offset]) if self.shuffle else offset


@dataclass(frozen=True)
class BatchPartition:
    """What one of `world` workers takes of every global batch, in `accumulation` micro-batches."""

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
                f"a global batch of {self.global_batch} cannot be shared by {self.world_size} workers in "
                f"{self.accumulation} micro-batches each: choose a multiple of {self.world_size * self.accumulation}"
            )

    @property
    def micro_batch(self) -> int:
        """Samples of one micro-batch of one worker."""
        return self.global_batch // (self.world_size * self.accumulation)

    def positions(self, start: int) -> list[list[int]]:
        """Global positions of this worker's micro-batches in the global batch that begins at `start`."""
        stride = self.world_size * self.micro_batch
        first = start + self.rank * self.micro_batch
        return [
            list(range(first + micro * stride, first + micro * stride + self.micro_batch))
            for micro in range(self.accumulation)
        ]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " count"]:
    # NumPy keeps the raw numbers of a bit generator the same for good, but not what its Generator makes of them.
    return np.argsort(np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count), kind="stable")
