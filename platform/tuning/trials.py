"""The trials of a search as a table: settings, best metric, checkpoint and error of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.tune import Result
from rich.table import Table

from raylift.datasets.archive.store import Folder, join
from raylift.datasets.errors import AlteredFileError, ConfigError, RayliftError
from raylift.datasets.serialization import from_plain
from raylift.platform.monitor import monitored
from raylift.platform.training.checkpoint import CheckpointError, best_checkpoint
from raylift.platform.training.driver import exit_detail
from raylift.platform.tuning import two_objectives
from raylift.platform.tuning.two_objectives import Measurement

TABLE_FILE = "trials.json"


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that were trained with the same settings."""

    trial: str
    first_step: int
    """The step of the checkpoint it started from."""
    last_step: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A row of the table."""

    id: str
    settings: dict[str, Any]
    best_psnr_db: float | None
    """Highest validation PSNR, of the volume or of its reprojection."""
    step: int
    """The step that reached it."""
    checkpoint: str
    error: str = ""
    measurement: Measurement | None = None
    """Its measurement in a search with two objectives."""
    pareto: bool = False
    """Whether it belongs to the Pareto set of two objectives."""
    lineage: list[Segment] = field(default_factory=list)
    """With population-based training, the settings that led to the checkpoint, by step."""


def load_table(url: str) -> list[Trial]:
    """Load the table of a finished search.

    Raises:
        ConfigError: it was altered.
    """
    try:
        rows = Folder(url).read_hashed(TABLE_FILE)["trials"]
    except AlteredFileError as error:
        raise ConfigError(f"{error}. Remove it: raylift tune --resume {url} makes it again") from error
    return [from_plain(Trial, row, TABLE_FILE) for row in rows]


def name_results(results: Iterable[Result]) -> list[tuple[str, dict[str, Any], str]]:
    """Id, settings and error of each of Ray Tune's results, whose folder is `run_trial_<id>_<number>_<settings>`."""
    named = []
    for result in results:
        folder = Path(result.path).name
        match = re.match(r".+?_([0-9a-f]+(?:_\d{5})?)_\d+_", folder)
        named.append((match[1] if match else folder, result.config or {}, describe(result.error)))
    return named


def tabulate(url: str, trials: Iterable[tuple[str, dict[str, Any], str]]) -> list[Trial]:
    """The rows of a search's trials, the best first or, with two objectives, first the Pareto set from slow to fast.

    Of equal trials the one that started first is first, so that a resumed search has the order of an unbroken one.

    Args:
        url: the search's folder.
        trials: id, settings and error of each in the order of their start; the error is empty if there is none.
    """
    rows = []
    for name, settings, error in trials:
        try:
            checkpoint, summary = best_checkpoint(join(url, "trials", name))
            best = summary["metrics"][monitored(summary["metrics"])]
            measurement = two_objectives.load(join(url, "trials", name))
            rows.append(Trial(name, settings, best, summary["step"], checkpoint, error, measurement))
        except CheckpointError as missing:
            rows.append(Trial(name, settings, None, 0, "", error or describe(missing)))
    measured = [(each.quality, each.inference_s) if (each := row.measurement) else None for row in rows]
    fronts = two_objectives.is_pareto_optimal(measured)
    rows = [replace(row, pareto=front) for row, front in zip(rows, fronts, strict=True)]
    return sorted(rows, key=_rank)


def _rank(trial: Trial) -> tuple[bool, bool, bool, float]:
    quality = trial.measurement.quality if trial.measurement else trial.best_psnr_db
    return not trial.pareto, trial.measurement is None, quality is None, -(quality or 0.0)


def describe(error: Exception | None) -> str:
    """The message of the error of a trial, without the traceback that Ray adds; empty if there is none."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if cause is None:
        return ""
    if isinstance(cause, RayActorError | WorkerCrashedError):
        return f"the process that drives it was lost ({exit_detail(cause)})"
    return str(cause) if isinstance(cause, RayliftError) else f"{type(cause).__name__}: {cause}".splitlines()[0]


def as_table(trials: list[Trial]) -> Table:
    """The trials for a terminal."""
    measurement = next((trial.measurement for trial in trials if trial.measurement), None)
    objectives = [measurement.metric, "inference time, s", "Pareto"] if measurement else ["PSNR, dB"]
    table = Table("trial", *short_names(list(trials[0].settings)), *objectives, "step")
    for trial in trials:
        settings = _cells(trial.settings)
        best = "none" if trial.best_psnr_db is None else f"{trial.best_psnr_db:.2f}"
        values = two_objectives.cells(trial.measurement, trial.pareto) if measurement else [best]
        table.add_row(trial.id, *settings, *values, str(trial.step))
    return table


def lineage_table(lineage: Sequence[Segment]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a lineage: steps, trial and settings of each segment."""
    rows = [[f"{each.first_step} to {each.last_step}", each.trial, *_cells(each.settings)] for each in lineage]
    return ["steps", "trial", *short_names(list(lineage[0].settings))], rows


def as_lineage_table(lineage: Sequence[Segment]) -> Table:
    """A lineage for a terminal."""
    header, rows = lineage_table(lineage)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def _cells(settings: dict[str, Any]) -> list[str]:
    return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in settings.values()]


def short_names(keys: list[str]) -> list[str]:
    """The last part of each dotted key, and the part before it where several end alike: lifting.kind, fusion.kind."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    twice = {name for name in last if last.count(name) > 1}
    return [".".join(key.split(".")[-2:]) if name in twice else name for key, name in zip(keys, last, strict=True)]
