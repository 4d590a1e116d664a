"""How good the reconstructor is during training, shared among the workers.

By the `volume` protocol where the archive has CT; else by how its volumes project onto the radiographs they were made
of, which says nothing of depth but is all that can be known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.archive.archive import Archive
from raylift.datasets.batch import Batch
from raylift.datasets.streaming.stream import load_batch
from raylift.models.consistency import agreement
from raylift.models.system_config import DEFAULT_WINDOW
from raylift.models.weights import Description
from raylift.platform.config import RunConfig

if TYPE_CHECKING:
    import numpy as np


VOLUME_METRICS = ("val_psnr_db", "val_mae_hu")
REPROJECTION_METRICS = ("val_reprojection_psnr_db", "val_reprojection_residual")


class Validation:
    """The first samples of the val split, dealt out to the ranks."""

    def __init__(
        self, archive: Archive, run: RunConfig, description: Description, rank: int, world: int, device: torch.device
    ) -> None:
        entries = archive.entries("val")[: run.train.validation_samples]
        names = [view.name for view in archive.manifest.geometry.views]
        self._archive, self._device, self._description = archive, device, description
        self._volumes = archive.manifest.contents == "volumes"
        self._views = [names.index(view.name) for view in description.geometry.views]
        # With ZeRO-3 a forward is a collective: every rank takes equally many, some again and without weight.
        turns = -(-len(entries) // world)
        mine = [rank + world * turn for turn in range(turns)]
        self._mine = [(entries[place % len(entries)], place < len(entries)) for place in mine]

    @torch.no_grad()
    def run(self, network: nn.Module) -> tuple[dict[str, float], Float[np.ndarray, "h w"] | None]:
        """Means over all ranks, and a coronal slice of truth, if there is any, and reconstruction of this rank's first.

        The first metric is the one that decides (see `metric`).
        """
        training = network.training
        network.eval()
        of = self._description
        names = VOLUME_METRICS if self._volumes else REPROJECTION_METRICS
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._device)
        picture = None
        for entry, counts in self._mine:
            # Runs with other windows are compared in the protocol's.
            batch = load_batch(
                self._archive,
                [entry],
                DEFAULT_WINDOW,
                self._views,
                volumes=self._volumes,
                reference_quantiles=of.reference_quantiles,
            )
            batch = batch.to(self._device)
            made = network(batch.views).float().clip(0.0, 1.0)
            if counts:
                figures = self._against_truth(made, batch) if self._volumes else self._against_views(made, batch)
                sums += torch.stack([*figures, made.new_ones(())]).double()
            if picture is None:
                picture = _coronal(batch.ground_truth, self._judged(made))
        network.train(training)
        dist.all_reduce(sums)
        *totals, count = sums.tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}, picture

    def _against_truth(self, made: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        error = self._judged(made) - batch.volume
        psnr = -10 * error.square().mean().clamp_min(1e-12).log10()
        return psnr, error.abs().mean() * DEFAULT_WINDOW.width_hu

    def _judged(self, made: Tensor) -> Tensor:
        return DEFAULT_WINDOW.to_unit(self._description.window.to_hu(made))

    def _against_views(self, made: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        of = self._description
        found = agreement(made, batch.views, of.window, of.grid, of.geometry)
        return found.psnr_db.mean(), found.residual.mean()


def _coronal(truth: Tensor | None, made: Tensor) -> Float[np.ndarray, "h w"]:
    middle = made.shape[3] // 2
    shown = [made] if truth is None else [truth, made]
    picture: Float[np.ndarray, "h w"] = torch.cat([volume[0, 0, :, middle] for volume in shown], dim=1).cpu().numpy()
    return picture
