"""How the volumes of several views become one. Each option has a name, and a configuration chooses it by name.

A fusion takes the views' volumes of one size and, where decoding has begun, the volume that comes up from below; it
gives `out_channels` channels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.parts.blocks import DepthTapConvolution

FusionName = Literal["average", "sum", "concatenate", "attention", "alignment"]

Volume = Float[Tensor, "n _ d h w"]


@dataclass(frozen=True)
class FusionConfig:
    """How views are fused; the defaults are X2CT-GAN's."""

    kind: FusionName = "average"
    """average, sum and attention take any number of views with the same weights. attention: a score for each view at
    each voxel, softmax over the views. alignment: CVAA-GAN's, such scores made from all views together, and what they
    fuse both plain and distilled."""
    feedback: bool = True
    """With the growing decoder: each view has a decoder of its own, in which the fused volume replaces what the view
    had (X2CT-GAN's connection C)."""

    def build(self, channels: int, views: int, below: int = 0, keep_width: bool = False) -> Fusion:
        """The fusion of `views` volumes of `channels` channels beside a volume of `below` channels from below."""
        fusion = FUSIONS[self.kind](channels, views, below)
        if keep_width and fusion.out_channels != channels:
            return Narrowed(fusion, channels)
        return fusion


class Fusion(nn.Module):
    """What all fusions are."""

    def __init__(self, channels: int, views: int, below: int) -> None:  # noqa: ARG002
        super().__init__()
        self.channels = channels

    @property
    def out_channels(self) -> int:
        """Channels of the fused volume."""
        return self.channels

    @abstractmethod
    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """One volume of several, given what comes up from below."""


class Average(Fusion):
    """The mean over views: X2CT-GAN's connection C."""

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:  # noqa: ARG002
        """One volume."""
        return torch.stack(views).mean(dim=0)


class Sum(Fusion):
    """The sum over views."""

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:  # noqa: ARG002
        """One volume."""
        return torch.stack(views).sum(dim=0)


class Concatenate(Fusion):
    """All channels of all views."""

    def __init__(self, channels: int, views: int, below: int) -> None:
        super().__init__(channels, views, below)
        self.views = views

    @property
    def out_channels(self) -> int:
        """As many as all views have together."""
        return self.channels * self.views

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:  # noqa: ARG002
        """One volume."""
        return torch.cat(views, dim=1)


class Attention(Fusion):
    """A score for each view at each voxel, from the view and what comes from below; softmax over the views.

    CVAA-GAN's view attention alignment with each view scored by itself, by weights that all views share, so that it
    takes any number of them.
    """

    def __init__(self, channels: int, views: int, below: int) -> None:
        super().__init__(channels, views, below)
        self.correlate = nn.Sequential(nn.Conv3d(channels + below, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.score = DepthTapConvolution(channels, 1)

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """The views weighted."""
        scores = [self.score(self.correlate(beside(view, below))) for view in views]
        return weigh(views, torch.cat(scores, dim=1))


class Alignment(Fusion):
    """CVAA-GAN's module: view attention alignment, then fine distillation, beside the plain sum.

    Views fused by attention are the coarse features; a sigmoid mask on them makes the fine ones. Coarse, fine and sum
    are concatenated (what comes from below joins them in the decoder).
    """

    def __init__(self, channels: int, views: int, below: int) -> None:
        super().__init__(channels, views, below)
        self.correlate = nn.ModuleList(
            nn.Sequential(nn.Conv3d(channels + below, channels, 3, padding=1), nn.ReLU(inplace=True))
            for _ in range(views)
        )
        self.score = DepthTapConvolution(views * channels, views)
        self.distil = DepthTapConvolution(channels + below, 1, kernel=3)

    @property
    def out_channels(self) -> int:
        """Coarse, fine and sum."""
        return 3 * self.channels

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """Three times the channels of a view."""
        aware = [correlate(beside(view, below)) for correlate, view in zip(self.correlate, views, strict=True)]
        coarse = weigh(views, self.score(torch.cat(aware, dim=1)))
        fine = coarse * torch.sigmoid(self.distil(beside(coarse, below)))
        return torch.cat([coarse, fine, torch.stack(views).sum(dim=0)], dim=1)


class Narrowed(Fusion):
    """Another fusion, mixed to a width by a 1 x 1 x 1 convolution."""

    def __init__(self, fusion: Fusion, channels: int) -> None:
        super().__init__(channels, 0, 0)
        self.fusion = fusion
        self.mix = nn.Conv3d(fusion.out_channels, channels, 1)

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """One volume."""
        mixed: Tensor = self.mix(self.fusion(views, below))
        return mixed


FUSIONS: dict[FusionName, type[Fusion]] = {
    "average": Average,
    "sum": Sum,
    "concatenate": Concatenate,
    "attention": Attention,
    "alignment": Alignment,
}


def beside(volume: Volume, below: Volume | None) -> Volume:
    """The channels of both, or of the one there is."""
    return volume if below is None else torch.cat([volume, below], dim=1)


def weigh(views: list[Volume], scores: Float[Tensor, "n views d h w"]) -> Volume:
    """The views' sum, weighted at each voxel by the softmax of the scores."""
    weights = torch.softmax(scores, dim=1)
    return torch.stack([view * weights[:, k : k + 1] for k, view in enumerate(views)]).sum(dim=0)
