"""Networks that tell CT volumes from reconstructions, given the radiographs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.blocks import initialise
from raylift.models.lifting import repeat_along_rays


@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """X2CT-GAN's conditional 3-D patch discriminator: 11,055,169 parameters with two views at the defaults."""

    channels: tuple[int, ...] = (64, 128, 256, 512)
    conditional: bool = True


class PatchDiscriminator(nn.Module):
    """Convolutions of 4 x 4 x 4 over the volume and the repeated radiographs; each output judges one patch.

    All but the last of `channels` halve the size. Inner convolutions have no bias, which the instance norm after
    them would take away.
    """

    def __init__(self, config: PatchDiscriminatorConfig, views: tuple[str, ...]) -> None:
        super().__init__()
        self.views = views if config.conditional else ()
        widths = (1 + len(self.views), *config.channels)
        layers: list[nn.Module] = []
        for index, (width, next_width) in enumerate(pairwise(widths)):
            first, last = index == 0, index == len(config.channels) - 1
            layers.append(nn.Conv3d(width, next_width, 4, 1 if last else 2, padding=2, bias=first))
            if not first:
                layers.append(nn.InstanceNorm3d(next_width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        layers.append(nn.Conv3d(widths[-1], 1, 4, padding=2))
        self.layers = nn.Sequential(*layers)
        initialise(self)

    def forward(
        self, volume: Float[Tensor, "n 1 d h w"], radiographs: Float[Tensor, "n views rows columns"]
    ) -> Float[Tensor, "n 1 pd ph pw"]:
        """A score for each patch, without a final activation."""
        conditions = [
            repeat_along_rays(radiographs[:, index : index + 1].detach(), view) for index, view in enumerate(self.views)
        ]
        scores: Tensor = self.layers(torch.cat([*conditions, volume], dim=1))
        return scores
