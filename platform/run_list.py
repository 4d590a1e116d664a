"""Runs and searches in a folder: state, owner, progress and size of each."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from raylift.datasets.archive.store import Folder, absolute, join
from raylift.datasets.errors import RayliftError
from raylift.platform.monitor import monitored
from raylift.platform.training import lease
from raylift.platform.training.checkpoint import RUN_FILE, Checkpoints
from raylift.platform.tuning import population
from raylift.platform.tuning.algorithms import PBT
from raylift.platform.tuning.search import SEARCH_FILE
from raylift.platform.tuning.trials import TABLE_FILE, load_table


@dataclass(frozen=True)
class Overview:
    """One run or search."""

    url: str
    state: str
    """finished, running, stopped, lost or damaged, with the process and its last heartbeat or the reason."""
    best: str
    """The best monitored metric of a validation, with its step or trial; empty if there is none."""
    progress: str
    """Steps or trials done, of all."""
    size_bytes: int
    command: str
    """The command that resumes it, or evaluates it if it is finished; empty while it runs."""


def overviews(url: str) -> list[Overview]:
    """The run or search at a URL, or those directly in its folder, by name."""
    url = absolute(url)
    folder = Folder(url)
    places = [url] if _kind(folder) else [join(url, name) for name in folder.names() if not name.startswith(".")]
    return [overview for place in places if (overview := _overview(place))]


def _kind(folder: Folder) -> str:
    return next((name for name in (RUN_FILE, SEARCH_FILE) if folder.exists(name)), "")


def _overview(url: str) -> Overview | None:
    folder = Folder(url)
    kind = _kind(folder)
    if not kind:
        return None
    size = folder.size()
    try:
        record = folder.read_hashed(kind)
        best, progress, model = _run(url, record) if kind == RUN_FILE else _search(url, record)
        state = "finished" if model else lease.describe(folder) or "stopped"
    except RayliftError as error:
        return Overview(url, f"damaged: {error}", "", "", size, "")
    archive = record["config" if kind == RUN_FILE else "run"]["data"]["archive"]
    command = ["raylift", "evaluate", model, "--archive", archive]
    if not model:
        command = ["raylift", "train" if kind == RUN_FILE else "tune", "--resume", url]
    return Overview(url, state, best, progress, size, "" if state.startswith("running") else shlex.join(command))


def _run(url: str, record: dict[str, Any]) -> tuple[str, str, str]:
    """Best metric, progress, and the model of a finished run."""
    published = [summary for _, summary in Checkpoints(url).published()]
    steps, step = record["config"]["train"]["steps"], max((summary["step"] for summary in published), default=0)
    measured = [summary for summary in published if summary["metrics"]]
    best = ""
    if measured:
        name = monitored(measured[0]["metrics"])
        top = max(measured, key=lambda summary: summary["metrics"][name])
        best = f"{top['metrics'][name]:.2f} dB at step {top['step']}"
    return best, f"{step} of {steps} steps", url if step >= steps else ""


def _search(url: str, record: dict[str, Any]) -> tuple[str, str, str]:
    """Best metric, progress, and the best checkpoint of a finished search."""
    folder = Folder(url)
    if not folder.exists(TABLE_FILE):
        if record.get("scheduler") == PBT:
            step = state.step if (state := population.load(url)) else 0
            return "", f"{step} of {record['run']['train']['steps']} steps of {record['trials']} members", ""
        return "", f"{len(folder.names('trials'))} of {record['trials']} trials begun", ""
    table = load_table(url)
    if front := [trial for trial in table if trial.pareto]:
        return f"{len(front)} trials in the Pareto set", f"{len(table)} trials", front[0].checkpoint
    best = table[0]
    metric = "" if best.best_psnr_db is None else f"{best.best_psnr_db:.2f} dB of trial {best.id}"
    return metric, f"{len(table)} trials", best.checkpoint
