"""A training batch: volumes and radiographs as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.segmentation import Label


@dataclass(frozen=True)
class Batch:
    """A training batch of n samples."""

    ground_truth: Float[Tensor, "n 1 d h w"] | None
    """CT of the radiographs' subjects in the window's [0, 1]; None for systems supervised by radiographs."""
    radiographs: Float[Tensor, "n views rows columns"]
    """In [0, 1], bone bright, each normalized by its own percentiles or maximum; some with matched histograms."""
    ids: tuple[str, ...] = ()
    labels: UInt8[Tensor, "n 1 d h w"] | None = None
    """Values of `segmentation.Label`; read for objectives that need them, and where they mask the field of view."""
    unpaired: Float[Tensor, "n 1 d h w"] | None = None
    """CT of other subjects in the window's [0, 1], for objectives with unpaired volumes."""

    @property
    def volume(self) -> Float[Tensor, "n 1 d h w"]:
        """`ground_truth`, for objectives that require it.

        Raises:
            ConfigError: the batch has none.
        """
        if self.ground_truth is None:
            raise ConfigError("a batch of radiographs without CT: only systems supervised by volumes load it")
        return self.ground_truth

    @property
    def inside(self) -> Bool[Tensor, "n 1 d h w"]:
        """The voxels of `volume` inside the field of view; all of them where the archive has no mask."""
        if self.labels is None:
            return torch.ones_like(self.volume, dtype=torch.bool)
        return self.labels != Label.OUTSIDE_FIELD_OF_VIEW

    def fill_outside(self, volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, "n 1 d h w"]:
        """A volume with the ground truth outside the field of view, so that no loss depends on it there."""
        return volume if self.labels is None else torch.where(self.inside, volume, self.volume)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        radiographs = self.radiographs.to(device, non_blocking=True)
        return Batch(moved(self.ground_truth), radiographs, self.ids, moved(self.labels), moved(self.unpaired))
