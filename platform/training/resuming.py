"""Resuming a run with other settings: some are taken and printed, all others are refused by name."""

from __future__ import annotations

import re
from typing import Any

from raylift.datasets import hashed_json
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import to_plain
from raylift.platform.config import RunConfig, flatten, with_absolute_paths
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import RUN_FILE
from raylift.platform.training.inputs import archive_digests, with_snapshots

RESUMABLE_CHANGES = (
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.keep_checkpoints",
    "train.divergence_factor",
    "train.stop_on_divergence",
    "cluster.",
    "engine.",
    "optimizer.",
    "data.snapshot",
    "data.unpaired_snapshot",
    "data.threads",
    "data.prefetch_batches",
    "data.cache_gib",
)
"""Settings, or beginnings of settings, that a resumed run may change."""
LOSS_WEIGHT = re.compile(r"system\.loss\.\w+_weight")
"""Weights of losses. A resumed run may change them, but neither to nor from 0: some networks have no weights then."""
ARCHIVES = {"data.archive": "data.snapshot", "data.unpaired": "data.unpaired_snapshot"}
"""Archives, whose place a resumed run may change if the samples are the same, and their snapshots."""


def resume_run(run: RunConfig, url: str) -> RunConfig:
    """Check the settings of a run that is resumed against its record, print what changes, and record it.

    Args:
        run: the run's settings with those that were given to `--resume`.
        url: the run's folder.

    Returns:
        The settings of the resumed run.

    Raises:
        ConfigError: settings differ that a resumed run keeps; names each with both values.
    """
    base, record = runs.load_run(url), runs.load_record(url)
    run = with_snapshots(with_absolute_paths(run))
    recorded, current = record.get("archives", {}), archive_digests(run)
    moved = tuple(key for key in ARCHIVES if recorded.get(key, "") == current.get(key))
    before, after = flatten(to_plain(base)), flatten(to_plain(run))
    weights = tuple(key for key in after if LOSS_WEIGHT.fullmatch(key) and before.get(key) and after[key])
    changed = changes(base, run, RESUMABLE_CHANGES + moved + weights, url, "run")
    for key, (old, new) in changed.items():
        print(f"raylift: {key} changes from {old} to {new}{_samples(base, run, key)}", flush=True)
    for key, snapshot in ARCHIVES.items():
        if key in recorded and snapshot not in changed:
            current[key] = recorded[key]
    updated = {**record, "config": to_plain(run), "config_sha256": run.sha256(), "archives": current}
    if updated != record:
        Folder(url).write(RUN_FILE, hashed_json.encode(updated))
    return run


def changes(before: object, after: object, allowed: tuple[str, ...], url: str, kind: str) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations differ, each with both values.

    Args:
        before: the recorded configuration.
        after: the new configuration.
        allowed: settings, or beginnings of settings, that may change.
        url: the folder of the run or search, for the message.
        kind: `run` or `search`, for the message.

    Raises:
        ConfigError: settings differ that may not change.
    """
    old, new = flatten(to_plain(before)), flatten(to_plain(after))
    changed = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    refused = [f"{key} {a!r}, not {b!r}" for key, (a, b) in changed.items() if not key.startswith(allowed)]
    if refused:
        raise ConfigError(f"{url} keeps {'; '.join(refused)}: start a new {kind} to change it")
    return changed


def _samples(base: RunConfig, run: RunConfig, key: str) -> str:
    """How a new snapshot changes the training samples, for the line about it."""
    if key != "data.snapshot":
        return ""
    counts: list[Any] = [
        len(Archive(config.data.archive, config.data.snapshot).entries("train")) for config in (base, run)
    ]
    return f" ({counts[0]} and {counts[1]} samples in the train split)"
