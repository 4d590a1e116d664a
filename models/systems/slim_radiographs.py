"""The systems that learn from radiographs, with fewer channels: for CPU cores, demos, searches and tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from raylift.models.parts.cyclegan_networks import CycleGan
from raylift.models.xray_only import Reprojected

S = TypeVar("S", Reprojected, CycleGan)


def slim(system: S) -> S:
    """For 64 voxels a side: two million parameters or fewer."""
    if isinstance(system, CycleGan):
        return _cycle(system, (16, 32, 64), 3, (16, 32, 64, 64))
    return _reprojected(system, (4, 4, 4, 4), 8, (64, 32, 16, 8, 8), (16, 32, 64))


def tiny(system: S) -> S:
    """For 32 voxels a side: a tenth of a second a step."""
    if isinstance(system, CycleGan):
        return _cycle(system, (8, 8, 16), 1, (8, 16, 16))
    return _reprojected(system, (2, 2, 2), 4, (16, 16, 8, 8), (8, 16))


def _reprojected(
    system: Reprojected,
    layers: tuple[int, ...],
    growth: int,
    channels: tuple[int, ...],
    discriminator_channels: tuple[int, ...],
) -> Reprojected:
    dense = system.encoder.kind == "dense"
    encoder = replace(system.encoder, stem=growth, growth=growth, bottleneck=4 * growth)
    return replace(
        system,
        encoder=replace(encoder, stem=2 * growth, layers=layers) if dense else encoder,
        # An upsampling decoder has a width for every size of the encoder.
        decoder=replace(system.decoder, channels=channels if dense else channels[-3:]),
        discriminator=replace(system.discriminator, channels=discriminator_channels),
    )


def _cycle(
    system: CycleGan, channels: tuple[int, ...], blocks: int, discriminator_channels: tuple[int, ...]
) -> CycleGan:
    return replace(
        system,
        channels=channels,
        blocks=blocks,
        projection_channels=channels,
        volume_discriminator=replace(system.volume_discriminator, channels=discriminator_channels),
        view_discriminator=replace(system.view_discriminator, channels=discriminator_channels[:-1]),
    )
