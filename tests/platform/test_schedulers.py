"""Schedulers of a resumed search have the validations of its earlier trials, read from small files alone."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raylift.datasets.archive.store import join
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models.weights import Description
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import Checkpoints, Tensors, TrainingState
from raylift.platform.tuning.algorithms import SAMPLERS, SCHEDULERS

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


def scheduler(name: str, url: Path) -> TrialScheduler:
    """A scheduler of runs of eight steps with a validation every two."""
    train = replace(PRESETS["x2ct-gan-tiny"].train, steps=8, validate_every=2)
    made = SCHEDULERS[name](str(url), train, 2)
    made.set_search_properties("val_psnr_db", "max")
    return made


@pytest.mark.parametrize(("name", "earlier"), [("asha", 2), ("median", 3)])
def test_the_validations_of_a_resumed_search_are_read_without_weights(tmp_path, name, earlier):
    resumed = scheduler(name, tmp_path)
    for finished in "abc"[:earlier]:
        # Anything that reads the weights fails.
        (train(str(tmp_path), finished, [20.0, 24.0]) / "model/model.safetensors").unlink()
        resumed.on_trial_add(None, trial(finished, Trial.TERMINATED))
    worse, better = trial("dddddddd", Trial.PENDING), trial("eeeeeeee", Trial.PENDING)
    for added in (worse, better):
        resumed.on_trial_add(None, added)
    decisions = [
        resumed.on_trial_result(None, added, {"step": 4, "val_psnr_db": psnr})
        for added, psnr in ((worse, 21.0), (better, 25.0))
    ]
    assert decisions == [TrialScheduler.STOP, TrialScheduler.CONTINUE]


PSNRS = [[20.0, 22.0, 24.0, 24.0], [21.0, 23.0, 23.0, 25.0], [20.5, 21.0, 21.0, 21.5], [20.2, 22.5, 23.0, 21.0]]
PSNRS += [[22.0, 22.0, 22.0, 22.0], [18.0, 22.1, 22.2, 26.0], [24.0, 24.0, 24.0, 24.0]]
"""Validations that seven trials would have at steps 2, 4, 6 and 8."""


def run(decide: TrialScheduler, added: Trial, psnrs: list[float], first: int = 0) -> int:
    """Report a trial's validations as Tune does, from the first on; returns how many there were when it ended."""
    for count, psnr in enumerate(psnrs[first:], start=first + 1):
        result = {"step": 2 * count, "val_psnr_db": psnr}
        if decide.on_trial_result(None, added, result) == TrialScheduler.STOP or count == len(psnrs):
            decide.on_trial_complete(None, added, result)
            added.status = Trial.TERMINATED
            return count
    raise AssertionError("a trial has no end")


@pytest.mark.parametrize("broken", range(1, 7))
@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_search_that_is_interrupted_in_any_trial_stops_the_trials_of_an_unbroken_one(tmp_path, name, broken):
    unbroken, counts = scheduler(name, tmp_path / "unbroken"), []
    for index, psnrs in enumerate(PSNRS):
        added = trial(f"{index:08x}", Trial.RUNNING)
        unbroken.on_trial_add(None, added)
        counts.append(run(unbroken, added, psnrs))
    assert min(counts) < 4 == max(counts)

    url, resumed = tmp_path / "resumed", scheduler(name, tmp_path / "resumed")
    for index, psnrs in enumerate(PSNRS):
        finished = index < broken
        if index <= broken:
            train(str(url), f"{index:08x}", psnrs[: counts[index]])
        added = trial(f"{index:08x}", Trial.TERMINATED if finished else Trial.PENDING)
        resumed.on_trial_add(None, added)
        if not finished:
            # The interrupted trial first reports its newest validation again.
            assert run(resumed, added, psnrs, first=counts[index] - 1 if index == broken else 0) == counts[index]


def test_median_stopping_counts_a_validation_that_is_reported_again_once(tmp_path):
    again = scheduler("median", tmp_path)
    for index in range(3):
        added = trial(f"{index:08x}", Trial.RUNNING)
        again.on_trial_add(None, added)
        # A lost worker trains from the checkpoint of step 2, and Tune repeats the result of a trial that ends.
        for step, psnr in ((2, 10.0), (4, 20.0), (4, 20.0), (4, 20.0)):
            again.on_trial_result(None, added, {"step": step, "val_psnr_db": psnr})
        again.on_trial_complete(None, added, {"step": 4, "val_psnr_db": 20.0})
    added = trial("dddddddd", Trial.RUNNING)
    again.on_trial_add(None, added)
    result = {"step": 4, "val_psnr_db": 16.0}
    assert again.on_trial_result(None, added, result) == TrialScheduler.CONTINUE, "the average is not 15"


def test_samplers_are_seeded():
    def values(name: str, seed: int) -> list[float]:
        study = optuna.create_study(sampler=SAMPLERS[name](seed))
        study.optimize(lambda trial: trial.suggest_float("lr", 0.0, 1.0), n_trials=12)
        return [trial.value for trial in study.trials]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name in SAMPLERS:
        assert values(name, 1) == values(name, 1) != values(name, 2)
    assert values("tpe", 1)[:10] == values("random", 1)[:10]
    assert values("tpe", 1)[10:] != values("random", 1)[10:]
