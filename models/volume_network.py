"""The interface of every reconstruction network."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class VolumeNetwork(nn.Module):
    """A network from radiographs to volumes."""

    @abstractmethod
    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """The reconstruction, then auxiliary volumes for deep supervision."""

    def forward(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """Volumes in the window's [0, 1]; values outside can occur and are clipped in the conversion to HU."""
        return self.volumes(radiographs)[0]
