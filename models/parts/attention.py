"""Attention between tokens: within an image, and from the voxels of a volume to the pixels of an image."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Tokens ask, other tokens (or they themselves) answer: scaled dot products in several heads, Vaswani et al."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask = nn.Linear(channels, channels)
        self.answer = nn.Linear(channels, 2 * channels)
        self.mix = nn.Linear(channels, channels)

    def forward(self, asking: Float[Tensor, "n q c"], answering: Float[Tensor, "n k c"]) -> Float[Tensor, "n q c"]:
        """What each asking token gathers."""
        key, value = self.answer(answering).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.ask(asking), key, value))
        gathered: Tensor = self.mix(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return gathered


class TransformerBlock(nn.Module):
    """Self-attention, then two linear layers, each beside a straight path and after a layer norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.before = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        self.think = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, tokens: Float[Tensor, "n k c"]) -> Float[Tensor, "n k c"]:
        """As many tokens."""
        normed = self.before(tokens)
        tokens = tokens + self.attention(normed, normed)
        thought: Tensor = tokens + self.think(tokens)
        return thought


def positions(size: int, axes: int, channels: int, like: Tensor) -> Float[Tensor, "places channels"]:
    """Sines and cosines of the coordinates of every place of a square (2 axes) or cube (3), so that tokens know theirs.

    The slowest sine climbs once from side to side, so that no two places are alike; the fastest is six octaves above.
    Every axis has equally many; channels left over are zero.
    """
    each = channels // (2 * axes)
    along = torch.linspace(-1, 1, size, dtype=torch.float32, device=like.device)
    frequencies = (
        math.pi / 2 * 2.0 ** (torch.arange(each, dtype=torch.float32, device=like.device) * (6 / max(each, 1)))
    )
    waves = torch.cat([torch.sin(along[:, None] * frequencies), torch.cos(along[:, None] * frequencies)], dim=1)
    shape = [size] * axes
    spread = [
        waves.reshape([size if a == axis else 1 for a in range(axes)] + [2 * each]).expand(*shape, 2 * each)
        for axis in range(axes)
    ]
    return F.pad(torch.cat(spread, dim=-1).flatten(0, -2), (0, channels - 2 * each * axes)).to(like.dtype)
