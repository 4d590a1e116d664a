"""Schedulers of a resumed search have the validations of its earlier trials, read from small files alone."""

from pathlib import Path

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raylift.datasets.archive.store import join
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models.weights import Description
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import Checkpoints, Tensors, TrainingState
from raylift.platform.tuning.halving import ResumableASHA

GRID = Grid(32, 10.0)


def train(url: str, name: str, psnrs: list[float]) -> Path:
    """A trial's run with a validation every two steps; returns its newest checkpoint."""
    system = PRESETS["x2ct-gan-tiny"].system
    networks = {key: dict(net.state_dict()) for key, net in system.objective(GRID, chest(GRID)).networks().items()}
    history = [{"step": 2.0 * (k + 1), "val_psnr_db": psnr} for k, psnr in enumerate(psnrs)]
    step = 2 * len(psnrs)
    state = TrainingState(step, step, {"val_psnr_db": psnrs[-1]}, history)
    adam = {name: {} for name in networks}
    description = Description(system, GRID, chest(GRID), Window())
    return Path(Checkpoints(join(url, "trials", name)).save(state, Tensors(networks, adam), description))


def trial(name: str, status: str) -> Trial:
    added = Trial("run_trial", trial_id=name, stub=True)
    added.status = status
    return added


@pytest.fixture
def asha(tmp_path):
    return ResumableASHA(str(tmp_path), metric="val_psnr_db", mode="max", max_t=8, grace_period=2, reduction_factor=2)


def test_the_rungs_of_a_resumed_search_are_read_without_weights(tmp_path, asha):
    for name in ("aaaaaaaa", "bbbbbbbb"):
        # Anything that reads the weights fails.
        (train(str(tmp_path), name, [20.0, 24.0]) / "model/model.safetensors").unlink()
        asha.on_trial_add(None, trial(name, Trial.TERMINATED))
    worse, better = trial("cccccccc", Trial.PENDING), trial("dddddddd", Trial.PENDING)
    for added in (worse, better):
        asha.on_trial_add(None, added)
    decisions = [
        asha.on_trial_result(None, added, {"step": 4, "val_psnr_db": psnr})
        for added, psnr in ((worse, 23.0), (better, 25.0))
    ]
    assert decisions == [TrialScheduler.STOP, TrialScheduler.CONTINUE]
