"""Lifting from 2-D to 3-D: the features of a radiograph to volumes, each lifting under its configuration name.

A lifting takes an encoder's features from full size down and the rays of the radiograph's view; its volumes are
coarsest first. No weight belongs to a view: the same weights lift along any rays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.choices import KeyOf
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_fraction, require_minimum
from raylift.models.parts.attention import positional_encoding
from raylift.models.parts.blocks import ResidualUnit, run
from raylift.models.parts.divisibility import require_divisible_channels
from raylift.models.parts.rays import Rays

Image = Float[Tensor, "n 1 s s"]
Features = list[Float[Tensor, "n _ _ _"]]
Volumes = list[Float[Tensor, "n _ _ _ _"]]
Level = tuple[int, int, int]
"""One size: channels of its features, channels of its volume, voxels per side."""


@dataclass(frozen=True)
class LiftingConfig:
    """Settings of the lifting; the defaults are X2CT-GAN's."""

    kind: LiftingName = "repeat_conv"
    """repeat_conv: features repeated at every depth, then a 3-D convolution (X2CT-GAN). repeat: repeated, without
    weights (3DCNN). duo: repeat_conv, merged with the radiograph itself after a 3-D ResNet (DuoLift-GAN). attention:
    repeat_conv, and the voxels of coarse volumes attend to all pixels (TRCT-GAN). channels: the channels of a map
    are the depths (PSR)."""
    along: Literal["axes", "rays"] = "axes"
    """axes: depths lie along an axis of the volume. rays: along the rays of the view's own geometry; all views share
    one encoder, and any pose is possible."""
    coarsest: Literal["vector", "features"] = "vector"
    """Source of the coarsest volume: a fully connected layer on the mean of the coarsest features, or those features
    lifted like the others. Along rays it is always the features, because a fully connected layer fits one pose."""
    dropout: float = 0.5
    """Dropout probability of the fully connected layer."""
    heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        require_minimum(self, 1, "heads")
        require_fraction(self, "dropout")

    @property
    def has_vector_lift(self) -> bool:
        """Whether the coarsest volume is the output of a fully connected layer."""
        return self.coarsest == "vector" and self.along == "axes"

    def widths(self, features: tuple[int, ...], decoder: tuple[int, ...]) -> tuple[int, ...]:
        """Channels of the lifted volumes, coarsest first.

        Args:
            features: channels of the encoder's features, from full size down.
            decoder: channels of the decoder, coarsest first, which most liftings use too.

        Raises:
            ConfigError: the encoder and this lifting do not fit.
        """
        return LIFTINGS[self.kind].widths(features, decoder)

    def build(self, features: tuple[int, ...], widths: tuple[int, ...], size: int, use_checkpoint: bool) -> nn.Module:
        """The lifting to a volume of `size` voxels per side, with initial weights."""
        sizes = [size >> k for k in reversed(range(len(features)))]
        levels = list(zip(reversed(features), widths, sizes, strict=True))
        return LIFTINGS[self.kind].build(self, levels, use_checkpoint)


class PlaneConvolution(nn.Conv3d):
    """A 3 x 3 x 3 convolution of an image repeated along an axis, without repeating the image.

    The result differs along the rays only where the zero padding of the convolution reaches: in the first and the
    last plane. Three 2-D convolutions, with sums of the kernel's depth taps, therefore give the result of the 3-D
    convolution for a fraction of its work; all planes in between are equal.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "n c s s"], axis: int) -> list[Float[Tensor, "n c s s"]]:  # type: ignore[override]
        """The first plane, any inner plane, and the last plane."""
        # Taps inside the volume: all but the first at the first plane, all, all but the last at the last plane.
        return [self._convolve(image, axis, taps) for taps in ((1, 2), (0, 1, 2), (0, 1))]

    def _convolve(self, image: Tensor, axis: int, taps: tuple[int, ...]) -> Tensor:
        weight = torch.stack([self.weight.select(axis, tap) for tap in taps]).sum(dim=0)
        return F.conv2d(image, weight, self.bias, padding=1)


class RepeatConvLift(nn.Module):
    """X2CT-GAN's connection B: a 1 x 1 projection, repetition along the axis, a 3-D convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_proj = _pointwise_conv(in_channels, out_channels)
        self.conv = PlaneConvolution(out_channels)

    def forward(self, features: Float[Tensor, "n c s s"], rays: Rays) -> Float[Tensor, "n out s s s"]:
        """A cube with the image's resolution."""
        size, axis = features.shape[-1], rays.axis
        counts = (1, size - 2, 1)
        planes = _normalize(self.conv(self.in_proj(features), axis), counts)
        volume = torch.cat(
            [
                plane.unsqueeze(axis).expand(*plane.shape[:2], *_cube(size, axis, count))
                for plane, count in zip(planes, counts, strict=True)
            ],
            dim=axis,
        )
        return torch.relu(volume)


class RayLift(nn.Module):
    """Connection B along the view's own rays: back-projected features and a depth channel, then a 3-D convolution.

    Along oblique rays the depth cannot be inferred from the padding, as it can along axes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_proj = _pointwise_conv(in_channels, out_channels)
        self.conv = nn.Sequential(
            nn.Conv3d(out_channels + 1, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, features: Float[Tensor, "n c s s"], rays: Rays) -> Float[Tensor, "n out s s s"]:
        """A cube with the image's resolution."""
        volume = rays.backproject(self.in_proj(features))
        depth = rays.depth(features.shape[-1], like=volume).expand(len(volume), -1, -1, -1, -1)
        lifted: Tensor = self.conv(torch.cat([volume, depth], dim=1))
        return lifted


class VectorLift(nn.Module):
    """X2CT-GAN's connection A: the mean over the image to the coarsest volume by one fully connected layer."""

    def __init__(self, in_channels: int, out_channels: int, size: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.shape = (out_channels, size, size, size)
        self.fc = nn.Linear(in_channels, out_channels * size**3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Float[Tensor, "n c _ _"], rays: Rays) -> Float[Tensor, "n out s s s"]:  # noqa: ARG002
        """A cube of the size given at construction."""
        vector = features.mean(dim=(2, 3))
        return torch.relu(self.dropout(self.fc(vector))).reshape(-1, *self.shape)


class AttentionLift(nn.Module):
    """A lift with cross-attention from each voxel to every pixel, added to the lifted features.

    Every voxel keeps the features of its own ray and gains information from the rest of the radiograph.
    """

    def __init__(self, lift: nn.Module, in_channels: int, out_channels: int, heads: int) -> None:
        super().__init__()
        self.lift = lift
        self.pixel_proj = nn.Linear(in_channels, out_channels)
        self.norm = nn.LayerNorm(out_channels)
        self.attention = nn.MultiheadAttention(out_channels, heads, batch_first=True)

    def forward(self, features: Float[Tensor, "n c s s"], rays: Rays) -> Float[Tensor, "n out s s s"]:
        """A cube with the image's resolution."""
        lifted: Tensor = self.lift(features, rays)
        size, width = features.shape[-1], lifted.shape[1]
        pixels = self.pixel_proj(features.flatten(2).transpose(1, 2)) + positional_encoding(size, 2, width, like=lifted)
        voxels = self.norm(lifted.flatten(2).transpose(1, 2)) + positional_encoding(size, 3, width, like=lifted)
        attended, _ = self.attention(voxels, pixels, pixels, need_weights=False)
        output: Tensor = lifted + attended.transpose(1, 2).reshape(lifted.shape)
        return output


class PyramidLifting(nn.Module):
    """A lift for each size, coarsest first; up to `max_attention_size` voxels per side with attention."""

    def __init__(
        self, config: LiftingConfig, levels: Sequence[Level], use_checkpoint: bool, max_attention_size: int = 0
    ) -> None:
        super().__init__()
        self.use_checkpoint, self.max_attention_size = use_checkpoint, max_attention_size
        first = VectorLift(*levels[0], config.dropout) if config.has_vector_lift else self._lift(config, *levels[0])
        self.coarsest = first
        self.finer = nn.ModuleList(self._lift(config, *level) for level in levels[1:])

    def _lift(self, config: LiftingConfig, in_channels: int, out_channels: int, size: int) -> nn.Module:
        lift = (RayLift if config.along == "rays" else RepeatConvLift)(in_channels, out_channels)
        if size > self.max_attention_size:
            return lift
        remedy = "set system.lifting.heads to a divisor of the coarse widths of system.decoder.channels"
        require_divisible_channels((out_channels,), config.heads, remedy)
        return AttentionLift(lift, in_channels, out_channels, config.heads)

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:  # noqa: ARG002
        """Volumes, coarsest first."""
        lifts = zip([self.coarsest, *self.finer], reversed(features), strict=True)
        return [run(partial(lift, rays=rays), image, use_checkpoint=self.use_checkpoint) for lift, image in lifts]


class DuoLifting(PyramidLifting):
    """DuoLift's two branches: lifted features, and the lifted radiograph itself after a 3-D ResNet.

    The ResNet downsamples the volume as often as the encoder downsamples the image. At each size a 1 x 1 x 1
    convolution merges both branches.
    """

    def __init__(self, config: LiftingConfig, levels: Sequence[Level], use_checkpoint: bool) -> None:
        super().__init__(config, levels, use_checkpoint)
        self.has_depth_channel = config.along == "rays"
        widths = [width for _, width, _ in levels]
        channels = [1 + self.has_depth_channel, *reversed(widths)]
        self.resnet = nn.ModuleList(
            ResidualUnit(width, next_width, stride=2 if index else 1)
            for index, (width, next_width) in enumerate(pairwise(channels))
        )
        self.merge = nn.ModuleList(nn.Conv3d(2 * width, width, 1) for width in widths)

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:
        """Volumes, coarsest first."""
        volume = rays.backproject(radiograph)
        if self.has_depth_channel:
            depth = rays.depth(radiograph.shape[-1], like=volume).expand(len(volume), -1, -1, -1, -1)
            volume = torch.cat([volume, depth], dim=1)
        volumes = []
        for block in self.resnet:
            volume = run(block, volume, use_checkpoint=self.use_checkpoint)
            volumes.append(volume)
        lifted = super().forward(radiograph, features, rays)
        branches = zip(self.merge, lifted, reversed(volumes), strict=True)
        return [merge(torch.cat(both, dim=1)) for merge, *both in branches]


class RepeatLifting(nn.Module):
    """Features repeated at every depth, without weights."""

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:  # noqa: ARG002
        """Volumes, coarsest first."""
        return [rays.backproject(image) for image in reversed(features)]


class ChannelLifting(nn.Module):
    """PSR's lifting: two 1 x 1 convolutions give a channel for every depth, and the channels become the volume.

    Batch norm in a lifting that views share would be trained on the statistics of each view and evaluated with their
    mean, so a shared one has instance norm.
    """

    def __init__(self, config: LiftingConfig, levels: Sequence[Level], use_checkpoint: bool) -> None:  # noqa: ARG002
        super().__init__()
        ((in_channels, _, size),) = levels
        self.depths = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1, bias=False),
            nn.InstanceNorm2d(in_channels) if config.along == "rays" else nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, size, 1, bias=False),
        )

    def forward(self, radiograph: Image, features: Features, rays: Rays) -> Volumes:  # noqa: ARG002
        """One volume of one channel."""
        (image,) = features
        return [rays.depths_to_volume(self.depths(image))]


class LiftingKind(NamedTuple):
    """A lifting and the channels of its volumes."""

    build: Callable[[LiftingConfig, Sequence[Level], bool], nn.Module]
    """From the settings, the sizes, coarsest first, and whether activations are recomputed in the backward pass."""
    widths: Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]
    """As `LiftingConfig.widths`."""


def decoder_widths(features: tuple[int, ...], decoder: tuple[int, ...]) -> tuple[int, ...]:
    """The decoder's channels at the sizes of the features."""
    if len(decoder) < len(features):
        raise ConfigError(
            f"{len(decoder)} decoder channels for {len(features) - 1} encoder stages: give {len(features)} or more"
        )
    return decoder[len(decoder) - len(features) :]


def single_width(features: tuple[int, ...], decoder: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG001
    """One channel, from a single feature map."""
    if len(features) != 1:
        raise ConfigError(
            f"lifting 'channels' takes one feature map, not {len(features)}: use the hourglass or unet encoder"
        )
    return (1,)


LIFTINGS = {
    "repeat_conv": LiftingKind(PyramidLifting, decoder_widths),
    "repeat": LiftingKind(lambda *_: RepeatLifting(), lambda features, _: features[::-1]),
    "duo": LiftingKind(DuoLifting, decoder_widths),
    # 16 voxels per side: at most 4,096 voxels attend to 256 pixels.
    "attention": LiftingKind(partial(PyramidLifting, max_attention_size=16), decoder_widths),
    "channels": LiftingKind(ChannelLifting, single_width),
}
LiftingName = KeyOf[str, LIFTINGS]


def _pointwise_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1), nn.InstanceNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def _cube(size: int, axis: int, count: int) -> tuple[int, ...]:
    return tuple(count if dim == axis else size for dim in (2, 3, 4))


def _normalize(planes: list[Tensor], counts: tuple[int, ...], eps: float = 1e-5) -> list[Tensor]:
    """Instance norm over a volume given as its distinct planes and the number of times each occurs."""
    total = sum(counts)
    mean = sum(p.mean(dim=(2, 3), keepdim=True) * (n / total) for p, n in zip(planes, counts, strict=True))
    squares = [(p - mean).square().mean(dim=(2, 3), keepdim=True) for p in planes]
    variance = torch.stack([s * (n / total) for s, n in zip(squares, counts, strict=True)]).sum(0)
    return [(p - mean) * torch.rsqrt(variance + eps) for p in planes]
