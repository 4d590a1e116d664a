"""Discriminators of CT volumes and of radiographs, each under its configuration name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.choices import KeyOf
from raylift.datasets.serialization import require_minimum
from raylift.models.parts.blocks import conv_norm_act_3d, initialize
from raylift.models.parts.encoders import at_size
from raylift.models.parts.rays import Rays, along_volume_axes


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Settings of a volume discriminator; the defaults are X2CT-GAN's, with two views 11,055,169 parameters."""

    kind: DiscriminatorName = "patch"
    """patch: X2CT-GAN's, a score for each patch. coordinate: the same, with coordinate channels in the input (X-Recon;
    11,067,457 parameters). lifted: patch, with a 3-D convolution block on each radiograph (CVAA-GAN). cnn: one score
    for the whole volume (DuoLift-GAN)."""
    channels: tuple[int, ...] = (64, 128, 256, 512)
    """Output channels of its layers, from the input on."""
    conditional: bool = True
    """Whether the radiographs, back-projected along their rays, are input channels in addition to the volume."""
    condition_channels: int = 16
    """Channels of a radiograph after the convolution block of `lifted`."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "channels", "condition_channels")

    def build(self, rays: Sequence[Rays]) -> nn.Module:
        """The discriminator for views with these rays, with initial weights."""
        return DISCRIMINATORS[self.kind](self, rays)


class Discriminator(nn.Module):
    """Convolutions of 4 x 4 x 4 over the volume and its condition; all but the last halve the size.

    Inner convolutions have no bias: the instance norm after them would remove it. The last three arguments give the
    variants that `DiscriminatorConfig.kind` describes.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        rays: Sequence[Rays],
        coordinates: bool = False,
        condition_conv: bool = False,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.rays = list(rays) if config.conditional else []
        self.has_coordinates = coordinates
        condition_channels = config.condition_channels if condition_conv else 1
        in_channels = 3 * coordinates + condition_channels * len(self.rays) + 1
        if condition_conv:
            self.condition_conv = nn.ModuleList(conv_norm_act_3d(1, condition_channels) for _ in self.rays)
        widths = (in_channels, *config.channels)
        layers: list[nn.Module] = []
        for index, (width, next_width) in enumerate(pairwise(widths)):
            first, last = index == 0, index == len(config.channels) - 1
            layers.append(nn.Conv3d(width, next_width, 4, 1 if last else 2, padding=2, bias=first))
            if not first:
                layers.append(nn.InstanceNorm3d(next_width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        if pooled:
            layers += [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], 1)]
        else:
            layers.append(nn.Conv3d(widths[-1], 1, 4, padding=2))
        self.layers = nn.Sequential(*layers)
        initialize(self)

    def forward(
        self, volume: Float[Tensor, "n 1 d h w"], radiographs: Float[Tensor, "n views rows columns"]
    ) -> Float[Tensor, "*patches"]:
        """Logits: one for each patch, or one for each volume."""
        conditions: list[Tensor] = []
        if self.rays:
            images = along_volume_axes(at_size(radiographs.detach(), volume.shape[-1]), self.rays)
            conditions = [rays.backproject(images[:, k : k + 1]) for k, rays in enumerate(self.rays)]
        if hasattr(self, "condition_conv"):
            conditions = [conv(condition) for conv, condition in zip(self.condition_conv, conditions, strict=True)]
        coordinates = _coordinates(volume) if self.has_coordinates else []
        scores: Tensor = self.layers(torch.cat([*coordinates, *conditions, volume], dim=1))
        return scores


DISCRIMINATORS: dict[str, Callable[[DiscriminatorConfig, Sequence[Rays]], nn.Module]] = {
    "patch": Discriminator,
    "coordinate": partial(Discriminator, coordinates=True),
    "lifted": partial(Discriminator, condition_conv=True),
    "cnn": partial(Discriminator, pooled=True),
}
DiscriminatorName = KeyOf[str, DISCRIMINATORS]


@dataclass(frozen=True)
class ViewDiscriminatorConfig:
    """Settings of a radiograph discriminator; the defaults are u-X2CTGAN's."""

    channels: tuple[int, ...] = (64, 128, 256)
    """Output channels of its layers, from the input on."""
    pooled: bool = True
    """One score for each image, the mean over its patches (u-X2CTGAN), or a score for each patch."""
    conditional: bool = False
    """True: the input is all views of a patient, one of them reprojected and the others as given (cGAN-128). False: a
    single image, with the same weights for every view."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "channels")

    def build(self, views: int) -> ViewDiscriminator:
        """The discriminator for this number of views, with initial weights."""
        return ViewDiscriminator(self, views)


class ViewDiscriminator(nn.Module):
    """Convolutions of 4 x 4 over radiographs; all but the last halve the size.

    Instance norm replaces u-X2CTGAN's batch norm: real and fake images are separate batches, so batch statistics alone
    would distinguish them.
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
        self, real: Float[Tensor, "n views rows columns"], fake: Float[Tensor, "n _ rows columns"] | None = None
    ) -> Float[Tensor, "*patches"]:
        """Logits of the real radiographs or, where given, of the fake ones; a condition is always real."""
        if not self.conditional:
            images = (real if fake is None else fake).flatten(0, 1).unsqueeze(1)
        elif fake is None:
            images = real
        else:
            images = torch.cat([_replace_view(real, k, image) for k, image in enumerate(fake.unbind(1))])
        scores: Tensor = self.layers(images)
        return scores.mean(dim=(1, 2, 3)) if self.pooled else scores


def _replace_view(
    radiographs: Float[Tensor, "n views rows columns"], index: int, image: Float[Tensor, "n rows columns"]
) -> Float[Tensor, "n views rows columns"]:
    return torch.stack([image if k == index else other for k, other in enumerate(radiographs.unbind(1))], dim=1)


def _coordinates(volume: Float[Tensor, "n 1 d h w"]) -> list[Float[Tensor, "n 1 d h w"]]:
    """The coordinate of every voxel along each axis, from -1 to 1: the channels of CoordConv (Liu et al. 2018)."""
    coordinates = []
    for axis in (2, 3, 4):
        line = torch.linspace(-1, 1, volume.shape[axis], dtype=volume.dtype, device=volume.device)
        shape = [volume.shape[axis] if k == axis else 1 for k in range(5)]
        coordinates.append(line.reshape(shape).expand(volume.shape))
    return coordinates
