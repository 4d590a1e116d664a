"""Sizes of the upsampling decoder: a skip connection, convolution blocks and upsampling at each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from raylift.models.parts.blocks import ConcatConvBlock, conv_norm_act_3d, upsample_3d


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
