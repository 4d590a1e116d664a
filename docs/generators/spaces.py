"""Reference page of the search spaces, from the YAML files themselves."""

from __future__ import annotations

from pathlib import Path

import yaml

from raylift.platform.tuning.search import load_space

INTRODUCTION = """\
# Search spaces

`raylift tune SPACE` searches one of these, or a YAML file of your own. Keys are [settings](settings.md) of a run; each
names how it is sampled: `uniform`, `log_uniform` and `integer` between two bounds, `choice` among values. Optuna
chooses the settings of each trial (`--sampler`), and successive halving or median stopping ends the worse ones early
(`--scheduler`).
"""


def page(folder: Path) -> str:
    """The page of all spaces in a folder."""
    lines = [INTRODUCTION]
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        space = yaml.safe_load(text)
        summary = text.splitlines()[0].lstrip("# ")
        lines += [f"## {path.stem}", "", f"{summary} Preset: `{load_space(path.stem).preset}`.", ""]
        lines += ["| setting | sampled | from |", "| --- | --- | --- |"]
        for key, how in space["space"].items():
            ((kind, values),) = how.items()
            lines.append(f"| `{key}` | {kind} | {', '.join(f'`{_shown(value)}`' for value in values)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
