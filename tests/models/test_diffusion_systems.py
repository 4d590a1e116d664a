"""Diffusion systems: gradients, overfitting, dependence on their inputs, and reproducible samples."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, View, chest
from raylift.datasets.intensity import Window
from raylift.models import weights
from raylift.models.diffusion.autoencoder import Autoencoder, AutoencoderConfig
from raylift.models.diffusion.denoiser import (
    Denoiser,
    DenoiserConfig,
    depth_to_space,
    shifted_window_attention,
    space_to_depth,
)
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.diffusion.noise_schedule import NoiseSchedulerConfig
from raylift.models.diffusion.triplane import ImplicitDecoder, TriPlaneConfig, project_to_plane, resize_plane
from raylift.models.objectives.diffusion import DenoisingLoss
from raylift.models.parts.encoders import EncoderConfig
from raylift.models.systems.diffux2ct import DiffuX2CT, VolumeDiffusion
from raylift.models.systems.latent_diffusion import LatentDiffusion
from raylift.models.zoo import SYSTEMS, parameters
from raylift.platform.config import OptimizerConfig
from raylift.platform.presets import PRESETS

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
TINY = {name: PRESETS[f"{name}-tiny"].system for name in ("diffux2ct", "latent-diffusion")}


def batch(views=2, n=2):
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.rand(n, 1, 32, 32, 32, generator=generator), torch.rand(n, views, 32, 32, generator=generator), ("x",) * n
    )


def two_boxes() -> Batch:
    """Two different volumes, with their projections as radiographs."""
    volume = torch.zeros(2, 1, 32, 32, 32)
    volume[0, :, 8:20, 6:18, 4:16] = 0.8
    volume[1, :, 14:28, 12:26, 14:28] = 0.8
    views = torch.stack([volume.mean(dim=3)[:, 0], volume.mean(dim=4)[:, 0]], dim=1)
    return Batch(volume, views / views.max())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [64, 128])
def test_a_published_network_gives_cubes_of_its_grid(name, size):
    system, grid = SYSTEMS[name].full, Grid(size)
    with torch.device("meta"):
        made = system.reconstruction_network(grid, chest(grid))(torch.empty(1, 2, size, size))
    assert made.shape == (1, 1, size, size, size)


@pytest.mark.parametrize("name", TINY)
def test_a_slim_network_has_some_two_million_parameters_at_most(name):
    grid = Grid(64)
    with torch.device("meta"):
        assert parameters(PRESETS[f"{name}-slim"].system.reconstruction_network(grid, chest(grid))) < 2_200_000


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("count", [1, 2])
def test_every_parameter_gets_a_gradient_with_one_view_and_with_two(name, count):
    torch.manual_seed(0)
    system = replace(TINY[name], views=("frontal", "lateral")[:count])
    objective = system.objective(GRID, GEOMETRY)
    assert list(objective.loss_modules) == ["denoiser"]
    # The last convolution starts at zero and passes no gradient before its first step.
    with torch.no_grad():
        for parameter in objective.reconstruction_network.denoiser.conv_out.parameters():
            parameter.normal_(0, 0.02)
    loss, logs, outputs = objective.loss_modules["denoiser"](batch(count), {})
    loss.backward()
    assert torch.isfinite(loss)
    assert outputs == {}
    assert all(torch.isfinite(value) and not value.requires_grad for value in logs.values())
    without = [
        key for key, p in objective.reconstruction_network.named_parameters() if p.grad is None or not p.grad.any()
    ]
    # A bias before an instance norm has no effect.
    assert [key for key in without if not key.endswith("stem.0.bias")] == []


@pytest.mark.parametrize("timesteps", [1000, 100])
def test_the_loss_is_the_noise_error_and_one_over_t_of_the_projections(timesteps):
    torch.manual_seed(0)
    system = replace(TINY["diffux2ct"], scheduler=replace(DiffuX2CT().scheduler, num_train_timesteps=timesteps))
    objective = system.objective(GRID, GEOMETRY)
    with torch.no_grad():
        loss, logs, _ = objective.loss_modules["denoiser"](batch(), {})
    assert float(loss) == pytest.approx(float(logs["epsilon_mse"] + logs["projection_l1"] / timesteps))
    # The error of a prediction of zero is the noise, whose variance is one.
    assert float(logs["epsilon_mse"]) == pytest.approx(1, abs=0.02)


def test_the_projection_loss_alone_reaches_the_denoiser():
    torch.manual_seed(0)
    gradients = []
    for weight in (0.0, 1000.0):
        torch.manual_seed(0)
        objective = replace(TINY["diffux2ct"], loss=DenoisingLoss(projection_weight=weight)).objective(GRID, GEOMETRY)
        objective.loss_modules["denoiser"](batch(), {})[0].backward()
        gradients.append(objective.reconstruction_network.denoiser.conv_out[-1].weight.grad)
    assert float((gradients[1] - gradients[0]).norm()) > 0.01 * float(gradients[0].norm())


STEPS = {"diffux2ct": 100, "latent-diffusion": 150}


def trained(system, steps, lr=1.5e-3, seed=0):
    """A network after some steps of Adam on two volumes, with constant, then decaying learning rate, and its losses."""
    torch.manual_seed(seed)
    objective = system.objective(GRID, GEOMETRY)
    data = two_boxes()
    optimizer = torch.optim.Adam(objective.reconstruction_network.parameters())
    rates = OptimizerConfig(lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rates.lr_at(step, steps)
        loss, _, _ = objective.loss_modules["denoiser"](data, {})
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return objective.reconstruction_network.eval(), losses


@pytest.fixture(scope="module", params=list(TINY))
def overfitted(request):
    """A network overfitted to two volumes."""
    network, losses = trained(TINY[request.param], STEPS[request.param])
    assert sum(losses[-10:]) < sum(losses[:10]) / 4, losses
    return network


def test_it_overfits_two_volumes_and_does_not_predict_their_mean(overfitted):
    data = two_boxes()
    ground_truth, made = data.volume, overfitted(data.radiographs)
    between = (ground_truth[0] - ground_truth[1]).square().mean()
    assert (made[0] - made[1]).square().mean() > 0.25 * between
    # Less error than the mean of both volumes.
    assert (made - ground_truth).square().mean() < 0.5 * (ground_truth.mean(dim=0) - ground_truth).square().mean()


def test_after_as_many_steps_samples_of_epsilon_prediction_are_worse_than_an_empty_volume():
    system = TINY["diffux2ct"]
    epsilon_prediction = replace(
        system, scheduler=replace(system.scheduler, prediction_type="epsilon"), sampling=SamplingConfig("ddim", 16)
    )
    network, losses = trained(epsilon_prediction, STEPS["diffux2ct"], lr=1e-3, seed=2)
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    data = two_boxes()
    assert (network(data.radiographs) - data.volume).square().mean() > data.volume.square().mean()


def test_the_published_system_learns_to_predict_epsilon():
    system = DiffuX2CT()
    small = replace(
        system,
        triplane=TINY["diffux2ct"].triplane,
        denoiser=DenoiserConfig((16, 32, 32), blocks=1, attention_levels=(False, False, True)),
    )
    _, losses = trained(small, 80, lr=1e-3)
    assert sum(losses[:5]) / 5 > 0.5
    assert sum(losses[-10:]) / 10 < 0.1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_a_sample_depends_on_radiographs_and_seed_and_not_on_the_rest_of_the_batch(overfitted, sampler):
    views = torch.cat([two_boxes().radiographs, two_boxes().radiographs.flip(0) * 0.9])
    settings = SamplingConfig(sampler, 4, seed=11)
    four = overfitted.sample(views, settings)
    torch.manual_seed(123)
    again = overfitted.sample(views, settings)
    assert torch.equal(four, again)
    for k in range(4):
        torch.testing.assert_close(overfitted.sample(views[k : k + 1], settings), four[k : k + 1], atol=1e-4, rtol=1e-4)
    other = overfitted.sample(views, replace(settings, seed=12))
    assert float((other - four).abs().max()) > 1e-3
    assert float((other - four).abs().max()) > 100 * float((again - four).abs().max())


def test_forward_samples_with_the_settings_of_the_network(overfitted):
    views = two_boxes().radiographs
    settings, overfitted.sampling = overfitted.sampling, SamplingConfig("ddim", 3, 5)
    try:
        assert torch.equal(overfitted(views), overfitted.sample(views, SamplingConfig("ddim", 3, 5)))
    finally:
        overfitted.sampling = settings


def test_a_saved_network_gives_the_same_samples(overfitted, tmp_path):
    # Window attention has integer relative positions in a buffer, which must stay integers.
    name = "diffux2ct" if isinstance(overfitted, VolumeDiffusion) else "latent-diffusion"
    description = weights.Description(TINY[name], GRID, GEOMETRY, Window())
    weights.save(tmp_path, overfitted.state_dict(), description)
    loaded = weights.load(tmp_path).network
    for name, tensor in overfitted.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype, name
    views = two_boxes().radiographs
    assert torch.equal(loaded(views), overfitted(views))


@pytest.mark.parametrize("name", TINY)
def test_each_view_reaches_the_volume(name):
    torch.manual_seed(0)
    network = TINY[name].reconstruction_network(GRID, GEOMETRY)
    with torch.no_grad():
        network.denoiser.conv_out[-1].weight.normal_(0, 0.05)
    views = torch.rand(1, 2, 32, 32)
    settings = SamplingConfig("ddim", 2)
    for view in range(2):
        changed = views.clone()
        changed[:, view] = changed[:, view].flip(-1)
        assert not torch.allclose(network.sample(views, settings), network.sample(changed, settings), atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_neither_the_loss_nor_a_gradient(name):
    gradients = []
    for checkpointing in ("none", "all"):
        torch.manual_seed(0)
        objective = replace(TINY[name], checkpointing=checkpointing).objective(GRID, GEOMETRY)
        with torch.no_grad():
            objective.reconstruction_network.denoiser.conv_out[-1].weight.normal_(0, 0.05)
        torch.manual_seed(1)
        loss, _, _ = objective.loss_modules["denoiser"](batch(), {})
        loss.backward()
        named = objective.reconstruction_network.named_parameters()
        gradients.append({"loss": loss.detach(), **{key: p.grad for key, p in named}})
    plain, checkpointed = gradients
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", TINY)
def test_under_bf16_autocast_the_loss_is_nearly_that_of_fp32(name):
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        objective = TINY[name].objective(GRID, GEOMETRY)
        with torch.no_grad():
            objective.reconstruction_network.denoiser.conv_out[-1].weight.normal_(0, 0.05)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _, _ = objective.loss_modules["denoiser"](batch(), {})
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_sample_computes_its_condition_once_and_stays_in_the_range_of_the_data():
    torch.manual_seed(0)
    network, made = TINY["diffux2ct"].reconstruction_network(GRID, GEOMETRY), []
    network.triplane.register_forward_hook(lambda *_: made.append("condition"))
    network.denoiser.register_forward_hook(lambda *_: made.append("step"))
    # Predictions far out of range.
    torch.nn.init.normal_(network.denoiser.conv_out[-1].weight, std=1.0)
    for sampler in ("ddpm", "ddim", "dpm_solver"):
        made.clear()
        sample = network.sample(batch().radiographs, SamplingConfig(sampler, 3))
        assert made == ["condition", "step", "step", "step"]
        assert sample.min() == 0
        assert sample.max() == 1


def test_the_published_denoiser_has_shifted_window_attention_at_its_coarser_sizes():
    with torch.device("meta"):
        denoiser = DiffuX2CT().reconstruction_network(Grid(128), chest(Grid(128))).denoiser
    shifts = [
        [tuple(block.shift_size) for module in stage.modules() for block in getattr(module, "blocks", ())]
        for stage in (stage.attention for stage in denoiser.down_blocks)
    ]
    assert shifts == [[], [], *[[(0, 0, 0), (2, 2, 2)]] * 2]


def test_shifted_windows_pass_information_into_the_next_window():
    torch.manual_seed(0)
    windows = shifted_window_attention(8, 2, 4).eval()
    features = torch.rand(1, 8, 8, 8, 8)
    changed = features.clone()
    # In one channel: layer norm removes an offset common to all.
    changed[:, 0, 3, 3, 3] += 1.0
    with torch.no_grad():
        moved = (windows(changed) - windows(features)).abs().amax(dim=(0, 1))
        one, other = (windows.blocks[0](each.movedim(1, -1), None) for each in (features, changed))
    # A regular layer stays in its window of four voxels per side, the shifted one after it crosses the border.
    assert torch.equal(one[:, 4:], other[:, 4:])
    assert moved[4, 4, 4] > 1e-6


def test_patches_of_two_voxels_per_side_are_an_eighth_of_the_work():
    spent = []
    for patch in (1, 2):
        config = replace(DenoiserConfig((32, 48, 64), blocks=1, attention_levels=(False,) * 3), patch=patch)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            condition = [torch.empty(1, 16, size, size, size) for size in config.sizes(64)]
            Denoiser(config, 1, 16)(torch.empty(1, 1, 64, 64, 64), torch.zeros(1, dtype=torch.long), condition)
        spent.append(counter.get_total_flops())
    assert spent[1] == pytest.approx(spent[0] / 8, rel=0.05)


def test_radiographs_of_another_size_are_resized_to_the_volumes():
    network = TINY["diffux2ct"].reconstruction_network(GRID, GEOMETRY)
    assert network.sample(torch.rand(1, 2, 50, 50), SamplingConfig("ddim", 1)).shape == (1, 1, 32, 32, 32)


@pytest.mark.parametrize(("axis", "own"), [(3, 3), (4, 4)])
def test_a_view_projected_to_a_plane_is_the_mean_of_the_repeated_volume(axis, own):
    image = torch.rand(2, 3, 6, 6)
    volume = image.unsqueeze(axis).expand(*image.shape[:2], 6, 6, 6)
    for normal in (2, 3, 4):
        torch.testing.assert_close(project_to_plane(image, axis, normal), volume.mean(dim=normal))
    assert torch.equal(project_to_plane(image, axis, own), image)


def test_the_implicit_decoder_is_an_mlp_on_the_concatenation_of_planes_and_coordinates():
    torch.manual_seed(0)
    config = TriPlaneConfig(channels=4, hidden=8, condition_channels=5)
    decoder = ImplicitDecoder(config)
    planes, along = [torch.rand(2, 4, 6, 6) for _ in range(3)], torch.rand(6, 13)
    made = decoder(*planes, along)
    assert made.shape == (2, 5, 6, 6, 6)
    d, h, w = 1, 4, 2
    axial, coronal, sagittal = planes
    given = torch.cat(
        [axial[:, :, h, w], coronal[:, :, d, w], sagittal[:, :, d, h], along[[d, h, w]].flatten().expand(2, -1)], dim=1
    )
    matrix = torch.cat(
        [
            *(layer.weight.flatten(1) for layer in decoder.plane_proj),
            *(layer.weight for layer in decoder.coordinate_proj),
        ],
        dim=1,
    )
    first = given @ matrix.T + decoder.bias.flatten()
    output = decoder.mlp(first[..., None, None, None])[..., 0, 0, 0]
    torch.testing.assert_close(made[:, :, d, h, w], output)


def test_the_implicit_decoder_is_evaluated_at_voxels_of_any_size():
    plane = torch.arange(8.0).expand(1, 1, 8, 8)
    # Coarser voxels have the mean of a linear ramp over their extent, finer ones interpolate it.
    torch.testing.assert_close(resize_plane(plane, 4)[0, 0, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))
    torch.testing.assert_close(resize_plane(plane, 16)[0, 0, 0, 1:-1], torch.arange(14) / 2 + 0.25)
    assert resize_plane(plane, 6).shape == (1, 1, 6, 6)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_depth_to_space_inverts_space_to_depth(patch):
    data = torch.rand(2, 3, 8, 8, 8)
    patches = space_to_depth(data, patch)
    assert patches.shape == (2, 3 * patch**3, 8 // patch, 8 // patch, 8 // patch)
    assert torch.equal(depth_to_space(patches, patch), data)
    # The voxels of a patch are adjacent channels.
    assert set(patches[0, : patch**3, 0, 0, 0].tolist()) == set(data[0, 0, :patch, :patch, :patch].flatten().tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: DenoiserConfig(heads=3), "3 heads do not divide"),
        (lambda: DenoiserConfig(patch=0), "patch is 0: give 1 or more"),
        (lambda: DenoiserConfig(channels=()), "give one width or more"),
        (lambda: DenoiserConfig(channels=(16, 32)), "attention_levels and denoiser.channels: give as many of each"),
        (lambda: NoiseSchedulerConfig(beta_start=1e-20), "noise begins with 0 .* raise beta_start"),
        (lambda: NoiseSchedulerConfig(beta_end=0.5), "signal ends with 5.* lower beta_end or num_train_timesteps"),
        (lambda: replace(TINY["diffux2ct"], ema_decay=1.0).objective(GRID, GEOMETRY), "ema_decay is 1.0: .* decay in"),
        (lambda: DenoisingLoss(projection_weight=-1.0), "give a weight of 0 or more"),
        (lambda: DenoiserConfig().sizes(44), "multiple of 8 from 16 up, or fewer denoiser.channels"),
        (
            lambda: DiffuX2CT().reconstruction_network(Grid(40), chest(Grid(40))),
            "multiple of 16 from 32 up, or fewer stages",
        ),
        (lambda: LatentDiffusion(loss=DenoisingLoss()), "latents have no projections"),
        (lambda: AutoencoderConfig(latent_channels=0), "latent_channels is 0: give 1 or more"),
        (lambda: LatentDiffusion().reconstruction_network(Grid(66), chest(Grid(66))), "use a multiple of 4"),
        (
            lambda: DiffuX2CT(views=("frontal", "frontal")).reconstruction_network(Grid(64), chest(Grid(64))),
            "each once",
        ),
        (lambda: DiffuX2CT(views=("skyline",)).reconstruction_network(Grid(64), chest(Grid(64))), "no view 'skyline'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        change()


def test_a_triplane_condition_needs_views_along_an_axis():
    geometry = replace(GEOMETRY, views=(View("oblique", azimuth_deg=40.0),))
    with pytest.raises(ConfigError, match="'oblique' is neither frontal nor lateral"):
        replace(TINY["diffux2ct"], views=("oblique",)).reconstruction_network(GRID, geometry)


def test_the_condition_may_be_that_of_any_encoder():
    planes = replace(
        TINY["diffux2ct"].triplane, encoder=EncoderConfig("hourglass", init_features=4, block_config=(1, 1))
    )
    network = replace(TINY["diffux2ct"], triplane=planes).reconstruction_network(GRID, GEOMETRY)
    assert network.sample(batch().radiographs, SamplingConfig("ddim", 1)).shape == (2, 1, 32, 32, 32)


def test_latents_are_a_quarter_as_large_and_normalized_for_every_volume():
    torch.manual_seed(0)
    with torch.device("meta"):
        assert LatentDiffusion().reconstruction_network(Grid(128), chest(Grid(128))).sample_shape == (8, 32)
    coder = Autoencoder(AutoencoderConfig((8, 8), 4))
    volumes = torch.rand(3, 1, 32, 32, 32) * torch.tensor([0.01, 0.5, 1.0]).reshape(3, 1, 1, 1, 1)
    with torch.no_grad():
        mean, log_variance = coder.encode(volumes)
    assert mean.shape == log_variance.shape == (3, 4, 8, 8, 8)
    torch.testing.assert_close(mean.mean(dim=(1, 2, 3, 4)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(mean.square().mean(dim=(1, 2, 3, 4)), torch.ones(3), atol=0.01, rtol=0)
    assert float(log_variance.max()) < -4


def test_denoiser_and_autoencoder_pass_no_gradient_to_each_other():
    torch.manual_seed(0)
    network = TINY["latent-diffusion"].reconstruction_network(GRID, GEOMETRY)
    latents, losses = network.encode(batch().volume, [])
    assert not latents.requires_grad
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in network.autoencoder.parameters())
    assert all(p.grad is None for p in (*network.denoiser.parameters(), *network.triplane.parameters()))
    # Training changes no state but the weights, so ranks cannot diverge.
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.encode(batch().volume * 0.1, [])
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
