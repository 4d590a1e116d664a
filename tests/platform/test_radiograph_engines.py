"""Systems supervised by radiographs have the same losses on two workers under every ZeRO stage as under stage 0."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.models.zoo import SYSTEMS
from raylift.platform.config import EngineConfig, OptimizerConfig, RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training import engine as engines
from raylift.platform.training.loop import training_step
from raylift.platform.training.tracking import RunningMeans

GRID = Grid(16, 20.0)
WORLD, STEPS = 2, 3


def cyclegan():
    """Deterministic, with discriminators that are not updated at the second step."""
    return replace(SYSTEMS["cyclegan-b"].tiny, dropout=0.0, projection_channels=(4, 8))


def run_of(system, stage: int) -> RunConfig:
    run = PRESETS["x2ct-gan-tiny"]
    return replace(
        run,
        system=system,
        engine=EngineConfig(stage, gradient_clipping=1.0),
        cluster=replace(run.cluster, workers=WORLD),
        optimizer=OptimizerConfig(lr=1e-4),
        train=replace(run.train, batch_size=WORLD),
    )


def batch(rank: int, views: int) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    cube, other = torch.rand(2, 1, 1, 16, 16, 16, generator=generator)
    return Batch(cube, torch.rand(1, views, 16, 16, generator=generator), ("x",), unpaired=other)


def losses(rank, wanted):
    device = engines.init_backend(gpu=False)
    results = {}
    for key, run in wanted.items():
        torch.manual_seed(0)
        started = engines.initialize(run.system.objective(GRID, chest(GRID)), run, device)
        seen = []
        for step in range(STEPS):
            averages = RunningMeans()
            training_step(started, batch(rank, len(run.system.views)), step, averages)
            seen.append(averages.reduce())
        results[key] = seen
    return results


@pytest.fixture(scope="module")
def trained() -> dict:
    """All runs in one pair of processes: their start costs more than the steps."""
    wanted = {("cyclegan-b", stage): run_of(cyclegan(), stage) for stage in range(4)}
    for name, block_config in (("u-x2ctgan", (2, 2, 2)), ("cgan-128", (2, 2))):
        system = SYSTEMS[name].tiny
        system = replace(system, encoder=replace(system.encoder, block_config=block_config))
        wanted |= {(name, stage): run_of(system, stage) for stage in (0, 3)}
        # With activations recomputed from partitioned parameters.
        wanted[name, "again"] = run_of(replace(system, checkpointing="all"), 3)
    return run_ranks(WORLD, losses, wanted)[0]


def agree(some: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    for step, (one, other) in enumerate(zip(some, others, strict=True)):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == pytest.approx(value, rel=1e-3 if step == 0 else 0.02, abs=1e-4), key


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_of_four_networks_are_those_of_stage_0(trained, stage):
    agree(trained["cyclegan-b", stage], trained["cyclegan-b", 0])
    first, last = trained["cyclegan-b", 0][0], trained["cyclegan-b", 0][-1]
    assert all(first[f"{network}/loss"] != last[f"{network}/loss"] for network in ("generator", "projection"))


@pytest.mark.parametrize("name", ["u-x2ctgan", "cgan-128"])
@pytest.mark.parametrize("stage", [3, "again"])
def test_losses_of_a_reprojecting_system_are_those_of_stage_0(trained, name, stage):
    agree(trained[name, stage], trained[name, 0])
    assert trained[name, 0][0]["generator/agreement"] != trained[name, 0][-1]["generator/agreement"]


def test_discriminators_are_updated_at_every_second_step(trained):
    networks = ["generator", "projection", "volume_discriminator", "view_discriminator"]
    updated = [[network for network in networks if f"{network}/loss" in step] for step in trained["cyclegan-b", 0]]
    assert updated == [networks, networks[:2], networks]
