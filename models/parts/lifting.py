"""From 2-D to 3-D: how the features of a radiograph become volumes, each lifting by its name.

A lifting takes an encoder's features from full size down, and the radiograph's rays, and gives volumes from the
coarsest up. It holds no view: the same weights lift along any rays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_least, require_share
from raylift.models.parts.attention import Attention, positions
from raylift.models.parts.blocks import Residual, run
from raylift.models.parts.rays import Rays

LiftingName = Literal["repeat", "plain", "duo", "attention", "channels"]

Image = Float[Tensor, "n 1 s s"]
Features = list[Float[Tensor, "n _ _ _"]]
Volumes = list[Float[Tensor, "n _ _ _ _"]]


@dataclass(frozen=True)
class LiftingConfig:
    """How features become volumes; the defaults are X2CT-GAN's."""

    kind: LiftingName = "repeat"
    """repeat: at every depth, then a 3-D convolution (X2CT-GAN). plain: at every depth, nothing learned (3DCNN). duo:
    repeat, beside the radiograph itself through a 3-D ResNet (DuoLift-GAN). attention: repeat, and voxels of coarse
    volumes attend to all pixels (TRCT-GAN). channels: a map's channels are the depths (PSR)."""
    along: Literal["axes", "rays"] = "axes"
    """axes: depths lie behind each other along an axis of the volume. rays: along the cone-beam rays of the view's own
    geometry; all views share one encoder, and any pose will do."""
    coarsest: Literal["vector", "features"] = "vector"
    """Where the coarsest volume comes from: a fully connected layer on the mean of the coarsest features, or those
    features lifted like the others. Along rays it is always the features, because a fully connected layer would learn
    one pose."""
    dropout: float = 0.5
    """Of the fully connected layer."""
    heads: int = 4
    """Of attention."""

    def __post_init__(self) -> None:
        require_least(self, 1, "heads")
        require_share(self, "dropout")

    @property
    def by_vector(self) -> bool:
        """Whether the coarsest volume comes through a fully connected layer."""
        return self.coarsest == "vector" and self.along == "axes"

    def widths(self, features: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Channels of the lifted volumes, coarsest first, for an encoder's and a decoder's, the decoder's first.

        Raises:
            ConfigError: the encoder and this lifting do not go together.
        """
        if self.kind == "channels":
            if len(features) != 1:
                raise ConfigError(
                    f"lifting by channels wants one map, not {len(features)}: use the hourglass or unet encoder"
                )
            return (1,)
        if self.kind == "plain":
            return tuple(reversed(features))
        if len(wanted) < len(features):
            raise ConfigError(
                f"{len(wanted)} decoder widths for {len(features) - 1} encoder stages: give {len(features)} or more"
            )
        return wanted[len(wanted) - len(features) :]

    def build(self, features: tuple[int, ...], widths: tuple[int, ...], size: int, recompute: bool) -> nn.Module:
        """The lifting, with fresh weights, for a volume of `size` voxels a side."""
        if self.kind == "channels":
            return ChannelLifting(features[0], size, shared=self.along == "rays")
        if self.kind == "plain":
            return PlainLifting()
        if self.kind == "duo":
            return DuoLifting(self, features, widths, size, recompute)
        return PyramidLifting(self, features, widths, size, recompute)


class PlaneConvolution(nn.Conv3d):
    """A 3 x 3 x 3 convolution of an image repeated along an axis, without repeating it.

    Repeated features differ along the rays only where the zero padding of the convolution reaches, in the first and
    the last plane. So three 2-D convolutions, with the kernel's depth taps summed, give the same result as the 3-D one
    for a fraction of its work: the planes between are all one plane.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "n c s s"], axis: int) -> list[Float[Tensor, "n c s s"]]:  # type: ignore[override]
        """The first plane, any between, and the last."""
        # What taps meet features: all but the one before the first plane, all, all but the one after the last.
        return [self._convolve(image, axis, taps) for taps in ((1, 2), (0, 1, 2), (0, 1))]

    def _convolve(self, image: Tensor, axis: int, taps: tuple[int, ...]) -> Tensor:
        weight = torch.stack([self.weight.select(axis, tap) for tap in taps]).sum(dim=0)
        return F.conv2d(image, weight, self.bias, padding=1)


class RepeatLift(nn.Module):
    """X2CT-GAN's connection B: narrow by 1 x 1, repeat along the axis, let a 3-D convolution tell depths apart."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.narrow = _narrow(in_channels, out_channels)
        self.mix = PlaneConvolution(out_channels)

    def forward(self, features: Float[Tensor, "n c s s"], rays: Rays) -> Float[Tensor, "n out s s s"]:
        """A cube as large as the image."""
        size, axis = features.shape[-1], rays.axis
        counts = (1, size - 2, 1)
        planes = _normalize(self.mix(self.narrow(features), axis), counts)
        lifted = torch.cat(
            [
                plane.unsqueeze(axis).expand(*plane.shape[:2], *_cube(size, axis, count))
                for plane, count in zip(planes, counts, strict=True)
            ],
            dim=axis,
        )
        return torch.relu(lifted)


class RayLift(nn.Module):
    """Connection B along the view's own rays: pixels meet the voxels their rays cross, and each voxel knows its depth.

    The depth is a channel of its own: along oblique rays it cannot be read from the padding, as it is along axes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.narrow = _narrow(in_channels, out_channels)
        self.mix = nn.Sequential(
            nn.Conv3d(out_channels + 1, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, features: Float[Tensor, "n c s s"], rays: Rays) -> Float[Tensor, "n out s s s"]:
        """A cube as large as the image."""
        met = rays.spread(self.narrow(features))
        depth = rays.depth(features.shape[-1], like=met).expand(len(met), -1, -1, -1, -1)
        lifted: Tensor = self.mix(torch.cat([met, depth], dim=1))
        return lifted


class VectorLift(nn.Module):
    """X2CT-GAN's connection A: the mean over an image becomes the coarsest volume through one fully connected layer."""

    def __init__(self, in_channels: int, out_channels: int, size: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.shape = (out_channels, size, size, size)
        self.connect = nn.Linear(in_channels, out_channels * size**3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Float[Tensor, "n c _ _"], rays: Rays) -> Float[Tensor, "n out s s s"]:  # noqa: ARG002
        """A cube of the size given at construction."""
        vector = features.mean(dim=(2, 3))
        return torch.relu(self.dropout(self.connect(vector))).reshape(-1, *self.shape)


class AttentionLift(nn.Module):
    """A lift whose voxels also attend to every pixel, so that what a radiograph shows far away can inform a voxel.

    The repeated features stay beside the attended ones: a voxel keeps what its own ray shows.
    """

    def __init__(self, lift: nn.Module, in_channels: int, out_channels: int, heads: int) -> None:
        super().__init__()
        self.lift = lift
        self.tokens = nn.Linear(in_channels, out_channels)
        self.before = nn.LayerNorm(out_channels)
        self.attention = Attention(out_channels, heads)

    def forward(self, features: Float[Tensor, "n c s s"], rays: Rays) -> Float[Tensor, "n out s s s"]:
        """A cube as large as the image."""
        lifted: Tensor = self.lift(features, rays)
        size, width = features.shape[-1], lifted.shape[1]
        pixels = self.tokens(features.flatten(2).transpose(1, 2)) + positions(size, 2, width, like=lifted)
        voxels = self.before(lifted.flatten(2).transpose(1, 2)) + positions(size, 3, width, like=lifted)
        attended: Tensor = self.attention(voxels, pixels)
        return lifted + attended.transpose(1, 2).reshape(lifted.shape)


LARGEST_ATTENDED = 16
"""Volumes up to this size attend: at 16 a side 4,096 voxels ask 256 pixels."""


class PyramidLifting(nn.Module):
    """A lift for each size."""

    def __init__(
        self, config: LiftingConfig, features: tuple[int, ...], widths: tuple[int, ...], size: int, recompute: bool
    ) -> None:
        super().__init__()
        self.recompute = recompute
        pairs = list(zip(reversed(features), widths, strict=True))
        sizes = [size >> k for k in reversed(range(len(features)))]

        def lift(index: int) -> nn.Module:
            kind = RayLift if config.along == "rays" else RepeatLift
            made = kind(*pairs[index])
            if config.kind == "attention" and sizes[index] <= LARGEST_ATTENDED:
                if pairs[index][1] % config.heads:
                    raise ConfigError(
                        f"{config.heads} heads cannot share {pairs[index][1]} channels: set system.lifting.heads to a "
                        "divisor of the coarse widths of system.decoder.channels"
                    )
                return AttentionLift(made, *pairs[index], config.heads)
            return made

        self.coarsest = VectorLift(*pairs[0], sizes[0], config.dropout) if config.by_vector else lift(0)
        self.finer = nn.ModuleList(lift(index) for index in range(1, len(pairs)))

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:  # noqa: ARG002
        """Volumes from the coarsest up."""
        lifts = zip([self.coarsest, *self.finer], reversed(features), strict=True)
        return [run(partial(lift, rays=rays), flat, recompute=self.recompute) for lift, flat in lifts]


class DuoLifting(PyramidLifting):
    """DuoLift's two branches: features lifted, and the radiograph itself lifted and taken through a 3-D ResNet.

    The ResNet halves the volume as often as the encoder halves the image; at each size a 1 x 1 x 1 convolution makes
    one volume of both branches'.
    """

    def __init__(
        self, config: LiftingConfig, features: tuple[int, ...], widths: tuple[int, ...], size: int, recompute: bool
    ) -> None:
        super().__init__(config, features, widths, size, recompute)
        self.knows_depth = config.along == "rays"
        inside = [1 + self.knows_depth, *reversed(widths)]
        self.resnet = nn.ModuleList(
            Residual(width, after, stride=2 if index else 1) for index, (width, after) in enumerate(pairwise(inside))
        )
        self.merge = nn.ModuleList(nn.Conv3d(2 * width, width, 1) for width in widths)

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:
        """Volumes from the coarsest up."""
        image = rays.spread(radiograph)
        if self.knows_depth:
            depth = rays.depth(radiograph.shape[-1], like=image).expand(len(image), -1, -1, -1, -1)
            image = torch.cat([image, depth], dim=1)
        images = []
        for block in self.resnet:
            image = run(block, image, recompute=self.recompute)
            images.append(image)
        lifted = super().forward(radiograph, features, rays)
        return [
            merge(torch.cat(both, dim=1)) for merge, *both in zip(self.merge, lifted, reversed(images), strict=True)
        ]


class PlainLifting(nn.Module):
    """Features at every depth, as they are."""

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:  # noqa: ARG002
        """Volumes from the coarsest up."""
        return [rays.spread(flat) for flat in reversed(features)]


class ChannelLifting(nn.Module):
    """PSR's way: two 1 x 1 convolutions make a channel for every depth, and channels are stood up as a volume.

    Where views share it batch norm would be trained on each view's statistics and used with the mean of all, so
    instance norm stands there.
    """

    def __init__(self, in_channels: int, size: int, shared: bool = False) -> None:
        super().__init__()
        self.depths = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1),
            nn.InstanceNorm2d(in_channels) if shared else nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, size, 1),
        )

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:  # noqa: ARG002
        """One volume of one channel."""
        (flat,) = features
        return [rays.stand_up(self.depths(flat))]


def _narrow(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1), nn.InstanceNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def _cube(size: int, axis: int, count: int) -> tuple[int, ...]:
    return tuple(count if dim == axis else size for dim in (2, 3, 4))


def _normalize(planes: list[Tensor], counts: tuple[int, ...], eps: float = 1e-5) -> list[Tensor]:
    """Instance norm over a volume given as planes and how often each occurs."""
    total = sum(counts)
    mean = sum(p.mean(dim=(2, 3), keepdim=True) * (n / total) for p, n in zip(planes, counts, strict=True))
    spread = [(p - mean).square().mean(dim=(2, 3), keepdim=True) for p in planes]
    variance = torch.stack([s * (n / total) for s, n in zip(spread, counts, strict=True)]).sum(0)
    return [(p - mean) * torch.rsqrt(variance + eps) for p in planes]
