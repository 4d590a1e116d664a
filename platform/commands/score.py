"""`raylift score`: metrics of volumes of any program against their ground truth."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from raylift import __version__
from raylift.datasets.lung_segmenter import segmenter_of
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.platform.evaluation.protocols import VolumeProtocolName
from raylift.platform.progress import console, progress_bar


@dataclass(frozen=True)
class ScoreOptions:
    """Compare volumes of any program (NIfTI, NRRD, MetaImage, in HU) with their ground truth.

    Files are matched by their path inside the two folders without suffix, or by a CSV. No model and no archive is
    needed.
    """

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """Folder of the volumes."""
    ground_truth: Path
    """Folder of the ground truth."""
    pairs: Path | None = None
    """CSV with the columns prediction and ground_truth, paths inside the two folders."""
    resample: bool = False
    """Resample volumes to the grid of their ground truth (linear); otherwise another grid is an error."""
    protocols: tuple[VolumeProtocolName, ...] = ()
    """How metrics are computed (see docs/explanation/protocols.md); by default all protocols that compare volumes."""
    output: Path = Path("score")
    """Folder for scores.csv, a row for each volume, and scores.json."""
    assume_spacing_mm: tuple[float, float, float] | None = None
    """Spacing along the axes of NRRD and MetaImage files that state none."""
    segmenter: str = "thresholds"
    """What finds the lungs of protocol `segmentation`: thresholds, or lungmask:FILE, the package's network with weights
    from a file (docs/explanation/protocols.md)."""
    limits: ScanLimits = field(default_factory=ScanLimits)


def score(arguments: list[str]) -> int:
    """Compare volumes with their ground truth: table, CSV, JSON."""
    from raylift.platform.evaluation import score as scoring

    options = tyro.cli(ScoreOptions, prog="raylift score", args=arguments)
    segmenter = segmenter_of(options.segmenter)
    missing: list[str] = []
    if options.pairs:
        pairs = scoring.pairs_by_table(options.pairs, options.predictions, options.ground_truth)
    else:
        pairs, missing = scoring.pairs_by_name(options.predictions, options.ground_truth)
    with progress_bar("score") as bar:
        result = scoring.score(
            pairs,
            missing=missing,
            protocols=options.protocols,
            resample=options.resample,
            limits=options.limits,
            assume_spacing_mm=options.assume_spacing_mm,
            segmenter=segmenter,
            progress=bar.update,
        )
    options.output.mkdir(parents=True, exist_ok=True)
    result.table.write_csv(options.output / "scores.csv")
    content = {
        **result.table.to_json(),
        "missing": result.missing,
        "notes": result.notes,
        "segmenter": segmenter.name,
        "command": shlex.join(["raylift", "score", *arguments]),
        "version": __version__,
    }
    (options.output / "scores.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    for section in result.table.sections():
        console.print(section.terminal())
    for name, notes in result.notes.items():
        for note in notes:
            print(f"{name}: {note}")
    if result.missing:
        shown = ", ".join(result.missing[:5]) + (" ..." if len(result.missing) > 5 else "")
        print(f"warning: {len(result.missing)} ground-truth volumes have no prediction and are in no metric: {shown}")
    print(f"{len(pairs)} volumes: {options.output / 'scores.csv'}, {options.output / 'scores.json'}")
    return 0
