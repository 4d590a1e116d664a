"""What stands in for CT of other people where a run has none: the anatomy of `raylift.datasets.phantom`, and no noise.

A discriminator of volumes needs volumes that are real. With none at hand a system that has one brings a prior, and
this one is stated: thoraces drawn by a procedure, people who do not exist.
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
"""Beyond the seeds of 32 bits that archives of phantoms are drawn from, so that nobody is drawn in both."""


class DrawnPeople:
    """A number of procedural thoraces, each drawn when it is first asked for."""

    def __init__(self, grid: Grid, window: Window, count: int) -> None:
        self.grid, self.window, self.count = grid, window, count
        self._drawn: dict[int, Tensor] = {}

    def volumes(self, like: Float[Tensor, "n _ rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """As many as radiographs, in the window's [0, 1], chosen by torch's global generator."""
        chosen = torch.randint(self.count, (len(like),), device="cpu").tolist()
        return torch.stack([self._person(number) for number in chosen]).to(like.device)

    def _person(self, number: int) -> Tensor:
        if number not in self._drawn:
            hu, _ = thorax(FIRST_SEED + number, self.grid)
            self._drawn[number] = self.window.to_unit(torch.from_numpy(hu.astype(np.float32)))[None]
        return self._drawn[number]
