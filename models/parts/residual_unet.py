"""A residual U-Net in 2-D or 3-D with normalized blocks, resize-convolutions and conditioning by a vector.

```
features -> conv_in -> [blocks] -> downsample -> [blocks] -> ... -> [blocks] -> upsample -> ... -> features per size
                          ^ condition                ^ condition of that size
```
Upsampling is interpolation and a convolution: a transposed convolution leaves a checkerboard (Odena et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.models.parts.blocks import CONVOLUTION, ResnetBlock

INTERPOLATION = {2: "bilinear", 3: "trilinear"}


class Upsample(nn.Module):
    """Linear interpolation to twice the size, then a convolution."""

    def __init__(self, dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The 1 x 1 (x 1) convolution commutes with the interpolation and is cheaper before it.
        self.conv = CONVOLUTION[dims](in_channels, out_channels, 1)
        self.mode = INTERPOLATION[dims]

    def forward(self, features: Float[Tensor, "n c ..."]) -> Float[Tensor, "n out ..."]:
        """Features of twice the size along each axis with `out` channels."""
        return F.interpolate(self.conv(features), scale_factor=2.0, mode=self.mode, align_corners=False)


class ResidualUNet(nn.Module):
    """Features of one image or volume to features at every size.

    Args:
        dims: 2 for images, 3 for volumes.
        in_channels: of the input.
        channels: at each size, finest first.
        blocks: residual blocks at each size of the encoder, and again of the decoder.
        embedding: width of the vector that conditions every block; 0 for none.
        condition: channels of the condition that is added at each size, finest first; empty for none.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        channels: Sequence[int],
        blocks: int = 1,
        embedding: int = 0,
        condition: Sequence[int] = (),
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION[dims]
        levels = len(channels)

        def stack(first: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(
                ResnetBlock(dims, first if k == 0 else width, width, embedding, zero_init=True) for k in range(blocks)
            )

        self.conv_in = convolution(in_channels, channels[0], 3, padding=1)
        self.cond_proj = nn.ModuleList(
            convolution(inputs, width, 1) for inputs, width in zip(condition, channels, strict=bool(condition))
        )
        self.down = nn.ModuleList(stack(width, width) for width in channels)
        self.downsample = nn.ModuleList(
            convolution(channels[k], channels[k + 1], 2, stride=2) for k in range(levels - 1)
        )
        self.upsample = nn.ModuleList(Upsample(dims, channels[k + 1], channels[k]) for k in range(levels - 1))
        self.up = nn.ModuleList(stack(2 * channels[k], channels[k]) for k in range(levels - 1))

    def forward(
        self,
        features: Float[Tensor, "n c ..."],
        embedding: Float[Tensor, "n e"] | None = None,
        condition: Sequence[Float[Tensor, "n _ ..."]] = (),
    ) -> list[Float[Tensor, "n _ ..."]]:
        """The decoder's features at each size, finest first."""
        hidden: Tensor = self.conv_in(features)
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            hidden = self.downsample[level - 1](hidden) if level else hidden
            hidden = hidden + self.cond_proj[level](condition[level]) if condition else hidden
            hidden = _through(blocks, hidden, embedding)
            skips.append(hidden)
        outputs = [skips.pop()]
        for level in reversed(range(len(self.up))):
            concatenated = torch.cat([self.upsample[level](outputs[-1]), skips.pop()], dim=1)
            outputs.append(_through(self.up[level], concatenated, embedding))
        return outputs[::-1]


def _through(blocks: nn.Module, features: Tensor, embedding: Tensor | None) -> Tensor:
    for block in blocks.children():
        features = block(features, embedding)
    return features
