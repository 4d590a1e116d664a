"""Decoders that fuse the views' volumes first: a residual 3-D U-Net and a 3-D U-Net++.

The fused volume of each size is an input of the downsampling path at that size; sizes that the encoder lacks are made
by pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.parts.blocks import ConcatConvBlock, ResidualBlock, conv_norm_act_3d, run, upsample_3d
from raylift.models.parts.decoders import DecoderConfig, DecoderContext, Lifted
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.heads import ACTIVATIONS, Head


class MultiScaleFusion(nn.Module):
    """A fusion for each size that was lifted, finest first."""

    def __init__(self, fusion: FusionConfig, widths: Sequence[int], views: int) -> None:
        super().__init__()
        fusions = [fusion.build(width, views) for width in reversed(widths)]
        self.fusions = nn.ModuleList(fusions)
        self.widths: list[int] = [level.out_channels for level in fusions]

    def forward(self, lifted: Lifted) -> list[Float[Tensor, "n _ _ _ _"]]:
        """The fused volumes, finest first."""
        by_size = list(zip(*lifted, strict=True))
        return [fusion(list(views)) for fusion, views in zip(self.fusions, reversed(by_size), strict=True)]


class NoDecoder(nn.Module):
    """The only lifted volume of each view, fused, is the reconstruction."""

    def __init__(
        self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], context: DecoderContext
    ) -> None:
        super().__init__()
        self.fusion = fusion.build(widths[-1], context.views, keep_width=True)
        self.activation = config.output

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """A list with the volume; this decoder has no auxiliary ones."""
        return [ACTIVATIONS[self.activation](self.fusion([volumes[-1] for volumes in lifted]))]


class UNet(nn.Module):
    """3DCNN's V-Net-like network: residual blocks at each size, max pooling, concatenated skip connections."""

    def __init__(
        self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], context: DecoderContext
    ) -> None:
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

    def __init__(
        self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], context: DecoderContext
    ) -> None:
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


def _input_widths(fusion: MultiScaleFusion, channels: list[int]) -> list[int]:
    """Input channels of the downsampling path at each size: the pooled volume and the fused one, where there are."""
    fused = [*fusion.widths, *[0] * (len(channels) - len(fusion.widths))]
    return [pooled + width for pooled, width in zip([0, *channels[:-1]], fused, strict=True)]


def _concatenated(block: nn.Module, *volumes: Tensor) -> Tensor:
    output: Tensor = block(torch.cat(volumes, dim=1))
    return output


def _residual_blocks(in_channels: int, channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels if k else in_channels, channels) for k in range(count)))


def _conv_blocks(in_channels: int, channels: int) -> nn.Sequential:
    return ConcatConvBlock(in_channels, channels, *conv_norm_act_3d(channels, channels))
