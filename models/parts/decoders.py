"""From lifted volumes of several sizes to the reconstruction, each decoder by its name.

A decoder takes, for each view, its lifted volumes from the coarsest up, fuses the views, and gives volumes: first the
reconstruction, then auxiliary ones of the same size where it has any and deep supervision wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_least
from raylift.models.parts.blocks import Checkpointing, Join, convolve_3d, run, upsample_3d
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.heads import ActivationName, Head, Rendering

DecoderName = Literal["growing", "unet", "unet++", "none"]
HeadName = Literal["convolution", "rendering"]

Lifted = list[list[Float[Tensor, "n _ _ _ _"]]]


@dataclass(frozen=True)
class DecoderConfig:
    """How lifted volumes become the reconstruction; the defaults are X2CT-GAN's."""

    kind: DecoderName = "growing"
    """growing: from the coarsest volume up, the views fused at each size (X2CT-GAN, CVAA-GAN, X-Recon). unet: down
    and up again in 3-D with residual blocks (3DCNN). unet++: the same with nested paths (DuoLift-GAN). none: the lifted
    volume is the answer (PSR)."""
    channels: tuple[int, ...] = (256, 128, 64, 32, 16, 16)
    """From the coarsest volume to the finest."""
    blocks: int = 1
    """Convolutions (growing) or residual blocks (unet) at each size, after the one that joins."""
    view_blocks: int = 2
    """The same in the decoders that views have to themselves, and in that of a lone view."""
    coarsest_blocks: int = 0
    """Convolutions before the first step up of the growing decoder."""
    head: HeadName = "convolution"
    """rendering: X-Recon's, an intensity at each size, combined from coarse to fine; with the growing decoder only."""
    head_kernel: int = 7
    output: ActivationName = "relu"

    def __post_init__(self) -> None:
        if self.head == "rendering" and self.kind != "growing":
            raise ConfigError(f"the rendering head grows with the volume: decoder '{self.kind}' wants convolution")
        require_least(self, 1, "channels")
        require_least(self, 0, "blocks", "view_blocks", "coarsest_blocks")
        if self.head_kernel < 1 or self.head_kernel % 2 == 0:
            raise ConfigError(
                f"head_kernel is {self.head_kernel}: give an odd number, so that the volume keeps its size"
            )

    @property
    def has_auxiliaries(self) -> bool:
        """Whether deep supervision has something to supervise; the growing decoder's depends on fusion too."""
        return self.kind == "unet++" or self.head == "rendering"


@dataclass(frozen=True)
class Build:
    """What a decoder must know of the rest of the network."""

    views: int
    auxiliaries: bool = False
    """Whether deep supervision wants auxiliary volumes."""
    checkpointing: Checkpointing = "none"
    view_decoders: bool = False
    """Whether views have decoders of their own."""
    alone: bool = False
    """Whether the one view there is decodes by itself, with the blocks that a view's own decoder has."""

    def recompute(self, finest: bool) -> bool:
        """Whether a part of the decoder is computed again in the backward pass."""
        return self.checkpointing == "all" or (finest and self.checkpointing == "finest")


class DecoderLevel(nn.Module):
    """One size of the growing decoder: join what comes from below with a skip, refine, and go up.

    `join` and `refine` are two steps because X2CT-GAN fuses the views between them.
    """

    def __init__(self, channels: int, joined: int, blocks: int, up_channels: int | None) -> None:
        super().__init__()
        self.compress = Join(joined, channels) if joined else None
        self.blocks = nn.Sequential(*(convolve_3d(channels, channels) for _ in range(blocks)))
        self.up = upsample_3d(channels, up_channels) if up_channels else nn.Identity()

    def join(self, *volumes: Float[Tensor, "n _ d h w"]) -> Float[Tensor, "n c d h w"]:
        """Concatenate and bring to the level's width."""
        if self.compress is None:
            (volume,) = volumes
            return volume
        joined: Tensor = self.compress(*volumes)
        return joined

    def refine(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n up d2 h2 w2"]:
        """The level's blocks, then the step to twice the size, where there is one."""
        refined: Tensor = self.up(self.blocks(features))
        return refined


class Levels(nn.ModuleList):
    """A level for each width, coarsest first; the last has one block at most and only refines."""

    def __init__(self, channels: Sequence[int], skips: Sequence[int], blocks: int, coarsest_blocks: int) -> None:
        # The coarsest volume is joined with nothing, so it is only brought to its width where it has another.
        first = DecoderLevel(channels[0], skips[0] if skips[0] != channels[0] else 0, coarsest_blocks, channels[1])
        inner = [
            DecoderLevel(width, width + skip, blocks, above)
            for (width, above), skip in zip(pairwise(channels[1:]), skips[1:-1], strict=True)
        ]
        last = DecoderLevel(channels[-1], channels[-1] + skips[-1], min(blocks, 1), None)
        super().__init__([first, *inner, last])

    def level(self, index: int) -> DecoderLevel:
        """One level, 0 the coarsest."""
        level = self[index]
        assert isinstance(level, DecoderLevel)
        return level


class ViewDecoder(nn.Module):
    """A decoder that one view has to itself beside the fused one; X2CT-GAN's connection C feeds it.

    Its own reconstruction, whose loss has no weight in the published system, is computed for deep supervision only.
    """

    def __init__(self, config: DecoderConfig, widths: Sequence[int]) -> None:
        super().__init__()
        skips = (config.channels[0], *widths[1:])
        self.levels = Levels(config.channels, skips, config.view_blocks, config.coarsest_blocks)
        self.head = Head(config.channels[-1], config.output, config.head_kernel)

    def forward(
        self, below: Float[Tensor, "n _ _ _ _"], skip: Float[Tensor, "n _ d h w"], index: int
    ) -> Float[Tensor, "n c d h w"]:
        """The level's skip joined with what the fused volume of the level below grows into."""
        return self.levels.level(index).join(self.levels.level(index - 1).refine(below), skip)

    def volume(self, fused: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n 1 d h w"]:
        """The view's own reconstruction, from the finest fused volume."""
        own: Tensor = self.head(self.levels.level(len(self.levels) - 1).refine(fused))
        return own


class GrowingDecoder(nn.Module):
    """At each size: fuse the views, join the fusion with what has grown so far, refine, double.

    With view decoders, what a view brings to the fusion is its lifted volume joined with what the fused volume of the
    size below grew into.
    """

    def __init__(self, config: DecoderConfig, fusion: FusionConfig, widths: Sequence[int], build: Build) -> None:
        super().__init__()
        self.auxiliaries, self.build = build.auxiliaries, build
        channels = config.channels
        feeds = build.view_decoders
        entering = (widths[0], *channels[1:]) if feeds else tuple(widths)
        # The coarsest volume has nothing below it to attend by; CVAA-GAN sums there.
        first = FusionConfig("sum") if fusion.kind == "alignment" else fusion
        fuse = [
            (fusion if index else first).build(width, build.views, channels[index] if index else 0, keep_width=feeds)
            for index, width in enumerate(entering)
        ]
        self.fuse = nn.ModuleList(fuse)
        skips = [one.out_channels for one in fuse]
        self.levels = Levels(
            channels, skips, config.view_blocks if build.alone else config.blocks, config.coarsest_blocks
        )
        self.head: nn.Module
        if config.head == "rendering":
            pairs = zip(channels[1:], skips[1:], strict=True)
            self.head = Rendering([width + skip for width, skip in pairs], config.output)
        else:
            self.head = Head(channels[-1], config.output, config.head_kernel)

    def forward(self, lifted: Lifted, decoders: Sequence[nn.Module] = ()) -> list[Float[Tensor, "n 1 d h w"]]:
        """The reconstruction, then at will what it was at the sizes below, or the views' own."""
        own = [decoder for decoder in decoders if isinstance(decoder, ViewDecoder)]
        by_size = [list(views) for views in zip(*lifted, strict=True)]
        fused = self.levels.level(0).join(self.fuse[0](by_size[0]))
        volume = run(self.levels.level(0).refine, fused, recompute=self.build.recompute(finest=False))
        renders = []
        for index in range(1, len(by_size)):
            views = by_size[index]
            again = partial(run, recompute=self.build.recompute(finest=index == len(by_size) - 1))
            if own:
                pairs = zip(own, views, strict=True)
                views = [again(partial(decoder, index=index), fused, view) for decoder, view in pairs]
            fused, *made = again(partial(self._level, index), volume, *views)
            if isinstance(self.head, Rendering):
                renders.append(made.pop(0))
            volume = made[0] if made else fused
        if isinstance(self.head, Rendering):
            return self.head.combine(renders, coarser=self.auxiliaries)
        made = [again(self.head, volume)]
        if self.auxiliaries:
            # Along rays all views have one decoder, which has one thing to say.
            made += [again(decoder.volume, fused) for decoder in dict.fromkeys(own)]
        return made

    def _level(self, index: int, below: Tensor, *views: Tensor) -> tuple[Tensor, ...]:
        """One size: the fused views, their rendering where there is one, and what they grow into with what is below."""
        fused: Tensor = self.fuse[index](list(views), below)
        made = [fused]
        if isinstance(self.head, Rendering):
            made.append(self.head(torch.cat([fused, below], dim=1), index - 1))
            if index == len(self.fuse) - 1:
                # Nothing reads what a finest size with a rendering would grow into.
                return tuple(made)
        level = self.levels.level(index)
        return (*made, level.refine(level.join(below, fused)))
