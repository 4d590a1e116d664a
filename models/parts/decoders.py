"""Decoders: the lifted volumes of several sizes to the reconstruction, each decoder under its configuration name.

The input of a decoder is, for each view, its lifted volumes coarsest first. The decoder fuses the views. Its output is
the reconstruction, followed by auxiliary volumes of the same size where deep supervision needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.choices import KeyOf
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_minimum
from raylift.models.parts.blocks import (
    Checkpointing,
    ConcatConvBlock,
    DecoderLevels,
    ResidualUnit,
    conv_norm_act_3d,
    run,
    upsample_3d,
)
from raylift.models.parts.fusion import FusionConfig, MultiScaleFusion
from raylift.models.parts.heads import ACTIVATIONS, ActivationName, Head, Rendering

HeadName = Literal["convolution", "rendering"]

Lifted = list[list[Float[Tensor, "n _ _ _ _"]]]
Widths = Sequence[int]
"""Channels of the lifted volumes, coarsest first."""


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

    def build(self, fusion: FusionConfig, widths: Widths, context: DecoderContext) -> nn.Module:
        """The decoder, with initial weights."""
        return DECODERS[self.kind](self, fusion, widths, context)


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


class ViewDecoder(nn.Module):
    """A decoder of one view, next to the fused one; X2CT-GAN's connection C replaces its volumes by the fused ones.

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

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Widths, context: DecoderContext) -> None:
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


class NoDecoder(nn.Module):
    """The only lifted volume of each view, fused, is the reconstruction."""

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Widths, context: DecoderContext) -> None:
        super().__init__()
        self.fusion = fusion.build(widths[-1], context.views, keep_width=True)
        self.activation = config.output

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """A list with the volume; this decoder has no auxiliary ones."""
        return [ACTIVATIONS[self.activation](self.fusion([volumes[-1] for volumes in lifted]))]


class UNet(nn.Module):
    """3DCNN's V-Net-like network: residual blocks at each size, max pooling, concatenated skip connections."""

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Widths, context: DecoderContext) -> None:
        super().__init__()
        self.context = context
        self.fusion = MultiScaleFusion(fusion, widths, context.views)
        channels = list(reversed(config.channels))
        self.pool = nn.MaxPool3d(2)
        self.down = nn.ModuleList(
            _residual_blocks(in_channels, width, config.blocks)
            for in_channels, width in zip(_input_widths(self.fusion, channels), channels, strict=True)
        )
        self.upsamplers = nn.ModuleList(upsample_3d(channels[k + 1], channels[k]) for k in range(len(channels) - 1))
        self.up = nn.ModuleList(_residual_blocks(2 * width, width, config.blocks) for width in channels[:-1])
        self.head = Head(channels[0], config.output, config.head_kernel)

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """A list with the volume; this decoder has no auxiliary ones."""
        skips: list[Tensor] = []
        fused = self.fusion(lifted)
        for index, block in enumerate(self.down):
            volumes = [*([self.pool(skips[-1])] if skips else []), *fused[index : index + 1]]
            use_checkpoint = self.context.use_checkpoint(finest=not skips)
            skips.append(run(partial(_concatenated, block), *volumes, use_checkpoint=use_checkpoint))
        volume = skips.pop()
        while skips:
            index = len(skips) - 1
            use_checkpoint = self.context.use_checkpoint(finest=index == 0)
            volume = run(partial(self._up, index), volume, skips.pop(), use_checkpoint=use_checkpoint)
        return [run(self.head, volume, use_checkpoint=self.context.use_checkpoint(finest=True))]

    def _up(self, index: int, volume: Tensor, skip: Tensor) -> Tensor:
        return _concatenated(self.up[index], self.upsamplers[index](volume), skip)


class UNetPlusPlus(nn.Module):
    """U-Net++ (Zhou et al. 2018): a U-Net whose skip connections are chains of convolution nodes.

    Node (i, j) has size i, 0 the finest, after j upsamplings. Its input is the concatenation of all earlier nodes of
    its size and the upsampled node (i + 1, j - 1). Every node of the finest size has a head: the last one's output is
    the reconstruction, the others are for deep supervision.
    """

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Widths, context: DecoderContext) -> None:
        super().__init__()
        self.auxiliaries, self.context = context.auxiliaries, context
        self.fusion = MultiScaleFusion(fusion, widths, context.views)
        channels = list(reversed(config.channels))
        self.depth = len(channels) - 1
        self.pool = nn.MaxPool3d(2)
        self.down = nn.ModuleList(
            _conv_blocks(in_channels, width)
            for in_channels, width in zip(_input_widths(self.fusion, channels), channels, strict=True)
        )
        self.upsamplers, self.nodes = nn.ModuleDict(), nn.ModuleDict()
        for j in range(1, self.depth + 1):
            for i in range(self.depth + 1 - j):
                self.upsamplers[f"{i},{j}"] = upsample_3d(channels[i + 1], channels[i])
                self.nodes[f"{i},{j}"] = _conv_blocks((j + 1) * channels[i], channels[i])
        heads = self.depth if self.auxiliaries else 1
        self.heads = nn.ModuleList(Head(channels[0], config.output, config.head_kernel) for _ in range(heads))

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """The reconstruction, then with auxiliaries those of the earlier finest nodes, last first."""
        fused = self.fusion(lifted)
        nodes: list[list[Tensor]] = []
        for i in range(self.depth + 1):
            volumes = [*([self.pool(nodes[-1][0])] if nodes else []), *fused[i : i + 1]]
            use_checkpoint = self.context.use_checkpoint(finest=i == 0)
            nodes.append([run(self.down[i], *volumes, use_checkpoint=use_checkpoint)])
            # All nodes whose inputs are complete with this one.
            for j in range(1, i + 1):
                node = partial(self._node, f"{i - j},{j}")
                use_checkpoint = self.context.use_checkpoint(finest=i == j)
                nodes[i - j].append(run(node, nodes[i - j + 1][j - 1], *nodes[i - j], use_checkpoint=use_checkpoint))
        finest = nodes[0][:0:-1]
        use_checkpoint = self.context.use_checkpoint(finest=True)
        return [
            run(head, volume, use_checkpoint=use_checkpoint) for head, volume in zip(self.heads, finest, strict=False)
        ]

    def _node(self, name: str, below: Tensor, *earlier: Tensor) -> Tensor:
        node: Tensor = self.nodes[name](*earlier, self.upsamplers[name](below))
        return node


DECODERS: dict[str, Callable[[DecoderConfig, FusionConfig, Widths, DecoderContext], nn.Module]] = {
    "upsampling": UpsamplingDecoder,
    "unet": UNet,
    "unet++": UNetPlusPlus,
    "none": NoDecoder,
}
DecoderName = KeyOf[str, DECODERS]


def _input_widths(fusion: MultiScaleFusion, channels: list[int]) -> list[int]:
    """Input channels of the downsampling path at each size: the pooled volume and the fused one, where there are."""
    fused = [*fusion.widths, *[0] * (len(channels) - len(fusion.widths))]
    return [pooled + width for pooled, width in zip([0, *channels[:-1]], fused, strict=True)]


def _concatenated(block: nn.Module, *volumes: Tensor) -> Tensor:
    output: Tensor = block(torch.cat(volumes, dim=1))
    return output


def _residual_blocks(in_channels: int, channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualUnit(channels if k else in_channels, channels) for k in range(count)))


def _conv_blocks(in_channels: int, channels: int) -> nn.Sequential:
    return ConcatConvBlock(in_channels, channels, *conv_norm_act_3d(channels, channels))
