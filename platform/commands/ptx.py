"""`raylift ptx`: pneumothorax of CT volumes."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from raylift import __version__
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.platform.progress import progress_bar


@dataclass(frozen=True)
class PtxOptions:
    """Segment lungs and pneumothorax in acquired CT or reconstructed volumes (NIfTI, NRRD, MetaImage, DICOM).

    The segmentation uses thresholds and shape; no weights are needed. A network can find lungs that thresholds miss.
    """

    volumes: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="VOLUME [VOLUME ...]")]
    """Files, or folders of them."""
    ground_truth: Path | None = None
    """Folder with the CT of the same names, for the agreement of reconstructions with it, which then need not be
    plausible as a CT."""
    output: Path = Path("ptx")
    """Folder for ptx.csv, a mask (NAME-mask.nii.gz) and a figure (NAME-regions.png) of each volume, and agreement.json
    and agreement.png."""
    assume_spacing_mm: tuple[float, float, float] | None = None
    """Spacing along the axes of NRRD and MetaImage files that state none."""
    segmenter: str = "thresholds"
    """What finds the lungs: thresholds alone, or lungmask:FILE, whose lungs are added to those of thresholds
    (docs/explanation/protocols.md)."""
    limits: ScanLimits = field(default_factory=ScanLimits)


def ptx(arguments: list[str]) -> int:
    """Segment pneumothorax: masks, CSV, figures."""
    import SimpleITK as sitk

    from raylift.datasets.csv_file import write_rows
    from raylift.datasets.ingest.pipeline import IngestReport
    from raylift.datasets.lung_segmenter import segmenter_of
    from raylift.datasets.scans.reader import Scan
    from raylift.platform.evaluation import ptx as segmenting
    from raylift.platform.evaluation.agreement import agreement
    from raylift.platform.evaluation.plots_ptx import UNITS, plot_agreement, plot_regions

    options = tyro.cli(PtxOptions, prog="raylift ptx", args=arguments)
    segmenter = segmenter_of(options.segmenter)
    volumes = segmenting.matched(options.volumes, options.ground_truth)
    options.output.mkdir(parents=True, exist_ok=True)
    results = [f"{name}-{kind}" for name in volumes.sources for kind in ("mask.nii.gz", "regions.png")]
    for name in ("ptx.csv", "agreement.json", "agreement.png", *results):
        (options.output / name).unlink(missing_ok=True)

    def write(name: str, scan: Scan, segmented: segmenting.Segmented) -> None:
        mask = options.output / f"{name}-mask.nii.gz"
        mask.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(segmented.mask(scan.image), str(mask))
        plot_regions(name, segmented, options.output / f"{name}-regions.png")

    with progress_bar("ptx") as bar:
        measured = segmenting.measure(
            volumes,
            write,
            limits=options.limits,
            assume_spacing_mm=options.assume_spacing_mm,
            segmenter=segmenter,
            progress=bar.update,
        )
    for line in IngestReport(refused=measured.refused).lines():
        print(line)
    if not measured.found:
        return 1
    write_rows(options.output / "ptx.csv", segmenting.COLUMNS, measured.rows())
    for name, sides in measured.found.items():
        for side, of_side in sides.items():
            print(
                f"{name}, {side}: pneumothorax {of_side.pneumothorax_ml:.0f} ml, "
                f"{of_side.occupancy_percent:.1f} % of the pleural cavity"
            )
    if measured.ground_truth:
        pairs = measured.pairs()
        agreements = {name: agreement(*pair) for name, pair in pairs.items()}
        for name, agreed in agreements.items():
            print(f"agreement of {name} in {UNITS[name]}, {agreed.count} volumes: {agreed.text()}")
        content = {
            **{name: agreed.to_json() for name, agreed in agreements.items()},
            "segmenter": segmenter.name,
            "command": shlex.join(["raylift", "ptx", *arguments]),
            "version": __version__,
        }
        (options.output / "agreement.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        plot_agreement(pairs, options.output / "agreement.png")
    print(f"{len(measured.found)} volumes by {segmenter.name}: {options.output / 'ptx.csv'}")
    return 0
