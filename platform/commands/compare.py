"""`raylift compare`: models and volumes of other programs on the same scans."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import SplitChoice
from raylift.datasets.archive.store import local_path
from raylift.datasets.errors import ConfigError
from raylift.datasets.lung_segmenter import segmenter_of
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.models.weights import DESCRIPTION_FILE, Model
from raylift.platform import model_store
from raylift.platform.evaluation.protocols import ProtocolName
from raylift.platform.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What `raylift evaluate` and `raylift compare` share."""

    archive: tuple[str, ...]
    """Folders or URLs of one or several archives; results are also given by archive."""
    split: SplitChoice = "test"
    """Split that is evaluated, or all."""
    include_training_scans: bool = False
    """Evaluate subjects that a model was trained on too; otherwise they are named and left out."""
    protocols: tuple[ProtocolName, ...] = ()
    """How metrics are computed (see docs/explanation/protocols.md); by default all protocols that compare volumes or,
    without CT, `reprojection`."""
    consistency_steps: int = 0
    """Steps of the data-consistency fit, after which models' volumes are evaluated a second time; 10 are usually
    enough."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    samples: int = 1
    """Number of samples of a diffusion model, whose mean is evaluated; seeds are consecutive."""
    robustness: bool = False
    """Evaluate models under errors of the radiographs too (pose, distances, centering, noise, scatter, tone,
    collimation, flip, missing lateral), which are projected again from the CT; takes about 25 times as long."""
    ptx: bool = False
    """Measure the pneumothorax in every volume and in the CT too (PTX-Seg): volume, occupancy of the pleural cavity,
    and their agreement. Voxels must be 5 mm or less."""
    segmenter: str = "thresholds"
    """What finds the lungs of protocol `segmentation` and of --ptx: thresholds, or lungmask:FILE, the package's network
    with weights from a file (docs/explanation/protocols.md)."""
    workers: int = 1
    """1 evaluates scan by scan in this process. More are Ray actors, each with all models and as many PyTorch threads
    as this process has (OMP_NUM_THREADS), on this machine or the cluster of RAY_ADDRESS."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(EvaluationOptions):
    """Compare models and volumes of other programs on the same held-out scans, together with the trivial baselines.

    A folder of NIfTI, NRRD or MetaImage files in HU is compared as a model is. Its files have the names of the
    archive's scans, and the grid of the volumes that `raylift reconstruct` writes.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Checkpoints, runs (their best checkpoint), exported models, models:NAME, or folders of volumes."""
    reference: str = ""
    """The method to which differences are given, by its name in the tables; by default the mean volume."""
    resample: bool = False
    """Resample volumes of folders to the archive's grid (linear); otherwise another grid is an error."""
    output: Path = Path("comparison")
    """Folder for report.html, report.md, metrics.csv (a row for each scan and method), metrics.json, figures and, with
    --robustness, robustness.csv."""


def compare(arguments: list[str]) -> int:
    """Compare models and folders of volumes: tables, CSV, JSON, Markdown, report."""
    options = tyro.cli(CompareOptions, prog="raylift compare", args=arguments)
    local_path(options.output)
    command = shlex.join(["raylift", "compare", *arguments])
    candidates = _candidates(options.models)
    return run(
        candidates, options, options.output, "compare", command, reference=options.reference, resample=options.resample
    )


def run(
    candidates: Mapping[str, Model | Path],
    options: EvaluationOptions,
    output: Path,
    title: str,
    command: str,
    history: list[dict[str, float]] | None = None,
    reference: str = "",
    resample: bool = False,
) -> int:
    """Compare candidates, write the report and print its summary.

    The scans that are finished are kept in the output folder until the report is written, so that the same command
    continues after an interruption.
    """
    from raylift.platform.evaluation import compare as comparison
    from raylift.platform.evaluation import report
    from raylift.platform.evaluation.case_cache import CaseCache

    cache = CaseCache(output / "finished-scans")
    with progress_bar(title) as bar:
        result = comparison.compare(
            candidates,
            [Archive(url) for url in options.archive],
            split=options.split,
            include_training_scans=options.include_training_scans,
            protocols=options.protocols,
            command=command,
            consistency_steps=options.consistency_steps,
            sampling=options.sampling,
            samples=options.samples,
            robustness=options.robustness,
            ptx=options.ptx,
            segmenter=segmenter_of(options.segmenter),
            workers=options.workers,
            cache=cache,
            progress=bar.update,
            reference=reference,
            resample=resample,
        )
    if cache.loaded:
        print(f"{cache.loaded} of {len(result.cases)} scans were finished by a run that was interrupted")
    page = report.write(result, output, history)
    cache.remove()
    report.print_summary(result, page)
    return 0


def _candidates(given: tuple[str, ...]) -> dict[str, Model | Path]:
    """Models and folders by the end of their path, with as many parts as distinguish them."""
    from raylift.platform.evaluation.score import holds_volumes
    from raylift.platform.training.checkpoint import INDEX_FILE, RUN_FILE, resolve_checkpoint

    if not given:
        raise ConfigError("there is nothing to compare: name models or folders of volumes")
    if len(set(given)) < len(given):
        raise ConfigError(f"{' '.join(given)}: a model or folder is named twice")
    parts = [argument.rstrip("/").split("/") for argument in given]
    ends = (["/".join(one[-count:]) for one in parts] for count in range(1, max(map(len, parts)) + 1))
    names = next((one for one in ends if len(set(one)) == len(one)), list(given))
    return {
        name: Path(argument)
        if holds_volumes(Path(argument), unless=(DESCRIPTION_FILE, INDEX_FILE, RUN_FILE))
        else model_store.load(resolve_checkpoint(argument))
        for name, argument in zip(names, given, strict=True)
    }
