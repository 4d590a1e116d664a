"""Command-line arguments that `raylift train` and `raylift tune` share: a leading name, then settings of a run."""

from __future__ import annotations

from typing import TypeVar

import tyro

from raylift.datasets.errors import ConfigError

Options = TypeVar("Options")


def parse(command: str, arguments: list[str], default: Options) -> Options:
    """Options of a command whose defaults are those of a run.

    Args:
        command: name of the command and of the preset or search space, for the help.
        arguments: the arguments after that name.
        default: the options without arguments.
    """
    return tyro.cli(
        type(default),
        prog=f"raylift {command}",
        args=arguments,
        default=default,
        config=(tyro.conf.AvoidSubcommands,),
    )


def split_name(arguments: list[str]) -> tuple[str, list[str]]:
    """The leading argument if it is no option, else an empty string, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return "", arguments


def pop_option(arguments: list[str], name: str) -> tuple[str, list[str]]:
    """The value of an option, empty if it is absent, and the arguments without it.

    Raises:
        ConfigError: the option has no value.
    """
    if name not in arguments:
        return "", arguments
    place = arguments.index(name)
    if place + 1 >= len(arguments):
        raise ConfigError(f"{name} requires a value")
    return arguments[place + 1], arguments[:place] + arguments[place + 2 :]


def print_usage(lines: tuple[str, ...], choices: str, arguments: list[str]) -> int:
    """Print the usage and the available names; returns the exit status: 0 if help was requested, else 2."""
    print("usage: " + "\n       ".join(lines) + f"\n\n{choices}")
    return 0 if {"-h", "--help"} & set(arguments) else 2
