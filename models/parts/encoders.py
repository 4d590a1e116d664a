"""What a radiograph becomes before it is lifted: features at several sizes, each half the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_least
from raylift.models.parts.attention import TransformerBlock, positions
from raylift.models.parts.blocks import DenseLayer, convolve_2d, run
from raylift.models.parts.unet_2d import ImageUNet

EncoderName = Literal["dense", "transformer", "hourglass", "unet", "image"]


@dataclass(frozen=True)
class EncoderConfig:
    """How a radiograph is encoded; the defaults are X2CT-GAN's."""

    kind: EncoderName = "dense"
    """dense: X2CT-GAN's densely connected stages. transformer: the same, with transformer blocks before the last stage
    (TRCT-GAN). hourglass: PSR's residual encoder-decoder, whose answer is one map of full size. unet: the U-Net, the
    same (cGAN-128). image: the radiograph itself, nothing learned (3DCNN)."""
    stem: int = 64
    """Channels at full size; the hourglass has four times as many inside, the U-Net doubles them with each halving."""
    growth: int = 32
    bottleneck: int = 128
    layers: tuple[int, ...] = (6, 12, 24, 16, 6)
    """Dense layers of each stage, or residual blocks of the hourglass at each size; every stage halves the image. The
    U-Net has as many halvings as there are numbers here and two convolutions a size, whatever they are."""
    transformer_blocks: int = 6
    heads: int = 8

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            raise ConfigError(f"encoder layers {self.layers}: give one or more stages of one or more layers")
        require_least(self, 1, "stem", "growth", "bottleneck", "heads")
        require_least(self, 0, "transformer_blocks")
        if self.kind == "transformer" and (len(self.layers) < 2 or self.channels()[-2] % self.heads):
            raise ConfigError(
                f"{self.heads} heads cannot share {self.channels()[-2:][0]} channels: use a divisor, "
                "and two stages or more"
            )

    def channels(self) -> tuple[int, ...]:
        """Channels at full size, then after each halving."""
        if self.kind == "image":
            return (1,)
        if self.kind == "hourglass":
            return (4 * self.stem,)
        if self.kind == "unet":
            return (self.stem,)
        widths = [self.stem]
        for count in self.layers[:-1]:
            widths.append((widths[-1] + count * self.growth) // 2)
        return (*widths, widths[-1] + self.layers[-1] * self.growth)

    def halvings(self) -> int:
        """How often the radiograph is halved inside."""
        return 0 if self.kind == "image" else len(self.layers)

    def build(self, recompute: bool) -> nn.Module:
        """The encoder, with fresh weights: a list of features for an image, from full size down."""
        if self.kind == "image":
            return ImageEncoder()
        if self.kind == "hourglass":
            return Hourglass(self, recompute)
        if self.kind == "unet":
            return ImageUNet(tuple(self.stem << k for k in range(len(self.layers) + 1)), recompute)
        return DenseEncoder(self, recompute)


def at_size(radiographs: Float[Tensor, "n views rows columns"], size: int) -> Float[Tensor, "n views s s"]:
    """Radiographs of so many pixels a side."""
    if radiographs.shape[2:] == (size, size):
        return radiographs
    return F.interpolate(radiographs, size=(size, size), mode="bilinear", antialias=True)


class ImageEncoder(nn.Module):
    """The radiograph as it is."""

    def forward(self, radiograph: Float[Tensor, "n 1 rows columns"]) -> list[Float[Tensor, "n _ _ _"]]:
        """A list of one."""
        return [radiograph]


class DenseEncoder(nn.Module):
    """A stem at full size, then stages that halve the image; transformer blocks, if any, stand before the last."""

    def __init__(self, config: EncoderConfig, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        widths = config.channels()
        self.stem = nn.Sequential(
            nn.Conv2d(1, config.stem, 7, padding=3, padding_mode="reflect"),
            nn.InstanceNorm2d(config.stem),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList()
        for index, count in enumerate(config.layers):
            width, last = widths[index], index == len(config.layers) - 1
            stage = nn.Sequential(convolve_2d(width, width, stride=2))
            for _ in range(count):
                stage.append(DenseLayer(width, config.growth, config.bottleneck))
                width += config.growth
            if not last:
                stage.append(convolve_2d(width, widths[index + 1], kernel=1))
            self.stages.append(stage)
        blocks = config.transformer_blocks if config.kind == "transformer" else 0
        self.transformer = nn.ModuleList(TransformerBlock(widths[-2], config.heads) for _ in range(blocks))

    def forward(self, radiograph: Float[Tensor, "n 1 rows columns"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Features from full size down, one more than there are stages."""
        features = [self.stem(radiograph)]
        for stage in self.stages:
            if len(features) == len(self.stages) and len(self.transformer):
                features[-1] = self._attend(features[-1])
            features.append(run(stage, features[-1], recompute=self.recompute))
        return features

    def _attend(self, features: Float[Tensor, "n c s s"]) -> Float[Tensor, "n c s s"]:
        tokens = features.flatten(2).transpose(1, 2)
        tokens = tokens + positions(features.shape[-1], 2, features.shape[1], like=tokens)
        for block in self.transformer:
            tokens = run(block, tokens, recompute=self.recompute)
        return tokens.transpose(1, 2).reshape(features.shape)


def _normed(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Bottleneck(nn.Module):
    """PSR's residual block: 1 x 1 to half the width, 3 x 3, 3 x 3, beside a straight path."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.bend = nn.Sequential(
            _normed(in_channels, half, kernel=1),
            _normed(half, half),
            nn.Conv2d(half, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        same = in_channels == out_channels
        self.straight = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h w"]:
        """The sum of both paths, rectified."""
        rectified: Tensor = F.relu(self.bend(features) + self.straight(features))
        return rectified


class Hourglass(nn.Module):
    """PSR's 2-D encoder-decoder: it looks at the radiograph at twice the volume's size, halves it, goes down and back.

    Batch norm as published; what comes up is added to what went down.
    """

    def __init__(self, config: EncoderConfig, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        stem, width = config.stem, 4 * config.stem
        self.stem = nn.Sequential(
            _normed(1, stem, kernel=7, stride=2),
            Bottleneck(stem, 2 * stem),
            Bottleneck(2 * stem, 2 * stem),
            Bottleneck(2 * stem, 2 * stem),
            Bottleneck(2 * stem, width),
        )
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), *(Bottleneck(width, width) for _ in range(count))) for count in config.layers
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, groups=width, bias=False) for _ in config.layers
        )
        self.refine = nn.ModuleList(Bottleneck(width, width) for _ in config.layers[1:])

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n c s s"]]:
        """One map as large as the radiograph."""
        twice = F.interpolate(radiograph, scale_factor=2.0, mode="bilinear", align_corners=False)
        features = [run(self.stem, twice, recompute=self.recompute)]
        for stage in self.down:
            features.append(run(stage, features[-1], recompute=self.recompute))
        up = self.up[0](features.pop())
        for grow, refine in zip(self.up[1:], self.refine, strict=True):
            up = grow(run(refine, up + features.pop(), recompute=self.recompute))
        # What the stem saw at full size is not added: the published decoder ends with the last step up.
        return [up]
