"""What a radiograph becomes before it is lifted: features at several sizes, and one vector for the whole image."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.blocks import DenseLayer, convolve_2d


@dataclass(frozen=True)
class DenseEncoderConfig:
    """X2CT-GAN's densely connected encoder. The defaults are the published ones."""

    stem: int = 64
    growth: int = 32
    bottleneck: int = 128
    layers: tuple[int, ...] = (6, 12, 24, 16, 6)

    def channels(self) -> tuple[int, ...]:
        """Channels at full size, then after each halving but the last; last of all those of the vector."""
        widths = [self.stem]
        for count in self.layers[:-1]:
            widths.append((widths[-1] + count * self.growth) // 2)
        return (*widths, widths[-1] + self.layers[-1] * self.growth)


class DenseEncoder(nn.Module):
    """A stem at full size, then stages that halve the image; the last one is averaged to a vector."""

    def __init__(self, config: DenseEncoderConfig) -> None:
        super().__init__()
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
            stage.append(nn.AdaptiveAvgPool2d(1) if last else convolve_2d(width, widths[index + 1], kernel=1))
            self.stages.append(stage)

    def forward(
        self, radiograph: Float[Tensor, "n 1 rows columns"]
    ) -> tuple[list[Float[Tensor, "n _ _ _"]], Float[Tensor, "n c"]]:
        """Features from full size down to one sixteenth, and the vector."""
        features = [self.stem(radiograph)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[:-1], features[-1].flatten(1)
