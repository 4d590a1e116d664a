"""Every part of every composition trains with parameters that ZeRO-3 has partitioned, checkpointing or not."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.models.composition import Composition
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.parts.fusion import FusionConfig
from raylift.models.parts.lifting import LiftingConfig
from raylift.models.system_config import SystemConfig
from raylift.models.zoo import SYSTEMS
from raylift.platform.config import EngineConfig, OptimizerConfig, RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training import engine as engines
from raylift.platform.training.loop import training_step
from raylift.platform.training.tracking import RunningMeans

GRID = Grid(32, 10.0)
STEPS = 2


def systems() -> dict[str, SystemConfig]:
    """Every published system, parts that none of them has, and the diffusion systems."""
    tiny = {name: entry.tiny for name, entry in SYSTEMS.items() if not name.endswith("-cnn")}
    found = {name: system for name, system in tiny.items() if isinstance(system, Composition)}
    x2ct = SYSTEMS["x2ct-gan"].tiny
    found["along rays"] = replace(x2ct, lifting=LiftingConfig("duo", "rays"), fusion=FusionConfig("attention"))
    found["auxiliaries"] = replace(x2ct, loss=ReconstructionLoss(deep_supervision_weight=1.0))
    diffusion = {name: PRESETS[f"{name}-tiny"].system for name in ("diffux2ct", "latent-diffusion")}
    # Random numbers come from torch's generator alone, because runs are compared.
    return diffusion | {
        name: replace(
            system,
            lifting=replace(system.lifting, dropout=0.0),
            loss=replace(system.loss, cone_jitter_deg=0.0, cone_jitter_voxels=0.0),
        )
        for name, system in found.items()
    }


def settings(system: SystemConfig, stage: int) -> RunConfig:
    run = PRESETS["x2ct-gan-tiny"]
    return replace(
        run,
        system=system,
        engine=EngineConfig(stage),
        cluster=replace(run.cluster, workers=1),
        optimizer=OptimizerConfig(lr=1e-4),
        train=replace(run.train, batch_size=1),
    )


def batch(views: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    cube = torch.rand(1, 1, 32, 32, 32, generator=generator)
    return Batch(cube, torch.rand(1, views, 32, 32, generator=generator), ("x",), (cube > 0.5).byte())


def losses(rank, wanted):
    device = engines.init_backend(gpu=False)
    results, plain_config = {}, engines._deepspeed_config

    def nothing_persists(run):
        """Small parameters would be left whole, and none given back before the step is over."""
        config = plain_config(run)
        limits = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters")
        config["zero_optimization"] |= {f"stage3_{name}": 0 for name in limits} if run.engine.zero_stage == 3 else {}
        return config

    engines._deepspeed_config = nothing_persists
    for key, run in wanted.items():
        torch.manual_seed(0)
        started = engines.initialize(run.system.objective(GRID, chest(GRID)), run, device)
        seen = []
        for step in range(STEPS):
            averages = RunningMeans()
            torch.manual_seed(step)
            training_step(started, batch(len(run.system.views)), step, averages)
            seen.append(averages.reduce())
        held = [p.numel() for engine in started.values() for p in engine.loss_module.parameters()]
        assert all(held) if run.engine.zero_stage == 0 else not any(held), f"{key}: the injection did not fire"
        results[key] = seen
    return results


@pytest.fixture(scope="module")
def trained() -> dict:
    """All runs in one process: its start costs more than the steps."""
    wanted = {}
    for name, system in systems().items():
        wanted[name, 0, "none"] = settings(replace(system, checkpointing="none"), 0)
        for checkpointing in ("none", "all"):
            wanted[name, 3, checkpointing] = settings(replace(system, checkpointing=checkpointing), 3)
    return run_ranks(1, losses, wanted)[0]


@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("name", systems())
def test_losses_under_zero_3_are_those_without(trained, name, checkpointing):
    plain, apart = trained[name, 0, "none"], trained[name, 3, checkpointing]
    assert plain[0].keys() == apart[0].keys()
    for step in range(STEPS):
        for key, value in plain[step].items():
            assert apart[step][key] == pytest.approx(value, rel=1e-3 if step == 0 else 0.02, abs=1e-5), (step, key)
    # The step in between was one.
    key = next(iter(plain[0]))
    assert plain[0][key] != pytest.approx(plain[1][key], rel=1e-4)


def test_weight_decay_reaches_adam():
    run = replace(settings(systems()["psr"], 0), optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.5))
    assert run_ranks(1, decays, run)[0] == [0.5]


def decays(rank, run):
    device = engines.init_backend(gpu=False)
    started = engines.initialize(run.system.objective(GRID, chest(GRID)), run, device)
    return [group["weight_decay"] for engine in started.values() for group in engine.deepspeed.optimizer.param_groups]
