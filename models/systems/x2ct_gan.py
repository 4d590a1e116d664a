"""X2CT-GAN (Ying et al., CVPR 2019, arXiv 1905.06902): CT from one or two radiographs by lifted dense features.

Each view has an encoder, lifts its features at every size, and decodes them; after each join the views are fused, the
fusion replaces both views' features, and a third decoder grows the volume that counts. At the published settings the
biplanar generator has 61,740,467 parameters, the single-view one 29,384,481.

Ours in the same network: lifted volumes stand in the patient's axes from the start, where theirs are permuted at every
fusion (same function, kernels transposed); and the views' own heads, whose output has no weight in the published
loss, exist but are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.models.blocks import initialise
from raylift.models.decoders import ActivationName, Decoder, Head
from raylift.models.discriminators import PatchDiscriminator, PatchDiscriminatorConfig
from raylift.models.encoders import DenseEncoder, DenseEncoderConfig
from raylift.models.fusion import FusionName, fusion
from raylift.models.lifting import RepeatLift, VectorLift
from raylift.models.objectives.adversarial import ReconstructionLoss, reconstruction_objective
from raylift.models.objectives.turns import Objective

ViewName = Literal["frontal", "lateral"]


@dataclass(frozen=True)
class X2CTGAN:
    """The system's settings; the defaults are the published ones."""

    name: Literal["x2ct-gan"] = "x2ct-gan"
    views: tuple[ViewName, ...] = ("frontal", "lateral")
    encoder: DenseEncoderConfig = field(default_factory=DenseEncoderConfig)
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16, 16)
    """From the coarsest volume, 1/32 of the size, to the finest."""
    dropout: float = 0.5
    fusion: FusionName = "average"
    output: ActivationName = "relu"
    discriminator: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    loss: ReconstructionLoss = field(default_factory=ReconstructionLoss)

    def __post_init__(self) -> None:
        if len(self.decoder_channels) != len(self.encoder.layers) + 1:
            raise ConfigError(
                f"{len(self.decoder_channels)} decoder widths for {len(self.encoder.layers)} encoder stages: "
                f"give {len(self.encoder.layers) + 1}"
            )
        if not self.views or len(set(self.views)) != len(self.views):
            raise ConfigError(f"views {self.views}: give frontal, lateral or both, each once")

    def reconstructor(self, size: int) -> nn.Module:
        """The network that makes volumes of `size` voxels a side, with fresh weights."""
        return Generator(self, size)

    def objective(self, size: int) -> Objective:
        """The players that train it, with fresh weights."""
        discriminator = PatchDiscriminator(self.discriminator, self.views) if self.loss.adversarial else None
        return reconstruction_objective(self.reconstructor(size), discriminator, self.loss)


class ViewBranch(nn.Module):
    """What each view has to itself: an encoder, lifts at every size, and a decoder whose end only a lone view uses."""

    def __init__(self, config: X2CTGAN, size: int, view: ViewName) -> None:
        super().__init__()
        channels = config.decoder_channels
        *skips, vector = config.encoder.channels()
        self.encoder = DenseEncoder(config.encoder)
        self.lift_vector = VectorLift(vector, channels[0], size >> len(config.encoder.layers), config.dropout)
        self.lifts = nn.ModuleList(
            RepeatLift(skip, width, view) for skip, width in zip(reversed(skips), channels[1:], strict=True)
        )
        self.decoder = Decoder(channels, blocks=2, last_blocks=1)
        self.head = Head(channels[-1], config.output)

    def forward(self, radiograph: Float[Tensor, "n 1 s s"]) -> list[Float[Tensor, "n _ _ _ _"]]:
        """The lifted features, coarsest first."""
        features, vector = self.encoder(radiograph)
        coarsest = self.lift_vector(vector)
        return [coarsest, *(lift(skip) for lift, skip in zip(self.lifts, reversed(features), strict=True))]


class Generator(nn.Module):
    """Radiographs to a volume. One view decodes alone; several are fused at every size."""

    def __init__(self, config: X2CTGAN, size: int) -> None:
        super().__init__()
        halvings = len(config.encoder.layers)
        if size % 2**halvings or size < 2 * 2**halvings:
            raise ConfigError(
                f"size {size} cannot be halved {halvings} times to 2 or more: "
                f"use a multiple of {2**halvings} from {2 * 2**halvings} up, or fewer encoder stages"
            )
        self.views = config.views
        self.branches = nn.ModuleList(ViewBranch(config, size, view) for view in config.views)
        channels = config.decoder_channels
        if len(config.views) > 1:
            self.fuse = nn.ModuleList(fusion(config.fusion, width, len(config.views)) for width in channels)
            self.decoder = Decoder(channels, blocks=1, last_blocks=1)
            self.head = Head(channels[-1], config.output)
        initialise(self)

    def forward(self, radiographs: Float[Tensor, "n views s s"]) -> Float[Tensor, "n 1 s s s"]:
        """Volumes in the window's [0, 1]; values outside can occur and are clipped by whoever needs HU."""
        branches = [branch for branch in self.branches if isinstance(branch, ViewBranch)]
        lifted = [branch(radiographs[:, k : k + 1]) for k, branch in enumerate(branches)]
        if len(branches) == 1:
            alone: Tensor = branches[0].head(branches[0].decoder(lifted[0]))
            return alone
        fused = self.fuse[0]([skips[0] for skips in lifted])
        volume = self.decoder.level(0).refine(fused)
        for index in range(1, len(self.decoder)):
            # The fused volume stands in for what each view had at the size below.
            joined = [
                branch.decoder.level(index).join(branch.decoder.level(index - 1).refine(fused), skips[index])
                for branch, skips in zip(branches, lifted, strict=True)
            ]
            fused = self.fuse[index](joined)
            volume = self.decoder.level(index).refine(self.decoder.level(index).join(volume, fused))
        result: Tensor = self.head(volume)
        return result
