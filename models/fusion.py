"""How the volumes of several views become one. Each option has a name, and a configuration chooses it by name."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

FusionName = Literal["average", "sum", "concatenate"]


class Average(nn.Module):
    """The mean over views: X2CT-GAN's connection C."""

    def forward(self, views: list[Float[Tensor, "n c d h w"]]) -> Float[Tensor, "n c d h w"]:
        """One volume."""
        return torch.stack(views).mean(dim=0)


class Sum(nn.Module):
    """The sum over views."""

    def forward(self, views: list[Float[Tensor, "n c d h w"]]) -> Float[Tensor, "n c d h w"]:
        """One volume."""
        return torch.stack(views).sum(dim=0)


class Concatenate(nn.Module):
    """All channels of all views, mixed back to the width of one by a 1 x 1 x 1 convolution."""

    def __init__(self, channels: int, views: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(channels * views, channels, 1)

    def forward(self, views: list[Float[Tensor, "n c d h w"]]) -> Float[Tensor, "n c d h w"]:
        """One volume."""
        mixed: Tensor = self.mix(torch.cat(views, dim=1))
        return mixed


def fusion(name: FusionName, channels: int, views: int) -> nn.Module:
    """The fusion of that name for `views` volumes of `channels` channels."""
    if name == "average":
        return Average()
    if name == "sum":
        return Sum()
    return Concatenate(channels, views)
