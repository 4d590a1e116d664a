"""The same parts with fewer channels: small variants of the systems made of parts, for CPU cores, demos and tests.

A final ReLU of a published network is replaced by a leaky ReLU, because its gradient often vanishes in small networks
on volumes that are mostly air.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from raylift.models.composition import Composition
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.reprojection_composition import ReprojectionComposition

P = TypeVar("P", Composition, ReprojectionComposition)


@dataclass(frozen=True)
class Widths:
    """Channels and layers of a small network."""

    layers: tuple[int, ...]
    """Dense layers of each encoder stage."""
    growth_rate: int
    decoder: tuple[int, ...]
    """From the coarsest volume to the finest."""
    discriminator: tuple[int, ...]


SLIM = Widths((2, 3, 4, 3, 2), 8, (64, 32, 24, 16, 8, 8), (16, 32, 64, 64))
TINY = Widths((1, 1, 1, 1), 4, (32, 16, 8, 8, 8), (8, 16, 16))
SLIM_REPROJECTION = Widths((4, 4, 4, 4), 8, (64, 32, 16, 8, 8), (16, 32, 64))
TINY_REPROJECTION = Widths((2, 2, 2), 4, (16, 16, 8, 8), (8, 16))


def slim(system: P) -> P:
    """The variant for 64 voxels per side: about two million parameters or fewer."""
    if isinstance(system, Composition):
        return _composition(system, SLIM)
    return _reprojection(system, SLIM_REPROJECTION)


def tiny(system: P) -> P:
    """The variant for 32 voxels per side: a tenth of a second for each step."""
    if isinstance(system, Composition):
        return _composition(system, TINY)
    return _reprojection(system, TINY_REPROJECTION)


def _composition(system: Composition, widths: Widths) -> Composition:
    encoder, decoder, growth_rate = system.encoder, system.decoder, widths.growth_rate
    if encoder.kind in ("dense", "transformer"):
        bottleneck = growth_rate * (4 if growth_rate > 4 else 2)
        encoder = replace(
            encoder,
            init_features=2 * growth_rate,
            growth_rate=growth_rate,
            bottleneck_channels=bottleneck,
            block_config=widths.layers,
            transformer_blocks=2,
            heads=1,
        )
    elif encoder.kind == "hourglass":
        encoder = EncoderConfig(
            kind="hourglass", init_features=2 * growth_rate, block_config=(1,) * (len(widths.decoder) - 2)
        )
    if decoder.kind != "none":
        output = "leaky_relu" if decoder.output == "relu" else decoder.output
        decoder = replace(decoder, channels=widths.decoder, output=output)
    return replace(
        system,
        encoder=encoder,
        lifting=replace(system.lifting, heads=2),
        decoder=decoder,
        discriminator=replace(system.discriminator, channels=widths.discriminator, condition_channels=4),
        checkpointing="none",
    )


def _reprojection(system: ReprojectionComposition, widths: Widths) -> ReprojectionComposition:
    growth_rate, dense = widths.growth_rate, system.encoder.kind == "dense"
    encoder = replace(
        system.encoder, init_features=growth_rate, growth_rate=growth_rate, bottleneck_channels=4 * growth_rate
    )
    return replace(
        system,
        encoder=replace(encoder, init_features=2 * growth_rate, block_config=widths.layers) if dense else encoder,
        # The upsampling decoder has a width for every size of the encoder.
        decoder=replace(system.decoder, channels=widths.decoder if dense else widths.decoder[-3:]),
        discriminator=replace(system.discriminator, channels=widths.discriminator),
    )
