"""Creating a run in its folder and training it with Ray Train, and reading its configuration and history."""

from __future__ import annotations

import json
import os
import platform as machine
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from typing import Any

import ray.train
import ray.tune

from raylift import __version__
from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder, absolute, join, require_reachable
from raylift.datasets.errors import AlteredFileError, ConfigError
from raylift.datasets.serialization import from_plain, to_plain
from raylift.platform import cluster, model_store
from raylift.platform.config import RunConfig, flatten, with_absolute_paths
from raylift.platform.progress import worker_messages
from raylift.platform.training import initial_weights, lease
from raylift.platform.training.checkpoint import RUN_FILE, STATE_FILE, Checkpoints, load_state, local_copy
from raylift.platform.training.driver import Interrupted, fit_with_restarts
from raylift.platform.training.inputs import (
    archive_digests,
    check,
    check_network,
    require_archives,
    with_archive_views,
    with_snapshots,
)


def new_run_url(runs: str, preset: str) -> str:
    """A folder for a new run, named after its preset and the time."""
    return join(absolute(runs), f"{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}")


def load_run(url: str) -> RunConfig:
    """Load the configuration of a run: the one in its record or, if that is missing, in its newest checkpoint.

    Raises:
        ConfigError: there is no run at that URL, or its record was altered; names the settings that differ from those
            of the newest checkpoint.
    """
    require_reachable(url)
    where = f"{absolute(url)}/{RUN_FILE}"
    try:
        return from_plain(RunConfig, Folder(url).read_hashed(RUN_FILE)["config"], where)
    except FileNotFoundError as error:
        checkpoint, config = _newest_config(url)
        if config is None:
            raise ConfigError(f"{absolute(url)} is not a run: it has no {RUN_FILE}") from error
        print(f"raylift: {where} is missing: the settings in {checkpoint} are used instead", flush=True)
        return from_plain(RunConfig, config, str(checkpoint))
    except AlteredFileError as error:
        raise ConfigError(
            f"{error}{_altered_settings(url)}. Restore it, or remove it: --resume then takes the settings of the "
            "newest checkpoint. Options of --resume change settings"
        ) from error


def load_record(url: str) -> dict[str, Any]:
    """Everything that is recorded of a run; empty if that is missing."""
    folder = Folder(url)
    return folder.read_hashed(RUN_FILE) if folder.exists(RUN_FILE) else {}


def _newest_config(url: str) -> tuple[str | None, dict[str, Any] | None]:
    """URL and configuration of a run's newest checkpoint whose state matches its digest; None if there is none."""
    newest, _ = Checkpoints(url).newest([STATE_FILE])
    if newest is None:
        return None, None
    with local_copy(newest, [STATE_FILE]) as local:
        return newest, load_state(local).config


def _altered_settings(url: str) -> str:
    """How the settings in an altered record, if it can be parsed, differ from those of the newest checkpoint."""
    checkpoint, config = _newest_config(url)
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        here, there = flatten(json.loads(Folder(url).read(RUN_FILE))["config"]), flatten(config)
        differences = [f"{key} {value!r}, not {there.get(key)!r}" for key, value in here.items() if value != there[key]]
        if config is not None and differences:
            return f" ({'; '.join(differences)} as in {checkpoint})"
    return ""


def create(run: RunConfig, run_url: str) -> RunConfig:
    """Create a run: write its configuration with absolute paths and base models, its digest and versions.

    Raises:
        ConfigError: archive, initial weights and settings do not fit together, or the run exists and is not one that
            failed before its first step; nothing is written.
    """
    require_reachable(run_url)
    run = with_snapshots(with_archive_views(with_absolute_paths(initial_weights.resolve(run))))
    archive = check(run)
    initial_weights.check(run, archive)
    check_network(run, archive)
    versions = {"raylift": __version__, "ray": ray.__version__, "python": machine.python_version()}
    record = {
        "config": to_plain(run),
        "config_sha256": run.sha256(),
        "archives": archive_digests(run),
        "versions": versions,
        "machine": machine.machine(),
        "initial_weights": initial_weights.record(run),
        "process": lease.this_process(),
    }
    write_record(run_url, RUN_FILE, record, "run")
    return run


def write_record(url: str, name: str, data: dict[str, Any], kind: str) -> None:
    """Write the file that makes a folder a run or a search.

    It replaces the file of one that failed before its first step, which has left nothing else in the folder.

    Raises:
        ConfigError: the folder is a run or search that has started, or that another process of this machine starts.
    """
    folder, content = Folder(url), hashed_json.encode(data)
    try:
        folder.create(name, content)
    except FileExistsError as error:
        visible = [other for other in folder.names() if not other.startswith(".")]
        if visible != [name]:
            raise ConfigError(
                f"{url} is already a {kind}: resume it with --resume {url}, or choose another folder"
            ) from error
        if pid := _starting_process(folder.read_hashed(name)):
            raise ConfigError(f"process {pid} has just started this {kind} in {url}: choose another folder") from error
        folder.write(name, content)


def _starting_process(record: dict[str, Any]) -> int:
    """The running process of this machine that wrote a run's record; 0 if it ended, is this one or is elsewhere."""
    process = record.get("process", {})
    if not lease.is_here(process) or process["pid"] == os.getpid() or lease.has_ended(process):
        return 0
    return int(process["pid"])


def fit(
    run: RunConfig, run_url: str, *, title: str = "train", to_tune: bool = False, leased: bool = False, until: int = 0
) -> dict[str, Any]:
    """Train a created run, from its newest checkpoint if it has one, and return its last metrics.

    Args:
        run: the configuration.
        run_url: the run's folder.
        title: of the progress bar and the log lines; empty: there are none.
        to_tune: whether it is a trial, whose validations are reported to Ray Tune.
        leased: whether the caller holds the lease of the run or of its search.
        until: the step at which training ends; 0: `train.steps`.

    Raises:
        ConfigError: another process trains the run.
        NonFiniteLossError: a loss was not finite; the run stops before the optimizer step.
        DivergedLossError: the training diverged, in a run with `train.stop_on_divergence`.
        Interrupted: on SIGINT or SIGTERM; workers end with this process.
        RunFailedError: a disk or the memory is full, or workers were lost more often than `cluster.max_failures`.
    """
    archive = check(run)
    digests = load_record(run_url).get("archives", {})
    require_archives(run, digests)
    checkpoints = Checkpoints(run_url)
    published = checkpoints.published()
    if not published:
        initial_weights.check(run, archive)
    # All files are verified before the run counts as finished.
    end = min(until or run.train.steps, run.train.steps)
    last = published[-1] if published and published[-1][1]["step"] >= end else None
    if last and checkpoints.newest()[0] == join(checkpoints.url, last[0]):
        finished: dict[str, Any] = last[1]["metrics"]
        if to_tune:
            # A search that was killed may not have received its trial's last validation.
            ray.tune.report({**finished, "step": run.train.steps})
        return finished
    settings = {"archives": digests, "messages": None, "to_tune": to_tune, "until": end}
    if to_tune or not title:
        return _fit(run, run_url, settings)
    with nullcontext() if leased else lease.acquire(run_url), worker_messages(title) as messages:
        try:
            return _fit(run, run_url, {**settings, "messages": messages})
        except Interrupted as error:
            at_step = ""
            with suppress(ray.exceptions.RayError):
                at_step = f" at step {ray.get(messages.last_step.remote(), timeout=5)}"
            saved = [summary["step"] for _, summary in checkpoints.published()][-1:]
            newest = f"its newest checkpoint is of step {saved[0]}" if saved else "it has no checkpoint yet"
            raise Interrupted(f"{error}{at_step}; resume with raylift train --resume {run_url} ({newest})") from None


def _fit(run: RunConfig, run_url: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train with settings of `train_worker`."""
    workers, messages = run.cluster.workers, settings["messages"]
    cluster.require_resources(workers * run.cluster.cpus_per_worker, workers * run.cluster.gpus_per_worker, "this run")
    callbacks: list[Any] = []
    if settings["to_tune"]:
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())  # type: ignore[no-untyped-call]

    def note(text: str) -> None:
        if messages is None:
            print(f"raylift: {text}", flush=True)
        else:
            with suppress(ray.exceptions.RayActorError):
                ray.get(messages.put.remote((None, run.train.steps, text)))

    return fit_with_restarts(run, run_url, settings, callbacks, note)


def load_history(url: str) -> list[dict[str, float]]:
    """The training history in a checkpoint; empty for an exported model."""
    state = _json(url, STATE_FILE)
    history: list[dict[str, float]] = state.get("history", [])
    return history


def load_metrics(url: str) -> dict[str, float]:
    """The validation metrics in a checkpoint; empty for an exported model."""
    state = _json(url, STATE_FILE)
    metrics: dict[str, float] = state.get("metrics", {})
    return metrics


def _json(url: str, name: str) -> dict[str, Any]:
    folder = Folder(model_store.location(url))
    return folder.read_hashed(name) if folder.exists(name) else {}
