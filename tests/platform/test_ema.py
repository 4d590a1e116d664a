"""The exponential moving average (EMA) of the weights, under every ZeRO stage against torch, and in checkpoints."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks
from torch import nn

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models import weights
from raylift.models.objectives.objective import LossModule, Objective
from raylift.models.volume_network import VolumeNetwork
from raylift.models.weights import Description
from raylift.platform.config import EngineConfig, OptimizerConfig, RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training import engine as engines
from raylift.platform.training.checkpoint import (
    Checkpoints,
    Tensors,
    TrainingState,
    load_model_weights,
    load_network,
    local_copy,
)
from raylift.platform.training.loop import gather_tensors, training_step
from raylift.platform.training.tracking import RunningMeans

WORLD, ACCUMULATION, STEPS, SIZE = 2, 2, 20, 4
DECAY = 0.6
"""Reached after six steps of the warm-up, so that both of its branches are run."""


class Smooth(VolumeNetwork):
    """Odd counts of weights, so that no partition divides evenly, a buffer, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE, 7), nn.Tanh(), nn.Linear(7, SIZE**2 * 3 - 1))
        self.out = nn.Linear(SIZE**2 * 3 - 1, SIZE**2)
        self.never_used = nn.Linear(3, 1)
        self.register_buffer("counted", torch.arange(3))

    def volumes(self, radiographs: torch.Tensor) -> list[torch.Tensor]:
        rows = self.out(self.layers(radiographs.mean(dim=1)))
        return [rows.reshape(-1, 1, SIZE, SIZE, SIZE)]


class SquaredError(LossModule):
    def forward(self, batch, earlier):
        loss = (self.network(batch.radiographs) - batch.volume).square().mean()
        return loss, {}, {}


def settings(stage: int, workers: int = WORLD, precision: str = "fp32") -> RunConfig:
    run = PRESETS["x2ct-gan-tiny"]
    return replace(
        run,
        engine=EngineConfig(stage, precision, ACCUMULATION),
        cluster=replace(run.cluster, workers=workers),
        optimizer=OptimizerConfig(lr=1e-2),
        train=replace(run.train, batch_size=4),
    )


def fresh_objective() -> Objective:
    torch.manual_seed(5)
    return Objective({"denoiser": SquaredError(Smooth())}, ema_decay=DECAY)


def sample(step: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + index)
    return Batch(
        torch.rand(1, 1, SIZE, SIZE, SIZE, generator=generator), torch.rand(1, 2, SIZE, SIZE, generator=generator)
    )


def train_steps(started, rank, world, begin, end):
    for step in range(begin, end):
        for micro in range(ACCUMULATION):
            each = 4 // world // ACCUMULATION
            parts = [sample(step, micro * world * each + rank * each + k) for k in range(each)]
            batch = Batch(torch.cat([p.volume for p in parts]), torch.cat([p.radiographs for p in parts]), ("x",))
            training_step(started, batch, step, RunningMeans())
        for engine in started.values():
            engine.update_ema(step)


def reference(steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and their EMA by torch's own Adam and the formula, in one process."""
    loss_module = fresh_objective().loss_modules["denoiser"]
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=1e-2, betas=(0.5, 0.99))
    average = {name: p.detach().clone() for name, p in loss_module.network.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        for index in range(4):
            (loss_module(sample(step, index), {})[0] / 4).backward()
        optimizer.step()
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, p in loss_module.network.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    return {name: p.detach() for name, p in loss_module.network.named_parameters()}, average


VIEWS = sample(999, 0).radiographs


@pytest.fixture(scope="module")
def trained() -> list[dict]:
    """All runs of two ranks in one pair of processes."""
    wanted = {(stage, whole): settings(stage) for stage in range(4) for whole in (True, False) if whole or stage == 3}
    return run_ranks(WORLD, on_deepspeed, wanted)


def on_deepspeed(rank, wanted):
    device = engines.init_backend(gpu=False)
    results, plain_config = {}, engines._deepspeed_config

    def nothing_persists(run):
        config = plain_config(run)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    for (stage, whole), run in wanted.items():
        engines._deepspeed_config = plain_config if whole else nothing_persists
        started = engines.initialize(fresh_objective(), run, device)
        engine = started["denoiser"]
        if stage == 3:
            # By default DeepSpeed keeps these small parameters whole on every rank.
            assert bool(engine.deepspeed.optimizer.persistent_parameters) == whole
        train_steps(started, rank, WORLD, 0, STEPS // 2)
        half = gather_tensors(started)
        with torch.no_grad():
            plain = engine.loss_module.network(VIEWS).clone()
            with engine.ema_weights():
                averaged = engine.loss_module.network(VIEWS).clone()
            again = engine.loss_module.network(VIEWS).clone()
        # What was swapped must be back for training to continue.
        train_steps(started, rank, WORLD, STEPS // 2, STEPS)
        results[stage, whole] = {
            "half": half,
            "full": gather_tensors(started),
            "outputs": (plain, averaged, again),
        }
    engines._deepspeed_config = plain_config
    return results


def difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((actual[name] - value).abs().max()) for name, value in expected.items())


CASES = [(0, True), (1, True), (2, True), (3, True), (3, False)]


@pytest.mark.parametrize("case", CASES)
def test_the_ema_is_that_of_plain_torch(trained, case):
    for length, part in ((STEPS // 2, "half"), (STEPS, "full")):
        tensors = trained[0][case][part]
        plain, average = reference(length)
        assert difference(tensors.networks["denoiser"], plain) < 1e-6
        assert difference(tensors.ema["denoiser"], average) < 1e-6
        # Neither the weights themselves nor the EMA of one step less.
        assert difference(average, plain) > 1e-3
        assert difference(tensors.ema["denoiser"], reference(length - 1)[1]) > 1e-4
        assert torch.equal(tensors.ema["denoiser"]["counted"], torch.arange(3))


@pytest.mark.parametrize("case", CASES)
def test_within_the_context_every_rank_computes_with_the_ema(trained, case):
    plain, average = reference(STEPS // 2)
    network = fresh_objective().reconstruction_network
    for state, place in ((plain, 0), (average, 1), (plain, 2)):
        network.load_state_dict(state, strict=False)
        with torch.no_grad():
            expected = network(VIEWS)
        for rank in range(WORLD):
            torch.testing.assert_close(trained[rank][case]["outputs"][place], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_after_a_resume_at_another_stage_and_world_size_the_ema_continues(trained, world):
    pairs = [(0, 3), (3, 1), (1, 2), (2, 0), (3, 3)]
    halves = {pair: trained[0][pair[0], True]["half"] for pair in pairs}
    done = run_ranks(world, resume, halves, world)[0]
    plain, average = reference(STEPS)
    for pair in pairs:
        assert difference(done[pair].networks["denoiser"], plain) < 1e-6, f"from stage {pair[0]} to {pair[1]}"
        assert difference(done[pair].ema["denoiser"], average) < 1e-6, f"from stage {pair[0]} to {pair[1]}"


def resume(rank, halves, world):
    device = engines.init_backend(gpu=False)
    results = {}
    for (before, after), half in halves.items():
        objective = fresh_objective()
        objective.reconstruction_network.load_state_dict(half.networks["denoiser"])
        started = engines.initialize(objective, settings(after, workers=world), device)
        started["denoiser"].restore_adam(half.adam["denoiser"])
        started["denoiser"].restore_ema(half.ema["denoiser"])
        train_steps(started, rank, world, STEPS // 2, STEPS)
        results[before, after] = gather_tensors(started)
    return results


def test_a_checkpoint_holds_the_ema_as_its_model_and_the_weights_next_to_it(tmp_path):
    system, grid = PRESETS["x2ct-gan-tiny"].system, Grid(32, 10.0)
    networks = {name: dict(net.state_dict()) for name, net in system.objective(grid, chest(grid)).networks().items()}
    averaged = {"generator": {name: value + 1 for name, value in networks["generator"].items()}}
    adam = {name: {"step": torch.tensor(1.0)} for name in networks}
    description = Description(system, grid, chest(grid), Window())
    for step, tensors in ((1, Tensors(networks, adam)), (2, Tensors(networks, adam, averaged))):
        where = Checkpoints(str(tmp_path)).save(TrainingState(step, 4, {"val_psnr_db": 1.0}), tensors, description)
        name = next(iter(averaged["generator"]))
        with local_copy(where) as local:
            stored = {path.stem for path in (local / "networks").iterdir()}
            assert stored == ({"discriminator"} if step == 1 else {"discriminator", "generator"})
            assert torch.equal(load_network(local, "generator", first=True)[name], networks["generator"][name])
            served = networks if step == 1 else averaged
            assert torch.equal(load_model_weights(local)[name], served["generator"][name])
        assert torch.equal(weights.load(where).network.state_dict()[name], served["generator"][name])


def test_without_a_decay_there_is_no_ema_and_nothing_more_to_store():
    assert run_ranks(1, without, settings(0, workers=1))[0] == (False, {})


def without(rank, run):
    objective = Objective(fresh_objective().loss_modules)
    started = engines.initialize(objective, run, engines.init_backend(gpu=False))
    train_steps(started, rank, 1, 0, 1)
    with started["denoiser"].ema_weights():
        return started["denoiser"].has_ema, gather_tensors(started).ema
