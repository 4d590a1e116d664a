"""Whole runs by name: every variant of every system in `models.zoo.SYSTEMS`, with the training that its file states."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import to_plain
from raylift.models.system_config import SystemConfig
from raylift.models.system_entry import Training
from raylift.models.zoo import SYSTEMS
from raylift.platform.config import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    flatten,
    from_yaml,
)


def run_of(system: SystemConfig, training: Training) -> RunConfig:
    """The run that trains a system: with one worker on a GPU, or with two on CPU cores."""
    on_gpu = training.device == "GPU"
    return RunConfig(
        system,
        data=DataConfig(size=training.size, window=training.window, normalization=training.normalization),
        optimizer=OptimizerConfig(
            lr=training.lr,
            betas=training.betas,
            decay_start=training.decay_start,
            weight_decay=training.weight_decay,
        ),
        engine=EngineConfig(
            zero_stage=0 if on_gpu else 1,
            precision=training.precision,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            gradient_clipping=training.gradient_clipping,
        ),
        cluster=ClusterConfig(workers=1, gpus_per_worker=1.0) if on_gpu else ClusterConfig(workers=2),
        train=TrainConfig(
            steps=training.steps,
            batch_size=training.batch_size,
            log_every=training.log_every,
            validate_every=training.validate_every,
            validation_samples=training.validation_samples,
        ),
    )


PRESETS: dict[str, RunConfig] = {
    name: run_of(*variant) for entry in SYSTEMS.values() for name, variant in entry.variants().items()
}
"""NAME as published (raylift's own: in full size), NAME-single from the frontal view alone, NAME-slim for CPU cores,
NAME-tiny for tests."""


def named_run(name: str) -> RunConfig:
    """A preset, or the configuration in a YAML file.

    Raises:
        ConfigError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith((".yaml", ".yml")):
        return from_yaml(Path(name).read_text(encoding="utf-8"), name)
    raise ConfigError(f"unknown preset '{name}': use one of {', '.join(PRESETS)}, or a YAML file")


def train_command(run: RunConfig) -> str:
    """The `raylift train` command with exactly the settings of a run: the nearest preset, and what differs from it.

    Raises:
        ConfigError: no preset has the run's parts.
    """
    settings = flatten(to_plain(run))
    differences = {}
    for name, preset in PRESETS.items():
        there = flatten(to_plain(preset))
        if there.keys() == settings.keys():
            differences[name] = {key: value for key, value in settings.items() if there[key] != value}
    if not differences:
        raise ConfigError("no preset has the parts of this run: write its settings to a YAML file")
    nearest = min(differences, key=lambda name: len(differences[name]))
    return f"raylift train {nearest} {options_of(differences[nearest])}".rstrip()


def options_of(settings: dict[str, Any]) -> str:
    """Settings on the command line."""
    return shlex.join(word for key, value in settings.items() for word in _option(key, value))


def _option(key: str, value: Any) -> list[str]:
    """The words of a setting on the command line."""
    *path, last = key.replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*path, last if value else f"no-{last}"])]
    return ["--" + ".".join([*path, last]), *map(str, value if isinstance(value, list) else [value])]


def listing() -> str:
    """Systems, and a line for each of their presets."""
    width = max(map(len, PRESETS))
    lines = ["presets:"]
    for entry in SYSTEMS.values():
        lines.append(f"  {entry.title}: {entry.summary}")
        for name, (system, training) in entry.variants().items():
            where = "one GPU" if training.device == "GPU" else "two CPU cores"
            size = f"{training.size}^3, {training.steps:,} steps with batch size {training.batch_size} on {where}"
            lines.append(f"    {name:<{width}}  {' and '.join(system.views)}, {size}")
    return "\n".join(lines)
