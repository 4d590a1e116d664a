"""`raylift evaluate` and `raylift export`: the report of a checkpoint, and its export as a model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.store import local_path
from raylift.models.weights import Model
from raylift.platform import model_store
from raylift.platform.commands.compare import EvaluationOptions, run


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluationOptions):
    """Evaluate a model on held-out scans, next to the trivial baselines: mean training volume and back-projection.

    On an archive of radiographs without CT, reprojections of the volumes are compared with the radiographs.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, a run (its best checkpoint), an exported model, or models:NAME (see `raylift models`)."""
    output: Path = Path("evaluation")
    """Folder for report.html, report.md, metrics.csv (a row for each scan and method), metrics.json and figures."""


def evaluate(arguments: list[str]) -> int:
    """Evaluate a checkpoint: table, JSON, figures, report."""
    from raylift.platform.evaluation.results import MODEL
    from raylift.platform.training import runs
    from raylift.platform.training.checkpoint import resolve_checkpoint

    options = tyro.cli(EvaluateOptions, prog="raylift evaluate", args=arguments)
    local_path(options.output)
    url = resolve_checkpoint(options.model)
    candidates: dict[str, Model | Path] = {MODEL: model_store.load(url)}
    command = shlex.join(["raylift", "evaluate", *arguments])
    return run(candidates, options, options.output, "evaluate", command, runs.load_history(url))


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint as safetensors with its description and a model card."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, a run (its best checkpoint), an exported model, or models:NAME (see `raylift models`)."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """A new or empty folder."""


def export(arguments: list[str]) -> int:
    """Export a checkpoint as safetensors, config and model card."""
    from raylift.platform import export as exporting
    from raylift.platform.training import runs
    from raylift.platform.training.checkpoint import resolve_checkpoint

    options = tyro.cli(ExportOptions, prog="raylift export", args=arguments)
    url = resolve_checkpoint(options.model)
    sha256 = exporting.export(model_store.load(url), options.folder, runs.load_metrics(url))
    print(f"{options.folder}: weights SHA-256 {sha256}")
    return 0
