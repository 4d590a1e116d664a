"""Trivial baselines: predictors without a network, which a useful model must beat.

`MeanVolume` predicts the mean of the training volumes. `BackProjection` back-projects each radiograph along its rays,
averages the views, and maps the result to intensities by a linear fit to the training volumes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.projector import backproject


class MeanVolume(nn.Module):
    """The mean training volume, whatever the radiographs."""

    def __init__(self, mean: Float[Tensor, "1 1 d h w"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """The same volume n times."""
        return self.get_buffer("mean").expand(len(radiographs), -1, -1, -1, -1)


class BackProjection(nn.Module):
    """The mean back-projection of the views, mapped to intensities by a scale and an offset."""

    def __init__(self, grid: Grid, geometry: Geometry, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.grid, self.geometry = grid, geometry
        self.scale, self.offset = scale, offset

    def forward(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """Volumes in the window's [0, 1]."""
        return (self.backproject(radiographs) * self.scale + self.offset).clip(0.0, 1.0)

    def backproject(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """The mean over views of the back-projected radiographs."""
        volumes = [
            backproject(radiographs[:, k : k + 1], self.grid.shape, self.grid.spacing_mm, self.geometry, view)
            for k, view in enumerate(self.geometry.views)
        ]
        return torch.stack(volumes).mean(dim=0)


@dataclass(frozen=True, eq=False)
class FittedBaselines:
    """Both baselines as fitted to training volumes."""

    mean: Float[Tensor, "1 1 d h w"]
    """The mean training volume in the window's [0, 1]."""
    scale: float
    """Factor from the back-projection to the window's [0, 1]."""
    offset: float
    volumes: int
    """Number of training volumes."""

    def predictors(self, grid: Grid, geometry: Geometry) -> dict[str, nn.Module]:
        """The baselines by name, on the grid and for the views of the fit."""
        projected = BackProjection(grid, geometry, self.scale, self.offset)
        return {"mean volume": MeanVolume(self.mean), "back-projection": projected}


def fit(batches: Iterable[Batch], grid: Grid, geometry: Geometry) -> FittedBaselines:
    """Fit both baselines in one pass over training batches whose views are those of `geometry`, in its order.

    Voxels outside the field of view of CT with a mask are left out; those that every CT lacks are air.
    """
    unscaled = BackProjection(grid, geometry)
    total, inside = torch.zeros(2, 1, 1, *grid.shape, dtype=torch.float64)
    count = 0
    # The five sums of the normal equations of volume = scale * back-projection + offset.
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        mask = batch.inside.double()
        y, x = batch.volume.double() * mask, unscaled.backproject(batch.radiographs).double() * mask
        total += y.sum(dim=0, keepdim=True)
        inside += mask.sum(dim=0, keepdim=True)
        count += len(y)
        sums += torch.stack([x.sum(), y.sum(), (x * x).sum(), (x * y).sum(), mask.sum()])
    x_sum, y_sum, xx, xy, n = sums.tolist()
    scale = (n * xy - x_sum * y_sum) / max(n * xx - x_sum * x_sum, 1e-12)
    return FittedBaselines((total / inside.clamp_min(1)).float(), scale, (y_sum - scale * x_sum) / n, count)


def unfitted(grid: Grid, geometry: Geometry) -> dict[str, nn.Module]:
    """Baselines without training volumes: a uniform volume of 0.5, and back-projection without a fit."""
    return {
        "uniform volume": MeanVolume(torch.full((1, 1, *grid.shape), 0.5)),
        "back-projection": BackProjection(grid, geometry),
    }
