"""Four players that learn from radiographs do on two workers and every ZeRO stage what they do on stage 0."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.stream import Batch
from raylift.models.systems.slim_radiographs import tiny
from raylift.models.zoo import SYSTEMS
from raylift.platform import engine as engines
from raylift.platform.config import EngineConfig, OptimiserConfig, RunConfig
from raylift.platform.presets.compositions import x2ct_gan_tiny
from raylift.platform.tracking import Averages
from raylift.platform.train import take_turns

GRID = Grid(16, 20.0)
WORLD, STEPS = 2, 3


def cyclegan():
    """With nothing random, and discriminators that sit out the second step."""
    return replace(tiny(SYSTEMS["cyclegan-b"]()), dropout=0.0, projection_channels=(4, 8))


def run_of(system, stage: int) -> RunConfig:
    run = x2ct_gan_tiny()
    return replace(
        run,
        system=system,
        engine=EngineConfig(stage, gradient_clip=1.0),
        cluster=replace(run.cluster, workers=WORLD),
        optimiser=OptimiserConfig(rate=1e-4),
        train=replace(run.train, batch=WORLD),
    )


def batch(rank: int, views: int) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    cube, other = torch.rand(2, 1, 1, 16, 16, 16, generator=generator)
    return Batch(cube, torch.rand(1, views, 16, 16, generator=generator), ("x",), unpaired=other)


def losses(rank, wanted):
    device = engines.prepare(gpu=False)
    results = {}
    for key, run in wanted.items():
        torch.manual_seed(0)
        started = engines.start(run.system.objective(GRID, chest(GRID)), run, device)
        seen = []
        for step in range(STEPS):
            averages = Averages()
            take_turns(started, batch(rank, len(run.system.views)), step, averages)
            seen.append(averages.take())
        results[key] = seen
    return results


@pytest.fixture(scope="module")
def trained() -> dict:
    """All runs in one pair of processes: their start costs more than the steps."""
    return run_ranks(WORLD, losses, {stage: run_of(cyclegan(), stage) for stage in range(4)})[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_of_four_players_are_those_of_stage_0(trained, stage):
    for step in range(STEPS):
        assert trained[stage][step].keys() == trained[0][step].keys()
        for key, value in trained[0][step].items():
            assert trained[stage][step][key] == pytest.approx(value, rel=1e-3 if step == 0 else 0.02, abs=1e-4), key
    first, last = trained[0][0], trained[0][-1]
    assert all(first[f"{player}/loss"] != last[f"{player}/loss"] for player in ("generator", "projection"))


def test_discriminators_sit_out_every_second_step(trained):
    players = ["generator", "projection", "volume_discriminator", "view_discriminator"]
    turns = [[player for player in players if f"{player}/loss" in step] for step in trained[0]]
    assert turns == [players, players[:2], players]
