"""Successive halving whose rungs survive a resumed search."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler

from raylift.datasets.archive.store import join
from raylift.platform.training.checkpoint import Checkpoints


class ResumableASHA(ASHAScheduler):
    """ASHA by step, which reads earlier validations from the trials' checkpoints, because Tune does not keep its rungs.

    By step, because Tune counts the reports of a resumed trial from the first again.
    """

    def __init__(self, url: str, **options: Any) -> None:
        """ASHA of the search at a URL; options as of `ASHAScheduler`."""
        super().__init__(time_attr="step", **options)
        self._url = url

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Record the validations of a trial of a resumed search.

        An unfinished trial reports its newest one itself, so that it stops if it would have stopped.
        """
        super().on_trial_add(tune_controller, trial)
        state = Checkpoints(join(self._url, "trials", trial.trial_id)).newest_state()
        validations = [entry for entry in state.history if self._metric in entry] if state else []
        if trial.status != Trial.TERMINATED:
            validations = validations[:-1]
        for validation in validations:
            self.on_trial_result(tune_controller, trial, validation)
