"""Procedural phantoms in place of unpaired CT: the anatomy of `raylift.datasets.phantom`, without noise.

A discriminator of volumes needs real volumes. Where a run has none, this explicit prior replaces them: random thoraces
of patients who do not exist.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import Window
from raylift.datasets.phantom.thorax import thorax

FIRST_SEED = 2**33
"""Beyond the 32-bit seeds of phantom archives, so that no phantom is in both."""


class PhantomPrior:
    """A number of procedural phantoms, each generated at its first use."""

    def __init__(self, grid: Grid, window: Window, count: int) -> None:
        self.grid, self.window, self.count = grid, window, count
        self._cache: dict[int, Tensor] = {}

    def volumes(self, like: Float[Tensor, "n _ rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """One per radiograph, in the window's [0, 1], sampled with torch's global generator."""
        indices = torch.randint(self.count, (len(like),), device="cpu").tolist()
        return torch.stack([self._phantom(index) for index in indices]).to(like.device)

    def _phantom(self, index: int) -> Tensor:
        if index not in self._cache:
            hu, _ = thorax(FIRST_SEED + index, self.grid)
            self._cache[index] = self.window.to_unit(torch.from_numpy(hu.astype(np.float32)))[None]
        return self._cache[index]
