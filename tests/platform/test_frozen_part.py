"""A network with a frozen part under every ZeRO stage: the other parameters train as in plain torch."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.models.objectives.objective import Objective
from raylift.platform.config import EngineConfig, RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training import engine as engines
from raylift.platform.training.loop import gather_tensors, training_step
from raylift.platform.training.tracking import RunningMeans

WORLD, STEPS = 2, 3
GRID = Grid(32, 10.0)
RATE = 1e-3


def settings(stage: int, workers: int = WORLD) -> RunConfig:
    run = PRESETS["refiner-tiny"]
    return replace(
        run,
        engine=EngineConfig(stage),
        cluster=replace(run.cluster, workers=workers),
        optimizer=replace(run.optimizer, lr=RATE),
        train=replace(run.train, batch_size=workers),
    )


def sample(step: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(10 * step + index)
    return Batch(
        torch.rand(1, 1, 32, 32, 32, generator=generator), torch.rand(1, 2, 32, 32, generator=generator), ("x",)
    )


def fresh(run: RunConfig) -> Objective:
    torch.manual_seed(5)
    objective = run.system.objective(GRID, chest(GRID))
    # The last layer starts at zero, which would make the gradients of all others zero at the first step.
    torch.nn.init.normal_(objective.reconstruction_network.denoiser.conv_out[-1].weight, std=0.1)
    return objective


def train_steps(started, rank: int, begin: int, end: int) -> None:
    for step in range(begin, end):
        torch.manual_seed(100 * step + rank)
        training_step(started, sample(step, rank), step, RunningMeans())
        started["denoiser"].update_ema(step)


def prepared() -> torch.device:
    """Under ZeRO-3 no parameter is left whole for being small, and each is given back at once."""
    plain_config = engines._deepspeed_config

    def nothing_persists(run):
        config = plain_config(run)
        limits = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
        config["zero_optimization"] |= {f"stage3_{name}": 0 for name in limits} if run.engine.zero_stage == 3 else {}
        return config

    engines._deepspeed_config = nothing_persists
    return engines.init_backend(gpu=False)


def on_deepspeed(rank, stages):
    device = prepared()
    results = {}
    for stage in stages:
        for steps in (STEPS, 1):
            run = settings(stage)
            started = engines.initialize(fresh(run), run, device)
            train_steps(started, rank, 0, steps)
            if stage == 3:
                assert not any(p.numel() for p in started["denoiser"].loss_module.parameters()), (
                    "nothing was taken apart"
                )
            results[stage, steps] = gather_tensors(started)
    return results


def resume(rank, halves):
    """From one step taken at a stage to the last at another."""
    device = prepared()
    results = {}
    for (before, after), half in halves.items():
        run = settings(after)
        objective = fresh(run)
        for name, network in objective.networks().items():
            network.load_state_dict(half.networks[name])
        started = engines.initialize(objective, run, device)
        for name, engine in started.items():
            engine.restore_adam(half.adam[name])
            engine.restore_ema(half.ema[name])
        train_steps(started, rank, 1, STEPS)
        results[before, after] = gather_tensors(started)
    return results


def reference(steps: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and their EMA: one process, torch's own Adam on the mean gradient of both ranks' samples."""
    run = settings(0)
    (loss_module,) = fresh(run).loss_modules.values()
    trained = [p for p in loss_module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE, betas=run.optimizer.betas)
    average = {name: tensor.clone() for name, tensor in loss_module.network.state_dict().items()}
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(WORLD):
            torch.manual_seed(100 * step + rank)
            loss, _, _ = loss_module(sample(step, rank), {})
            (loss / WORLD).backward()
        optimizer.step()
        decay = (1 + step) / (10 + step)
        state = loss_module.network.state_dict()
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in state.items()}
    return {name: tensor.clone() for name, tensor in loss_module.network.state_dict().items()}, average


@pytest.fixture(scope="module")
def trained() -> dict:
    return run_ranks(WORLD, on_deepspeed, range(4))[0]


def largest_difference(weights, expected) -> float:
    assert weights.keys() == expected.keys()
    return max(float((weights[name] - tensor).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize("stage", range(4))
def test_other_parameters_train_as_in_plain_torch_and_the_frozen_part_is_unchanged(trained, stage):
    done = trained[stage, STEPS]
    own, average = done.networks["denoiser"], done.ema["denoiser"]
    expected, expected_average = reference(STEPS)
    assert largest_difference(own, expected) < 2e-5
    assert largest_difference(average, expected_average) < 2e-5
    # What one step more or less would be.
    assert largest_difference(own, reference(STEPS - 1)[0]) > 5e-4
    for name, tensor in fresh(settings(0)).reconstruction_network.state_dict().items():
        if name.startswith("base."):
            assert torch.equal(own[name], tensor), name
            assert torch.equal(average[name], tensor), name


@pytest.mark.parametrize("stage", range(4))
def test_adam_has_no_state_of_the_frozen_part(trained, stage):
    ((_, moments),) = trained[stage, STEPS].adam.items()
    assert not [name for name in moments if name.startswith("base.")]
    denoiser = [name for name, p in fresh(settings(0)).reconstruction_network.named_parameters() if p.requires_grad]
    assert {name.rsplit("/", 1)[0] for name in moments} - {"step"} == set(denoiser)


def test_a_run_resumed_at_another_stage_equals_an_uninterrupted_one(trained):
    pairs = [(0, 3), (1, 2), (3, 1), (2, 0)]
    done = run_ranks(WORLD, resume, {pair: trained[pair[0], 1] for pair in pairs})[0]
    expected, expected_average = reference(STEPS)
    for pair in pairs:
        message = f"from stage {pair[0]} to {pair[1]}"
        assert largest_difference(done[pair].networks["denoiser"], expected) < 2e-5, message
        assert largest_difference(done[pair].ema["denoiser"], expected_average) < 2e-5, message
