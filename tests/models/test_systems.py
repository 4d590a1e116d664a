"""CNN and GAN systems: published parameter counts, gradients, overfitting, dependence on their inputs."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import get_args

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, LATERAL, Grid, View, chest
from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.objectives.objective import frozen
from raylift.models.parts.decoders import DecoderConfig
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.parts.fusion import Alignment, FusionConfig, FusionName, Sum
from raylift.models.parts.lifting import LiftingConfig, LiftingName
from raylift.models.systems.psr import PSR
from raylift.models.systems.trct import TRCT_GAN
from raylift.models.systems.x2ct import X2CT_GAN
from raylift.models.zoo import SYSTEMS, parameters

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
BIPLANAR = ("frontal", "lateral")
COMPOSITIONS = [name for name, entry in SYSTEMS.items() if isinstance(entry.full, Composition)]


def batch(views=2, size=32, n=2):
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.rand(n, 1, size, size, size, generator=generator),
        torch.rand(n, views, size, size, generator=generator),
        tuple(f"sample-{k}" for k in range(n)),
        torch.randint(0, 4, (n, 1, size, size, size), dtype=torch.uint8, generator=generator),
    )


@cache
def two_boxes() -> Batch:
    """Two different volumes, with their projections as radiographs; the boxes are labeled as lung."""
    volume = torch.zeros(2, 1, 32, 32, 32)
    volume[0, :, 8:20, 6:18, 4:16] = 0.8
    volume[1, :, 14:28, 12:26, 14:28] = 0.8
    views = torch.stack([volume.mean(dim=3)[:, 0], volume.mean(dim=4)[:, 0]], dim=1)
    return Batch(volume, views / views.max(), labels=(volume > 0).byte())


def without_dropout(system: Composition) -> Composition:
    return replace(system, lifting=replace(system.lifting, dropout=0.0))


COUNTS = [(name, count) for name, entry in SYSTEMS.items() for count in entry.parameters]


@pytest.mark.parametrize(("name", "published"), COUNTS, ids=[f"{name}-{one.count}" for name, one in COUNTS])
def test_a_published_network_has_the_published_number_of_parameters(name, published):
    system, grid = replace(SYSTEMS[name].full, views=published.views), Grid(published.size)
    with torch.device("meta"):
        networks = system.objective(grid, chest(grid)).networks()
    assert parameters(networks[published.network]) == published.count


def test_the_published_numbers_of_parameters_are_these():
    counts = {(name, published.count) for name, published in COUNTS}
    x2ct = {(name, count) for name in ("x2ct-gan", "x2ct-cnn") for count in (61_740_467, 29_384_481)}
    assert x2ct | {("x2ct-gan", 11_055_169), ("x2ct-gan", 11_051_073), ("psr", 9_068_480)} <= counts
    assert {("x-recon", count) for count in (98_799_735, 37_517_943, 11_067_457)} <= counts


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_slim_network_has_some_two_million_parameters_at_most(name):
    grid = Grid(64)
    with torch.device("meta"):
        assert parameters(SYSTEMS[name].slim.reconstruction_network(grid, chest(grid))) < 2_200_000


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("size", [96, 128])
def test_every_published_network_gives_cubes_of_its_grid(name, size):
    assert_cube(SYSTEMS[name].full, size)


@pytest.mark.parametrize("name", ["psr", "3dcnn", "x2ct-cnn"])
def test_a_published_network_gives_a_cube_along_rays_too(name):
    published = SYSTEMS[name].full
    assert_cube(replace(published, lifting=replace(published.lifting, along="rays")), 96)


def assert_cube(system: Composition, size: int) -> None:
    # Not on the meta device, which autocast does not support: positions along rays are computed without it.
    with FakeTensorMode(allow_non_fake_inputs=True):
        grid = Grid(size)
        made = system.reconstruction_network(grid, chest(grid))(torch.empty(1, len(system.views), size, size))
    assert made.shape == (1, 1, size, size, size)


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_every_network_of_every_system_gets_gradients_from_one_view_and_from_two(name, count):
    torch.manual_seed(0)
    objective = replace(SYSTEMS[name].tiny, views=BIPLANAR[:count]).objective(GRID, GEOMETRY)
    assert list(objective.loss_modules) == (["generator", "discriminator"] if objective_is_gan(name) else ["generator"])
    data, earlier = batch(count), {}
    for network_name, loss_module in objective.loss_modules.items():
        with frozen([net for other, net in objective.networks().items() if other != network_name]):
            loss, logs, generated = loss_module(data, earlier)
            loss.backward()
        earlier |= generated
        assert torch.isfinite(loss)
        assert all(torch.isfinite(value) and not value.requires_grad for value in logs.values())
        without = {key for key, p in loss_module.network.named_parameters() if p.grad is None}
        # The heads of view decoders are for deep supervision only; a rendering head does not use the finest level.
        known = {key for key in without if ".decoder.head." in key or ".levels.4." in key or "decoder.levels.4." in key}
        assert without == known
    assert earlier["reconstruction"].shape == (2, 1, 32, 32, 32)


def objective_is_gan(name: str) -> bool:
    return SYSTEMS[name].kind == "GAN"


STEPS_AND_FALL = {
    "psr": (60, 50.0),
    "x2ct-gan": (40, 10.0),
    "cvaa-gan": (40, 10.0),
    "duolift-gan": (40, 10.0),
    "trct-gan": (40, 10.0),
}
"""Steps of Adam at 1e-3 and the factor by which the loss falls, where these are not 60 and 10."""


def without_adversarial_term(name: str) -> Composition:
    system = SYSTEMS[name].tiny
    return replace(system, name="", loss=replace(system.loss, adversarial_weight=0.0))


OVERFITTED = [
    name
    for index, name in enumerate(COMPOSITIONS)
    # A CNN that is its GAN without the adversarial term would be trained twice.
    if without_adversarial_term(name) not in map(without_adversarial_term, COMPOSITIONS[:index])
]


@pytest.mark.parametrize("name", [*OVERFITTED, "along rays"])
def test_a_system_overfits_two_volumes_and_does_not_predict_their_mean(name):
    steps, fall = STEPS_AND_FALL.get(name, (60, 10.0))
    torch.manual_seed(0)
    rays = {"lifting": LiftingConfig(along="rays"), "fusion": FusionConfig("attention", view_decoders=False)}
    system = replace(X2CT_GAN.tiny, **rays) if name == "along rays" else SYSTEMS[name].tiny
    system = without_dropout(system)
    system = replace(system, loss=replace(system.loss, adversarial_weight=0.0))
    objective = system.objective(GRID, GEOMETRY)
    data = two_boxes()
    data = replace(data, radiographs=data.radiographs[:, : len(system.views)])
    optimizer = torch.optim.Adam(objective.reconstruction_network.parameters(), lr=1e-3, betas=(0.5, 0.99))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _, _ = objective.loss_modules["generator"](data, {})
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / fall
    with torch.no_grad():
        made = objective.reconstruction_network(data.radiographs)
    ground_truth = data.volume
    between = (ground_truth[0] - ground_truth[1]).square().mean()
    assert (made[0] - made[1]).square().mean() > 0.25 * between
    # Less error than the mean of both volumes.
    assert (made - ground_truth).square().mean() < 0.5 * (ground_truth.mean(dim=0) - ground_truth).square().mean()


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if objective_is_gan(name)])
def test_a_gan_with_its_discriminator_and_published_weights_overfits_two_volumes_too(name):
    torch.manual_seed(0)
    objective = without_dropout(SYSTEMS[name].tiny).objective(GRID, GEOMETRY)
    data, networks = two_boxes(), objective.networks()
    # At 1e-3 the generator's output can stay constant for a hundred steps.
    optimizers = {key: torch.optim.Adam(net.parameters(), lr=5e-4, betas=(0.5, 0.99)) for key, net in networks.items()}
    losses = []
    for _ in range(80):
        earlier = {}
        for key, loss_module in objective.loss_modules.items():
            optimizers[key].zero_grad()
            with frozen([network for other, network in networks.items() if other != key]):
                loss, logs, generated = loss_module(data, earlier)
                loss.backward()
            earlier |= generated
            optimizers[key].step()
        losses.append(float(logs["real"] + logs["fake"]))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        made = objective.reconstruction_network(data.radiographs)
    ground_truth = data.volume
    assert (made[0] - made[1]).square().mean() > 0.25 * (ground_truth[0] - ground_truth[1]).square().mean()
    assert (made - ground_truth).square().mean() < 0.5 * (ground_truth.mean(dim=0) - ground_truth).square().mean()


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_each_view_reaches_the_volume(name):
    torch.manual_seed(0)
    # In training mode: a batch norm with initial running statistics suppresses its input.
    network = without_dropout(replace(SYSTEMS[name].tiny, views=BIPLANAR)).reconstruction_network(GRID, GEOMETRY)
    views = torch.rand(1, 2, 32, 32)
    with torch.no_grad():
        for view in range(2):
            changed = views.clone()
            changed[:, view] = changed[:, view].flip(-1)
            assert not torch.allclose(network(views), network(changed), atol=1e-6)


MIRRORED = replace(GEOMETRY, views=(FRONTAL, View("lateral", azimuth_deg=270.0)))
"""The lateral from the other side."""


@pytest.mark.parametrize("name", [*COMPOSITIONS, "diffux2ct", "cyclegan-b"])
def test_a_lateral_from_the_other_side_is_lifted_into_the_same_axes(name):
    system = SYSTEMS[name].tiny
    if isinstance(system, Composition):
        system = without_dropout(replace(system, views=BIPLANAR))
    torch.manual_seed(0)
    one = system.objective(GRID, GEOMETRY)
    other = system.objective(GRID, MIRRORED)
    views, volume = batch().radiographs, batch().ground_truth
    seen_from_there = torch.stack([views[:, 0], views[:, 1].flip(-1)], dim=1)
    for key, network in one.networks().items():
        other.networks()[key].load_state_dict(network.state_dict())
        network.eval(), other.networks()[key].eval()
    with torch.no_grad():
        for volumes in zip(outputs(one, views, volume), outputs(other, seen_from_there, volume), strict=True):
            torch.testing.assert_close(*volumes)


def outputs(objective, views, volume):
    """Outputs of the reconstruction network, a conditional discriminator, and CycleGAN's second generator."""
    networks = objective.networks()
    reconstructor = objective.reconstruction_network
    yield reconstructor(views) if not hasattr(reconstructor, "condition") else reconstructor.condition(views)[0]
    if "discriminator" in networks:
        yield networks["discriminator"](volume, views)
    if "projection" in networks:
        images = networks["projection"](volume)
        flipped = networks["projection"].rays[1].is_flipped
        yield torch.stack([images[:, 0], images[:, 1].flip(-1) if flipped else images[:, 1]], dim=1)


CROSSED = [
    ("repeat_conv", "alignment", "upsampling", True, "axes"),
    ("duo", "alignment", "upsampling", False, "axes"),
    ("duo", "attention", "unet++", False, "rays"),
    ("attention", "concatenate", "upsampling", True, "rays"),
    ("repeat", "average", "upsampling", True, "axes"),
    ("repeat", "sum", "unet", False, "rays"),
    ("repeat_conv", "alignment", "unet", False, "rays"),
    ("attention", "alignment", "unet++", False, "axes"),
]


@pytest.mark.parametrize(("lifting", "fusion", "decoder", "view_decoders", "along"), CROSSED)
def test_options_can_be_combined(lifting, fusion, decoder, view_decoders, along):
    torch.manual_seed(0)
    base = X2CT_GAN.tiny
    system = replace(
        base,
        lifting=LiftingConfig(lifting, along, "features", heads=2),
        fusion=FusionConfig(fusion, view_decoders),
        decoder=replace(base.decoder, kind=decoder, head_kernel=3),
        loss=ReconstructionLoss(deep_supervision_weight=float(decoder == "unet++" or view_decoders)),
    )
    objective = system.objective(GRID, GEOMETRY)
    loss, logs, generated = objective.loss_modules["generator"](batch(), {})
    loss.backward()
    assert generated["reconstruction"].shape == (2, 1, 32, 32, 32)
    assert ("auxiliary" in logs) == (decoder == "unet++" or view_decoders)
    without = [key for key, p in objective.reconstruction_network.named_parameters() if p.grad is None]
    assert not [key for key in without if "view" in key or "fuse" in key or "lifting" in key]


def test_the_views_of_psr_are_averaged():
    torch.manual_seed(0)
    network = replace(PSR.tiny, views=BIPLANAR).reconstruction_network(GRID, GEOMETRY).eval()
    views, made = batch().radiographs, []
    for branch in network.branches:
        branch.register_forward_hook(lambda _, __, lifted: made.append(lifted[-1]))
    with torch.no_grad():
        volume = network(views)
    torch.testing.assert_close(volume, (made[0] + made[1]) / 2)
    assert not torch.allclose(made[0], made[1])


def test_psr_normalizes_over_the_batch_and_3dcnn_each_volume_by_itself():
    norms = {
        name: {
            type(module) for module in SYSTEMS[name].full.reconstruction_network(Grid(64), chest(Grid(64))).modules()
        }
        & {nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm3d}
        for name in ("psr", "3dcnn")
    }
    assert norms == {"psr": {nn.BatchNorm2d}, "3dcnn": {nn.InstanceNorm3d}}


def test_cvaa_gan_sums_and_refines_the_coarsest_views_and_aligns_the_others():
    with torch.device("meta"):
        decoder = SYSTEMS["cvaa-gan"].full.reconstruction_network(Grid(128), chest(Grid(128))).decoder
    assert [type(fuse) for fuse in decoder.fusions] == [Sum, *[Alignment] * 5]
    assert {fuse.score.kernel_size for fuse in decoder.fusions[1:]} == {(7, 7, 7)}
    assert len(decoder.levels.level(0).blocks) == 1
    assert {len(decoder.levels.level(k).blocks) for k in range(1, 6)} == {0}


def test_psr_lifts_along_rays_too():
    network = replace(PSR.tiny, views=BIPLANAR, lifting=LiftingConfig("channels", "rays"))
    assert network.reconstruction_network(GRID, GEOMETRY)(batch().radiographs).shape == (2, 1, 32, 32, 32)


def test_along_rays_the_same_weights_serve_other_views_and_any_number_of_them():
    torch.manual_seed(0)
    oblique = View("oblique", azimuth_deg=40.0, elevation_deg=5.0)
    geometry = replace(GEOMETRY, views=(FRONTAL, LATERAL, oblique))
    base = X2CT_GAN.tiny
    for fusion in ("average", "sum", "attention"):
        system = replace(base, lifting=LiftingConfig(along="rays"), fusion=FusionConfig(fusion))
        state = system.reconstruction_network(GRID, geometry).state_dict()
        made = {}
        for views in (("frontal",), ("oblique",), ("frontal", "oblique"), ("oblique", "frontal", "lateral")):
            network = replace(system, views=views).reconstruction_network(GRID, geometry)
            network.load_state_dict(state)
            with torch.no_grad():
                made[views] = network(batch(3).radiographs[:, : len(views)])
        assert not torch.allclose(made[("frontal",)], made[("oblique",)], atol=1e-4)


def test_along_rays_the_order_of_views_does_not_matter():
    torch.manual_seed(0)
    system = replace(X2CT_GAN.tiny, lifting=LiftingConfig(along="rays"), fusion=FusionConfig("attention"))
    network = system.reconstruction_network(GRID, GEOMETRY).eval()
    swapped = replace(system, views=("lateral", "frontal")).reconstruction_network(GRID, GEOMETRY).eval()
    swapped.load_state_dict(network.state_dict())
    views = batch().radiographs
    with torch.no_grad():
        torch.testing.assert_close(swapped(views.flip(1)), network(views), atol=1e-4, rtol=1e-3)


def test_in_trct_gan_a_pixel_changes_the_voxels_of_its_ray_most():
    # With a vector broadcast over the volume, as in a public implementation, every voxel would change equally: ratio 1.
    ratios, distances = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        network = TRCT_GAN.tiny.reconstruction_network(GRID, GEOMETRY)
        views = torch.rand(1, 2, 32, 32)
        changed = views.clone()
        changed[0, 0, 10, 20] += 0.5
        with torch.no_grad():
            difference = (network(changed) - network(views)).abs()[0, 0].mean(dim=1)
        # Frontal: rows are D, columns are W.
        ratios.append(float(difference[8:13, 18:23].mean() / difference.median()))
        distances.append(int((difference == difference.max()).nonzero()[0].sub(torch.tensor([10, 20])).abs().max()))
    # With random weights the ratio is 2.5 with a standard deviation of 0.5 over 40 seeds, and the distance up to 7.
    assert min(ratios) > 1.5
    assert sum(ratios) / len(ratios) > 2
    assert sorted(distances)[-1] <= 5


@pytest.mark.parametrize("name", ["x2ct-gan", "duolift-gan", "3dcnn", "psr", "trct-gan", "x-recon"])
def test_checkpointing_changes_neither_the_loss_nor_a_gradient(name):
    gradients = []
    for checkpointing in ("none", "finest", "all"):
        torch.manual_seed(0)
        system = replace(without_dropout(SYSTEMS[name].tiny), checkpointing=checkpointing)
        objective = system.objective(GRID, GEOMETRY)
        torch.manual_seed(1)
        loss, _, _ = objective.loss_modules["generator"](batch(len(system.views)), {})
        loss.backward()
        named = objective.reconstruction_network.named_parameters()
        statistics = {
            key: buffer for key, buffer in objective.reconstruction_network.named_buffers() if "running" in key
        }
        assert bool(statistics) == (name == "psr")
        gradients.append(
            {"loss": loss.detach(), **statistics, **{key: p.grad for key, p in named if p.grad is not None}}
        )
    plain, *others = gradients
    for checkpointed in others:
        assert plain.keys() == checkpointed.keys()
        for key, gradient in plain.items():
            torch.testing.assert_close(checkpointed[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


def test_deep_supervision_uses_the_volumes_of_view_decoders_and_costs_nothing_without_gradients():
    system = replace(X2CT_GAN.tiny, loss=ReconstructionLoss(deep_supervision_weight=0.5))
    network = system.reconstruction_network(GRID, GEOMETRY)
    assert len(network.volumes(batch().radiographs)) == 3
    assert len(X2CT_GAN.tiny.reconstruction_network(GRID, GEOMETRY).volumes(batch().radiographs)) == 1
    with torch.no_grad():
        assert len(network.volumes(batch().radiographs)) == 1
    loss, _, _ = system.objective(GRID, GEOMETRY).loss_modules["generator"](batch(), {})
    assert torch.isfinite(loss)


def test_along_rays_the_shared_view_decoder_gives_one_auxiliary_volume():
    system = replace(
        X2CT_GAN.tiny, lifting=LiftingConfig(along="rays"), loss=ReconstructionLoss(deep_supervision_weight=1.0)
    )
    assert len(system.reconstruction_network(GRID, GEOMETRY).volumes(batch().radiographs)) == 2
    assert (
        len(
            replace(system, lifting=LiftingConfig()).reconstruction_network(GRID, GEOMETRY).volumes(batch().radiographs)
        )
        == 3
    )


def test_radiographs_of_another_size_are_resized_to_the_volumes():
    network = X2CT_GAN.tiny.reconstruction_network(GRID, GEOMETRY)
    assert network(torch.rand(1, 2, 50, 50)).shape == (1, 1, 32, 32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": DecoderConfig(channels=(8, 8, 8, 8))}, "4 decoder channels for 5 encoder stages: give 6"),
        ({"decoder": DecoderConfig(channels=(8,) * 7)}, "the upsampling decoder needs 6"),
        (
            {"decoder": DecoderConfig("unet", channels=(8, 8))},
            "2 decoder channels for 5 encoder stages: give 6 or more",
        ),
        ({"decoder": DecoderConfig("none")}, "without a decoder the lifted volume is the output"),
        ({"views": ("frontal", "frontal")}, "name one or more, each once"),
        ({"views": ()}, "name one or more"),
        (
            {"fusion": FusionConfig(view_decoders=False), "loss": ReconstructionLoss(deep_supervision_weight=1.0)},
            "has no auxiliary volumes here",
        ),
    ],
)
def test_incompatible_options_are_refused_with_the_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        Composition(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecoderConfig(head_kernel=4), "head_kernel is 4: give an odd number"),
        (lambda: DecoderConfig(channels=(8, 0)), "channels is .* give numbers of 1 or more"),
        (lambda: LiftingConfig(dropout=1.0), "dropout is 1.0: give a fraction in"),
        (lambda: EncoderConfig("transformer", heads=0), "heads is 0: give 1 or more"),
    ],
)
def test_invalid_numbers_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_heads_that_do_not_divide_the_lifted_channels_are_refused():
    system = X2CT_GAN.tiny
    with pytest.raises(ConfigError, match=r"3 heads do not divide .* divisor of the coarse widths"):
        replace(system, lifting=LiftingConfig("attention", heads=3)).reconstruction_network(GRID, GEOMETRY)


def test_an_indivisible_size_is_refused_with_the_divisible_ones():
    with pytest.raises(ConfigError, match="multiple of 32 from 64 up"):
        X2CT_GAN.full.reconstruction_network(Grid(48), chest(Grid(48)))


def test_a_view_that_the_geometry_lacks_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="no view 'skyline' in this geometry"):
        Composition(views=("skyline",)).reconstruction_network(Grid(64), chest(Grid(64)))


def test_the_rendering_head_needs_the_upsampling_decoder():
    with pytest.raises(ConfigError, match="decoder 'unet' has no rendering head"):
        DecoderConfig("unet", head="rendering")


def test_heads_must_divide_the_channels_of_the_transformer():
    with pytest.raises(ConfigError, match="3 heads do not divide"):
        EncoderConfig("transformer", heads=3)


def test_every_combination_of_lifting_fusion_and_decoder_builds():
    base = X2CT_GAN.tiny
    with torch.device("meta"):
        for lifting, along, fusion, view_decoders, decoder in product(
            get_args(LiftingName),
            ("axes", "rays"),
            get_args(FusionName),
            (True, False),
            ("upsampling", "unet", "unet++"),
        ):
            if lifting == "channels" or fusion == "sum" or (view_decoders and decoder != "upsampling"):
                continue
            choices = {"fusion": FusionConfig(fusion, view_decoders), "decoder": replace(base.decoder, kind=decoder)}
            system = replace(base, lifting=LiftingConfig(lifting, along, heads=2), **choices)
            if along == "rays":
                assert parameters(system.reconstruction_network(GRID, GEOMETRY)) > 10_000
            else:
                made = system.reconstruction_network(GRID, GEOMETRY)(torch.empty(1, 2, 32, 32))
                assert made.shape == (1, 1, 32, 32, 32)


@pytest.mark.parametrize("name", [*COMPOSITIONS, "along rays"])
def test_under_bf16_autocast_the_loss_is_nearly_that_of_fp32(name):
    system = SYSTEMS[name].tiny if name in COMPOSITIONS else replace(X2CT_GAN.tiny, lifting=LiftingConfig(along="rays"))
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        objective = without_dropout(system).objective(GRID, GEOMETRY)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _, _ = objective.loss_modules["generator"](batch(len(system.views)), {})
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
