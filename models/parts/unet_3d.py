"""Decoders that fuse the views' volumes first and then go down and up in 3-D: residual U-Net and U-Net++.

Lifted volumes of every size enter where the way down has that size; what the encoder did not make is made by pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.parts.blocks import Join, Residual, convolve_3d, run, upsample_3d
from raylift.models.parts.decoders import Build, DecoderConfig, Lifted
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.heads import ACTIVATIONS, Head


class Fused(nn.Module):
    """The views' volumes, fused at every size that was lifted, finest first."""

    def __init__(self, fusion: FusionConfig, widths: Sequence[int], views: int) -> None:
        super().__init__()
        fuse = [fusion.build(width, views) for width in reversed(widths)]
        self.fuse = nn.ModuleList(fuse)
        self.widths: list[int] = [one.out_channels for one in fuse]

    def forward(self, lifted: Lifted) -> list[Float[Tensor, "n _ _ _ _"]]:
        """Finest first."""
        by_size = list(zip(*lifted, strict=True))
        return [fuse(list(views)) for fuse, views in zip(self.fuse, reversed(by_size), strict=True)]


class NoDecoder(nn.Module):
    """The views' one lifted volume, fused, is the reconstruction."""

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], build: Build) -> None:
        super().__init__()
        self.fuse = fusion.build(widths[-1], build.views, keep_width=True)
        self.activation = config.output

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """A list of one."""
        return [ACTIVATIONS[self.activation](self.fuse([volumes[-1] for volumes in lifted]))]


class UNet(nn.Module):
    """Residual blocks on the way down and up, max pooling between, skips concatenated: 3DCNN's V-Net-like network."""

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], build: Build) -> None:
        super().__init__()
        self.build = build
        self.fused = fused = Fused(fusion, widths, build.views)
        channels = list(reversed(config.channels))
        entering = [*fused.widths, *[0] * (len(channels) - len(fused.widths))]
        before = [0, *channels[:-1]]
        self.pool = nn.MaxPool3d(2)
        self.down = nn.ModuleList(
            _residuals(came + enters, width, config.blocks)
            for came, enters, width in zip(before, entering, channels, strict=True)
        )
        self.grow = nn.ModuleList(upsample_3d(channels[k + 1], channels[k]) for k in range(len(channels) - 1))
        self.up = nn.ModuleList(_residuals(2 * width, width, config.blocks) for width in channels[:-1])
        self.head = Head(channels[0], config.output, config.head_kernel)

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """A list of one."""
        skips: list[Tensor] = []
        entering = self.fused(lifted)
        for index in range(len(self.down)):
            volumes = [*([self.pool(skips[-1])] if skips else []), *entering[index : index + 1]]
            skips.append(run(partial(_joined, self.down[index]), *volumes, recompute=self.build.recompute(not skips)))
        volume = skips.pop()
        while skips:
            index = len(skips) - 1
            again = self.build.recompute(finest=index == 0)
            volume = run(partial(self._rise, index), volume, skips.pop(), recompute=again)
        return [run(self.head, volume, recompute=self.build.recompute(finest=True))]

    def _rise(self, index: int, volume: Tensor, skip: Tensor) -> Tensor:
        return _joined(self.up[index], self.grow[index](volume), skip)


class UNetPlusPlus(nn.Module):
    """U-Net++ (Zhou et al. 2018): between the way down and the way up, nodes that refine what is on their way.

    Node (i, j) stands at size i, 0 the finest, after j steps up: it joins all nodes before it at its size with the one
    below, brought to its size. Every node of the finest size has a head; the last one's is the reconstruction, the
    others are for deep supervision.
    """

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], build: Build) -> None:
        super().__init__()
        self.auxiliaries, self.build = build.auxiliaries, build
        self.fused = fused = Fused(fusion, widths, build.views)
        channels = list(reversed(config.channels))
        self.depth = len(channels) - 1
        entering = [*fused.widths, *[0] * (len(channels) - len(fused.widths))]
        before = [0, *channels[:-1]]
        self.pool = nn.MaxPool3d(2)
        self.down = nn.ModuleList(
            _plain(came + enters, width) for came, enters, width in zip(before, entering, channels, strict=True)
        )
        self.grow, self.nodes = nn.ModuleDict(), nn.ModuleDict()
        for j in range(1, self.depth + 1):
            for i in range(self.depth + 1 - j):
                self.grow[f"{i},{j}"] = upsample_3d(channels[i + 1], channels[i])
                self.nodes[f"{i},{j}"] = _plain((j + 1) * channels[i], channels[i])
        heads = self.depth if self.auxiliaries else 1
        self.heads = nn.ModuleList(Head(channels[0], config.output, config.head_kernel) for _ in range(heads))

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:  # noqa: ARG002
        """The reconstruction, then at will those of the finest nodes before it, the last first."""
        entering = self.fused(lifted)
        made: list[list[Tensor]] = []
        for i in range(self.depth + 1):
            volumes = [*([self.pool(made[-1][0])] if made else []), *entering[i : i + 1]]
            made.append([run(self.down[i], *volumes, recompute=self.build.recompute(finest=i == 0))])
            # All nodes that this one makes possible.
            for j in range(1, i + 1):
                node = partial(self._node, f"{i - j},{j}")
                again = self.build.recompute(finest=i == j)
                made[i - j].append(run(node, made[i - j + 1][j - 1], *made[i - j], recompute=again))
        finest = made[0][:0:-1]
        again = self.build.recompute(finest=True)
        return [run(head, volume, recompute=again) for head, volume in zip(self.heads, finest, strict=False)]

    def _node(self, name: str, below: Tensor, *before: Tensor) -> Tensor:
        node: Tensor = self.nodes[name](*before, self.grow[name](below))
        return node


def _joined(block: nn.Module, *volumes: Tensor) -> Tensor:
    made: Tensor = block(torch.cat(volumes, dim=1))
    return made


def _residuals(in_channels: int, channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Residual(channels if k else in_channels, channels) for k in range(count)))


def _plain(in_channels: int, channels: int) -> nn.Sequential:
    return Join(in_channels, channels, *convolve_3d(channels, channels))
