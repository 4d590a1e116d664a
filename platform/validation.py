"""How good the reconstructor is during training, by the `volume` protocol, shared among the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.archive import Archive
from raylift.datasets.stream import load
from raylift.models.weights import Description
from raylift.platform.config import RunConfig

if TYPE_CHECKING:
    import numpy as np


class Validation:
    """The first samples of the val split, dealt out to the ranks."""

    def __init__(
        self, archive: Archive, run: RunConfig, description: Description, rank: int, world: int, device: torch.device
    ) -> None:
        entries = archive.entries("val")[: run.train.validation_samples]
        names = [view.name for view in archive.manifest.geometry.views]
        self._archive, self._device, self._window = archive, device, run.data.window
        self._views = [names.index(view.name) for view in description.geometry.views]
        # With ZeRO-3 a forward is a collective: every rank takes equally many, some again and without weight.
        turns = -(-len(entries) // world)
        mine = [rank + world * turn for turn in range(turns)]
        self._mine = [(entries[place % len(entries)], place < len(entries)) for place in mine]

    @torch.no_grad()
    def run(self, network: nn.Module) -> tuple[dict[str, float], Float[np.ndarray, "h w"] | None]:
        """Mean PSNR and MAE over all ranks, and a coronal slice of truth and reconstruction of this rank's first."""
        training = network.training
        network.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        picture = None
        for entry, counts in self._mine:
            batch = load(self._archive, [entry], self._window, self._views).to(self._device)
            made = network(batch.views).float().clip(0.0, 1.0)
            if counts:
                error = made - batch.volume
                psnr = -10 * error.square().mean().clamp_min(1e-12).log10()
                sums += torch.stack([psnr, error.abs().mean() * self._window.width_hu, psnr.new_ones(())]).double()
            if picture is None:
                picture = _coronal(batch.volume, made)
        network.train(training)
        dist.all_reduce(sums)
        psnr_sum, mae_sum, count = sums.tolist()
        return {"val_psnr_db": psnr_sum / count, "val_mae_hu": mae_sum / count}, picture


def _coronal(truth: Tensor, made: Tensor) -> Float[np.ndarray, "h w"]:
    middle = truth.shape[3] // 2
    picture: Float[np.ndarray, "h w"] = torch.cat([truth[0, 0, :, middle], made[0, 0, :, middle]], dim=1).cpu().numpy()
    return picture
