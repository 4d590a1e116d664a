"""Generator weights of X2CT-GAN's public code under raylift's names.

That code keeps the volumes of a view in the order of its rays: N, C, H, D, W for the frontal and N, C, W, D, H for the
lateral, and permutes them at every fusion. Here all volumes are N, C, D, H, W, so kernels and the rows of the fully
connected layer are permuted instead. Running statistics, which that code stores and does not use, are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.models.composition import Composition
from raylift.models.systems.x2ct import GAN

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
VIEW_KERNELS = ((0, 1, 3, 2, 4), (0, 1, 3, 4, 2))
"""Permutations of the axes of a 3-D kernel, for the frontal and the lateral view."""
VIEW_NAMES = ("view1Model.", "view2Model.")


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a generator's `state_dict` in X2CT-GAN's public code, by the names of `EncoderDecoder`.

    Args:
        state: of the generator of one view or of two.

    Raises:
        ConfigError: an entry is no weight of that generator, or the weights that give its shape are missing.
    """
    weights = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in RUNNING_STATISTICS}
    biplanar = any(name.startswith(VIEW_NAMES) for name in weights)
    converted: dict[str, Tensor] = {}
    if not biplanar:
        converted |= _view(weights, 0, "branches.0.", "decoder.")
    else:
        for index, prefix in enumerate(VIEW_NAMES):
            view = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            converted |= _view(view, index, f"branches.{index}.", f"branches.{index}.decoder.")
        fused = {name: tensor for name, tensor in weights.items() if not name.startswith(VIEW_NAMES)}
        for name, tensor in fused.items():
            target = "decoder." + _decoder_name(name, _stages(fused), compress=False)
            # That code concatenates the average of the views and the coarser volume in the other order.
            swapped = target.endswith("concat_conv.0.weight")
            converted[target] = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1) if swapped else tensor
    return converted


def system_of(state: Mapping[str, Tensor]) -> tuple[Composition, int]:
    """X2CT-GAN with the widths and views of converted weights, and the size of its volumes in voxels per side.

    Raises:
        ConfigError: a weight that gives a width is missing.
    """
    try:
        encoder, stages = "branches.0.encoder", _count(state, r"decoder\.levels\.\d+\.up\.0\.weight")
        layers = [_count(state, rf"branches\.0\.encoder\.stages\.{k}\.\d+\.conv\.2\.weight") for k in range(stages)]
        ups = [state[f"decoder.levels.{level}.up.0.weight"].shape[:2] for level in range(stages)]
        channels = (ups[0][0], *(out_channels for _, out_channels in ups))
        edge = _edge(len(state["branches.0.lifting.coarsest.fc.weight"]), channels[0])
        dense = f"{encoder}.stages.0.1"
        system = replace(
            GAN,
            views=("frontal", "lateral")[: _count(state, r"branches\.\d\.encoder\.stem\.0\.weight")],
            encoder=replace(
                GAN.encoder,
                init_features=len(state[f"{encoder}.stem.0.weight"]),
                growth_rate=len(state[f"{dense}.conv.2.weight"]),
                bottleneck_channels=len(state[f"{dense}.bottleneck.2.weight"]),
                block_config=tuple(layers),
            ),
            decoder=replace(GAN.decoder, channels=channels),
        )
    except (KeyError, IndexError) as error:
        raise ConfigError(f"it lacks weights of X2CT-GAN's generator: {error}") from error
    return system, edge << stages


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(bool(re.fullmatch(pattern, name)) for name in state)


def _edge(rows: int, channels: int) -> int:
    """Voxels per side of the coarsest volume, from the rows of the fully connected layer."""
    edge: int = round((rows / channels) ** (1 / 3))
    if channels * edge**3 != rows:
        raise ConfigError(f"its fully connected layer has {rows} rows, no cube of {channels} channels")
    return edge


def _view(weights: Mapping[str, Tensor], index: int, branch: str, decoder: str) -> dict[str, Tensor]:
    """The weights of one view, in the patient's axes."""
    stages, kernel = _stages(weights), VIEW_KERNELS[index]
    compress = any(name.startswith("decoder_compress_layer") for name in weights)
    converted = {}
    for name, tensor in weights.items():
        in_decoder = name.startswith("decoder")
        target = (
            decoder + _decoder_name(name, stages, compress) if in_decoder else branch + _encoder_name(name, weights)
        )
        if tensor.ndim == 5:
            tensor = tensor.permute(kernel)
        elif name.startswith("base_link"):
            tensor = _permute_rows(tensor, kernel, weights)
        converted[target] = tensor
    return converted


def _stages(weights: Mapping[str, Tensor]) -> int:
    """How often the network halves a radiograph, from its decoder."""
    layers = [int(match[1]) for name in weights if (match := re.match(r"decoder_layer(\d+)\.", name))]
    if not layers:
        raise ConfigError("it lacks the decoder of X2CT-GAN's generator")
    return max(layers) + 1


def _permute_rows(tensor: Tensor, kernel: tuple[int, ...], weights: Mapping[str, Tensor]) -> Tensor:
    """The rows of the fully connected layer, each a voxel of the coarsest volume, in the patient's axes."""
    coarsest = weights.get(f"decoder_layer{_stages(weights) - 1}.0.block.block.0.weight")
    if coarsest is None:
        raise ConfigError("it lacks the coarsest decoder layer of X2CT-GAN's generator")
    channels = len(coarsest)
    edge = _edge(len(tensor), channels)
    by_voxel = tensor.reshape(channels, edge, edge, edge, -1)
    order = (0, *(axis - 1 for axis in kernel[2:]), 4)
    return by_voxel.permute(order).reshape(tensor.shape)


def _encoder_name(name: str, weights: Mapping[str, Tensor]) -> str:
    """The name of an encoder's or a lifting's weight."""
    module, _, kind = name.rpartition(".")
    if module == "encoder_layer.1":
        return f"encoder.stem.0.{kind}"
    if module == "base_link.0":
        return f"lifting.coarsest.fc.{kind}"
    if match := re.fullmatch(r"encoder_layer(\d+)\.2", module):
        return f"encoder.stages.{match[1]}.0.2.{kind}"
    if match := re.fullmatch(r"encoder_layer(\d+)\.3\.conv_block\.(\d+)\.conv([12])", module):
        part = "bottleneck" if match[3] == "1" else "conv"
        return f"encoder.stages.{match[1]}.{int(match[2]) + 1}.{part}.2.{kind}"
    if match := re.fullmatch(r"encoder_layer(\d+)\.6", module):
        layers = sum(bool(re.fullmatch(rf"encoder_layer{match[1]}\.3\..*conv1\.weight", other)) for other in weights)
        return f"encoder.stages.{match[1]}.{layers + 1}.2.{kind}"
    if match := re.fullmatch(r"linker_layer(\d+)\.0\.(compress|conv)_block\.0", module):
        part = "in_proj.0" if match[2] == "compress" else "conv"
        return f"lifting.finer.{_stages(weights) - 1 - int(match[1])}.{part}.{kind}"
    raise _unknown(name)


def _decoder_name(name: str, stages: int, compress: bool) -> str:
    """The name of a decoder's weight.

    Args:
        name: in that code, where decoder layer -1 is the finest.
        stages: number of downsamplings.
        compress: whether the convolution after the concatenation has a module of its own.
    """
    module, _, kind = name.rpartition(".")
    if module == "decoder_layer.0":
        return f"head.conv.{kind}"
    if match := re.fullmatch(r"decoder_compress_layer(-?\d+)\.0", module):
        return f"levels.{stages - 1 - int(match[1])}.concat_conv.0.{kind}"
    if match := re.fullmatch(r"decoder_layer(-?\d+)\.(\d+)(\.block\.block\.0)?", module):
        level, place = stages - 1 - int(match[1]), int(match[2]) // 3
        if match[3]:
            return f"levels.{level}.up.0.{kind}"
        # The coarsest level has no skip connection.
        place -= not compress and level > 0
        return f"levels.{level}.concat_conv.0.{kind}" if place < 0 else f"levels.{level}.blocks.{place}.0.{kind}"
    raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"'{name[:80]}' is no weight of X2CT-GAN's generator")
