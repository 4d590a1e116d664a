"""Encoders: a radiograph to features at several sizes, each half the previous one, by their configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.choices import KeyOf
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_minimum
from raylift.models.parts.attention import positional_encoding, transformer_block
from raylift.models.parts.blocks import DenseLayer, norm_act_conv_2d, run
from raylift.models.parts.divisibility import require_divisible_channels


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of the encoder; the defaults are X2CT-GAN's."""

    kind: EncoderName = "dense"
    """dense: X2CT-GAN's densely connected stages. transformer: the same, with transformer blocks before the last stage
    (TRCT-GAN). hourglass: PSR's residual encoder-decoder, whose output is one map of full size. unet: the U-Net, with
    the same output (cGAN-128). identity: the radiograph itself (3DCNN)."""
    init_features: int = 64
    """Channels at full size; the hourglass has four times as many inside, each downsampling of the
    U-Net doubles them."""
    growth_rate: int = 32
    """Channels that a dense layer adds."""
    bottleneck_channels: int = 128
    """Channels between the two convolutions of a dense layer."""
    block_config: tuple[int, ...] = (6, 12, 24, 16, 6)
    """Dense layers of each stage, or residual blocks of the hourglass at each size; every stage halves the image. The
    U-Net downsamples once for each number here and has two convolutions at each size, whatever the numbers."""
    transformer_blocks: int = 6
    """Transformer blocks before the last stage, of the transformer encoder."""
    heads: int = 8
    """Attention heads of these blocks."""

    def __post_init__(self) -> None:
        if not self.block_config or min(self.block_config) < 1:
            raise ConfigError(
                f"encoder block_config {self.block_config}: give one or more stages of one or more layers"
            )
        require_minimum(self, 1, "init_features", "growth_rate", "bottleneck_channels", "heads")
        require_minimum(self, 0, "transformer_blocks")
        self.channels()

    def channels(self) -> tuple[int, ...]:
        """Channels at full size, then after each downsampling.

        Raises:
            ConfigError: the settings do not fit this encoder.
        """
        return ENCODERS[self.kind].channels(self)

    def downsamplings(self) -> int:
        """How often the encoder halves the radiograph."""
        return len(self.block_config) if ENCODERS[self.kind].halves else 0

    def build(self, use_checkpoint: bool) -> nn.Module:
        """The encoder, with initial weights: an image to a list of features, from full size down."""
        return ENCODERS[self.kind].build(self, use_checkpoint)


def at_size(radiographs: Float[Tensor, "n views rows columns"], size: int) -> Float[Tensor, "n views s s"]:
    """Radiographs resized to `size` pixels per side, bilinear with antialiasing."""
    if radiographs.shape[2:] == (size, size):
        return radiographs
    return F.interpolate(radiographs, size=(size, size), mode="bilinear", antialias=True)


class IdentityEncoder(nn.Module):
    """The radiograph itself."""

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n _ _ _"]]:
        """One feature map: the radiograph, with one channel."""
        return [radiograph]


class DenseEncoder(nn.Module):
    """A stem at full size, then stages that halve the image; transformer blocks, if any, precede the last stage."""

    def __init__(self, config: EncoderConfig, use_checkpoint: bool = False, transformer_blocks: int = 0) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        widths = config.channels()
        self.stem = nn.Sequential(
            nn.Conv2d(1, config.init_features, 7, padding=3, padding_mode="reflect"),
            nn.InstanceNorm2d(config.init_features),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList()
        for index, count in enumerate(config.block_config):
            width, last = widths[index], index == len(config.block_config) - 1
            stage = nn.Sequential(norm_act_conv_2d(width, width, stride=2))
            for _ in range(count):
                stage.append(DenseLayer(width, config.growth_rate, config.bottleneck_channels))
                width += config.growth_rate
            if not last:
                stage.append(norm_act_conv_2d(width, widths[index + 1], kernel=1))
            self.stages.append(stage)
        self.transformer = nn.ModuleList(transformer_block(widths[-2], config.heads) for _ in range(transformer_blocks))

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Features from full size down, one more than there are stages."""
        features = [self.stem(radiograph)]
        for stage in self.stages:
            if len(features) == len(self.stages) and len(self.transformer):
                features[-1] = self._attend(features[-1])
            features.append(run(stage, features[-1], use_checkpoint=self.use_checkpoint))
        return features

    def _attend(self, features: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c s s"]:
        tokens = features.flatten(2).transpose(1, 2)
        tokens = tokens + positional_encoding(features.shape[-1], 2, features.shape[1], like=tokens)
        for block in self.transformer:
            tokens = run(block, tokens, use_checkpoint=self.use_checkpoint)
        return tokens.transpose(1, 2).reshape(features.shape)


def _conv_norm_act(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Bottleneck(nn.Module):
    """PSR's residual block: 1 x 1 to half the width, 3 x 3, 3 x 3, and a shortcut.

    Each convolution, that of the shortcut too, has no bias and is followed by batch norm and ReLU, as in X2CT-GAN's
    public code.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.residual = nn.Sequential(
            _conv_norm_act(in_channels, half, kernel=1),
            _conv_norm_act(half, half),
            _conv_norm_act(half, out_channels),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else _conv_norm_act(in_channels, out_channels, kernel=1)

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h w"]:
        """ReLU of residual and shortcut."""
        output: Tensor = F.relu(self.residual(features) + self.shortcut(features))
        return output


class Hourglass(nn.Module):
    """PSR's 2-D encoder-decoder: its input is the radiograph at twice the volume's size, halved by the stem.

    Batch norm as published; skip connections add.
    """

    def __init__(self, config: EncoderConfig, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        stem, width = config.init_features, 4 * config.init_features
        self.stem = nn.Sequential(
            _conv_norm_act(1, stem, kernel=7, stride=2),
            Bottleneck(stem, 2 * stem),
            Bottleneck(2 * stem, 2 * stem),
            Bottleneck(2 * stem, 2 * stem),
            Bottleneck(2 * stem, width),
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), *(Bottleneck(width, width) for _ in range(count)))
            for count in config.block_config
        )
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, groups=width, bias=False)
            for _ in config.block_config
        )
        self.up = nn.ModuleList(Bottleneck(width, width) for _ in config.block_config[1:])

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n c s s"]]:
        """One map as large as the radiograph."""
        enlarged = F.interpolate(radiograph, scale_factor=2.0, mode="bilinear", align_corners=False)
        skips = [run(self.stem, enlarged, use_checkpoint=self.use_checkpoint)]
        for stage in self.down:
            skips.append(run(stage, skips[-1], use_checkpoint=self.use_checkpoint))
        features = self.upsamplers[0](skips.pop())
        for upsampler, block in zip(self.upsamplers[1:], self.up, strict=True):
            features = upsampler(run(block, features + skips.pop(), use_checkpoint=self.use_checkpoint))
        return [features + skips.pop()]


class UNet2d(nn.Module):
    """The U-Net (Ronneberger et al. 2015): double convolutions, max pooling, concatenated skip connections."""

    def __init__(self, config: EncoderConfig, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        widths = [config.init_features << k for k in range(len(config.block_config) + 1)]
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(_double_conv(width, next_width) for width, next_width in pairwise((1, *widths)))
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(below, width, 2, stride=2) for width, below in pairwise(widths)
        )
        self.up = nn.ModuleList(_double_conv(2 * width, width) for width in widths[:-1])

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n c s s"]]:
        """One map as large as the radiograph."""
        skips = [run(self.down[0], radiograph, use_checkpoint=self.use_checkpoint)]
        for block in self.down[1:]:
            skips.append(run(block, self.pool(skips[-1]), use_checkpoint=self.use_checkpoint))
        features = skips.pop()
        for index in reversed(range(len(self.up))):
            concatenated = torch.cat([self.upsamplers[index](features), skips.pop()], dim=1)
            features = run(self.up[index], concatenated, use_checkpoint=self.use_checkpoint)
        return [features]


def _double_conv(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.InstanceNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class EncoderKind(NamedTuple):
    """An encoder and the shapes of its features."""

    build: Callable[[EncoderConfig, bool], nn.Module]
    """From the settings and whether activations are recomputed in the backward pass."""
    channels: Callable[[EncoderConfig], tuple[int, ...]]
    """Channels at full size, then after each downsampling."""
    halves: bool = True
    """Whether the image is halved for each number in `block_config`."""


def dense_channels(config: EncoderConfig) -> tuple[int, ...]:
    """Every stage adds the channels of its layers, and all but the last halve the sum."""
    widths = [config.init_features]
    for count in config.block_config[:-1]:
        widths.append((widths[-1] + count * config.growth_rate) // 2)
    return (*widths, widths[-1] + config.block_config[-1] * config.growth_rate)


def transformer_channels(config: EncoderConfig) -> tuple[int, ...]:
    """Those of the dense encoder, if the transformer blocks fit."""
    if len(config.block_config) < 2:
        raise ConfigError(
            f"encoder block_config {config.block_config}: the transformer encoder needs two stages or more"
        )
    widths = dense_channels(config)
    require_divisible_channels(widths[-2:-1], config.heads, "set system.encoder.heads to a divisor")
    return widths


ENCODERS = {
    "dense": EncoderKind(DenseEncoder, dense_channels),
    "transformer": EncoderKind(
        lambda c, recompute: DenseEncoder(c, recompute, c.transformer_blocks), transformer_channels
    ),
    "hourglass": EncoderKind(Hourglass, lambda config: (4 * config.init_features,)),
    "unet": EncoderKind(UNet2d, lambda config: (config.init_features,)),
    "identity": EncoderKind(lambda *_: IdentityEncoder(), lambda _: (1,), halves=False),
}
EncoderName = KeyOf[str, ENCODERS]
