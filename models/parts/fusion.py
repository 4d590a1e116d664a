"""View fusion: the feature volumes of several views to one, each fusion under the name it has in a configuration.

A fusion takes the views' volumes of one size and, in an upsampling decoder, the upsampled volume of the next coarser
size (`below`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.choices import KeyOf
from raylift.models.parts.blocks import DepthTapConvolution

Volume = Float[Tensor, "n _ d h w"]


@dataclass(frozen=True)
class FusionConfig:
    """Settings of the view fusion; the defaults are X2CT-GAN's."""

    kind: FusionName = "average"
    """average, sum and attention take any number of views with the same weights. attention: a score for each view at
    each voxel, softmax over the views. alignment: CVAA-GAN's, scores computed from all views together; its output
    holds the weighted sum, the same after a sigmoid mask (CVAA-GAN's fine distillation), and the plain sum."""
    view_decoders: bool = True
    """With the upsampling decoder: each view has a decoder of its own, in which the fused volume replaces the view's
    own one (X2CT-GAN's connection C)."""

    def build(self, channels: int, views: int, below: int = 0, keep_width: bool = False) -> Fusion:
        """The fusion of `views` volumes of `channels` channels.

        Args:
            channels: of each view's volume.
            views: their number.
            below: channels of the upsampled volume of the next coarser size, 0 without one.
            keep_width: whether the fused volume must have `channels` channels too.
        """
        fusion = FUSIONS[self.kind](channels, views, below)
        if keep_width and fusion.out_channels != channels:
            return ProjectedFusion(fusion, channels)
        return fusion


class Fusion(nn.Module):
    """The interface of a fusion."""

    def __init__(self, channels: int, views: int, below: int) -> None:  # noqa: ARG002
        super().__init__()
        self.channels = channels

    @property
    def out_channels(self) -> int:
        """Channels of the fused volume."""
        return self.channels

    @abstractmethod
    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """The fused volume of the views' volumes, given the upsampled volume of the next coarser size."""


class Average(Fusion):
    """The mean over views: X2CT-GAN's connection C."""

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:  # noqa: ARG002
        """The fused volume."""
        return torch.stack(views).mean(dim=0)


class Sum(Fusion):
    """The sum over views."""

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:  # noqa: ARG002
        """The fused volume."""
        return torch.stack(views).sum(dim=0)


class Concatenate(Fusion):
    """All channels of all views."""

    def __init__(self, channels: int, views: int, below: int) -> None:
        super().__init__(channels, views, below)
        self.views = views

    @property
    def out_channels(self) -> int:
        """The channels of all views together."""
        return self.channels * self.views

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:  # noqa: ARG002
        """The fused volume."""
        return torch.cat(views, dim=1)


class ViewAttention(Fusion):
    """A score for each view at each voxel, from the view and the coarser volume; softmax over the views.

    CVAA-GAN's view attention alignment with a score for each view by itself, from weights that all views share, so
    that the number of views is free.
    """

    def __init__(self, channels: int, views: int, below: int) -> None:
        super().__init__(channels, views, below)
        self.attention_conv = nn.Sequential(nn.Conv3d(channels + below, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.score = DepthTapConvolution(channels, 1)

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """The weighted sum of the views."""
        scores = [self.score(self.attention_conv(concatenate(view, below))) for view in views]
        return weighted_sum(views, torch.cat(scores, dim=1))


class Alignment(Fusion):
    """CVAA-GAN's module: view attention alignment, then fine distillation, and the plain sum.

    The views weighted by attention are the coarse features; a sigmoid mask on them gives the fine ones. The output
    concatenates coarse features, fine features and sum; the decoder adds the coarser volume.
    """

    def __init__(self, channels: int, views: int, below: int) -> None:
        super().__init__(channels, views, below)
        self.attention_conv = nn.ModuleList(
            nn.Sequential(nn.Conv3d(channels + below, channels, 3, padding=1), nn.ReLU(inplace=True))
            for _ in range(views)
        )
        self.score = DepthTapConvolution(views * channels, views)
        self.mask_conv = DepthTapConvolution(channels + below, 1, kernel=3)

    @property
    def out_channels(self) -> int:
        """Coarse, fine and sum."""
        return 3 * self.channels

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """Three times the channels of a view."""
        pairs = zip(self.attention_conv, views, strict=True)
        attended = [conv(concatenate(view, below)) for conv, view in pairs]
        coarse = weighted_sum(views, self.score(torch.cat(attended, dim=1)))
        fine = coarse * torch.sigmoid(self.mask_conv(concatenate(coarse, below)))
        return torch.cat([coarse, fine, torch.stack(views).sum(dim=0)], dim=1)


class ProjectedFusion(Fusion):
    """Another fusion and a 1 x 1 x 1 convolution to a given width."""

    def __init__(self, fusion: Fusion, channels: int) -> None:
        super().__init__(channels, 0, 0)
        self.fusion = fusion
        self.out_proj = nn.Conv3d(fusion.out_channels, channels, 1)

    def forward(self, views: list[Volume], below: Volume | None = None) -> Volume:
        """The fused volume."""
        projected: Tensor = self.out_proj(self.fusion(views, below))
        return projected


class MultiScaleFusion(nn.Module):
    """A fusion for each size that was lifted, finest first."""

    def __init__(self, fusion: FusionConfig, widths: Sequence[int], views: int) -> None:
        super().__init__()
        fusions = [fusion.build(width, views) for width in reversed(widths)]
        self.fusions = nn.ModuleList(fusions)
        self.widths: list[int] = [level.out_channels for level in fusions]

    def forward(self, lifted: list[list[Float[Tensor, "n _ _ _ _"]]]) -> list[Float[Tensor, "n _ _ _ _"]]:
        """The fused volumes, finest first."""
        by_size = list(zip(*lifted, strict=True))
        return [fusion(list(views)) for fusion, views in zip(self.fusions, reversed(by_size), strict=True)]


FUSIONS: dict[str, type[Fusion]] = {
    "average": Average,
    "sum": Sum,
    "concatenate": Concatenate,
    "attention": ViewAttention,
    "alignment": Alignment,
}
FusionName = KeyOf[str, FUSIONS]


def concatenate(volume: Volume, below: Volume | None) -> Volume:
    """The channels of both volumes, or of the first where there is no second."""
    return volume if below is None else torch.cat([volume, below], dim=1)


def weighted_sum(views: list[Volume], scores: Float[Tensor, "n views d h w"]) -> Volume:
    """The sum of the views, weighted at each voxel by the softmax of the scores."""
    weights = torch.softmax(scores, dim=1)
    return torch.stack([view * weights[:, k : k + 1] for k, view in enumerate(views)]).sum(dim=0)
