"""Reference pages of a run's settings and of the presets, from the configuration's dataclasses."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import setting_tables

from raylift.models.zoo import SYSTEMS
from raylift.platform.config import RunConfig
from raylift.platform.presets import PRESETS

INTRODUCTION = """\
# Settings

This page lists every setting of a run. It is generated from the dataclasses of `raylift.platform.config` and of the
systems. A setting is a flag of `raylift train` and `raylift tune` (`--optimizer.weight-decay 1e-4`; hyphens or
underscores) and a key of a YAML file (`raylift train run.yaml`). `raylift train PRESET --dry-run` prints the whole tree
of a preset, which is such a file. Unknown keys are errors.

The defaults below are those of the dataclasses; a [preset](presets.md) has its own. Settings of a
[system](../systems.md) depend on its family and are in the second part.
"""
PRESETS_INTRODUCTION = """\
# Presets

`raylift train PRESET` starts from one of these. A preset with the bare name of a system holds its full settings, as
published where there is a paper; `-slim` has the same parts at 64 voxels per side for CPU cores; `-tiny` is for tests.

| preset | system | voxels per side | batch | steps | description |
| --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The page of all settings."""
    lines = [INTRODUCTION]
    run = RunConfig()
    hints = get_type_hints(RunConfig)
    for name in hints:
        if name == "system":
            continue
        lines += _section(getattr(run, name), name)
    for family in families():
        lines += _section(_first_preset(family).system, "system", title=f"system: {family.__name__}")
    return "\n".join(lines)


def presets_page() -> str:
    """The page of all presets."""
    rows = []
    for name, run in PRESETS.items():
        text = SYSTEMS[run.system.name].summary
        rows.append(
            f"| `{name}` | `{run.system.name}` | {run.data.size} | {run.train.batch_size} | {run.train.steps:,} "
            f"| {text} |"
        )
    return PRESETS_INTRODUCTION + "\n".join(rows) + "\n"


def families() -> tuple[type, ...]:
    """The dataclasses of systems that `system` may be."""
    kinds: list[type] = []
    for run in PRESETS.values():
        if type(run.system) not in kinds:
            kinds.append(type(run.system))
    return tuple(kinds)


def _first_preset(family: type) -> RunConfig:
    return next(run for run in PRESETS.values() if type(run.system) is family)


def _section(settings: Any, prefix: str, title: str = "") -> list[str]:
    lines: list[str] = []
    for number, group in enumerate(setting_tables.groups(type(settings), settings, f"{prefix}.")):
        if number == 0:
            lines += [f"## {title or prefix}", ""]
        else:
            lines += [f"### {group.prefix}" + (f" ({title.split(': ')[1]})" if title else ""), ""]
        lines += [_plain(group.intro), ""]
        if number == 0 and title:
            names = [name for name, run in PRESETS.items() if type(run.system) is type(settings)]
            lines += [f"Presets: {', '.join(f'`{name}`' for name in names)}. Defaults are those of `{names[0]}`.", ""]
        if group.settings:
            lines += [*setting_tables.table(group.settings, flags=False), ""]
    return lines


def _plain(text: str) -> str:
    """A docstring as Markdown: its lists need an empty line before them."""
    return re.sub(r"(?m)(?<=[^\n])\n(?=[*-] )", "\n\n", text)
