"""The small parts that encoders, decoders and discriminators are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")
Checkpointing = Literal["none", "finest", "all"]
"""Which activations are dropped after the forward pass and computed again in the backward pass."""


def recomputed(part: Callable[..., Any], *inputs: Tensor) -> Any:
    """Calls a part, and again in the backward pass for its activations; an estimate of memory measures here.

    Running statistics of batch norm are those of the first time alone.
    """
    modules = part.modules() if isinstance(part, nn.Module) else ()
    norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return checkpoint(part, *inputs, use_reentrant=False)
    return checkpoint(part, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _unmoved(norms)))


@contextmanager
def _unmoved(norms: list[nn.BatchNorm2d]) -> Iterator[None]:
    # Not without tracking: the second pass must keep as many tensors as the first.
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, counted in before:
            norm.momentum, norm.num_batches_tracked = momentum, counted


def run(part: Callable[..., T], *inputs: Tensor, recompute: bool) -> T:
    """The part's answer; with `recompute` its activations are dropped and computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        answer: T = recomputed(part, *inputs)
        return answer
    return part(*inputs)


def convolve_2d(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Instance norm, ReLU, convolution: the order inside dense networks."""
    return nn.Sequential(
        nn.InstanceNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2),
    )


def convolve_3d(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, instance norm, ReLU at the same size."""
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


class JoiningConvolution(nn.Conv3d):
    """A 3 x 3 x 3 convolution of volumes side by side that never puts them side by side.

    Each volume meets its own part of the kernel, and the answers are added up, so that nothing as large as all of them
    together is made or kept for the backward pass.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, *volumes: Float[Tensor, "n _ d h w"]) -> Float[Tensor, "n out d h w"]:
        """The same size; the channels of all volumes together are `in_channels`."""
        first, *others = volumes
        part, *parts = self.weight.split_with_sizes([volume.shape[1] for volume in volumes], dim=1)
        made = F.conv3d(first, part, self.bias, padding=1)
        for volume, weight in zip(others, parts, strict=True):
            made += F.conv3d(volume, weight, padding=1)
        return made


class Join(nn.Sequential):
    """Volumes side by side through a convolution, instance norm, ReLU, and what else follows."""

    def __init__(self, in_channels: int, out_channels: int, *then: nn.Module) -> None:
        norm, rectify = nn.InstanceNorm3d(out_channels), nn.ReLU(inplace=True)
        super().__init__(JoiningConvolution(in_channels, out_channels), norm, rectify, *then)

    def forward(self, *volumes: Float[Tensor, "n _ d h w"]) -> Float[Tensor, "n out d h w"]:
        """The same size; the channels of all volumes together are `in_channels`."""
        convolve, *then = self
        features: Tensor = convolve(*volumes)
        for part in then:
            features = part(features)
        return features


def upsample_3d(in_channels: int, out_channels: int) -> nn.Sequential:
    """Transposed convolution to twice the size, instance norm, ReLU."""
    return nn.Sequential(
        nn.ConvTranspose3d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1),
        nn.InstanceNorm3d(out_channels),
        nn.ReLU(inplace=True),
    )


class DenseLayer(nn.Module):
    """A DenseNet layer: a bottleneck of 1 x 1, then 3 x 3, joined to what came in."""

    def __init__(self, in_channels: int, growth: int, bottleneck: int) -> None:
        super().__init__()
        self.narrow = convolve_2d(in_channels, bottleneck, kernel=1)
        self.grow = convolve_2d(bottleneck, growth)

    def forward(self, features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n grown h w"]:
        """`in_channels` to `in_channels + growth`."""
        return torch.cat([features, self.grow(self.narrow(features))], dim=1)


class DepthTapConvolution(nn.Conv3d):
    """A 3-D convolution to one or two channels, which leaves most of a vector unit idle.

    The depth taps are computed as channels of their own and added up shifted: the same sum, seven times faster on a
    CPU for a kernel of 7.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 7) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n out d h w"]:
        """The same size."""
        kernel, depth = self.kernel_size[0], features.shape[2]
        reach = kernel // 2
        # out, in, k, k, k -> k x out, in, 1, k, k
        weight = self.weight.permute(2, 0, 1, 3, 4).flatten(0, 1).unsqueeze(2)
        taps = F.conv3d(features, weight, padding=(0, reach, reach))
        taps = F.pad(taps, (0, 0, 0, 0, reach, reach))
        taps = taps.reshape(len(taps), kernel, self.out_channels, *taps.shape[2:])
        summed = torch.stack([taps[:, k, :, k : k + depth] for k in range(kernel)]).sum(dim=0)
        assert self.bias is not None
        return summed + self.bias.reshape(-1, 1, 1, 1)


class Residual(nn.Module):
    """Two 3 x 3 x 3 convolutions beside a straight path, which is a 1 x 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bend = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 3, stride, padding=1),
            nn.InstanceNorm3d(out_channels),
            nn.ReLU(inplace=True),
            *([nn.Dropout(dropout)] if dropout else []),
            nn.Conv3d(out_channels, out_channels, 3, padding=1),
            nn.InstanceNorm3d(out_channels),
        )
        same = in_channels == out_channels and stride == 1
        self.straight = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1, stride)

    def forward(self, features: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n out d2 h2 w2"]:
        """The sum of both paths, rectified."""
        return torch.relu(self.bend(features) + self.straight(features))


def initialize(network: nn.Module, std: float = 0.02) -> None:
    """Weights from N(0, std), biases zero, as X2CT-GAN and pix2pix start their networks."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
