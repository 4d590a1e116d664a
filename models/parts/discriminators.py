"""Networks that tell CT volumes from reconstructions, or radiographs from projections of such; each by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.serialization import require_least
from raylift.models.parts.blocks import convolve_3d, initialize
from raylift.models.parts.rays import Rays

DiscriminatorName = Literal["patch", "coordinate", "lifted", "cnn"]


@dataclass(frozen=True)
class DiscriminatorConfig:
    """What judges volumes; the defaults are X2CT-GAN's, with two views 11,055,169 parameters."""

    kind: DiscriminatorName = "patch"
    """patch: X2CT-GAN's, a score for each patch. coordinate: the same, whose first layer also sees where it is
    (X-Recon; 11,067,457 parameters). lifted: patch, with radiographs that a learned 3-D block prepares (CVAA-GAN).
    cnn: one score for the whole volume (DuoLift-GAN)."""
    channels: tuple[int, ...] = (64, 128, 256, 512)
    conditional: bool = True
    """Whether it sees the radiographs, spread along their rays, beside the volume."""
    condition_channels: int = 16
    """Channels a radiograph has after the learned block of `lifted`."""

    def __post_init__(self) -> None:
        require_least(self, 1, "channels", "condition_channels")

    def build(self, rays: Sequence[Rays]) -> nn.Module:
        """The discriminator for views with these rays, with fresh weights."""
        return Discriminator(self, rays)


class Discriminator(nn.Module):
    """Convolutions of 4 x 4 x 4 over the volume and what it is judged beside; all but the last halve the size.

    Inner convolutions have no bias, which the instance norm after them would take away.
    """

    def __init__(self, config: DiscriminatorConfig, rays: Sequence[Rays]) -> None:
        super().__init__()
        self.rays = list(rays) if config.conditional else []
        self.knows_place = config.kind == "coordinate"
        prepared = config.condition_channels if config.kind == "lifted" else 1
        entering = 3 * self.knows_place + prepared * len(self.rays) + 1
        if config.kind == "lifted":
            self.prepare = nn.ModuleList(convolve_3d(1, prepared) for _ in self.rays)
        widths = (entering, *config.channels)
        layers: list[nn.Module] = []
        for index, (width, next_width) in enumerate(pairwise(widths)):
            first, last = index == 0, index == len(config.channels) - 1
            layers.append(nn.Conv3d(width, next_width, 4, 1 if last else 2, padding=2, bias=first))
            if not first:
                layers.append(nn.InstanceNorm3d(next_width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        if config.kind == "cnn":
            layers += [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], 1)]
        else:
            layers.append(nn.Conv3d(widths[-1], 1, 4, padding=2))
        self.layers = nn.Sequential(*layers)
        initialize(self)

    def forward(
        self, volume: Float[Tensor, "n 1 d h w"], radiographs: Float[Tensor, "n views rows columns"]
    ) -> Float[Tensor, "*patches"]:
        """A score for each patch, or one for all, without a final activation."""
        conditions = [
            rays.spread(_at_size(radiographs[:, k : k + 1].detach(), volume.shape[-1]))
            for k, rays in enumerate(self.rays)
        ]
        if hasattr(self, "prepare"):
            conditions = [block(condition) for block, condition in zip(self.prepare, conditions, strict=True)]
        places = _places(volume) if self.knows_place else []
        scores: Tensor = self.layers(torch.cat([*places, *conditions, volume], dim=1))
        return scores


@dataclass(frozen=True)
class ViewDiscriminatorConfig:
    """What judges radiographs; the defaults are u-X2CTGAN's."""

    channels: tuple[int, ...] = (64, 128, 256)
    pooled: bool = True
    """One score for an image, the mean of its patches' (u-X2CTGAN), or a score for each patch."""
    conditional: bool = False
    """Whether it judges all views of a person together, one of them re-projected and the others as given (cGAN-128),
    or each image by itself, with the same weights for every view."""

    def __post_init__(self) -> None:
        require_least(self, 1, "channels")

    def build(self, views: int) -> ViewDiscriminator:
        """The discriminator for so many views, with fresh weights."""
        return ViewDiscriminator(self, views)


class ViewDiscriminator(nn.Module):
    """Convolutions of 4 x 4 over radiographs, each but the last halving the size.

    Instance norm stands where u-X2CTGAN has batch norm: real and re-projected images pass apart, so that batch
    statistics alone would tell them from each other.
    """

    def __init__(self, config: ViewDiscriminatorConfig, views: int) -> None:
        super().__init__()
        self.pooled, self.conditional = config.pooled, config.conditional
        widths = (views if config.conditional else 1, *config.channels)
        layers: list[nn.Module] = []
        for index, (width, next_width) in enumerate(pairwise(widths)):
            layers.append(nn.Conv2d(width, next_width, 4, stride=2, padding=1, bias=index == 0))
            if index:
                layers.append(nn.InstanceNorm2d(next_width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=2))
        self.layers = nn.Sequential(*layers)
        initialize(self)

    def forward(
        self, given: Float[Tensor, "n views rows columns"], made: Float[Tensor, "n _ rows columns"] | None = None
    ) -> Float[Tensor, "*patches"]:
        """Scores, without a final activation, of the radiographs given or, where there are any, of those made."""
        if not self.conditional:
            judged = (given if made is None else made).flatten(0, 1).unsqueeze(1)
        elif made is None:
            judged = given
        else:
            judged = torch.cat([_replaced(given, k, image) for k, image in enumerate(made.unbind(1))])
        scores: Tensor = self.layers(judged)
        return scores.mean(dim=(1, 2, 3)) if self.pooled else scores


def _replaced(
    views: Float[Tensor, "n views rows columns"], index: int, image: Float[Tensor, "n rows columns"]
) -> Float[Tensor, "n views rows columns"]:
    return torch.stack([image if k == index else view for k, view in enumerate(views.unbind(1))], dim=1)


def _at_size(radiograph: Float[Tensor, "n 1 rows columns"], size: int) -> Float[Tensor, "n 1 size size"]:
    if radiograph.shape[-1] == size:
        return radiograph
    return torch.nn.functional.interpolate(radiograph, size=(size, size), mode="bilinear", antialias=True)


def _places(volume: Float[Tensor, "n 1 d h w"]) -> list[Float[Tensor, "n 1 d h w"]]:
    """Each axis's coordinate at every voxel, from -1 to 1: what a coordinate convolution (Liu et al. 2018) adds."""
    places = []
    for axis in (2, 3, 4):
        line = torch.linspace(-1, 1, volume.shape[axis], dtype=volume.dtype, device=volume.device)
        shape = [volume.shape[axis] if k == axis else 1 for k in range(5)]
        places.append(line.reshape(shape).expand(volume.shape))
    return places
