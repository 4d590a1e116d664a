"""The report of a search: one HTML page with its trials, Optuna's figures and the command that repeats each trial."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import matplotlib as mpl
import optuna
import ray
from matplotlib import pyplot
from matplotlib.axes import Axes
from optuna.visualization import matplotlib as figures

from raylift import __version__
from raylift.datasets.archive.store import Folder, absolute, join
from raylift.datasets.errors import ConfigError
from raylift.platform.presets import train_command
from raylift.platform.reports.page import base64_text, render
from raylift.platform.training import lease
from raylift.platform.tuning import population
from raylift.platform.tuning.algorithms import PBT
from raylift.platform.tuning.search import Search, load_search
from raylift.platform.tuning.study import TrialHistory, as_study, load_trials, write_storage
from raylift.platform.tuning.trials import TABLE_FILE, lineage_table, short_names
from raylift.platform.tuning.two_objectives import (
    OBJECTIVES,
    TIMED_PASSES,
    WARM_UP_PASSES,
    cells,
    devices,
    is_pareto_optimal,
)

PAGE_FILE = "report.html"
TEMPLATE = "search.html.j2"
MIN_TRIALS = 2
"""Number of validated trials below which there are no figures."""
CURVES_IN_A_COLUMN = 20
"""Entries in a column of the legend of learning curves."""
PSNR = "best validation PSNR, dB"


def write(url: str) -> str:
    """Write the report of a search and its Optuna storage to its folder; returns the URL of the page.

    Raises:
        ConfigError: it is no search.
    """
    url = absolute(url)
    search = load_search(url)
    trials = load_trials(url, search)
    storage = write_storage(url, search, trials)
    header, rows = _table(search, trials)
    page = render(
        TEMPLATE,
        title=f"Search {url.rsplit('/', 1)[-1]}",
        summary=_summary(search, trials),
        unfinished=_unfinished(url, search, trials),
        table=(header, rows),
        figures=_figures(search, trials),
        lineage=_lineage(search, trials),
        commands=[(trial.id, _command(search, trial)) for trial in trials],
        storage=storage,
        provenance=json.dumps(_provenance(url, search), indent=1),
    )
    Folder(url).write(PAGE_FILE, page.encode())
    return join(url, PAGE_FILE)


def _ranked(trials: Sequence[TrialHistory]) -> list[TrialHistory]:
    """The trials, the best validation first or, with two objectives, the best quality."""
    return sorted(trials, key=lambda trial: (len(trial.objectives), trial.objectives[:1]), reverse=True)


def _pareto_set(trials: Sequence[TrialHistory]) -> list[TrialHistory]:
    """The Pareto set of two objectives, from slow to fast; empty for a single one."""
    points = [(each.quality, each.inference_s) if (each := trial.measurement) else None for trial in trials]
    return _ranked([trial for trial, front in zip(trials, is_pareto_optimal(points), strict=True) if front])


def _summary(search: Search, trials: Sequence[TrialHistory]) -> str:
    counts = [
        f"{count} {state}"
        for state in dict.fromkeys(trial.state for trial in trials)
        if (count := sum(trial.state == state for trial in trials))
    ]
    of = f"{len(trials)} trials of a population of {search.trials}"
    text = of if search.scheduler == PBT else f"{len(trials)} of {search.trials} trials"
    text += f": {', '.join(counts) or 'none has started'}."
    steps = sum(trial.trained_steps for trial in trials)
    text += f" {steps:,} of {search.trials * search.run.train.steps:,} steps were trained."
    if OBJECTIVES[search.objectives]:
        measured = devices(trial.measurement for trial in trials)
        text += (
            f" The Pareto set of {OBJECTIVES[search.objectives].partition(',')[0]} and time has "
            f"{len(_pareto_set(trials))} trials. Times are the median of {TIMED_PASSES} predictions of one sample in "
            f"fp32, after {WARM_UP_PASSES} others, on {measured or 'no device yet'}."
        )
    elif trials and (best := _ranked(trials)[0]).best:
        text += f" The best trial is {best.id} with {best.best[1]:.2f} dB at step {best.best[0]}."
    return text


def _unfinished(url: str, search: Search, trials: Sequence[TrialHistory]) -> str:
    """The state of a search that has not ended; empty if it has."""
    folder = Folder(url)
    if folder.exists(TABLE_FILE):
        return ""
    state = lease.describe(folder)
    if state.startswith("running"):
        return f"The search is {state}: this report is of its trials so far"
    failed = sum(trial.state == "failed" for trial in trials)
    if failed and len(trials) == search.trials and all(trial.state != "unfinished" for trial in trials):
        return f"{failed} of {len(trials)} trials failed: raylift tune --resume {url} repeats them"
    return f"The search was interrupted: raylift tune --resume {url} resumes it"


def _table(search: Search, trials: Sequence[TrialHistory]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the trials, the best first."""
    keys = list(search.space.space)
    metric = OBJECTIVES[search.objectives]
    header = ["trial", *([metric, "inference time, s", "Pareto"] if metric else [])]
    header += [
        "best validation PSNR, dB" if metric else "PSNR, dB",
        "best step",
        "last step",
        *(["started from"] if search.scheduler == PBT else []),
        *short_names(keys),
        "state",
    ]
    front, rows = _pareto_set(trials), []
    for trial in _ranked(trials):
        step, psnr = trial.best or (0, None)
        values = [trial.settings[key] for key in keys]
        rows.append(
            [
                trial.id,
                *(cells(trial.measurement, trial in front) if metric else []),
                "none" if psnr is None else f"{psnr:.2f}",
                str(step),
                str(max(trial.validations, default=0)),
                *([_parent(trial)] if search.scheduler == PBT else []),
                *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
                f"{trial.state}: {trial.error}" if trial.error else trial.state,
            ]
        )
    return header, rows


def _parent(trial: TrialHistory) -> str:
    """The checkpoint from which a member of a population started."""
    return f"{trial.lineage[-2].trial}, step {trial.first_step}" if len(trial.lineage) > 1 else "initial weights"


def _lineage(search: Search, trials: Sequence[TrialHistory]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the settings that led to the best checkpoint of population-based training, by step."""
    if search.scheduler != PBT or not trials or not (best := _ranked(trials)[0]).best:
        return None
    return lineage_table(best.lineage)


def _command(search: Search, trial: TrialHistory) -> str:
    try:
        return population.commands(search.run, trial.lineage) if trial.lineage else train_command(trial.run)
    except ConfigError as error:
        return f"# {error}"


def _figures(search: Search, trials: Sequence[TrialHistory]) -> list[tuple[str, str, str]]:
    """Title, caption and PNG of each figure."""
    # Optuna leaves pruned trials out of its figures; here a trial that was stopped early has its best validation.
    metric = OBJECTIVES[search.objectives]
    validated = [
        replace(trial, state="finished", error="")
        for trial in trials
        if (trial.measurement if metric else trial.validations)
    ]
    if len(validated) < MIN_TRIALS:
        return []
    names = dict(zip(search.space.space, short_names(list(search.space.space)), strict=True))
    study = as_study(search, validated, names, quality_only=True)
    quality = metric or PSNR
    early = "" if metric else " Trials that were stopped early count with their best validation."
    shown = []
    with warnings.catch_warnings(), mpl.rc_context():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Matplotlib warns of an axis with one value.
        warnings.simplefilter("ignore", UserWarning)
        if metric:
            front = figures.plot_pareto_front(as_study(search, validated), target_names=[metric, "inference time, s"])
            text = "Red: the trials that no other one dominates."
            shown.append(("Pareto front", text, _png(front)))
        history = figures.plot_optimization_history(study, target_name=quality)
        shown.append(("Optimization history", f"Trials in the order of their start.{early}", _png(history)))
        curves = figures.plot_intermediate_values(study)
        curves.set(xlabel="step", ylabel="validation PSNR, dB")
        for line, trial in zip(curves.lines, validated, strict=True):
            line.set_label(trial.id)
        columns = -(-len(validated) // CURVES_IN_A_COLUMN)
        curves.legend(fontsize=7, ncols=columns, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        shown.append(("Learning curves", "Validations of each trial by step.", _png(curves)))
        if len({trial.objectives[0] for trial in validated}) > 1:
            text = f"PED-ANOVA of {len(validated)} trials; of few trials it is uncertain.{early}"
            importances = figures.plot_param_importances(study, target_name=quality)
            shown.append(("Importance of settings", text, _png(importances)))
        lines = figures.plot_parallel_coordinate(study, target_name=quality)
        text = f"A line for each trial, dark where {quality.partition(',')[0]} is high.{early}"
        shown.append(("Parallel coordinates", text, _png(lines)))
    return shown


def _png(axes: Axes) -> str:
    """A figure without its title as PNG in base64; it is closed."""
    for place in ("left", "center"):
        axes.set_title("", loc=place)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(9.5, 4.0)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return base64_text(content.getvalue())


def _provenance(url: str, search: Search) -> dict[str, Any]:
    return {
        "search": url,
        "settings": {
            "sampler": search.sampler,
            "scheduler": search.scheduler,
            "objectives": search.objectives,
            "seed": search.seed,
            "trials": search.trials,
            "reduction_factor": search.reduction_factor,
        },
        "space": search.space.space,
        "base run SHA-256": search.run.sha256(),
        "archive": f"{search.run.data.archive}, snapshot {search.run.data.snapshot}",
        "versions": {"raylift": __version__, "ray": ray.__version__, "optuna": optuna.__version__},
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }
