"""Systems that are trained from radiographs alone: their losses, gradients and overfitting."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.models.objectives.cycle import CycleLoss
from raylift.models.objectives.objective import frozen
from raylift.models.objectives.reprojection import ReprojectionLoss
from raylift.models.parts.discriminators import Discriminator, ViewDiscriminatorConfig
from raylift.models.parts.radiograph_generator import RadiographGenerator
from raylift.models.reprojection_composition import ReprojectionComposition
from raylift.models.systems.cyclegan import CycleGan
from raylift.models.zoo import SYSTEMS, parameters

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
NAMES = [name for name, entry in SYSTEMS.items() if entry.full.supervision == "radiographs"]
REPROJECTIONS = [name for name in NAMES if isinstance(SYSTEMS[name].full, ReprojectionComposition)]
CYCLES = [name for name in NAMES if isinstance(SYSTEMS[name].full, CycleGan)]


@cache
def people() -> Batch:
    """Two phantoms as training data, and two others as unpaired CT."""
    unit, views = [], []
    for seed in (1, 2, 3, 4):
        hu, _ = thorax(seed, GRID)
        unit.append(Window().to_unit(torch.from_numpy(hu.astype("float32")))[None])
        images = render_drrs(hu, GRID, GEOMETRY)
        views.append(torch.stack([torch.from_numpy(normalize(image)) for image in images]))
    return Batch(torch.stack(unit[:2]), torch.stack(views[:2]), ("a", "b"), unpaired=torch.stack(unit[2:]))


def batch(system, unpaired=True) -> Batch:
    """The batch of the system's views."""
    data = people()
    return replace(
        data, radiographs=data.radiographs[:, : len(system.views)], unpaired=data.unpaired if unpaired else None
    )


def calm(system):
    """Without random terms."""
    return replace(system, dropout=0.0) if isinstance(system, CycleGan) else system


def turns(objective, data, seed=0):
    """Every network's loss and logs after its backward pass, as in the training loop."""
    torch.manual_seed(seed)
    earlier, results = {}, {}
    for name, loss_module in objective.loss_modules.items():
        with frozen([net for other, net in objective.networks().items() if other != name]):
            loss, logs, outputs = loss_module(data, earlier)
            loss.backward()
        earlier |= outputs
        results[name] = loss.detach(), logs
    return results, earlier


def radiograph_generator(system: CycleGan) -> RadiographGenerator:
    return RadiographGenerator(system.projection_channels, GRID, GEOMETRY.detector_px, system.rays(GRID, GEOMETRY))


@pytest.mark.parametrize("name", NAMES)
def test_every_network_gets_gradients_and_logs_numbers(name):
    torch.manual_seed(0)
    objective = SYSTEMS[name].tiny.objective(GRID, GEOMETRY)
    results, earlier = turns(objective, batch(SYSTEMS[name].full))
    for network_name, loss_module in objective.loss_modules.items():
        loss, logs = results[network_name]
        assert torch.isfinite(loss)
        assert logs
        assert all(torch.isfinite(value) and not value.requires_grad for value in logs.values())
        assert all(parameter.grad is not None for parameter in loss_module.network.parameters())
    assert not any(tensor.requires_grad for tensor in earlier.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_network_uses_the_ground_truth_or_the_labels_of_a_batch(name):
    system = calm(SYSTEMS[name].tiny)
    data = batch(system)
    poisoned = replace(
        data,
        ground_truth=torch.full_like(data.volume, torch.nan),
        labels=torch.full(data.volume.shape, 255, dtype=torch.uint8),
    )
    losses = []
    for given in (data, poisoned, replace(data, ground_truth=None)):
        torch.manual_seed(0)
        results, _ = turns(system.objective(GRID, GEOMETRY), given)
        losses.append({network: float(loss) for network, (loss, _) in results.items()})
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("name", NAMES)
def test_slim_networks_are_small_and_published_ones_give_cubes(name):
    grid = Grid(64)
    with torch.device("meta"):
        assert parameters(SYSTEMS[name].slim.reconstruction_network(grid, chest(grid))) < 2_200_000
    system, grid = SYSTEMS[name].full, Grid(128)
    with FakeTensorMode():
        made = system.reconstruction_network(grid, chest(grid))(torch.empty(1, len(system.views), 128, 128))
    assert made.shape == (1, 1, 128, 128, 128)


@pytest.mark.parametrize(
    ("name", "network", "count"),
    [
        # The published one has three equal input channels and batch norm.
        ("u-x2ctgan", "discriminator", 660_545),
        # X2CT-GAN's with a volume as its only input.
        ("cyclegan-b", "volume_discriminator", 11_051_073 - 64 * 4**3),
        ("cyclegan-b", "view_discriminator", 660_545),
        ("cyclegan-b", "generator", 23_241_089),
        ("cgan-128", "generator", 31_141_793),
    ],
)
def test_published_networks_have_their_layers(name, network, count):
    grid = Grid(128)
    with torch.device("meta"):
        networks = SYSTEMS[name].full.objective(grid, chest(grid)).networks()
    assert parameters(networks[network]) == count


def gradient(system, data) -> torch.Tensor:
    """Gradients of the generator's whole loss in all its parameters."""
    torch.manual_seed(0)
    objective = system.objective(GRID, GEOMETRY)
    loss_module = objective.loss_modules["generator"]
    torch.manual_seed(1)
    with frozen([net for other, net in objective.networks().items() if other != "generator"]):
        loss, _, _ = loss_module(data, {})
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in loss_module.network.parameters()])


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(
    "term", ["reprojection_weight", "thickness_weight", "total_variation_weight", "adversarial_weight"]
)
def test_every_term_of_a_reprojection_loss_has_a_gradient_in_the_generator(term, balanced):
    # The public notebook's generator had no gradient but weight decay.
    system = SYSTEMS["u-x2ctgan"].tiny
    weights = replace(system.loss, balanced=balanced, total_variation_weight=1.0)
    system = replace(system, loss=weights)
    whole = gradient(system, batch(system))
    # Balanced weights are relative: a tiny weight removes a term.
    without = gradient(replace(system, loss=replace(weights, **{term: 1e-12})), batch(system))
    assert whole.norm() > 1e-6
    assert (whole - without).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("term", ["cycle_weight", "adversarial_weight"])
@pytest.mark.parametrize("projection", ["network", "projector"])
def test_every_term_of_a_cycle_has_a_gradient_in_the_volume_generator(term, projection):
    system = replace(calm(SYSTEMS["cyclegan-b"].tiny), projection=projection)
    whole = gradient(system, batch(system))
    without = gradient(replace(system, loss=replace(system.loss, **{term: 1e-12})), batch(system))
    assert (whole - without).norm() > 1e-3 * whole.norm()


def test_balanced_weights_sum_to_one_and_have_no_gradient():
    weights = ReprojectionLoss()
    terms = {
        "projection": torch.tensor(0.2, requires_grad=True),
        "total_variation": torch.tensor(0.05, requires_grad=True),
        "adversarial": torch.tensor(0.8, requires_grad=True),
    }
    loss = weights.weighted(terms)
    shares = torch.tensor([1 / 0.2, 0.1 / 0.05, 1 / 0.8])
    torch.testing.assert_close(loss.detach(), torch.tensor(2.1) / shares.sum())
    loss.backward()
    gradients = torch.stack([value.grad for value in terms.values()])
    torch.testing.assert_close(gradients, shares / shares.sum())
    # Weights are detached: their dependence on the terms has no gradient.
    assert gradients.sum() == pytest.approx(1.0)


def test_a_balanced_loss_logs_its_unweighted_terms():
    system = SYSTEMS["u-x2ctgan"].tiny
    results, _ = turns(system.objective(GRID, GEOMETRY), batch(system))
    loss, logs = results["generator"]
    weighted = system.loss.weighted({name: logs[name] for name in ("projection", "total_variation", "adversarial")})
    assert loss == pytest.approx(weighted)
    assert logs["projection"] == pytest.approx(logs["agreement"] + logs["thickness"])
    # The sum is uninformative: it is the harmonic mean of terms that differ by orders of magnitude.
    assert logs["projection"] > 1.5 * logs["total_variation"]


def test_weight_decay_of_adam_is_the_published_penalty_on_squared_parameters():
    stepped = []
    for decay, penalty in ((2e-4, 0.0), (0.0, 1e-4)):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3).double()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=decay)
        for _ in range(3):
            optimizer.zero_grad()
            squares = sum(parameter.square().sum() for parameter in layer.parameters())
            (layer(torch.ones(2, 5).double()).square().mean() + penalty * squares).backward()
            optimizer.step()
        stepped.append(layer.weight.detach())
    torch.testing.assert_close(*stepped, atol=1e-12, rtol=1e-9)


FALLS = {"cyclegan-b": 1.5, "cyclegan-f": 1.5, "cyclegan-b by the projector": 3.0}
"""The factor by which the error of reprojections (or of the cycle of radiographs) falls, where it is not 10."""


@pytest.mark.parametrize("name", [*NAMES, "cyclegan-b by the projector"])
def test_a_system_overfits_two_pairs_of_radiographs_and_distinguishes_them(name):
    torch.manual_seed(0)
    system = calm(SYSTEMS[name.split()[0]].tiny)
    if name.endswith("projector"):
        system = replace(system, projection="projector")
    objective, data = system.objective(GRID, GEOMETRY), batch(system)
    watched = "agreement" if isinstance(system, ReprojectionComposition) else "cycle_radiographs"
    optimizers = {
        key: torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.5, 0.99)) for key, net in objective.networks().items()
    }
    errors = []
    for step in range(60):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        results, _ = turns(objective, data, seed=step)
        for optimizer in optimizers.values():
            optimizer.step()
        errors.append(float(results["generator"][1][watched]))
    assert sum(errors[-3:]) / 3 < errors[0] / FALLS.get(name, 10.0), (errors[0], errors[-3:])
    with torch.no_grad():
        one, other = objective.reconstruction_network(data.radiographs)
    assert (one - other).square().mean() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_under_bf16_autocast_the_loss_is_nearly_that_of_fp32(name):
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        system = calm(SYSTEMS[name].tiny)
        objective = system.objective(GRID, GEOMETRY)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _, _ = objective.loss_modules["generator"](batch(system), {})
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_cgans_loss_is_the_cross_entropy_and_the_squared_error_of_each_view():
    torch.manual_seed(0)
    objective = SYSTEMS["cgan-128"].tiny.objective(GRID, GEOMETRY)
    data = batch(SYSTEMS["cgan-128"].full)
    results, earlier = turns(objective, data)
    loss, logs = results["generator"]
    errors = [(earlier["reprojections"][:, k] - data.radiographs[:, k]).square().mean() for k in range(2)]
    torch.testing.assert_close(loss, logs["adversarial"] + sum(errors) + 2 * logs["thickness"])


@pytest.mark.parametrize("name", REPROJECTIONS)
def test_checkpointing_changes_neither_the_loss_nor_a_gradient(name):
    gradients = []
    for checkpointing in ("none", "finest", "all"):
        system = replace(SYSTEMS[name].tiny, checkpointing=checkpointing)
        gradients.append(gradient(system, batch(system)))
    for checkpointed in gradients[1:]:
        torch.testing.assert_close(checkpointed, gradients[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["u-x2ctgan", "cgan-128", "cyclegan-b"])
def test_the_lateral_view_changes_the_volume(name):
    # The lateral input of the public cGAN was the frontal radiograph.
    torch.manual_seed(0)
    network = calm(SYSTEMS[name].tiny).reconstruction_network(GRID, GEOMETRY)
    views = people().radiographs.clone().requires_grad_(True)
    volume = network(views)
    volume.square().sum().backward()
    assert float(views.grad[:, 1].abs().sum()) > 0
    changed = views.detach().clone()
    changed[:, 1] = changed[:, 1].flip(-1)
    with torch.no_grad():
        assert float((network(changed) - volume).abs().max()) > 1e-3


@pytest.mark.parametrize("name", REPROJECTIONS)
def test_a_pixel_of_either_view_changes_the_voxels_of_its_own_ray_most(name):
    torch.manual_seed(0)
    network = SYSTEMS[name].tiny.reconstruction_network(GRID, GEOMETRY)
    views = torch.rand(1, 2, 32, 32)
    with torch.no_grad():
        for view, along in ((0, 1), (1, 2)):
            changed = views.clone()
            changed[0, view, 10, 20] += 0.5
            moved = (network(changed) - network(views)).abs()[0, 0].mean(dim=along)
            assert moved[8:13, 18:23].mean() > 1.5 * moved.median()
            assert (moved == moved.max()).nonzero()[0].sub(torch.tensor([10, 20])).abs().max() <= 4


def test_a_conditional_discriminator_scores_one_reprojected_view_with_the_given_others():
    discriminator = ViewDiscriminatorConfig(channels=(4,), pooled=False, conditional=True).build(2)
    discriminator.layers = nn.Identity()
    given, made = torch.rand(3, 2, 8, 8), torch.rand(3, 2, 8, 8)
    assert torch.equal(discriminator(given), given)
    frontal, lateral = discriminator(given, made).chunk(2)
    assert torch.equal(frontal, torch.stack([made[:, 0], given[:, 1]], dim=1))
    assert torch.equal(lateral, torch.stack([given[:, 0], made[:, 1]], dim=1))


def test_an_unconditional_discriminator_scores_each_image_alone_once_if_pooled():
    torch.manual_seed(0)
    given = torch.rand(3, 2, 32, 32)
    discriminator = ViewDiscriminatorConfig(channels=(4, 8)).build(2)
    assert discriminator(given).shape == (6,)
    torch.testing.assert_close(discriminator(given)[2:4], discriminator(given[1:2]))
    assert ViewDiscriminatorConfig(channels=(4, 8), pooled=False).build(2)(given).shape[:2] == (6, 1)


def test_rotated_reprojections_are_scored_too_with_a_rotation_std():
    system = SYSTEMS["u-x2ctgan"].tiny
    system = replace(system, loss=replace(system.loss, rotation_std_deg=20.0))
    _, earlier = turns(system.objective(GRID, GEOMETRY), batch(system))
    assert earlier["reprojections"].shape == (2, 4, 32, 32)


def watch_what_is_called_real(monkeypatch):
    """The inputs of the volume discriminator in its own turn, in order."""
    shown, forward = [], Discriminator.forward

    def watched(self, volume, views):
        if next(self.parameters()).requires_grad:
            shown.append(volume)
        return forward(self, volume, views)

    monkeypatch.setattr(Discriminator, "forward", watched)
    return shown


@pytest.mark.parametrize("name", CYCLES)
def test_real_samples_of_the_volume_discriminator_are_unpaired_ct_where_there_is_any(name, monkeypatch):
    system = SYSTEMS[name].tiny
    objective, data = system.objective(GRID, GEOMETRY), batch(system)
    shown = watch_what_is_called_real(monkeypatch)
    results, _ = turns(objective, data)
    assert torch.equal(shown[0], data.unpaired)
    assert results["generator"][1]["unpaired_is_ct"] == 1


def test_without_unpaired_ct_real_samples_are_procedural_phantoms(monkeypatch):
    system = replace(SYSTEMS["cyclegan-b"].tiny, phantoms=3)
    objective = system.objective(GRID, GEOMETRY)
    shown = watch_what_is_called_real(monkeypatch)
    results, _ = turns(objective, batch(system, unpaired=False))
    assert results["generator"][1]["unpaired_is_ct"] == 0
    pool = [Window().to_unit(torch.from_numpy(thorax(2**33 + k, GRID)[0].astype("float32"))) for k in range(3)]
    for volume in shown[0][:, 0]:
        assert any(torch.equal(volume, person) for person in pool)
        # Air, lung and soft tissue, as in a chest.
        hu = Window().to_hu(volume)
        assert (hu < -950).float().mean() > 0.1
        assert ((hu > -950) & (hu < -600)).float().mean() > 0.03
        assert ((hu > -150) & (hu < 150)).float().mean() > 0.2
    assert any("procedural phantoms" in note for note in objective.notes)


def test_procedural_phantoms_depend_on_the_seed_alone():
    system = SYSTEMS["cyclegan-b"].tiny
    unpaired = [
        turns(system.objective(GRID, GEOMETRY), batch(system, False), seed)[1]["unpaired"] for seed in (5, 5, 6)
    ]
    assert torch.equal(unpaired[0], unpaired[1])
    assert not torch.equal(unpaired[0], unpaired[2])


def test_every_weight_of_the_projection_network_is_trained():
    # The public one created its last layer at random in every call.
    torch.manual_seed(0)
    system = calm(SYSTEMS["cyclegan-b"].tiny)
    network = radiograph_generator(system)
    volume = people().volume
    made = network(volume)
    assert torch.equal(made, network(volume))
    made.square().sum().backward()
    assert {"conv_out.0.weight", "conv_out.1.weight"} <= set(dict(network.named_parameters()))
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in network.conv_out.parameters())
    assert made.shape == people().radiographs.shape


def test_the_projection_network_projects_along_each_views_rays():
    torch.manual_seed(0)
    system = replace(calm(SYSTEMS["cyclegan-b"].tiny), projection_channels=(8, 8))
    network = radiograph_generator(system)
    volume = torch.rand(1, 1, 32, 32, 32)
    changed = volume.clone()
    d, h, w = 10, 20, 6
    changed[0, 0, d, h, w] += 5.0
    with torch.no_grad():
        moved = (network(changed) - network(volume)).abs()[0]
    for image, column in zip(moved, (w, h), strict=True):
        assert (image == image.max()).nonzero()[0].sub(torch.tensor([d, column])).abs().max() <= 6


@pytest.mark.parametrize(("placement", "along"), [("geometric", 2), ("stacked", 1)])
def test_lateral_features_are_repeated_along_their_own_axis_unless_stacked(placement, along):
    torch.manual_seed(0)
    system = replace(calm(SYSTEMS["cyclegan-b"].tiny), placement=placement)
    network = system.reconstruction_network(GRID, GEOMETRY)
    views = torch.rand(1, 2, 32, 32)
    changed = views.clone()
    changed[0, 1, 8:12, 20:24] += 0.5
    with torch.no_grad():
        moved = (network(changed) - network(views)).abs()[0, 0].mean(dim=along)
    assert (moved == moved.max()).nonzero()[0].sub(torch.tensor([10, 22])).abs().max() <= 4


def test_cyclegans_features_fill_the_cube_with_a_depth_channel():
    # The public one starts with a depth of one and is stretched.
    system = calm(SYSTEMS["cyclegan-b"].tiny)
    network, given = system.reconstruction_network(GRID, GEOMETRY), []
    network.merge.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    network(people().radiographs)
    assert given[0].shape == (2, 2 * (16 + 1), 8, 8, 8)
    for view, axis in ((0, 1), (1, 2)):
        depth = given[0][0, 17 * view + 16].movedim(axis, 0).flatten(1)
        assert (depth.std(dim=1) == 0).all()
        torch.testing.assert_close(depth[:, 0], torch.linspace(-7 / 8, 7 / 8, 8))


def test_with_the_projector_only_volumes_have_a_discriminator():
    system = replace(SYSTEMS["cyclegan-b"].tiny, projection="projector")
    assert list(system.objective(GRID, GEOMETRY).loss_modules) == ["generator", "volume_discriminator"]
    whole = ["generator", "projection", "volume_discriminator", "view_discriminator"]
    assert list(SYSTEMS["cyclegan-b"].tiny.objective(GRID, GEOMETRY).loss_modules) == whole


def test_only_discriminators_have_smoothed_targets():
    system = calm(SYSTEMS["cyclegan-b"].tiny)
    results = {}
    for smoothing in (0.0, 0.1):
        torch.manual_seed(0)
        changed = replace(system, loss=replace(system.loss, smoothing=smoothing))
        results[smoothing], _ = turns(changed.objective(GRID, GEOMETRY), batch(system))
    for network, (loss, logs) in results[0.1].items():
        before, logs_before = results[0.0][network]
        assert (loss != before) == network.endswith("discriminator")
        if network.endswith("discriminator"):
            assert logs["fake"] == logs_before["fake"]
            assert logs["real"] != logs_before["real"]


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (ReprojectionComposition, {"views": ("frontal",)}, "max_thickness_mm .* for 1 views: give one for each"),
        (ReprojectionComposition, {"views": ()}, "name one or more"),
        (ReprojectionLoss, {"reprojection_weight": 0.0}, "no other term uses the radiographs"),
        (ReprojectionLoss, {"total_variation_weight": -1.0}, "below 0: system.loss.total_variation_weight"),
        (ReprojectionLoss, {"min_thickness_mm": (300.0, 0.0)}, "from 0 up, the second larger"),
        (CycleLoss, {"cycle_weight": 0.0}, "the cycle's weight must be positive"),
        (CycleLoss, {"discriminators_every": 0}, "discriminators_every 1 or more"),
        (CycleGan, {"phantoms": 0}, "0 phantoms"),
        (CycleGan, {"views": ("lateral", "lateral")}, "name one or more, each once"),
    ],
)
def test_invalid_settings_are_refused_with_the_remedy(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_a_conditional_discriminator_needs_two_views_and_no_rotated_ones():
    system = SYSTEMS["cgan-128"].full
    with pytest.raises(ConfigError, match="give two views or more"):
        replace(system, loss=replace(system.loss, rotation_std_deg=5.0))
    cycle = SYSTEMS["cyclegan-b"].full
    with pytest.raises(ConfigError, match="volumes of other patients have no radiographs"):
        replace(cycle, volume_discriminator=replace(cycle.volume_discriminator, conditional=True))
    with pytest.raises(ConfigError, match="no other views of the same patient"):
        replace(cycle, view_discriminator=replace(cycle.view_discriminator, conditional=True))


def test_an_indivisible_size_is_refused_with_the_divisible_ones():
    for make in (CycleGan.reconstruction_network, CycleGan.objective):
        with pytest.raises(ConfigError, match="multiple of 4 from 8 up"):
            make(SYSTEMS["cyclegan-f"].full, Grid(30), chest(Grid(30)))
