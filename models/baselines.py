"""Predictors that know nothing of networks. A model that does not beat them has learned nothing worth serving.

`MeanVolume` answers every radiograph with the mean of the training volumes. `BackProjection` spreads each radiograph
back along its rays, averages the views, and maps the result to intensities by the straight line that fits the training
volumes best.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.projector import backproject


class MeanVolume(nn.Module):
    """The mean training volume, whatever the radiographs show."""

    def __init__(self, mean: Float[Tensor, "1 1 d h w"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """The same volume n times."""
        return self.get_buffer("mean").expand(len(radiographs), -1, -1, -1, -1)


class BackProjection(nn.Module):
    """The views spread back along their rays and averaged, on a straight line fitted to training volumes."""

    def __init__(self, grid: Grid, geometry: Geometry, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.grid, self.geometry = grid, geometry
        self.scale, self.offset = scale, offset

    def forward(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """Volumes in the window's [0, 1]."""
        return (self.spread(radiographs) * self.scale + self.offset).clip(0.0, 1.0)

    def spread(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """The mean over views of the radiographs spread along their rays."""
        spread = [
            backproject(radiographs[:, k : k + 1], self.grid.shape, self.grid.spacing_mm, self.geometry, view)
            for k, view in enumerate(self.geometry.views)
        ]
        return torch.stack(spread).mean(dim=0)


def fit(batches: Iterable[Batch], grid: Grid, geometry: Geometry) -> dict[str, nn.Module]:
    """Both predictors, fitted in one pass over training batches whose views are those of `geometry`, in its order."""
    back = BackProjection(grid, geometry)
    total, count = torch.zeros(1, 1, *grid.shape, dtype=torch.float64), 0
    # Least squares of volume = scale * spread + offset needs these five sums only.
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        volume, spread = batch.volume.double(), back.spread(batch.views).double()
        total += volume.sum(dim=0, keepdim=True)
        count += len(volume)
        sums += torch.stack(
            [
                spread.sum(),
                volume.sum(),
                (spread * spread).sum(),
                (spread * volume).sum(),
                spread.new_tensor(spread.numel()),
            ]
        )
    x, y, xx, xy, n = sums.tolist()
    scale = (n * xy - x * y) / max(n * xx - x * x, 1e-12)
    fitted = BackProjection(grid, geometry, scale, (y - scale * x) / n)
    return {"mean volume": MeanVolume((total / count).float()), "back-projection": fitted}


def unfitted(grid: Grid, geometry: Geometry) -> dict[str, nn.Module]:
    """Predictors for want of training volumes: the same gray everywhere, and plain back-projection."""
    return {
        "uniform volume": MeanVolume(torch.full((1, 1, *grid.shape), 0.5)),
        "back-projection": BackProjection(grid, geometry),
    }
