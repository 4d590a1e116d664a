"""Positional encodings for attention; the attention itself is torch's."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def transformer_block(channels: int, heads: int) -> nn.Module:
    """A pre-norm transformer encoder layer: self-attention and an MLP of four times the width, without dropout."""
    return nn.TransformerEncoderLayer(
        channels, heads, 4 * channels, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def positional_encoding(size: int, axes: int, channels: int, like: Tensor) -> Float[Tensor, "positions channels"]:
    """Sinusoidal encoding of every position of a square (2 axes) or cube (3 axes) of `size` per side.

    The slowest sine rises once from side to side, so that no two positions have the same encoding; the fastest is six
    octaves above. Every axis has equally many channels; remaining channels are zero.
    """
    octaves = channels // (2 * axes)
    coordinates = torch.linspace(-1, 1, size, dtype=torch.float32, device=like.device)
    exponents = torch.arange(octaves, dtype=torch.float32, device=like.device) * (6 / max(octaves, 1))
    angles = coordinates[:, None] * (math.pi / 2 * 2.0**exponents)
    encoding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    by_axis = [
        encoding.reshape([size if a == axis else 1 for a in range(axes)] + [2 * octaves]).expand(
            *[size] * axes, 2 * octaves
        )
        for axis in range(axes)
    ]
    return F.pad(torch.cat(by_axis, dim=-1).flatten(0, -2), (0, channels - 2 * octaves * axes)).to(like.dtype)
