"""What a network trains on: volumes and radiographs of one batch, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from raylift.datasets.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """What a network trains on."""

    ground_truth: Float[Tensor, "n 1 d h w"] | None
    """CT in the window's [0, 1], of the people in the views; None for systems that learn from radiographs."""
    views: Float[Tensor, "n views rows columns"]
    """Radiographs in [0, 1], bone bright, each standardized by its own percentiles and, for some models, matched."""
    ids: tuple[str, ...] = ()
    labels: UInt8[Tensor, "n 1 d h w"] | None = None
    """Values of `segmentation.Label`, for objectives that ask for them; they are not read otherwise."""
    unpaired: Float[Tensor, "n 1 d h w"] | None = None
    """CT of other people, in the window's [0, 1], for objectives that know volumes only as a kind."""

    @property
    def volume(self) -> Float[Tensor, "n 1 d h w"]:
        """`ground_truth`, for objectives that compare with it.

        Raises:
            ConfigError: the batch has none.
        """
        if self.ground_truth is None:
            raise ConfigError("a batch of radiographs without CT: only systems that learn from volumes are given it")
        return self.ground_truth

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        views = self.views.to(device, non_blocking=True)
        return Batch(moved(self.ground_truth), views, self.ids, moved(self.labels), moved(self.unpaired))
