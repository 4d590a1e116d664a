"""How a search proposes settings and stops trials early: Optuna's samplers, and Ray Tune's schedulers by step.

Tune keeps no scheduler's state. Those of a resumed search read the validations of earlier trials from their
checkpoints, and count steps, because Tune counts the reports of a resumed trial from the first again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import join
from raylift.datasets.choices import KeyOf
from raylift.datasets.errors import ConfigError
from raylift.platform.config import RunConfig, TrainConfig, override
from raylift.platform.training.checkpoint import Checkpoints
from raylift.platform.training.inputs import check_network
from raylift.platform.tuning.two_objectives import METRICS, MODES

MAX_REFUSED = 100
"""Proposals in a row that make no network, after which a search ends."""


class FeasibleSearch(OptunaSearch):
    """Optuna's proposals, of which only those start a trial that make a network for the archive's grid.

    Once a trial is complete, Optuna gets the others as pruned trials without a value, which its samplers rank last;
    before, as failed ones, because refused settings alone would count as observations.
    """

    def __init__(self, run: RunConfig, sampler: BaseSampler, *, two_objectives: bool = False) -> None:
        """Proposals of a sampler for a run."""
        objectives: dict[str, Any] = {"metric": METRICS, "mode": MODES} if two_objectives else {}
        super().__init__(sampler=sampler, **objectives)
        self._run = run
        self._accepted = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Settings of the next trial, or `FINISHED` after `MAX_REFUSED` proposals in a row that make no network.

        Raises:
            ConfigError: they were the first ones.
        """
        for count in range(MAX_REFUSED):
            proposal = f"{trial_id} {count}"
            settings = super().suggest(proposal)
            if settings is None:
                return None
            try:
                run = override(self._run, settings)
                check_network(run, Archive(run.data.archive, run.data.snapshot))
            except ConfigError as error:
                refusal = error
            else:
                self._ot_trials[trial_id], self._accepted = self._ot_trials.pop(proposal), True
                return settings
            print(f"tune: refused {settings}: {refusal}", flush=True)
            self.on_trial_complete(proposal, error=not self._has_complete_trial())
        message = f"{MAX_REFUSED} proposals in a row make no network, the last because {refusal}"
        if not self._accepted:
            raise ConfigError(message)
        print(f"tune: no further trial starts: {message}", flush=True)
        return self.FINISHED

    def _has_complete_trial(self) -> bool:
        study: Any = self._ot_study
        return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


class ResumableASHA(ASHAScheduler):
    """ASHA, whose rungs a resumed search has again."""

    def __init__(self, url: str, **options: Any) -> None:
        """ASHA of the search at a URL; options as of `ASHAScheduler`."""
        super().__init__(time_attr="step", **options)
        self._url = url

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Record the validations of a trial of a resumed search."""
        super().on_trial_add(tune_controller, trial)
        for validation in _validations(self._url, trial, self._metric):
            self.on_trial_result(tune_controller, trial, validation)


class ResumableMedianStopping(MedianStoppingRule):
    """Median stopping, whose running averages a resumed search has again.

    Each validation counts once, also if a trial that was interrupted reports it again.
    """

    def __init__(self, url: str, **options: Any) -> None:
        """Median stopping of the search at a URL; options as of `MedianStoppingRule`."""
        # No trial pauses for others: it would have to start again.
        super().__init__(time_attr="step", min_time_slice=float("inf"), **options)  # type: ignore[arg-type]
        self._url = url

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Record the validations of a trial of a resumed search."""
        super().on_trial_add(tune_controller, trial)
        if validations := _validations(self._url, trial, self._metric):
            self._results[trial] = validations

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial continues: its best validation is not below the median of the others' averages."""
        self._results[trial] = [entry for entry in self._results[trial] if entry["step"] < result["step"]]
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Record nothing: the last validation was reported before."""


def _validations(url: str, trial: Trial, metric: str | None) -> list[dict[str, float]]:
    """The validations of a trial so far.

    An unfinished trial reports its newest one itself, so that it stops if it would have stopped.
    """
    state = Checkpoints(join(url, "trials", trial.trial_id)).newest_state()
    validations = [entry for entry in state.history if metric in entry] if state else []
    return validations if trial.status == Trial.TERMINATED else validations[:-1]


PBT = "pbt"
SCHEDULERS: dict[str, Callable[[str, TrainConfig, int], TrialScheduler] | None] = {
    "asha": lambda url, train, reduction_factor: ResumableASHA(
        url, max_t=train.steps, grace_period=min(train.validate_every, train.steps), reduction_factor=reduction_factor
    ),
    "median": lambda url, train, _: ResumableMedianStopping(url, grace_period=train.validate_every),
    PBT: None,
    "none": None,
}
"""Ray Tune's schedulers, of a search's URL, its training and its reduction factor. For population-based training see
`population`: that of Ray Tune refuses a sampler, and does not resume."""
Scheduler = KeyOf[str, SCHEDULERS]

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
"""Optuna's samplers, of a seed."""
Sampler = KeyOf[str, SAMPLERS]
