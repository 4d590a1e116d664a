"""Decoders: the lifted volumes of several sizes to the reconstruction, each decoder under its configuration name.

The input of a decoder is, for each view, its lifted volumes coarsest first. The decoder fuses the views. Its output is
the reconstruction, followed by auxiliary volumes of the same size where deep supervision needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_minimum
from raylift.models.parts.blocks import Checkpointing, ConcatConvBlock, conv_norm_act_3d, run, upsample_3d
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.heads import ActivationName, Head, Rendering

DECODERS = {
    "upsampling": "decoders.UpsamplingDecoder",
    "unet": "unet_3d.UNet",
    "unet++": "unet_3d.UNetPlusPlus",
    "none": "unet_3d.NoDecoder",
}
"""Classes of this folder, imported when one is built, because their files import this one."""
if TYPE_CHECKING:
    DecoderName = str
else:
    DecoderName = Literal[tuple(DECODERS)]
HeadName = Literal["convolution", "rendering"]

Lifted = list[list[Float[Tensor, "n _ _ _ _"]]]


@dataclass(frozen=True)
class DecoderConfig:
    """Settings of the decoder; the defaults are X2CT-GAN's."""

    kind: DecoderName = "upsampling"
    """upsampling: from the coarsest volume to the finest, with the views fused at each size (X2CT-GAN, CVAA-GAN,
    X-Recon). unet: a 3-D U-Net with residual blocks (3DCNN). unet++: a 3-D U-Net++ (DuoLift-GAN). none: the fused
    lifted volume is the reconstruction (PSR)."""
    channels: tuple[int, ...] = (256, 128, 64, 32, 16, 16)
    """From the coarsest volume to the finest."""
    blocks: int = 1
    """Convolutions (upsampling) or residual blocks (unet) at each size, after the skip connection."""
    view_blocks: int = 2
    """The same in the decoder of each view, and in the decoder of a single view."""
    coarsest_blocks: int = 0
    """Convolutions before the first upsampling of the upsampling decoder."""
    head: HeadName = "convolution"
    """rendering: X-Recon's, intensities at each size, combined from coarse to fine; upsampling decoder only."""
    head_kernel: int = 7
    """Edge of the last convolution's kernel in voxels."""
    output: ActivationName = "relu"
    """Activation after the last convolution."""

    def __post_init__(self) -> None:
        if self.head == "rendering" and self.kind != "upsampling":
            raise ConfigError(f"decoder '{self.kind}' has no rendering head: use upsampling, or head convolution")
        require_minimum(self, 1, "channels")
        require_minimum(self, 0, "blocks", "view_blocks", "coarsest_blocks")
        if self.head_kernel < 1 or self.head_kernel % 2 == 0:
            raise ConfigError(
                f"head_kernel is {self.head_kernel}: give an odd number, so that the volume keeps its size"
            )

    @property
    def has_auxiliaries(self) -> bool:
        """Whether the decoder itself has auxiliary volumes; those of an upsampling decoder depend on fusion too."""
        return self.kind == "unet++" or self.head == "rendering"

    def build(self, fusion: FusionConfig, widths: Sequence[int], context: DecoderContext) -> nn.Module:
        """The decoder of lifted volumes of these widths, coarsest first, with initial weights."""
        file, name = DECODERS[self.kind].split(".")
        decoder: type[nn.Module] = getattr(import_module(f"raylift.models.parts.{file}"), name)
        return decoder(self, fusion, widths, context)


@dataclass(frozen=True)
class DecoderContext:
    """Properties of the rest of the network that a decoder depends on."""

    views: int
    auxiliaries: bool = False
    """Whether deep supervision needs auxiliary volumes."""
    checkpointing: Checkpointing = "none"
    view_decoders: bool = False
    """Whether each view has a decoder of its own."""
    single_view: bool = False
    """Whether the only view is decoded with the blocks of a view decoder."""

    def use_checkpoint(self, finest: bool) -> bool:
        """Whether the activations of a part of the decoder are recomputed in the backward pass."""
        return self.checkpointing == "all" or (finest and self.checkpointing == "finest")


class DecoderLevel(nn.Module):
    """One size of the upsampling decoder: the skip connection, convolution blocks, upsampling.

    `merge` and `refine` are two steps because X2CT-GAN fuses the views between them.
    """

    def __init__(self, channels: int, merged: int, blocks: int, up_channels: int | None) -> None:
        super().__init__()
        self.concat_conv = ConcatConvBlock(merged, channels) if merged else None
        self.blocks = nn.Sequential(*(conv_norm_act_3d(channels, channels) for _ in range(blocks)))
        self.up = upsample_3d(channels, up_channels) if up_channels else nn.Identity()

    def merge(self, *volumes: Float[Tensor, "n _ d h w"]) -> Float[Tensor, "n c d h w"]:
        """The concatenation of the volumes, convolved to the level's width."""
        if self.concat_conv is None:
            (volume,) = volumes
            return volume
        merged: Tensor = self.concat_conv(*volumes)
        return merged

    def refine(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n up d2 h2 w2"]:
        """The output of the level's blocks, upsampled to twice the size except at the last level."""
        refined: Tensor = self.up(self.blocks(features))
        return refined


class DecoderLevels(nn.ModuleList):
    """A level for each width, coarsest first; the last has one block at most and no upsampling."""

    def __init__(self, channels: Sequence[int], skips: Sequence[int], blocks: int, coarsest_blocks: int) -> None:
        # The coarsest volume has no skip connection and is convolved only where its width differs.
        first = DecoderLevel(channels[0], skips[0] if skips[0] != channels[0] else 0, coarsest_blocks, channels[1])
        inner = [
            DecoderLevel(width, width + skip, blocks, above)
            for (width, above), skip in zip(pairwise(channels[1:]), skips[1:-1], strict=True)
        ]
        last = DecoderLevel(channels[-1], channels[-1] + skips[-1], min(blocks, 1), None)
        super().__init__([first, *inner, last])

    def level(self, index: int) -> DecoderLevel:
        """One level; index 0 is the coarsest."""
        level = self[index]
        assert isinstance(level, DecoderLevel)
        return level


class ViewDecoder(nn.Module):
    """The decoder of one view beside the fused decoder; X2CT-GAN's connection C replaces its volumes by the fused ones.

    Its own reconstruction, whose loss has no weight in the published system, is computed for deep supervision only.
    """

    def __init__(self, config: DecoderConfig, widths: Sequence[int]) -> None:
        super().__init__()
        skips = (config.channels[0], *widths[1:])
        self.levels = DecoderLevels(config.channels, skips, config.view_blocks, config.coarsest_blocks)
        self.head = Head(config.channels[-1], config.output, config.head_kernel)

    def forward(
        self, below: Float[Tensor, "n _ _ _ _"], skip: Float[Tensor, "n _ d h w"], index: int
    ) -> Float[Tensor, "n c d h w"]:
        """The lifted volume of a level merged with the refined and upsampled fused volume of the level below."""
        return self.levels.level(index).merge(self.levels.level(index - 1).refine(below), skip)

    def volume(self, fused: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n 1 d h w"]:
        """The view's own reconstruction, from the finest fused volume."""
        volume: Tensor = self.head(self.levels.level(len(self.levels) - 1).refine(fused))
        return volume


class UpsamplingDecoder(nn.Module):
    """At each size: fusion of the views, merged with the upsampled volume of the coarser size, then blocks.

    With view decoders, the input of the fusion is the output of each view's decoder at that size instead of its lifted
    volume.
    """

    def __init__(
        self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], context: DecoderContext
    ) -> None:
        super().__init__()
        self.auxiliaries, self.context = context.auxiliaries, context
        channels = config.channels
        has_view_decoders = context.view_decoders
        fusion_widths = (widths[0], *channels[1:]) if has_view_decoders else tuple(widths)
        # Alignment needs a coarser volume, which the coarsest size has not; CVAA-GAN sums there.
        coarsest = FusionConfig("sum") if fusion.kind == "alignment" else fusion
        fusions = [
            (fusion if index else coarsest).build(
                width, context.views, channels[index] if index else 0, keep_width=has_view_decoders
            )
            for index, width in enumerate(fusion_widths)
        ]
        self.fusions = nn.ModuleList(fusions)
        skips = [level.out_channels for level in fusions]
        blocks = config.view_blocks if context.single_view else config.blocks
        self.levels = DecoderLevels(channels, skips, blocks, config.coarsest_blocks)
        self.head: nn.Module
        if config.head == "rendering":
            pairs = zip(channels[1:], skips[1:], strict=True)
            self.head = Rendering([width + skip for width, skip in pairs], config.output)
        else:
            self.head = Head(channels[-1], config.output, config.head_kernel)

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:
        """The reconstruction, then with auxiliaries those of the coarser sizes or of the view decoders."""
        view_decoders = [decoder for decoder in decoders if isinstance(decoder, ViewDecoder)]
        by_size = [list(views) for views in zip(*lifted, strict=True)]
        fused = self.levels.level(0).merge(self.fusions[0](by_size[0]))
        volume = run(self.levels.level(0).refine, fused, use_checkpoint=self.context.use_checkpoint(finest=False))
        intensities = []
        for index in range(1, len(by_size)):
            views = by_size[index]
            finest = index == len(by_size) - 1
            checkpointed = partial(run, use_checkpoint=self.context.use_checkpoint(finest))
            if view_decoders:
                pairs = zip(view_decoders, views, strict=True)
                views = [checkpointed(partial(decoder, index=index), fused, view) for decoder, view in pairs]
            fused, *outputs = checkpointed(partial(self._level, index), volume, *views)
            if isinstance(self.head, Rendering):
                intensities.append(outputs.pop(0))
            volume = outputs[0] if outputs else fused
        if isinstance(self.head, Rendering):
            return self.head.combine(intensities, self.auxiliaries)
        volumes = [checkpointed(self.head, volume)]
        if self.auxiliaries:
            # Along rays all views share one decoder, which has a single volume.
            volumes += [checkpointed(decoder.volume, fused) for decoder in dict.fromkeys(view_decoders)]
        return volumes

    def _level(self, index: int, below: Tensor, *views: Tensor) -> tuple[Tensor, ...]:
        """One size: the fused views, with a rendering head their intensities, and the level's output."""
        fused: Tensor = self.fusions[index](list(views), below)
        outputs = [fused]
        if isinstance(self.head, Rendering):
            outputs.append(self.head(torch.cat([fused, below], dim=1), index - 1))
            if index == len(self.fusions) - 1:
                # With a rendering head nothing uses the output of the finest level.
                return tuple(outputs)
        level = self.levels.level(index)
        return (*outputs, level.refine(level.merge(below, fused)))
