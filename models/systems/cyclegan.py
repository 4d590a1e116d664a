"""CycleGAN-B and CycleGAN-F (Adwait et al. 2024, Boston University EC 523): unpaired radiographs and volumes.

```
radiographs -> G_A -> volume -> G_B -> radiographs                  L1 x 15, volume discriminator
volume of another patient -> G_B -> radiographs -> G_A -> volume     L1 x 15, radiograph discriminator
```

As published: the generator of volumes (7 x 7 to 64 channels, two downsamplings to 256, a 1 x 1 x 1 convolution in 3-D,
six residual blocks, two transposed convolutions, 7 x 7 x 7, dropout 0.3), the generator of radiographs (64, 128, 256
channels, then depth to channels), the patch discriminator of volumes (X2CT-GAN's widths); L1 cycles times 15,
cross-entropy with a target of 0.9 for real, gradients clipped at 1, discriminators in every second step, Adam at 1e-5
with betas 0.5 and 0.999, batch 16, 64 voxels per side, 40 epochs (B) or 50 (F) of 2,873 pairs.

Corrected here:

* their real volumes were Gaussian noise. Here they are CT of other patients where a run has any, and otherwise
  procedural phantoms, which the log and the model card state;
* the last layer of their generator of radiographs was made anew with random weights at every call. Here it is trained
  against a discriminator of radiographs; or the projector itself takes its place (`system.projection projector`);
* their views were stacked as channels, and rotated and jittered each by itself. Here each has an encoder and is
  repeated along its own axis (`system.placement stacked` restores the first), and nothing is jittered;
* their features start at a depth of one, are upsampled to 32 and stretched to 64. Here they fill the cube from the
  start, and every voxel has its depth as a channel.

Chosen: volumes in [0, 1] by a sigmoid, which is their tanh in other units; weights from N(0, 0.02) where they have
Kaiming's, whose scale the instance norms cancel in all layers but the last; the smoothed target for the
discriminators alone; a discriminator of radiographs of 64, 128 and 256 channels; no dropout in discriminators.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
from raylift.models.parts.blocks import ResidualUnit, initialize, upsample_3d
from raylift.models.parts.discriminators import DiscriminatorConfig, ViewDiscriminatorConfig
from raylift.models.parts.divisibility import require_divisible_size
from raylift.models.parts.heads import Head
from raylift.models.parts.radiograph_generator import RadiographGenerator
from raylift.models.parts.rays import Rays, along_volume_axes
from raylift.models.system_config import DEFAULT_WINDOW, Supervision, SystemConfig
from raylift.models.system_entry import SLIM_TRAINING, TINY_TRAINING, SystemEntry, Training, Views
from raylift.models.unpaired_prior import PhantomPrior
from raylift.models.volume_network import VolumeNetwork


@dataclass(frozen=True)
class CycleGan(SystemConfig):
    """Settings of CycleGAN-B and CycleGAN-F; the defaults are CycleGAN-B as published."""

    name: str = "cyclegan-b"
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry."""
    channels: tuple[int, ...] = (64, 128, 256)
    """Channels of the generator of volumes at full size and after each downsampling, in 2-D and in 3-D."""
    blocks: int = 6
    """Its residual blocks in 3-D, at the smallest size."""
    dropout: float = 0.3
    placement: Literal["geometric", "stacked"] = "geometric"
    """geometric: each view has an encoder, and its features are repeated along its own axis. stacked: the views are
    channels of one image, whose features are repeated along the first view's axis, as published: a pixel of the
    lateral is then placed as if it belonged to the frontal."""
    projection: Literal["network", "projector"] = "network"
    """How radiographs of volumes are computed: by a network that is trained with the rest, or by the projector, which
    has no weights. With it, the cycle from volumes to volumes is supervised training on other patients' volumes."""
    projection_channels: tuple[int, ...] = (64, 128, 256)
    """Channels of that network; every number halves the volume."""
    volume_discriminator: DiscriminatorConfig = field(default_factory=lambda: DiscriminatorConfig(conditional=False))
    view_discriminator: ViewDiscriminatorConfig = field(default_factory=lambda: ViewDiscriminatorConfig(pooled=False))
    loss: CycleLoss = field(default_factory=CycleLoss)
    phantoms: int = 16
    """Procedural phantoms that replace volumes of other patients where a run names none."""

    def __post_init__(self) -> None:
        if not self.views or len(set(self.views)) != len(self.views):
            raise ConfigError(f"views {self.views}: name one or more, each once")
        if len(self.channels) < 2 or not self.projection_channels or self.phantoms < 1:
            raise ConfigError(
                f"channels {self.channels}, projection_channels {self.projection_channels}, {self.phantoms} phantoms: "
                "give two, one and one or more"
            )
        require_minimum(self, 1, "channels", "projection_channels")
        require_minimum(self, 0, "blocks")
        require_fraction(self, "dropout")
        if self.view_discriminator.conditional:
            raise ConfigError(
                "radiographs of other patients' volumes have no other views of the same patient as a condition: set "
                "system.view_discriminator.conditional to false"
            )
        if self.volume_discriminator.conditional:
            raise ConfigError(
                "volumes of other patients have no radiographs as a condition: set "
                "system.volume_discriminator.conditional to false"
            )

    @property
    def supervision(self) -> Supervision:
        """`radiographs`: training needs no CT of the patients whose radiographs these are."""
        return "radiographs"

    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> VolumeNetwork:
        """The generator of volumes."""
        return VolumeGenerator(self, grid, self.rays(grid, geometry))

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:
        """Two generators and two discriminators, or one of each with the projector itself."""
        rays, learned = self.rays(grid, geometry), self.projection == "network"
        channels, pixels = self.projection_channels, geometry.detector_px
        networks = CycleNetworks(
            generator=self.reconstruction_network(grid, geometry),
            projection=RadiographGenerator(channels, grid, pixels, rays) if learned else None,
            reprojection=Reprojection(grid, geometry, window, self.views),
            volume_discriminator=self.volume_discriminator.build(rays),
            view_discriminator=self.view_discriminator.build(len(self.views)) if learned else None,
            prior=PhantomPrior(grid, window, self.phantoms),
        )
        return cycle_objective(networks, self.loss)

    def rays(self, grid: Grid, geometry: Geometry) -> list[Rays]:
        """How the views' rays cross the volume, in the views' order."""
        return [Rays(grid, geometry, geometry.view(name), follow_geometry=False) for name in self.views]


class VolumeGenerator(VolumeNetwork):
    """Radiographs downsampled in 2-D, repeated into 3-D at the smallest size, residual blocks, upsampled in 3-D.

    The depth along each view's rays is a further channel: repeated features are the same at all depths.
    """

    def __init__(self, system: CycleGan, grid: Grid, rays: list[Rays]) -> None:
        super().__init__()
        require_divisible_size(grid.size, 2 ** (len(system.channels) - 1), "fewer channels")
        self.size, self.stacked = grid.size, system.placement == "stacked"
        self.view_rays, self.rays = rays, rays[:1] if self.stacked else rays
        in_channels, widest = len(rays) if self.stacked else 1, system.channels[-1]
        self.encoders = nn.ModuleList(_encoder(in_channels, system) for _ in self.rays)
        self.merge = nn.Conv3d(len(self.rays) * (widest + 1), widest, 1)
        self.blocks = nn.Sequential(
            *(ResidualUnit(widest, widest, dropout=system.dropout) for _ in range(system.blocks))
        )
        self.up = nn.Sequential(*(upsample_3d(*pair) for pair in pairwise(reversed(system.channels))))
        self.head = Head(system.channels[0], "sigmoid")
        initialize(self)

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """A list with the volume; there are no auxiliary ones."""
        if radiographs.shape[-1] != self.size:
            radiographs = F.interpolate(radiographs, size=(self.size, self.size), mode="bilinear", antialias=True)
        radiographs = along_volume_axes(radiographs, self.view_rays)
        images = [radiographs] if self.stacked else list(radiographs.unsqueeze(2).unbind(1))
        placed = []
        for image, encoder, rays in zip(images, self.encoders, self.rays, strict=True):
            features = rays.backproject(encoder(image))
            placed += [features, rays.depth(features.shape[-1], like=features).expand(len(features), -1, -1, -1, -1)]
        return [self.head(self.up(self.blocks(self.merge(torch.cat(placed, dim=1)))))]


def _encoder(in_channels: int, system: CycleGan) -> nn.Sequential:
    first, *others = system.channels
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, first, 7, padding=3, padding_mode="reflect"),
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


BIPLANAR = CycleGan(
    name="cyclegan-b",
    views=("frontal", "lateral"),
    channels=(64, 128, 256),
    blocks=6,
    dropout=0.3,
    placement="geometric",
    projection="network",
    projection_channels=(64, 128, 256),
    volume_discriminator=DiscriminatorConfig(kind="patch", channels=(64, 128, 256, 512), conditional=False),
    view_discriminator=ViewDiscriminatorConfig(channels=(64, 128, 256), pooled=False, conditional=False),
    loss=CycleLoss(cycle_weight=15.0, adversarial_weight=1.0, smoothing=0.1, discriminators_every=2),
    phantoms=16,
)
FRONTAL = replace(BIPLANAR, name="cyclegan-f", views=("frontal",))


def with_channels(system: CycleGan, channels: tuple[int, ...], blocks: int, discriminator: tuple[int, ...]) -> CycleGan:
    """The system with other widths, of both generators and of the discriminators."""
    return replace(
        system,
        channels=channels,
        blocks=blocks,
        projection_channels=channels,
        volume_discriminator=replace(system.volume_discriminator, channels=discriminator),
        view_discriminator=replace(system.view_discriminator, channels=discriminator[:-1]),
    )


def entry(title: str, published: CycleGan, views: Views, epochs: int) -> SystemEntry:
    """One of the two systems; an epoch of 2,873 pairs in batches of 16 has 180 steps."""
    return SystemEntry(
        title=title,
        summary="radiographs to volumes and back, volumes of other patients to radiographs and back",
        paper="Adwait et al. 2024, Boston University",
        year=2024,
        views=views,
        kind="unpaired",
        full=published,
        slim=with_channels(published, (16, 32, 64), 3, (16, 32, 64, 64)),
        tiny=with_channels(published, (8, 8, 16), 1, (8, 16, 16)),
        training=Training(
            size=64,
            steps=epochs * 180,
            batch_size=16,
            lr=1e-5,
            betas=(0.5, 0.999),
            decay_start=1.0,
            gradient_clipping=1.0,
        ),
        slim_training=replace(SLIM_TRAINING, gradient_clipping=1.0),
        tiny_training=replace(TINY_TRAINING, gradient_clipping=1.0),
        spacing_mm=5.0,
    )


CYCLEGAN_B = entry("CycleGAN-B", BIPLANAR, "2", epochs=40)
CYCLEGAN_F = entry("CycleGAN-F", FRONTAL, "1", epochs=50)
