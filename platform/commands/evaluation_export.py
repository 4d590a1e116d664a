"""`raylift evaluate` and `raylift export`: the report of a checkpoint, and its export as a model."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import SplitChoice
from raylift.datasets.archive.store import local_path
from raylift.models.generative import SamplingFlags
from raylift.platform import model_store
from raylift.platform.evaluation.protocols import ProtocolName
from raylift.platform.progress import progress_bar


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a checkpoint on held-out scans, beside the mean of its training volumes and plain back-projection.

    On an archive of radiographs without CT, reprojections of the volumes are compared with the radiographs.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, a run (its best checkpoint), an exported model, or models:NAME (see `raylift models`)."""
    archive: tuple[str, ...]
    """Folders or URLs of one or several archives; results are also given by archive."""
    split: SplitChoice = "test"
    """Split that is evaluated, or all."""
    include_training_scans: bool = False
    """Evaluate subjects that the model was trained on too; otherwise they are named and left out."""
    protocols: tuple[ProtocolName, ...] = ()
    """How metrics are computed (see docs/explanation/protocols.md); by default all protocols that compare volumes or,
    without CT, `reprojection`."""
    output: Path = Path("evaluation")
    """Folder for report.html, metrics.json and figures."""
    consistency_steps: int = 0
    """Steps of a consistency fit to the radiographs, after which volumes are evaluated a second time; 10 are enough."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Number of samples of a generative model, whose mean is evaluated; seeds are consecutive."""


def evaluate(arguments: list[str]) -> int:
    """Evaluate a checkpoint: table, JSON, figures, report."""
    from raylift.platform.evaluation import evaluate as evaluation
    from raylift.platform.evaluation import report
    from raylift.platform.training import runs
    from raylift.platform.training.checkpoint import resolve_checkpoint

    options = tyro.cli(EvaluateOptions, prog="raylift evaluate", args=arguments)
    local_path(options.output)
    url = resolve_checkpoint(options.model)
    model = model_store.load(url)
    with progress_bar("evaluate") as bar:
        result = evaluation.evaluate(
            model,
            *map(Archive, options.archive),
            split=options.split,
            include_training_scans=options.include_training_scans,
            protocols=options.protocols,
            command=shlex.join(["raylift", "evaluate", *arguments]),
            consistency_steps=options.consistency_steps,
            sampling=options.sampling,
            samples=options.samples,
            progress=bar.update,
        )
    page = report.write(result, options.output, runs.load_history(url))
    report.print_summary(result, page)
    return 0


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
