"""Validation of the reconstruction network during training, distributed over the workers.

The metrics are those of the `volume` protocol where the archive has CT. Without CT, reprojections of the volumes are
compared with the input radiographs, which does not measure the error in depth.
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
from raylift.models.consistency import reprojection_metrics
from raylift.models.system_config import DEFAULT_WINDOW
from raylift.models.weights import Description
from raylift.platform.config import RunConfig

if TYPE_CHECKING:
    import numpy as np


VOLUME_METRICS = ("val_psnr_db", "val_mae_hu")
REPROJECTION_METRICS = ("val_reprojection_psnr_db", "val_reprojection_residual")


class Validation:
    """Validation on the first samples of the val split, distributed over the ranks."""

    def __init__(
        self, archive: Archive, run: RunConfig, description: Description, rank: int, world: int, device: torch.device
    ) -> None:
        entries = archive.entries("val")[: run.train.validation_samples]
        names = [view.name for view in archive.manifest.geometry.views]
        self._archive, self._device, self._description = archive, device, description
        self._volumes = archive.manifest.contents == "volumes"
        self._views = [names.index(view.name) for view in description.geometry.views]
        # With ZeRO-3 a forward is a collective: every rank takes equally many, and repeated ones are not counted.
        rounds = -(-len(entries) // world)
        mine = [rank + world * k for k in range(rounds)]
        self._mine = [(entries[place % len(entries)], place < len(entries)) for place in mine]

    @torch.no_grad()
    def run(self, network: nn.Module) -> tuple[dict[str, float], Float[np.ndarray, "h w"] | None]:
        """Validate the network.

        Returns:
            Means of the metrics over all ranks, of which the first is monitored, and a coronal slice of this rank's
            first sample: ground truth, if the archive has CT, next to the reconstruction.
        """
        training = network.training
        network.eval()
        names = VOLUME_METRICS if self._volumes else REPROJECTION_METRICS
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._device)
        slices = None
        for entry, counts in self._mine:
            # The window of the protocol makes runs with different windows comparable.
            batch = load_batch(
                self._archive,
                [entry],
                DEFAULT_WINDOW,
                self._views,
                volumes=self._volumes,
                reference_quantiles=self._description.reference_quantiles,
                normalization=self._description.normalization,
            )
            batch = batch.to(self._device)
            prediction = network(batch.radiographs).float().clip(0.0, 1.0)
            if counts:
                values = (
                    self._volume_metrics(prediction, batch)
                    if self._volumes
                    else self._reprojection_metrics(prediction, batch)
                )
                sums += torch.stack([*values, prediction.new_ones(())]).double()
            if slices is None:
                shown = self._in_protocol_window(prediction)
                slices = _coronal(batch.ground_truth, batch.fill_outside(shown))
        network.train(training)
        dist.all_reduce(sums)
        *totals, count = sums.tolist()
        return {name: total / count for name, total in zip(names, totals, strict=True)}, slices

    def _volume_metrics(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        error = self._in_protocol_window(prediction) - batch.volume
        if batch.labels is not None:
            error = error[batch.inside]
        psnr = -10 * error.square().mean().clamp_min(1e-12).log10()
        return psnr, error.abs().mean() * DEFAULT_WINDOW.width_hu

    def _in_protocol_window(self, prediction: Tensor) -> Tensor:
        return DEFAULT_WINDOW.to_unit(self._description.window.to_hu(prediction))

    def _reprojection_metrics(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        model = self._description
        reprojection = reprojection_metrics(prediction, batch.radiographs, model.window, model.grid, model.geometry)
        return reprojection.psnr_db.mean(), reprojection.residual.mean()


def _coronal(ground_truth: Tensor | None, prediction: Tensor) -> Float[np.ndarray, "h w"]:
    middle = prediction.shape[3] // 2
    volumes = [prediction] if ground_truth is None else [ground_truth, prediction]
    slices: Float[np.ndarray, "h w"] = torch.cat([volume[0, 0, :, middle] for volume in volumes], dim=1).cpu().numpy()
    return slices
