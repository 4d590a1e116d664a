"""The trials of a search with their validations, read from its folder, and the same as a study of Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.search.optuna import OptunaSearch

from raylift.datasets import process_folder
from raylift.datasets.archive.store import Folder, join
from raylift.platform import cluster
from raylift.platform.config import RunConfig, override
from raylift.platform.monitor import monitored
from raylift.platform.training.checkpoint import Checkpoints
from raylift.platform.tuning import population, two_objectives
from raylift.platform.tuning.algorithms import PBT
from raylift.platform.tuning.population import Member, Population
from raylift.platform.tuning.search import RAY_FOLDER, Search, validate
from raylift.platform.tuning.trials import Segment, describe
from raylift.platform.tuning.two_objectives import OBJECTIVES, Measurement

STORAGE_FILE = "optuna.log"
"""Journal file, which `optuna-dashboard` opens."""

STATES = {
    "finished": TrialState.COMPLETE,
    "stopped early": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "unfinished": TrialState.RUNNING,
}
"""Optuna's state of a trial by its state."""


@dataclass(frozen=True)
class TrialHistory:
    """A trial and its validations so far."""

    id: str
    run: RunConfig
    settings: dict[str, Any]
    state: str
    """One of `STATES`."""
    validations: dict[int, float]
    """The monitored metric by step."""
    error: str = ""
    measurement: Measurement | None = None
    """Its measurement in a search with two objectives."""
    lineage: list[Segment] = field(default_factory=list)
    """With population-based training, the settings that led to its best validation, by step."""

    @property
    def first_step(self) -> int:
        """The step of the checkpoint it started from; 0 if it started from none."""
        return self.lineage[-1].first_step if self.lineage else 0

    @property
    def trained_steps(self) -> int:
        """The number of its steps until its last validation."""
        return max(self.validations, default=self.first_step) - self.first_step

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best validation, of equal ones the first; None before the first one."""
        return max(self.validations.items(), key=lambda item: item[1], default=None)

    @property
    def objectives(self) -> list[float]:
        """The best validation, or quality and inference time; empty without any."""
        if self.measurement:
            return [self.measurement.quality, self.measurement.inference_s]
        return [self.best[1]] if self.best else []


def load_trials(url: str, search: Search) -> list[TrialHistory]:
    """The trials of a search in the order of their start, also while it runs."""
    if search.scheduler == PBT:
        state = population.load(url)
        return [_member(url, search, state, member) for member in state.members.values()] if state else []
    return [
        _history(
            url,
            search,
            trial.trial_id,
            dict(trial.config),
            trial.status == RayTrial.TERMINATED,
            describe(trial.get_pickled_error()) if trial.status == RayTrial.ERROR else "",
        )
        for trial in _ray_trials(url)
    ]


def _member(url: str, search: Search, state: Population, member: Member) -> TrialHistory:
    ended = member.id not in state.living
    history = _history(url, search, member.id, member.settings, ended, member.error)
    step = history.best[0] if history.best else member.first_step
    return replace(history, lineage=state.lineage(member.id, step))


def _ray_trials(url: str) -> list[RayTrial]:
    path, filesystem = cluster.ray_storage(url)
    try:
        analysis = tune.ExperimentAnalysis(f"{path}/{RAY_FOLDER}", storage_filesystem=filesystem)
    except ValueError:  # Ray Tune has not written its state yet
        return []
    return list(analysis.trials or [])


def _history(
    url: str, search: Search, trial: str, settings: dict[str, Any], terminated: bool, error: str
) -> TrialHistory:
    state = Checkpoints(join(url, "trials", trial)).newest_state()
    history = state.history if state else []
    metric = monitored(name for entry in history for name in entry)
    validations = {int(entry["step"]): entry[metric] for entry in history if math.isfinite(entry.get(metric, math.nan))}
    single = not OBJECTIVES[search.objectives]
    measurement = None if single else two_objectives.load(join(url, "trials", trial))
    if measurement or (single and max(validations, default=0) >= search.run.train.steps):
        progress = "finished"
    elif error:
        progress = "failed"
    else:
        progress = "stopped early" if terminated else "unfinished"
    return TrialHistory(trial, override(search.run, settings), settings, progress, validations, error, measurement)


def as_study(
    search: Search,
    trials: Sequence[TrialHistory],
    names: Mapping[str, str] | None = None,
    storage: BaseStorage | None = None,
    study_name: str = "search",
    *,
    quality_only: bool = False,
) -> optuna.Study:
    """A study of Optuna with the trials; the value of each is its best validation, or its two objectives.

    Args:
        search: the search.
        trials: its trials.
        names: names of the parameters by setting; by default the settings themselves.
        storage: of the study; by default the memory.
        study_name: its name in the storage.
        quality_only: whether the second of two objectives is left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = names or {key: key for key in search.space.space}
    distributions = OptunaSearch.convert_search_space(validate(search))
    single = quality_only or not OBJECTIVES[search.objectives]
    directions = [StudyDirection.MAXIMIZE] if single else [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    study = optuna.create_study(storage=storage, study_name=study_name, directions=directions)
    for trial in trials:
        state = STATES[trial.state]
        valued = state in (TrialState.COMPLETE, TrialState.PRUNED) and len(trial.objectives) >= len(directions)
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                values=trial.objectives[: len(directions)] if valued else None,
                params={names[key]: value for key, value in trial.settings.items()},
                distributions={names[key]: distribution for key, distribution in distributions.items()},
                user_attrs={"id": trial.id, "error": trial.error},
                intermediate_values=trial.validations,
            )
        )
    return study


def write_storage(url: str, search: Search, trials: Sequence[TrialHistory]) -> str:
    """Write the trials to the search's folder as a storage of Optuna, and return its URL."""
    with process_folder.make("study-files") as temporary:
        path = temporary / STORAGE_FILE
        as_study(search, trials, None, JournalStorage(JournalFileBackend(str(path))), url.rsplit("/", 1)[-1])
        Folder(url).put(path, STORAGE_FILE)
    return join(url, STORAGE_FILE)
