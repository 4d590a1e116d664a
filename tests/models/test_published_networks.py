"""Networks of X2CT's and X-Recon's public code, written out and filled with the same numbers, give equal outputs."""

from dataclasses import replace

import pytest
import torch
import x2ct_reference as reference
from torch.nn import functional as F

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import FRONTAL, LATERAL, Grid, chest, x2ct
from raylift.models.composition import Composition
from raylift.models.objectives.objective import frozen
from raylift.models.parts.discriminators import Discriminator, DiscriminatorConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.rays import Rays
from raylift.models.systems.psr import PSR
from raylift.models.systems.x2ct import X2CT_GAN
from raylift.models.systems.x_recon import X_RECON
from raylift.models.x2ct_weights import convert

GRID = Grid(16, 20.0)
LAYERS, STEM, GROWTH, BOTTLENECK, CHANNELS = (2, 1, 3), 6, 4, 8, (3, 4, 5, 6)


def small(system: Composition, views: tuple[str, ...] = ("frontal", "lateral")) -> Composition:
    """The published parts at 16 voxels per side."""
    encoder = EncoderConfig(
        kind="dense", init_features=STEM, growth_rate=GROWTH, bottleneck_channels=BOTTLENECK, block_config=LAYERS
    )
    decoder = replace(system.decoder, channels=CHANNELS[::-1])
    discriminator = replace(system.discriminator, channels=(4, 6, 8))
    return replace(system, views=views, encoder=encoder, decoder=decoder, discriminator=discriminator)


def numbers(views: int) -> reference.State:
    torch.manual_seed(views)
    return reference.random_state(LAYERS, STEM, GROWTH, BOTTLENECK, CHANNELS, GRID.size >> len(LAYERS), views)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("views", [1, 2])
def test_x2ct_gans_generator_equals_its_layers_written_out(views):
    state, images = numbers(views), torch.rand(2, views, 16, 16, dtype=torch.float64)
    network = (
        small(X2CT_GAN.full, ("frontal", "lateral")[:views]).reconstruction_network(GRID, chest(GRID)).double().eval()
    )
    network.load_state_dict(convert(state))
    with torch.no_grad():
        expected = (reference.single if views == 1 else reference.biplanar)(state, images)
        volume = network(images)
    assert expected.std() > 0.01
    assert relative(volume, expected) < 1e-13


def test_in_geometry_x2ct_the_lateral_is_flipped_into_the_columns_of_x2ct_gan():
    state, images = numbers(2), torch.rand(1, 2, 16, 16, dtype=torch.float64)
    network = small(X2CT_GAN.full).reconstruction_network(GRID, x2ct(GRID)).double().eval()
    network.load_state_dict(convert(state))
    with torch.no_grad():
        expected = reference.biplanar(state, images)
        volume = network(torch.stack([images[:, 0], images[:, 1].flip(-1)], dim=1))
    assert relative(volume, expected) < 1e-13


def layers_of(discriminator: Discriminator) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [(layer.weight, layer.bias) for layer in discriminator.layers if isinstance(layer, torch.nn.Conv3d)]


def patch_scores(layers: list[tuple[torch.Tensor, torch.Tensor | None]], features: torch.Tensor) -> torch.Tensor:
    """X2CT-GAN's discriminator: 4^3 convolutions with padding 2, stride 2 but for the last two, norm inside."""
    for index, (weight, bias) in enumerate(layers):
        first, last = index == 0, index == len(layers) - 1
        features = F.conv3d(features, weight, bias, stride=1 if index >= len(layers) - 2 else 2, padding=2)
        if not first and not last:
            features = F.instance_norm(features)
        if not last:
            features = F.leaky_relu(features, 0.2)
    return features


def expanded(images: torch.Tensor, size: int) -> torch.Tensor:
    """Both radiographs repeated along their rays: frontal over H, lateral over W."""
    frontal = images[:, 0][:, None, :, None, :].expand(-1, 1, size, size, size)
    lateral = images[:, 1][:, None, :, :, None].expand(-1, 1, size, size, size)
    return torch.cat([frontal, lateral], dim=1)


def test_x2ct_gans_losses_and_all_gradients_equal_their_equations_written_out():
    state, images = numbers(2), torch.rand(2, 2, 16, 16, dtype=torch.float64)
    batch = Batch(torch.rand(2, 1, 16, 16, 16, dtype=torch.float64), images)
    system = small(X2CT_GAN.full)
    objective = replace(system, lifting=replace(system.lifting, dropout=0.0)).objective(GRID, chest(GRID))
    networks = {name: network.double() for name, network in objective.networks().items()}
    networks["generator"].load_state_dict(convert(state))
    layers = layers_of(networks["discriminator"])

    def scores(volume: torch.Tensor) -> torch.Tensor:
        return patch_scores(layers, torch.cat([expanded(images, 16), volume], dim=1))

    weights = {name: t.clone().requires_grad_() for name, t in state.items() if t.is_floating_point()}
    volume = reference.biplanar(weights, images)
    projection = sum((volume.abs().mean(k) - batch.volume.abs().mean(k)).abs().mean() for k in (2, 3, 4)) / 3
    voxel = (volume - batch.volume).square().mean()
    generator_loss = 0.1 * (scores(volume) - 1).square().mean() + 10 * voxel + 10 * projection
    fake = volume.detach()
    discriminator_loss = 0.1 * ((scores(batch.volume) - 1).square().mean() + scores(fake).square().mean())

    with frozen([networks["discriminator"]]):
        loss, _, outputs = objective.loss_modules["generator"](batch, {})
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(generator_loss.detach()), rel=1e-13)
    names = [name for name in weights if "running" not in name]
    found = torch.autograd.grad(generator_loss, [weights[name] for name in names], allow_unused=True)
    # The gradient of a permuted weight is the permuted gradient.
    expected = convert({n: torch.zeros_like(weights[n]) if g is None else g for n, g in zip(names, found, strict=True)})
    gradients = {name: p.grad for name, p in networks["generator"].named_parameters()}
    scale = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        ours = torch.zeros_like(one) if gradients[name] is None else gradients[name]
        assert float((ours - one).abs().max()) < 1e-13 * max(1.0, scale), name

    with frozen([networks["generator"]]):
        loss, _, _ = objective.loss_modules["discriminator"](batch, outputs)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(discriminator_loss.detach()), rel=1e-13)
    tensors = [tensor for pair in layers for tensor in pair if tensor is not None]
    ours = [tensor.grad.clone() for tensor in tensors]
    for one, other in zip(ours, torch.autograd.grad(discriminator_loss, tensors), strict=True):
        assert float((one - other).abs().max()) < 1e-13


@pytest.mark.parametrize("kind", ["patch", "coordinate"])
def test_the_published_discriminators_equal_their_layers_written_out(kind):
    torch.manual_seed(0)
    rays = [Rays(GRID, chest(GRID), view, follow_geometry=False) for view in (FRONTAL, LATERAL)]
    discriminator = DiscriminatorConfig(kind=kind, channels=(4, 6, 8, 8)).build(rays).double()
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    volume, images = torch.rand(2, 1, 16, 16, 16).double(), torch.rand(2, 2, 16, 16).double()
    inputs = torch.cat([expanded(images, 16), volume], dim=1)
    if kind == "coordinate":
        line = torch.linspace(-1, 1, 16, dtype=torch.float64)
        coordinates = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).expand(2, 3, 16, 16, 16)
        inputs = torch.cat([coordinates, inputs], dim=1)
    with torch.no_grad():
        expected, scores = patch_scores(layers_of(discriminator), inputs), discriminator(volume, images)
    assert expected.std() > 0.01
    assert relative(scores, expected) < 1e-13


def test_x_recons_generator_equals_its_layers_written_out():
    """X2CT-GAN's views; at each size 1^3 convolutions of average and coarser volume, combined from coarse to fine."""
    state, images = numbers(2), torch.rand(2, 2, 16, 16, dtype=torch.float64)
    levels = reference.fused_features(state, images)[1:-1]
    renderers = []
    for average, below in levels:
        channels = average.shape[1] + below.shape[1]
        renderers.append((torch.randn(1, channels, 1, 1, 1).double() / 3, torch.randn(1).double() / 3))
    running = None
    for (average, below), (weight, bias) in zip(levels, renderers, strict=True):
        intensities = F.leaky_relu(F.conv3d(torch.cat([average, below], dim=1), weight, bias))
        if running is None:
            running = intensities / 2
        else:
            doubled = F.interpolate(running, scale_factor=2, mode="trilinear", align_corners=False)
            running = (doubled + intensities) / 2
    expected = F.leaky_relu(running)

    network = small(X_RECON.full).reconstruction_network(GRID, chest(GRID)).double().eval()
    converted = {name: t for name, t in convert(state).items() if not name.startswith("decoder.head")}
    # The published auxiliary heads of the views are not fused; that of the fused decoder is replaced.
    for index, (weight, bias) in enumerate(renderers):
        converted |= {f"decoder.head.conv.{index}.weight": weight, f"decoder.head.conv.{index}.bias": bias}
    network.load_state_dict(converted)
    with torch.no_grad():
        volume = network(images)
    assert expected.std() > 0.01
    assert relative(volume, expected) < 1e-5


class Tensors(dict[str, torch.Tensor]):
    """A state dict that records the names that are read."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("training", [True, False])
def test_psr_equals_the_layers_of_x2ct_gans_code_written_out(training):
    """The 2-D baseline of X2CT-GAN's public code; the radiograph is doubled by linear interpolation."""
    torch.manual_seed(0)
    encoder = replace(PSR.full.encoder, init_features=4)
    grid = Grid(32, 10.0)
    network = replace(PSR.full, encoder=encoder).reconstruction_network(grid, chest(grid)).double().train(training)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            positive = name.endswith("running_var")
            tensor.copy_(
                torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor) / tensor[0].numel() ** 0.5
            )
    state = Tensors({name: tensor.clone() for name, tensor in network.state_dict().items()})
    part = "branches.0.encoder."

    def conv_norm_act(name: str, features: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.0.weight"]
        features = F.conv2d(features, weight, None, stride, padding=weight.shape[-1] // 2)
        mean, variance = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        scale, shift = state[f"{name}.1.weight"], state[f"{name}.1.bias"]
        return torch.relu(F.batch_norm(features, mean, variance, scale, shift, training=training))

    def block(name: str, features: torch.Tensor) -> torch.Tensor:
        residual = features
        for index in range(3):
            residual = conv_norm_act(f"{name}.residual.{index}", residual)
        widened = residual.shape[1] != features.shape[1]
        return torch.relu(residual + (conv_norm_act(f"{name}.shortcut", features) if widened else features))

    def doubled(index: int, features: torch.Tensor) -> torch.Tensor:
        weight = state[f"{part}upsamplers.{index}.weight"]
        return F.conv_transpose2d(features, weight, None, stride=2, padding=1, groups=features.shape[1])

    def pooled(index: int, features: torch.Tensor, blocks: int) -> torch.Tensor:
        features = F.max_pool2d(features, 2)
        for k in range(blocks):
            features = block(f"{part}down.{index}.{k + 1}", features)
        return features

    image = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        full = conv_norm_act(f"{part}stem.0", F.interpolate(image, scale_factor=2, mode="bilinear"), stride=2)
        for k in range(1, 5):
            full = block(f"{part}stem.{k}", full)
        half = pooled(0, full, 3)
        quarter = pooled(1, half, 3)
        eighth = pooled(2, quarter, 3)
        up = doubled(0, pooled(3, eighth, 5))
        up = doubled(1, block(f"{part}up.0", eighth + up))
        up = doubled(2, block(f"{part}up.1", quarter + up))
        up = doubled(3, block(f"{part}up.2", half + up))
        name = "branches.0.lifting.depths"
        features = F.conv2d(full + up, state[f"{name}.0.weight"])
        statistics = [state[f"{name}.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        features = torch.relu(F.batch_norm(features, *statistics, training=training))
        depths = F.conv2d(features, state[f"{name}.3.weight"])
        expected = depths.permute(0, 2, 1, 3)[:, None]
        volume = network(image)
    assert {key for key in state if not key.endswith("num_batches_tracked")} == state.used
    assert expected.std() > 0.01
    assert relative(volume, expected) < 1e-13
