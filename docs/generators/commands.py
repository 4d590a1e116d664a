"""Reference page of the command line, generated from the commands' parsers."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any
from unittest import mock

import setting_tables
import tyro

from raylift.platform import cli

INTRODUCTION = """\
# Commands

This page is generated from the parsers of the commands; `raylift COMMAND --help` prints the same in a terminal. The
exit status is 0 (done), 1 (nothing could be done, or `archive verify` found damage), 2 (a mistake in the command or
its files, with the remedy on standard error) or 130 (interrupted).
"""
EXAMPLES = {"train": ["x2ct-gan-slim"], "tune": ["x2ct-gan"]}
RUN_SETTINGS = (
    "Every [setting](settings.md) of the run is an option as well, by its dotted name: `--train.steps 500`, "
    "`--system.fusion.kind sum`."
)


class _CapturedError(Exception):
    """Raised in place of parsing."""

    def __init__(self, owner: type, default: Any) -> None:
        self.owner, self.default = owner, default


def page() -> str:
    """The page of all commands."""
    lines = [INTRODUCTION, "| command | purpose |", "| --- | --- |"]
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {line} |" for name, (_, line) in cli.COMMANDS.items()]
    for name in cli.COMMANDS:
        lines += ["", f"## {name}", "", *_command(name)]
    return "\n".join(lines) + "\n"


def _command(name: str) -> list[str]:
    owner, default = options_of(name)
    own, *nested = setting_tables.groups(owner, default)
    lines = [own.intro, "", "```text", usage_of(name), "```", ""]
    settings = [setting for setting in own.settings if "." not in setting.key]
    if name in EXAMPLES:
        lines += [RUN_SETTINGS, ""]
        nested = []
    if settings:
        lines += [*setting_tables.table(settings, flags=True), ""]
    for group in nested:
        lines += [group.intro, "", *setting_tables.table(group.settings, flags=True), ""]
    return lines


def options_of(name: str) -> tuple[type, Any]:
    """The dataclass that a command parses its options into, and its default where it has one."""

    def capture(owner: type, *, default: Any = setting_tables.MISSING, **_: Any) -> None:
        raise _CapturedError(owner, default)

    with mock.patch.object(tyro, "cli", capture):
        try:
            cli.main([*name.split(), *EXAMPLES.get(name, [])])
        except _CapturedError as captured:
            return captured.owner, captured.default
    raise RuntimeError(f"raylift {name} parses no options")


def usage_of(name: str) -> str:
    """The first line of a command's help."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([*name.split(), *(EXAMPLES.get(name, [])), "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    usage = plain.strip().split("\n\n")[0].removeprefix("usage: ")
    for example in EXAMPLES.get(name, []):
        usage = usage.replace(example, "PRESET" if name == "train" else "SPACE")
    return usage
