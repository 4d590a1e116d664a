"""`raylift compare`: models and volumes of other programs on the same scans."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import SplitChoice
from raylift.datasets.archive.store import local_path
from raylift.datasets.errors import ConfigError
from raylift.models.weights import DESCRIPTION_FILE, Model
from raylift.platform import model_store
from raylift.platform.evaluation.protocols import ProtocolName
from raylift.platform.progress import progress_bar


@dataclass(frozen=True)
class CompareOptions:
    """Compare models and volumes of other programs on the same held-out scans, beside the trivial baselines.

    A folder of NIfTI, NRRD or MetaImage files in HU is a candidate like a model. Its files have the names of the
    archive's scans, and the grid of the volumes that `raylift reconstruct` writes.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Checkpoints, runs (their best checkpoint), exported models, models:NAME, or folders of volumes."""
    archive: tuple[str, ...]
    """Folders or URLs of one or several archives; results are also given by archive."""
    split: SplitChoice = "test"
    """Split that is evaluated, or all."""
    include_training_scans: bool = False
    """Evaluate subjects that a model was trained on too; otherwise they are named and left out."""
    reference: str = ""
    """The predictor to which differences are given, such as `mean volume`, the default, or the name of a model."""
    resample: bool = False
    """Resample volumes of folders to the archive's grid (linear); otherwise another grid is an error."""
    protocols: tuple[ProtocolName, ...] = ()
    """How metrics are computed (see docs/explanation/protocols.md); by default all protocols that compare volumes or,
    without CT, `reprojection`."""
    output: Path = Path("comparison")
    """Folder for report.html, report.md, metrics.csv (a row for each scan and predictor), metrics.json and figures."""


def compare(arguments: list[str]) -> int:
    """Compare models and folders of volumes: tables, CSV, JSON, Markdown, report."""
    from raylift.platform.evaluation import compare as comparison
    from raylift.platform.evaluation import report

    options = tyro.cli(CompareOptions, prog="raylift compare", args=arguments)
    local_path(options.output)
    with progress_bar("compare") as bar:
        result = comparison.compare(
            _candidates(options.models),
            [Archive(url) for url in options.archive],
            split=options.split,
            include_training_scans=options.include_training_scans,
            protocols=options.protocols,
            reference=options.reference,
            resample=options.resample,
            command=shlex.join(["raylift", "compare", *arguments]),
            progress=bar.update,
        )
    page = report.write(result, options.output)
    report.print_summary(result, page)
    return 0


def _candidates(given: tuple[str, ...]) -> dict[str, Model | Path]:
    """Models and folders by the last part of their path, or by the whole if two have the same."""
    from raylift.platform.evaluation.score import holds_volumes
    from raylift.platform.training.checkpoint import INDEX_FILE, RUN_FILE, resolve_checkpoint

    if not given:
        raise ConfigError("there is nothing to compare: name models or folders of volumes")
    if len(set(given)) < len(given):
        raise ConfigError(f"{' '.join(given)}: a model or folder is named twice")
    short = [argument.rstrip("/").rsplit("/", 1)[-1] for argument in given]
    names = short if len(set(short)) == len(short) else given
    return {
        name: Path(argument)
        if holds_volumes(Path(argument), unless=(DESCRIPTION_FILE, INDEX_FILE, RUN_FILE))
        else model_store.load(resolve_checkpoint(argument))
        for name, argument in zip(names, given, strict=True)
    }
