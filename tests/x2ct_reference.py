"""X2CT-GAN's generator, written out from the facts of its public code, on weights under the names of that code.

Volumes of a view are in the order of its rays, N, C, H, D, W for the frontal and N, C, W, D, H for the lateral, and are
permuted at every fusion. Dropout is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
TO_VIEW = ((0, 1, 3, 2, 4), (0, 1, 4, 2, 3))
TO_PATIENT = ((0, 1, 3, 2, 4), (0, 1, 3, 4, 2))


def random_state(
    layers: tuple[int, ...], stem: int, growth: int, bottleneck: int, channels: tuple[int, ...], edge: int, views: int
) -> State:
    """Weights of small random numbers, with the running statistics that the code stores.

    Args:
        layers: dense layers of each stage.
        stem: channels at full size.
        growth: channels that a dense layer adds.
        bottleneck: channels inside a dense layer.
        channels: of the decoder, from the finest size to the coarsest.
        edge: voxels per side of the coarsest volume.
        views: 1 or 2.
    """
    state: State = {}

    def conv(name: str, *shape: int, transposed: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, dtype=torch.float64) / (torch.Size(shape[1:]).numel() ** 0.5)
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[1] if transposed else shape[0], dtype=torch.float64)

    def norm(name: str, width: int) -> None:
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.zeros(width), torch.ones(width)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def decoder(prefix: str, blocks: tuple[int, ...], compress: bool) -> None:
        for index in range(len(layers) - 1, -2, -1):
            width, finest = channels[index + 1], index == -1
            place = 0
            if index < len(layers) - 1:
                name = f"{prefix}decoder_{'compress_' * compress}layer{index}"
                conv(f"{name}.0", width, 2 * width, 3, 3, 3)
                norm(f"{name}.1", width)
                place = 0 if compress else 3
                for _ in range(blocks[index + 1]):
                    conv(f"{prefix}decoder_layer{index}.{place}", width, width, 3, 3, 3)
                    norm(f"{prefix}decoder_layer{index}.{place + 1}", width)
                    place += 3
            if not finest:
                name = f"{prefix}decoder_layer{index}.{place}.block.block"
                conv(f"{name}.0", width, channels[index], 3, 3, 3, transposed=True)
                norm(f"{name}.1", channels[index])
        conv(f"{prefix}decoder_layer.0", 1, channels[0], 7, 7, 7)

    for prefix in ("view1Model.", "view2Model.") if views == 2 else ("",):
        conv(f"{prefix}encoder_layer.1", stem, 1, 7, 7)
        norm(f"{prefix}encoder_layer.2", stem)
        width = stem
        for index, count in enumerate(layers):
            conv(f"{prefix}linker_layer{index}.0.compress_block.0", channels[index], width, 1, 1)
            norm(f"{prefix}linker_layer{index}.0.compress_block.1", channels[index])
            conv(f"{prefix}linker_layer{index}.0.conv_block.0", channels[index], channels[index], 3, 3, 3)
            norm(f"{prefix}linker_layer{index}.0.conv_block.1", channels[index])
            norm(f"{prefix}encoder_layer{index}.0", width)
            conv(f"{prefix}encoder_layer{index}.2", width, width, 3, 3)
            for layer in range(count):
                name = f"{prefix}encoder_layer{index}.3.conv_block.{layer}"
                norm(f"{name}.norm1", width)
                conv(f"{name}.conv1", bottleneck, width, 1, 1)
                norm(f"{name}.norm2", bottleneck)
                conv(f"{name}.conv2", growth, bottleneck, 3, 3)
                width += growth
            if index < len(layers) - 1:
                norm(f"{prefix}encoder_layer{index}.4", width)
                conv(f"{prefix}encoder_layer{index}.6", width // 2, width, 1, 1)
                width //= 2
        conv(f"{prefix}base_link.0", channels[-1] * edge**3, width)
        decoder(prefix, (1, *[2] * (len(layers) - 1), 0), compress=views == 2)
    if views == 2:
        decoder("", (1,) * len(layers), compress=False)
    return state


def relu_norm(features: Tensor) -> Tensor:
    return torch.relu(F.instance_norm(features))


def conv(state: State, name: str, features: Tensor, **options: int) -> Tensor:
    function: Callable[..., Tensor] = F.conv2d if features.ndim == 4 else F.conv3d
    return function(features, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def encode(state: State, image: Tensor) -> tuple[list[Tensor], Tensor]:
    """The lifted volumes of a view from full size down, and the coarsest volume of the fully connected layer."""
    stages = sum(name.endswith("compress_block.0.weight") for name in state)
    features = relu_norm(conv(state, "encoder_layer.1", F.pad(image, (3, 3, 3, 3), mode="reflect")))
    lifted = []
    for stage in range(stages):
        flat = relu_norm(conv(state, f"linker_layer{stage}.0.compress_block.0", features))
        repeated = flat.unsqueeze(2).repeat(1, 1, flat.shape[2], 1, 1)
        lifted.append(relu_norm(conv(state, f"linker_layer{stage}.0.conv_block.0", repeated, padding=1)))
        features = conv(state, f"encoder_layer{stage}.2", relu_norm(features), stride=2, padding=1)
        layer = 0
        while f"encoder_layer{stage}.3.conv_block.{layer}.conv1.weight" in state:
            name = f"encoder_layer{stage}.3.conv_block.{layer}"
            narrow = conv(state, f"{name}.conv1", relu_norm(features))
            added = conv(state, f"{name}.conv2", relu_norm(narrow), padding=1)
            features, layer = torch.cat([features, added], dim=1), layer + 1
        if f"encoder_layer{stage}.6.weight" in state:
            features = conv(state, f"encoder_layer{stage}.6", relu_norm(features))
    vector = features.mean(dim=(2, 3)) @ state["base_link.0.weight"].T + state["base_link.0.bias"]
    channels = len(state[f"decoder_layer{stages - 1}.0.block.block.0.weight"])
    edge = round((vector.shape[1] / channels) ** (1 / 3))
    return lifted, torch.relu(vector).reshape(-1, channels, edge, edge, edge)


def refine(state: State, name: str, volume: Tensor, first: int) -> Tensor:
    """The blocks and the upsampling of a decoder layer, from module `first` on."""
    place = first
    while f"{name}.{place}.weight" in state:
        volume = relu_norm(conv(state, f"{name}.{place}", volume, padding=1))
        place += 3
    up = f"{name}.{place}.block.block.0"
    if f"{up}.weight" in state:
        weight, bias = state[f"{up}.weight"], state[f"{up}.bias"]
        volume = relu_norm(F.conv_transpose3d(volume, weight, bias, stride=2, padding=1, output_padding=1))
    return volume


def of(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def single(state: State, image: Tensor) -> Tensor:
    """The volume from the frontal view alone, in the patient's axes."""
    lifted, volume = encode(state, image)
    for index in range(len(lifted) - 1, -2, -1):
        name, first = f"decoder_layer{index}", 0
        if index < len(lifted) - 1:
            joined = torch.cat([volume, lifted[index + 1]], dim=1)
            volume, first = relu_norm(conv(state, f"{name}.0", joined, padding=1)), 3
        volume = refine(state, name, volume, first)
    return torch.relu(conv(state, "decoder_layer.0", volume, padding=3)).permute(TO_PATIENT[0])


def fused_features(state: State, images: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """For each size, coarsest first, the average of the views and the volume of the fused decoder from below."""
    views = [of(state, prefix) for prefix in ("view1Model.", "view2Model.")]
    encoded = [encode(view, images[:, k : k + 1]) for k, view in enumerate(views)]
    skips, volumes = [one[0] for one in encoded], [one[1] for one in encoded]
    below: Tensor | None = None
    found: list[tuple[Tensor, Tensor | None]] = []
    for index in range(len(skips[0]) - 1, -2, -1):
        name, coarsest = f"decoder_layer{index}", index == len(skips[0]) - 1
        if not coarsest:
            volumes = [
                relu_norm(
                    conv(view, f"decoder_compress_layer{index}.0", torch.cat([one, skip[index + 1]], dim=1), padding=1)
                )
                for view, one, skip in zip(views, volumes, skips, strict=True)
            ]
        average = (volumes[0].permute(TO_PATIENT[0]) + volumes[1].permute(TO_PATIENT[1])) / 2
        found.append((average, below))
        if below is None:
            below = refine(state, name, average, 0)
        else:
            merged = relu_norm(conv(state, f"{name}.0", torch.cat([average, below], dim=1), padding=1))
            below = refine(state, name, merged, 3)
        volumes = [refine(view, name, average.permute(order), 0) for view, order in zip(views, TO_VIEW, strict=True)]
    found.append((below, None))
    return found


def biplanar(state: State, images: Tensor) -> Tensor:
    """The fused volume from a frontal and a lateral radiograph whose columns run along the volume's axes."""
    finest, _ = fused_features(state, images)[-1]
    return torch.relu(conv(state, "decoder_layer.0", finest, padding=3))
