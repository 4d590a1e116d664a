"""Convolution blocks of encoders, decoders and discriminators, activation checkpointing and weight initialization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
"""Convolutions by the number of dimensions."""
Checkpointing = Literal["none", "finest", "all"]
"""Which activations are dropped after the forward pass and recomputed in the backward pass."""


def checkpointed(module: Callable[..., Any], *inputs: Tensor) -> Any:
    """The output of a module under activation checkpointing; the memory estimate replaces this function.

    Running statistics of batch norm are updated in the first forward pass only.
    """
    modules = module.modules() if isinstance(module, nn.Module) else ()
    norms = [norm for norm in modules if isinstance(norm, nn.BatchNorm2d)]
    if not norms:
        return checkpoint(module, *inputs, use_reentrant=False)
    contexts = nullcontext(), _frozen_running_statistics(norms)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: contexts)


@contextmanager
def _frozen_running_statistics(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    # Not by switching tracking off: the recomputation must save as many tensors as the first pass.
    momenta = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches_tracked in momenta:
            norm.momentum, norm.num_batches_tracked = momentum, batches_tracked


def run(module: Callable[..., T], *inputs: Tensor, use_checkpoint: bool) -> T:
    """The output of a module, with `use_checkpoint` under activation checkpointing."""
    if use_checkpoint and torch.is_grad_enabled():
        output: T = checkpointed(module, *inputs)
        return output
    return module(*inputs)


def norm_act_conv_2d(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Instance norm, ReLU, convolution: the order of dense networks."""
    return nn.Sequential(
        nn.InstanceNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2),
    )


def conv_norm_act_3d(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, instance norm, ReLU, at the same size."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


class SplitConcatConv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution of concatenated volumes that never builds the concatenation.

    Each volume is convolved with its own part of the kernel and the results are added, so that no tensor of all input
    channels is allocated or saved for the backward pass.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, *volumes: Float[Tensor, "n _ d h w"]) -> Float[Tensor, "n out d h w"]:
        """A volume of the same size; the channels of all inputs add up to `in_channels`."""
        first, *others = volumes
        kernel, *kernels = self.weight.split_with_sizes([volume.shape[1] for volume in volumes], dim=1)
        output = F.conv3d(first, kernel, self.bias, padding=1)
        for volume, weight in zip(others, kernels, strict=True):
            output += F.conv3d(volume, weight, padding=1)
        return output


class ConcatConvBlock(nn.Sequential):
    """Convolution of concatenated volumes, instance norm, ReLU, and any modules that follow."""

    def __init__(self, in_channels: int, out_channels: int, *following: nn.Module) -> None:
        norm, activation = nn.InstanceNorm3d(out_channels), nn.ReLU(inplace=True)
        super().__init__(SplitConcatConv3d(in_channels, out_channels), norm, activation, *following)

    def forward(self, *volumes: Float[Tensor, "n _ d h w"]) -> Float[Tensor, "n out d h w"]:
        """A volume of the same size; the channels of all inputs add up to `in_channels`."""
        conv, *following = self
        features: Tensor = conv(*volumes)
        for module in following:
            features = module(features)
        return features


def upsample_3d(in_channels: int, out_channels: int) -> nn.Sequential:
    """Transposed convolution to twice the size, instance norm, ReLU."""
    return nn.Sequential(
        nn.ConvTranspose3d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


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


class DenseLayer(nn.Module):
    """A DenseNet layer: a 1 x 1 bottleneck and a 3 x 3 convolution, concatenated with the input."""

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: int) -> None:
        super().__init__()
        self.bottleneck = norm_act_conv_2d(in_channels, bottleneck, kernel=1)
        self.conv = norm_act_conv_2d(bottleneck, growth_rate)

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out h w"]:
        """`in_channels + growth_rate` channels."""
        return torch.cat([features, self.conv(self.bottleneck(features))], dim=1)


class DepthTapConvolution(nn.Conv3d):
    """A 3-D convolution to one or two channels, faster than torch's.

    So few output channels leave most of a vector unit idle. The depth taps are therefore computed as output channels
    of a 2-D kernel and added with shifts: the same sum, seven times faster on a CPU for a kernel of 7.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 7) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n out d h w"]:
        """A volume of the same size."""
        kernel, depth = self.kernel_size[0], features.shape[2]
        padding = kernel // 2
        # out, in, k, k, k -> k x out, in, 1, k, k
        weight = self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1).unsqueeze(2)
        taps = F.conv3d(features, weight, padding=(0, padding, padding))
        taps = F.pad(taps, (0, 0, 0, 0, padding, padding))
        taps = taps.reshape(len(taps), kernel, self.out_channels, *taps.shape[2:])
        output = torch.stack([taps[:, k, :, k : k + depth] for k in range(kernel)]).sum(dim=0)
        assert self.bias is not None
        return output + self.bias.reshape(-1, 1, 1, 1)


class ResidualUnit(nn.Module):
    """Two 3 x 3 x 3 convolutions and a shortcut, which is a 1 x 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 3, stride, padding=1),
            nn.InstanceNorm3d(out_channels),
            nn.ReLU(inplace=True),
            *([nn.Dropout(dropout)] if dropout else []),
            nn.Conv3d(out_channels, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels),
        )
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1, stride)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n out d2 h2 w2"]:
        """ReLU of residual and shortcut."""
        return torch.relu(self.residual(features) + self.shortcut(features))


def group_norm(channels: int) -> nn.GroupNorm:
    """Eight groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResnetBlock(nn.Module):
    """Two normalized convolutions in 2-D or 3-D and a shortcut.

    Args:
        dims: 2 for images, 3 for volumes.
        in_channels: of the input.
        out_channels: of the output.
        embedding: width of a vector that scales and shifts the second normalization; 0 for none.
        zero_init: start as the shortcut alone.
    """

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, embedding: int = 0, zero_init: bool = False
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION[dims]
        self.norm1, self.conv1 = group_norm(in_channels), convolution(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), convolution(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else convolution(in_channels, out_channels, 1)
        self.time_emb_proj = nn.Linear(embedding, 2 * out_channels) if embedding else None
        if zero_init:
            nn.init.zeros_(self.conv2.weight)

    def forward(
        self, features: Float[Tensor, "n c ..."], embedding: Float[Tensor, "n e"] | None = None
    ) -> Float[Tensor, "n out ..."]:
        """Features of the same size with `out_channels` channels."""
        residual = self.norm2(self.conv1(F.silu(self.norm1(features))))
        if self.time_emb_proj is not None:
            assert embedding is not None
            scale_shift = self.time_emb_proj(embedding)
            scale, shift = scale_shift.reshape(*scale_shift.shape, *[1] * (features.ndim - 2)).chunk(2, dim=1)
            residual = residual * (1 + scale) + shift
        output: Tensor = self.shortcut(features) + self.conv2(F.silu(residual))
        return output


def initialize(network: nn.Module, std: float = 0.02) -> None:
    """Weights from N(0, std), biases zero, the initialization of X2CT-GAN and pix2pix."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, 0.0, std)
            nn.init.zeros_(module.in_proj_bias)
