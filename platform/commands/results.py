"""`raylift evaluate` and `raylift export`: a checkpoint to a report, or to a folder that others load."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import Split
from raylift.models.generative import SamplingFlags
from raylift.platform import model_store
from raylift.platform.progress import console, meter


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a checkpoint on held-out scans, beside the mean training volume and plain back-projection.

    On an archive of radiographs without CT, projections of the volumes are compared with the radiographs.
    """

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, a run (its best checkpoint) or an exported model."""
    archive: str
    """Folder or URL of the archive."""
    split: Split = "test"
    protocols: tuple[Literal["volume", "x2ct", "cvaa", "reprojection"], ...] = ()
    """How figures are computed (see raylift.models.metrics); otherwise all that compare volumes or, where the archive
    holds no CT, the re-projection."""
    output: Path = Path("evaluation")
    """Folder for report.html, metrics.json and figures."""
    consistency_steps: int = 0
    """Measure the model a second time, after so many steps that fit its volumes to the radiographs; 10 will do."""
    draw: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Measure the mean of so many draws of a drawing model, with seeds from the first one on."""


def evaluate(arguments: list[str]) -> int:
    """Measure a checkpoint: table, JSON, figures, report."""
    from raylift.platform.evaluation import evaluate as evaluation
    from raylift.platform.evaluation import report
    from raylift.platform.training import runs
    from raylift.platform.training.checkpoint import checkpoint_of

    options = tyro.cli(EvaluateOptions, prog="raylift evaluate", args=arguments)
    url = checkpoint_of(options.checkpoint)
    model = model_store.load(url)
    with meter("evaluate") as shown:
        result = evaluation.evaluate(
            model,
            Archive(options.archive),
            split=options.split,
            protocols=options.protocols,
            command=shlex.join(["raylift", "evaluate", *arguments]),
            consistency_steps=options.consistency_steps,
            draw=options.draw,
            samples=options.samples,
            progress=shown.at,
        )
    page = report.write(
        result, options.output, model.description.grid, model.description.geometry, runs.history_of(url)
    )
    for table in report.terminal_tables(result):
        console.print(table)
    print(result.verdict())
    print(f"report: {page}")
    return 0


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint as safetensors with its description and a model card."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, or a run (its best checkpoint)."""
    folder: tyro.conf.Positional[Path]
    """A new or empty folder."""


def export(arguments: list[str]) -> int:
    """A checkpoint as safetensors, config and model card."""
    from raylift.platform import export as exporting
    from raylift.platform.training import runs
    from raylift.platform.training.checkpoint import checkpoint_of

    options = tyro.cli(ExportOptions, prog="raylift export", args=arguments)
    url = checkpoint_of(options.checkpoint)
    sha256 = exporting.export(model_store.load(url), options.folder, runs.metrics_of(url))
    print(f"{options.folder}: weights SHA-256 {sha256}")
    return 0
