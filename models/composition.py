"""A system as parts by name: encoder, lifting, fusion, decoder, discriminator, loss.

Every system of kind regression or GAN but `unrolled` is a `Composition`, written out in `models/systems/`; a search may
cross them. `Parts` are the first four, for systems with other objectives.

```
radiograph k -> encoder -> lifting -+
                                    +-> fusion and decoder -> head -> volume -> losses, discriminator
radiograph l -> encoder -> lifting -+
```
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models.objectives.adversarial import ReconstructionLoss, reconstruction_objective
from raylift.models.objectives.objective import Objective
from raylift.models.parts.blocks import Checkpointing, initialize
from raylift.models.parts.decoders import DecoderConfig, DecoderContext, ViewDecoder
from raylift.models.parts.discriminators import DiscriminatorConfig
from raylift.models.parts.divisibility import require_divisible_size
from raylift.models.parts.encoders import EncoderConfig, at_size
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.parts.rays import Rays, along_volume_axes
from raylift.models.system_config import DEFAULT_WINDOW, SystemConfig
from raylift.models.volume_network import VolumeNetwork


@dataclass(frozen=True)
class Parts(SystemConfig):
    """The parts of the network, whatever its loss; the defaults are X2CT-GAN's."""

    name: str = ""
    """The system that these settings are based on; the parts below may differ from it."""
    views: tuple[str, ...] = ("frontal", "lateral")
    """Names of views of the archive's geometry; `all`: every one of them when a run starts."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lifting: LiftingConfig = field(default_factory=LiftingConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    checkpointing: Checkpointing = "none"
    """Activation checkpointing; finest: of the decoder at full size only, whose activations take most of the memory."""

    def __post_init__(self) -> None:
        if not self.views or len(set(self.views)) != len(self.views):
            raise ConfigError(f"views {self.views}: name one or more, each once")
        lifted, levels = len(self.lifted_widths), len(self.decoder.channels)
        if levels < 2 and self.decoder.kind != "none":
            raise ConfigError(f"decoder channels {self.decoder.channels}: give two or more")
        if self.decoder.kind == "upsampling" and levels != lifted:
            raise ConfigError(
                f"{levels} decoder channels for {lifted - 1} encoder stages: the upsampling decoder needs {lifted}"
            )
        if self.decoder.kind == "none" and self.lifted_widths != (1,):
            raise ConfigError(
                f"without a decoder the lifted volume is the output, and lifting '{self.lifting.kind}' gives "
                f"{len(self.lifted_widths)} volumes: use system.lifting.kind channels, or a decoder"
            )

    @property
    def lifted_widths(self) -> tuple[int, ...]:
        """Channels of the lifted volumes, coarsest first."""
        return self.lifting.widths(self.encoder.channels(), self.decoder.channels)

    @property
    def shares_encoder(self) -> bool:
        """Whether all views have one encoder: along true rays it does not depend on a pose."""
        return self.lifting.along == "rays"

    @property
    def has_single_view_decoder(self) -> bool:
        """Whether a single view uses the decoder of its branch, as in X2CT-GAN."""
        return self.fusion.view_decoders and len(self.views) == 1 and not self.shares_encoder

    @property
    def has_view_decoders(self) -> bool:
        """Whether each view has a decoder in addition to the fused one."""
        return self.fusion.view_decoders and self.decoder.kind == "upsampling" and not self.has_single_view_decoder

    @property
    def needs_auxiliaries(self) -> bool:
        """Whether its loss uses auxiliary volumes."""
        return False

    def reconstruction_network(self, grid: Grid, geometry: Geometry) -> VolumeNetwork:
        """An encoder and a lifting per view, the fusion and the decoder."""
        return EncoderDecoder(self, grid, geometry)

    def rays(self, grid: Grid, geometry: Geometry) -> list[Rays]:
        """How the views' rays cross the volume, in the views' order."""
        return [Rays(grid, geometry, geometry.view(name), self.lifting.along == "rays") for name in self.views]


@dataclass(frozen=True)
class Composition(Parts):
    """A CNN's or GAN's settings; the defaults are X2CT-GAN as published."""

    name: str = "x2ct-gan"
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: ReconstructionLoss = field(default_factory=ReconstructionLoss)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_auxiliaries and not (self.decoder.has_auxiliaries or self.has_view_decoders):
            raise ConfigError(
                f"decoder '{self.decoder.kind}' has no auxiliary volumes here: set system.loss.deep_supervision_weight "
                "to 0, or use unet++, the rendering head, or system.fusion.view_decoders"
            )

    @property
    def any_views(self) -> bool:
        """Along rays every view goes through the same encoder and lifting; fusions are built for any number."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether its loss uses the archive's label volumes."""
        return self.loss.lung_weight > 0

    @property
    def needs_auxiliaries(self) -> bool:
        """Whether deep supervision has a weight."""
        return self.loss.deep_supervision_weight > 0

    def objective(self, grid: Grid, geometry: Geometry, window: Window = DEFAULT_WINDOW) -> Objective:  # noqa: ARG002
        """The reconstruction network, and a discriminator if the adversarial term has a weight."""
        discriminator = self.discriminator.build(self.rays(grid, geometry)) if self.loss.adversarial_weight else None
        return reconstruction_objective(self.reconstruction_network(grid, geometry), discriminator, self.loss)


class ViewBranch(nn.Module):
    """The branch of one view: an encoder, a lifting and, with view decoders, a decoder."""

    def __init__(self, system: Parts, size: int) -> None:
        super().__init__()
        features, widths = system.encoder.channels(), system.lifted_widths
        self.encoder = system.encoder.build(system.checkpointing == "all")
        self.lifting = system.lifting.build(features, widths, size, system.checkpointing == "all")
        if system.has_view_decoders:
            self.decoder = ViewDecoder(system.decoder, widths)

    def forward(self, radiograph: Float[Tensor, "n 1 s s"], rays: Rays) -> list[Float[Tensor, "n _ _ _ _"]]:
        """The lifted features, coarsest first."""
        lifted: list[Tensor] = self.lifting(radiograph, self.encoder(radiograph), rays)
        return lifted


class EncoderDecoder(VolumeNetwork):
    """Radiographs to a volume: one branch per view, fusion, decoder.

    Along true rays all views go through one branch, and with a fusion that takes any number of views (average, sum,
    attention) the same weights work for any number of views in any pose.
    """

    def __init__(self, system: Parts, grid: Grid, geometry: Geometry) -> None:
        super().__init__()
        levels = len(system.decoder.channels) - 1 if system.decoder.kind != "none" else 0
        downsamplings = max(system.encoder.downsamplings(), levels)
        require_divisible_size(grid.size, 2**downsamplings, "fewer encoder stages")
        self.size, self.rays = grid.size, system.rays(grid, geometry)
        count = 1 if system.shares_encoder else len(system.views)
        self.branches = nn.ModuleList(ViewBranch(system, grid.size) for _ in range(count))
        context = DecoderContext(
            views=len(system.views),
            auxiliaries=system.needs_auxiliaries,
            checkpointing=system.checkpointing,
            view_decoders=system.has_view_decoders,
            single_view=system.has_single_view_decoder,
        )
        self.decoder = system.decoder.build(system.fusion, system.lifted_widths, context)
        initialize(self)

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """The reconstruction, then auxiliary volumes if deep supervision has a weight."""
        radiographs = along_volume_axes(at_size(radiographs, self.size), self.rays)
        branches = list(self.branches) * (len(self.rays) if len(self.branches) == 1 else 1)
        lifted = [
            branch(radiographs[:, k : k + 1], rays)
            for k, (branch, rays) in enumerate(zip(branches, self.rays, strict=True))
        ]
        decoders = [branch.decoder for branch in branches if hasattr(branch, "decoder")]
        volumes: list[Tensor] = self.decoder(lifted, decoders)
        return volumes if torch.is_grad_enabled() else volumes[:1]
