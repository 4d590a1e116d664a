"""The `raylift` command line: a table of commands, each imported only when it runs, so that `--help` is fast."""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Callable, Collection, Sequence

COMMANDS = {
    "ingest": ("raylift.platform.commands.ingest:ingest", "CT files and folders to an archive"),
    "ingest-xray": ("raylift.platform.commands.ingest:ingest_xray", "pairs of radiographs to an archive"),
    "phantom": ("raylift.platform.commands.ingest:phantom", "synthetic thorax volumes to an archive"),
    "archive ls": (
        "raylift.platform.commands.archive_commands:list_archive",
        "samples, splits, ingest options, size and snapshot of an archive",
    ),
    "archive verify": (
        "raylift.platform.commands.archive_commands:verify_archive",
        "every array of an archive against its digest",
    ),
    "archive merge": (
        "raylift.platform.commands.archive_commands:merge_archives",
        "samples of archives of one grid and geometry to another archive, each scan once",
    ),
    "train": ("raylift.platform.commands.train:train", "train a preset on Ray, or resume a run"),
    "tune": ("raylift.platform.commands.tune:tune", "hyperparameter search with Optuna, or resume one"),
    "runs": ("raylift.platform.commands.runs:runs", "runs and searches: state, best metric, size, next command"),
    "evaluate": (
        "raylift.platform.commands.evaluation_export:evaluate",
        "metrics of a checkpoint: tables, JSON, report",
    ),
    "compare": (
        "raylift.platform.commands.compare:compare",
        "metrics of models and of other programs' volumes on the same scans, with intervals",
    ),
    "score": ("raylift.platform.commands.score:score", "metrics of predicted volumes against their ground truth"),
    "ptx": ("raylift.platform.commands.ptx:ptx", "lungs and pneumothorax of CT volumes: masks, volumes, figures"),
    "export": (
        "raylift.platform.commands.evaluation_export:export",
        "a checkpoint as safetensors with a model card",
    ),
    "import-x2ct": (
        "raylift.platform.commands.import_x2ct:import_x2ct",
        "a checkpoint of X2CT-GAN's public code as a raylift model",
    ),
    "reconstruct": (
        "raylift.serve.commands:reconstruct",
        "radiographs to a CT volume as NIfTI, NRRD, DICOM series or PNG",
    ),
    "serve": ("raylift.serve.commands:serve", "HTTP API and web page for a model"),
    "models": ("raylift.platform.commands.about:models", "pretrained models, which commands take by name, models:NAME"),
    "systems": (
        "raylift.platform.commands.about:systems",
        "systems, published methods and raylift's own: presets, parameters, papers",
    ),
    "doctor": ("raylift.platform.commands.about:doctor", "what is installed and reachable, and what is missing"),
}
"""Function and line of help of each command. Only this table refers to folders to the right of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, 1 (nothing could be done, an archive is damaged, or the reader of the output, such as
        `head`, ended first), 2 (wrong arguments or settings) or 130 (interrupted).
    """
    try:
        try:
            return _main(arguments)
        finally:
            if sys.stdout:  # None where the shell closed it
                sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return 1  # as Rich, which prints tables


def _output_is_closed() -> bool:
    """Whether the reader of the output has ended; what is left of the output is discarded then."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _main(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_help(COMMANDS))
        return 0
    if words[0] in ("-V", "--version"):
        from raylift import __version__

        print(f"raylift {__version__}")
        return 0
    count = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        subcommands = [command for command in COMMANDS if command.startswith(f"{words[0]} ")]
        if subcommands and words[1:2] in (["-h"], ["--help"]):
            print(_help(subcommands))
            return 0
        unknown = " ".join(words[: 2 if subcommands else 1])
        print(f"raylift: unknown command '{unknown}': use one of {', '.join(subcommands or COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from raylift.datasets.errors import RayliftError

    try:
        return _command(name)(words[count:])
    except (RayliftError, FileNotFoundError, PermissionError) as error:
        print(f"raylift: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"raylift: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[list[str]], int]:
    module, function = COMMANDS[name][0].split(":")
    command: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return command


def _help(names: Collection[str]) -> str:
    width = max(map(len, names))
    commands = "\n".join(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names)
    return (
        "usage: raylift COMMAND ...\n\n"
        "3-D CT volumes from one to eight radiographs (X-rays): training, search and serving on Ray.\n"
        f"Research software, not a medical device.\n\n{commands}\n\n"
        "raylift COMMAND --help shows the options of a command."
    )


if __name__ == "__main__":
    raise SystemExit(main())
