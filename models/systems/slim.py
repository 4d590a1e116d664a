"""The same choices with fewer channels: systems that train on CPU cores, for demos, searches and tests.

A published ReLU at the end becomes a leaky one: small networks on volumes that are mostly air die of the first.
"""

from __future__ import annotations

from dataclasses import replace

from raylift.models.composition import Composition
from raylift.models.parts.encoders import EncoderConfig


def slim(system: Composition) -> Composition:
    """For 64 voxels a side: two million parameters or fewer."""
    layers = (2, 3, 4, 3, 2)
    return shrunk(system, layers, 8, (64, 32, 24, 16, 8, 8), (16, 32, 64, 64))


def tiny(system: Composition) -> Composition:
    """For 32 voxels a side: four halvings, a tenth of a second a step."""
    return shrunk(system, (1, 1, 1, 1), 4, (32, 16, 8, 8, 8), (8, 16, 16))


def shrunk(
    system: Composition,
    layers: tuple[int, ...],
    growth: int,
    channels: tuple[int, ...],
    discriminator_channels: tuple[int, ...],
) -> Composition:
    """The system with these dense layers, growth, decoder and discriminator widths, coarsest first."""
    encoder, decoder = system.encoder, system.decoder
    depth = len(channels)
    if encoder.kind in ("dense", "transformer"):
        bottleneck = growth * (4 if growth > 4 else 2)
        encoder = replace(
            encoder, stem=2 * growth, growth=growth, bottleneck=bottleneck, layers=layers, transformer_blocks=2, heads=1
        )
    elif encoder.kind == "hourglass":
        encoder = EncoderConfig(kind="hourglass", stem=2 * growth, layers=(1,) * (depth - 2))
    if decoder.kind != "none":
        output = "leaky_relu" if decoder.output == "relu" else decoder.output
        decoder = replace(decoder, channels=channels, output=output)
    return replace(
        system,
        encoder=encoder,
        lifting=replace(system.lifting, heads=2),
        decoder=decoder,
        discriminator=replace(system.discriminator, channels=discriminator_channels, condition_channels=4),
        checkpointing="none",
    )
