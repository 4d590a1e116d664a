"""CycleGAN's settings and its two generators: radiographs to a volume, and a volume to radiographs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.datasets.serialization import require_fraction, require_minimum
from raylift.models.drr import Reprojection
from raylift.models.objectives.cycle import CycleLoss, CycleNetworks, cycle_objective
from raylift.models.objectives.objective import Objective
from raylift.models.parts.blocks import ResidualBlock, initialize, upsample_3d
from raylift.models.parts.discriminators import Discriminator, DiscriminatorConfig, ViewDiscriminatorConfig
from raylift.models.parts.heads import Head
from raylift.models.parts.rays import Rays
from raylift.models.system_config import DEFAULT_WINDOW, LearnsFrom, SystemConfig
from raylift.models.unpaired_prior import DrawnPeople
from raylift.models.volume_network import VolumeNetwork


@dataclass(frozen=True)
class CycleGan(SystemConfig):
    """Settings of CycleGAN-B and CycleGAN-F; the defaults are CycleGAN-B as published."""

    name: Literal["cyclegan-b", "cyclegan-f"] = "cyclegan-b"
    """B began with two views, F with the frontal alone."""
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry."""
    channels: tuple[int, ...] = (64, 128, 256)
    """Of the generator of volumes at full size and after each halving, in 2-D and in 3-D."""
    blocks: int = 6
    """Its residual blocks in 3-D, at the smallest size."""
    dropout: float = 0.3
    placement: Literal["geometric", "stacked"] = "geometric"
    """geometric: each view has an encoder, and its features are repeated along its own axis. stacked: the views are
    channels of one image, whose features are repeated along the first view's axis, as published: a pixel of the
    lateral then stands where a pixel of the frontal belongs."""
    projection: Literal["network", "projector"] = "network"
    """What makes radiographs of volumes: a network that is trained with the rest, or the projector itself, which has
    nothing to learn. With the projector the way from volumes and back is supervised training on other people's
    volumes."""
    projection_channels: tuple[int, ...] = (64, 128, 256)
    """Of that network; every number halves the volume."""
    volume_discriminator: DiscriminatorConfig = field(default_factory=lambda: DiscriminatorConfig(conditional=False))
    view_discriminator: ViewDiscriminatorConfig = field(default_factory=lambda: ViewDiscriminatorConfig(pooled=False))
    loss: CycleLoss = field(default_factory=CycleLoss)
    drawn_people: int = 16
    """Procedural thoraces that stand for volumes of other people where a run names none."""

    def __post_init__(self) -> None:
        if not self.views or len(set(self.views)) != len(self.views):
            raise ConfigError(f"views {self.views}: name one or more, each once")
        if len(self.channels) < 2 or not self.projection_channels or self.drawn_people < 1:
            raise ConfigError(
                f"channels {self.channels}, projection_channels {self.projection_channels}, {self.drawn_people} drawn "
                "people: give two, one and one or more"
            )
        require_minimum(self, 1, "channels", "projection_channels")
        require_minimum(self, 0, "blocks")
        require_fraction(self, "dropout")
        if self.view_discriminator.conditional:
            raise ConfigError(
                "radiographs made of other people's volumes have no others of the same person to be judged beside: set "
                "system.view_discriminator.conditional to false"
            )
        if self.volume_discriminator.conditional:
            raise ConfigError(
                "volumes of other people have no radiographs to be judged beside: set "
                "system.volume_discriminator.conditional to false"
            )

    @property
    def learns_from(self) -> LearnsFrom:
        """No CT of the views."""
        return "radiographs"

    def reconstructor(self, grid: Grid, geometry: Geometry) -> VolumeNetwork:
        """The generator of volumes."""
        return VolumeGenerator(self, grid, self.rays(grid, geometry))

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:
        """Two generators and two discriminators, or one of each with the projector itself."""
        rays, learned = self.rays(grid, geometry), self.projection == "network"
        networks = CycleNetworks(
            generator=self.reconstructor(grid, geometry),
            projection=RadiographGenerator(self, grid, geometry, rays) if learned else None,
            reprojection=Reprojection(grid, geometry, window, self.views),
            volume_discriminator=Discriminator(self.volume_discriminator, rays),
            view_discriminator=self.view_discriminator.build(len(self.views)) if learned else None,
            prior=DrawnPeople(grid, window, self.drawn_people),
        )
        return cycle_objective(networks, self.loss)

    def rays(self, grid: Grid, geometry: Geometry) -> list[Rays]:
        """How the views' rays cross the volume, in the views' order."""
        rays = [Rays(grid, geometry, geometry.view(name), follow_geometry=False) for name in self.views]
        for ray in rays:
            ray.check()
        return rays


class VolumeGenerator(VolumeNetwork):
    """Radiographs down in 2-D, repeated into 3-D at the smallest size, residual blocks, and up again.

    Beside its features every voxel knows its depth along each view's rays: repeated features are the same at all.
    """

    def __init__(self, system: CycleGan, grid: Grid, rays: list[Rays]) -> None:
        super().__init__()
        _require_halvings(grid, len(system.channels) - 1)
        self.size, self.stacked = grid.size, system.placement == "stacked"
        self.rays = rays[:1] if self.stacked else rays
        entering, widest = len(rays) if self.stacked else 1, system.channels[-1]
        self.encoders = nn.ModuleList(_encoder(entering, system) for _ in self.rays)
        self.merge = nn.Conv3d(len(self.rays) * (widest + 1), widest, 1)
        self.blocks = nn.Sequential(
            *(ResidualBlock(widest, widest, dropout=system.dropout) for _ in range(system.blocks))
        )
        self.up = nn.Sequential(*(upsample_3d(*pair) for pair in pairwise(reversed(system.channels))))
        self.head = Head(system.channels[0], "sigmoid")
        initialize(self)

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """A list of one."""
        if radiographs.shape[-1] != self.size:
            radiographs = F.interpolate(radiographs, size=(self.size, self.size), mode="bilinear", antialias=True)
        images = [radiographs] if self.stacked else list(radiographs.unsqueeze(2).unbind(1))
        placed = []
        for image, encoder, rays in zip(images, self.encoders, self.rays, strict=True):
            spread = rays.backproject(encoder(image))
            placed += [spread, rays.depth(spread.shape[-1], like=spread).expand(len(spread), -1, -1, -1, -1)]
        return [self.head(self.up(self.blocks(self.merge(torch.cat(placed, dim=1)))))]


class RadiographGenerator(nn.Module):
    """A volume to radiographs: turned so that the rays run along its depth, halved in 3-D, the depth folded into 2-D.

    All views share the convolutions; each has its last layer, which gives a pixel of the smallest size as many
    channels as it has pixels of the radiograph. (Published: one channel, enlarged eight times, from a layer that was
    made anew with random weights at every call.)
    """

    def __init__(self, system: CycleGan, grid: Grid, geometry: Geometry, rays: list[Rays]) -> None:
        super().__init__()
        halvings = len(system.projection_channels)
        _require_halvings(grid, halvings)
        self.axes, self.pixels = [ray.axis for ray in rays], geometry.detector_px
        layers: list[nn.Module] = []
        for width, next_width in pairwise((1, *system.projection_channels)):
            layers += [
                nn.Conv3d(width, next_width, 4, stride=2, padding=1),
                nn.InstanceNorm3d(next_width),
                nn.ReLU(inplace=True),
            ]
        self.down = nn.Sequential(*layers)
        folded = system.projection_channels[-1] * (grid.size >> halvings)
        self.to_pixels = nn.ModuleList(nn.Conv2d(folded, 4**halvings, 1) for _ in rays)
        self.pixel_shuffle = nn.PixelShuffle(2**halvings)
        initialize(self)

    def forward(self, volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, "n views rows columns"]:
        """Radiographs in [0, 1], as batches have them."""
        images = [
            self.pixel_shuffle(unfold(self.down(volume.movedim(axis, 2)).flatten(1, 2)))
            for axis, unfold in zip(self.axes, self.to_pixels, strict=True)
        ]
        shown = torch.sigmoid(torch.cat(images, dim=1))
        if shown.shape[-1] != self.pixels:
            shown = F.interpolate(shown, size=(self.pixels, self.pixels), mode="bilinear", antialias=True)
        return shown


def _encoder(entering: int, system: CycleGan) -> nn.Sequential:
    first, *others = system.channels
    layers: list[nn.Module] = [
        nn.Conv2d(entering, first, 7, padding=3, padding_mode="reflect"),
        nn.InstanceNorm2d(first),
        nn.ReLU(inplace=True),
    ]
    for index, (width, next_width) in enumerate(pairwise((first, *others))):
        layers += [
            nn.Conv2d(width, next_width, 3, stride=2, padding=1),
            nn.InstanceNorm2d(next_width),
            nn.ReLU(inplace=True),
            *([nn.Dropout(system.dropout)] if system.dropout and index == 0 else []),
        ]
    return nn.Sequential(*layers)


def _require_halvings(grid: Grid, halvings: int) -> None:
    if grid.size % 2**halvings or grid.size < 2 * 2**halvings:
        raise ConfigError(
            f"size {grid.size} cannot be halved {halvings} times to 2 or more: "
            f"use a multiple of {2**halvings} from {2 * 2**halvings} up, or fewer channels"
        )
