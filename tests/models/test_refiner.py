"""The diffusion refiner: a frozen base, a residual, samples that depend on the seed alone."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models.diffusion.denoiser import DenoiserConfig
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.systems.psr import PSR
from raylift.models.systems.refiner import Refiner
from raylift.models.systems.x2ct import X2CT_GAN

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
SYSTEM = Refiner(
    base=X2CT_GAN.tiny,
    denoiser=DenoiserConfig((8, 16), blocks=1, attention_levels=(False, False), patch=2),
    sampling=SamplingConfig(steps=4),
)
FINER = replace(SYSTEM, upsampling=2, base=PSR.tiny, denoiser=DenoiserConfig((8, 16), 1, (False, False), patch=1))


@cache
def two_boxes() -> Batch:
    """Two different volumes, with their projections as radiographs."""
    volume = torch.zeros(2, 1, 32, 32, 32)
    volume[0, :, 8:20, 6:18, 4:16] = 0.8
    volume[1, :, 14:28, 12:26, 14:28] = 0.8
    views = torch.stack([volume.mean(dim=3)[:, 0], volume.mean(dim=4)[:, 0]], dim=1)
    return Batch(volume, views / views.max())


def network(system: Refiner = SYSTEM, grid: Grid = GRID):
    torch.manual_seed(0)
    made = system.reconstruction_network(grid, chest(grid))
    # The last layer starts at zero, so no other layer has an effect.
    torch.nn.init.normal_(made.denoiser.conv_out[-1].weight, std=0.1)
    return made


@pytest.mark.parametrize("base", [X2CT_GAN.tiny, PSR.tiny, SYSTEM], ids=["gan", "psr", "refiner"])
def test_a_refiner_of_any_system_survives_serialization(base):
    system = replace(SYSTEM, base=base)
    assert from_plain(Refiner, to_plain(system), "system") == system
    assert to_plain(system)["base"]["name"] == base.name
    assert system.views == base.views


def test_a_base_with_an_unknown_name_or_key_is_refused():
    plain = to_plain(SYSTEM)
    with pytest.raises(ConfigError, match="unknown name 'x3ct'"):
        from_plain(Refiner, plain | {"base": plain["base"] | {"name": "x3ct"}}, "system")
    with pytest.raises(ConfigError, match=r"depth.*system\.base"):
        from_plain(Refiner, plain | {"base": plain["base"] | {"depth": 3}}, "system")


@pytest.mark.parametrize("system", [SYSTEM, FINER], ids=["same size", "twice as fine"])
def test_the_denoiser_is_trained_and_the_base_is_not(system):
    torch.manual_seed(0)
    objective = system.objective(GRID, GEOMETRY)
    (loss_module,) = objective.loss_modules.values()
    loss_module.train()
    assert not any(module.training for module in loss_module.network.base.modules())
    data = two_boxes()
    data = replace(data, radiographs=data.radiographs[:, : len(system.views)])
    torch.nn.init.normal_(loss_module.network.denoiser.conv_out[-1].weight, std=0.1)
    before = {name: tensor.clone() for name, tensor in loss_module.network.base.state_dict().items()}
    loss, _, _ = loss_module(data, {})
    loss.backward()
    assert torch.isfinite(loss)
    without = {name for name, p in loss_module.network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {f"base.{name}" for name, _ in loss_module.network.base.named_parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in loss_module.network.base.state_dict().items())


@pytest.mark.parametrize("system", [SYSTEM, FINER], ids=["same size", "twice as fine"])
def test_the_data_are_the_residual_of_the_bases_volume(system):
    made, data = network(system), two_boxes()
    views = data.radiographs[:, : len(system.views)]
    condition = made.condition(views)
    residual, _ = made.encode(data.volume, condition)
    torch.testing.assert_close(made.decode(residual, condition), data.volume)
    coarse = made.decode(torch.zeros_like(residual), condition)
    with torch.no_grad():
        expected = made.base(views).clip(0.0, 1.0)
    if system.upsampling == 2:
        assert expected.shape[-1] == 16
        # Upsampling preserves the mean over blocks except near their faces.
        pooled = torch.nn.functional.avg_pool3d(coarse, 2)
        pair = torch.stack([pooled.flatten(), expected.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9
    else:
        torch.testing.assert_close(coarse, expected)


def test_an_untrained_refiner_keeps_the_bases_volume_with_sample_prediction_and_adds_noise_with_epsilon():
    views, far = two_boxes().radiographs, {}
    for prediction_type in ("sample", "epsilon", "v_prediction"):
        torch.manual_seed(0)
        system = replace(SYSTEM, scheduler=replace(SYSTEM.scheduler, prediction_type=prediction_type))
        made = system.reconstruction_network(GRID, GEOMETRY).eval()
        with torch.no_grad():
            far[prediction_type] = float((made(views) - made.base(views).clip(0.0, 1.0)).abs().mean())
    assert far["sample"] < 1e-6
    assert min(far["epsilon"], far["v_prediction"]) > 1e-3


def test_samples_depend_on_radiographs_and_seed_and_not_on_the_batch():
    made = network().eval()
    views = torch.rand(4, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    together = made.sample(views, SamplingConfig(steps=3, seed=5))
    alone = torch.cat([made.sample(view[None], SamplingConfig(steps=3, seed=5)) for view in views])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    assert torch.equal(made.sample(views, SamplingConfig(steps=3, seed=5)), together)
    assert (made.sample(views, SamplingConfig(steps=3, seed=6)) - together).abs().mean() > 1e-3
    assert (together[0] - together[1]).abs().mean() > 1e-3


def test_each_view_is_in_the_condition_of_the_denoiser():
    made, data = network().eval(), two_boxes()
    noisy, times = torch.zeros(2, 1, 32, 32, 32), torch.full((2,), 500)
    condition = made.condition(data.radiographs)
    with torch.no_grad():
        prediction = made.predict(noisy, times, condition)
        for view in range(3):
            changed = [level.clone() for level in condition]
            # Channels are the coarse volume's eight, then eight of each view.
            changed[0][:, 8 * view : 8 * view + 8] += 0.1
            assert not torch.allclose(made.predict(noisy, times, changed), prediction, atol=1e-6)


def test_a_refiner_overfits_the_residual_of_its_base():
    torch.manual_seed(0)
    (loss_module,) = replace(SYSTEM, residual_scale=0.5).objective(GRID, GEOMETRY).loss_modules.values()
    data = two_boxes()
    with torch.no_grad():
        lacks = (loss_module.network.base(data.radiographs).clip(0.0, 1.0) - data.volume).square().mean()
    optimizer = torch.optim.Adam(loss_module.network.denoiser.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss_module(data, {})[0].backward()
        optimizer.step()
    made = loss_module.network.eval()(data.radiographs)
    assert (made - data.volume).square().mean() < 0.5 * lacks
    assert (made[0] - made[1]).square().mean() > 0.25 * (data.volume[0] - data.volume[1]).square().mean()


def test_under_bf16_autocast_the_loss_is_nearly_that_of_fp32():
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        (loss_module,) = SYSTEM.objective(GRID, GEOMETRY).loss_modules.values()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _, _ = loss_module(two_boxes(), {})
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_checkpointing_changes_neither_the_loss_nor_a_gradient():
    gradients = []
    for checkpointing in ("none", "all"):
        torch.manual_seed(0)
        (loss_module,) = replace(SYSTEM, checkpointing=checkpointing).objective(GRID, GEOMETRY).loss_modules.values()
        torch.manual_seed(1)
        loss, _, _ = loss_module(two_boxes(), {})
        loss.backward()
        gradients.append([p.grad for p in loss_module.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"residual_scale": 0.0}, 32, "give a fraction of the window"),
        ({"upsampling": 2}, 33, "33 is no multiple of 2"),
        ({"denoiser": DenoiserConfig((8,) * 5, attention_levels=(False,) * 5, patch=2)}, 32, "not divisible by 32"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(settings, size, message):
    with pytest.raises(ConfigError, match=message):
        replace(SYSTEM, **settings).reconstruction_network(Grid(size, 10.0), chest(Grid(size, 10.0)))
