"""`raylift ingest`, `raylift ingest-xray` and `raylift phantom`: add scans, radiographs or phantoms to an archive."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import Split, read_assignments
from raylift.datasets.archive.store import absolute
from raylift.datasets.csv_file import write_rows
from raylift.datasets.errors import ArchiveNotFoundError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.geometry_options import geometry_of, parse_views
from raylift.datasets.lung_segmenter import segmenter_of
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.orientation import PatientFacingOption
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.datasets.scans.resample import FieldOfView
from raylift.platform.ingest_workers import ingest_workers
from raylift.platform.progress import progress_bar

if TYPE_CHECKING:
    from raylift.datasets.ingest.pipeline import IngestReport


@dataclass(frozen=True)
class GridOptions:
    """The grid and geometry of a new archive; an archive that exists keeps its own."""

    size: int | None = None
    """Voxels along each side; 128 for a new archive."""
    spacing_mm: float | None = None
    """Voxel spacing; 2.5 for a new archive."""
    geometry: str | None = None
    """Beam, distances, detector and views: chest (source to isocenter 1650 mm, source to detector 1800 mm; the default
    of a new archive), x2ct, parallel, or a YAML file."""
    views: str | None = None
    """One to eight views instead of the geometry's own (ingest-xray: a frontal and a lateral one): frontal, lateral,
    NAME=AZIMUTHdeg or NAME=AZIMUTHdeg/ELEVATIONdeg, with commas between them, as in frontal,lateral,oblique30=30deg."""

    def resolve(self, url: str) -> tuple[Grid, Geometry]:
        """Grid and geometry: as given, else those of an existing archive, else the defaults."""
        try:
            existing = Archive(url).manifest
        except ArchiveNotFoundError:
            existing = None
        default = existing.grid if existing else Grid()
        grid = Grid(self.size or default.size, self.spacing_mm or default.spacing_mm)
        geometry = (
            geometry_of(self.geometry or "chest", grid) if self.geometry or existing is None else existing.geometry
        )
        return grid, geometry if self.views is None else replace(
            geometry, views=parse_views(self.views, geometry.views)
        )


@dataclass(frozen=True)
class SubjectOptions:
    """License, subjects and splits of the files."""

    license: str = "not stated"
    """License of the files, stored with every sample."""
    subject_pattern: str = ""
    """Regular expression whose first group matches the subject in a file's name, or else in its path."""
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Fractions of subjects in the train, validation and test split."""
    splits: str = ""
    """A published list, x2ct-lidc or luna16, or a CSV with the columns split and subject, patient or series_uid.
    PatientIDs and series UIDs in it are hashed like those of DICOM files."""

    def assigned(self) -> dict[str, Split] | None:
        """Splits by subject from the list, whose notes are printed, or None without one."""
        if not self.splits:
            return None
        assignments = read_assignments(self.splits)
        for note in assignments.notes:
            print(note)
        return assignments.splits


@dataclass(frozen=True)
class SourceOptions:
    """The options that both ingest commands have."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Files and folders."""
    archive: str
    """Folder or URL of the archive."""
    grid: Annotated[GridOptions, tyro.conf.arg(name="")] = field(default_factory=GridOptions)
    subjects: Annotated[SubjectOptions, tyro.conf.arg(name="")] = field(default_factory=SubjectOptions)
    samples_per_shard: int = 8
    """Samples in a shard; each full shard is published at once."""
    workers: int = 1
    """Processes that read files and make samples; on the cluster of RAY_ADDRESS Ray tasks, whose nodes must have the
    files at the same paths. The archive is the same for any number."""
    left_out: Path | None = None
    """CSV to write, with the columns file and reason: every file that was refused, and of radiographs every one that is
    in no pair."""


@dataclass(frozen=True)
class IngestOptions(SourceOptions):
    """Add CT scans (NIfTI, NRRD, MetaImage, DICOM series) to an archive, skipping those already in it."""

    limits: ScanLimits = field(default_factory=ScanLimits)
    require_whole_thorax: bool = False
    """Refuse scans without two whole lungs."""
    keep_table: bool = False
    """Keep the scanner table and everything else outside the body."""
    assume_spacing_mm: tuple[float, float, float] | None = None
    """Spacing along the axes of NRRD and MetaImage files that state none; the axes are assumed to point to the left,
    posterior and superior."""
    beyond_field_of_view: FieldOfView = "keep"
    """Beyond a field of view that truncates the body: keep the air of the file, extend the body by soft tissue, or
    mask it, so that losses of supervised CNNs and GANs, metrics and figures leave it out. Other systems do not, and
    their training starts with a line that states this."""
    segmenter: str = "thresholds"
    """What finds the lungs of the labels: thresholds, or lungmask:FILE, the package's network with weights from a
    file (docs/explanation/protocols.md)."""


def ingest(arguments: list[str]) -> int:
    """CT files and folders to an archive."""
    from raylift.datasets.ingest.ct import ingest_ct as run

    options = tyro.cli(IngestOptions, prog="raylift ingest", args=arguments)
    segmenter = segmenter_of(options.segmenter)
    grid, geometry = options.grid.resolve(options.archive)
    with progress_bar("ingest") as bar, ingest_workers(options.workers) as workers:
        outcome = run(
            options.sources,
            options.archive,
            grid,
            geometry,
            limits=options.limits,
            source_license=options.subjects.license,
            subject_pattern=options.subjects.subject_pattern,
            split_fractions=options.subjects.split_fractions,
            assigned=options.subjects.assigned(),
            require_whole_thorax=options.require_whole_thorax,
            keep_table=options.keep_table,
            assume_spacing_mm=options.assume_spacing_mm,
            beyond_field_of_view=options.beyond_field_of_view,
            segmenter=segmenter,
            samples_per_shard=options.samples_per_shard,
            workers=workers,
            progress=bar.update,
        )
    return _report(options, outcome)


@dataclass(frozen=True)
class IngestXrayOptions(SourceOptions):
    """Add pairs of a frontal and a lateral radiograph (PNG, JPEG, TIFF, BMP, DICOM) to an archive without CT.

    Without a table, DICOM files are paired by study and the view in their headers, others by the words frontal, pa or
    ap and lateral or lat in their names.
    """

    pairs: Path | None = None
    """CSV with columns subject, frontal, lateral and optionally patient_facing, or indiana_projections.csv, or
    mimic-cxr-2.0.0-metadata.csv."""
    skip_ambiguous: bool = False
    """Skip subjects with more than one radiograph of a view; otherwise the first of each is used."""
    patient_facing: PatientFacingOption = "auto"
    """Edge that the patients of the lateral radiographs face; auto detects it and refuses images that are unclear."""
    invert: Inversion = "auto"
    """Whether to invert the images; auto inverts those in which bone is dark."""
    strict: bool = False
    """Refuse radiographs with any warning of the checks of the input; otherwise only those that are no chest
    radiographs of their view."""
    verbose: bool = False
    """Print every file that is in no pair, with the reason."""
    limits: RadiographLimits = field(default_factory=RadiographLimits)
    samples_per_shard: int = 64
    """Pairs in a shard; each full shard is published at once."""


def ingest_xray(arguments: list[str]) -> int:
    """Pairs of radiographs to an archive."""
    from raylift.datasets.ingest.xray import ingest_radiographs

    options = tyro.cli(IngestXrayOptions, prog="raylift ingest-xray", args=arguments)
    grid, geometry = options.grid.resolve(options.archive)
    with progress_bar("ingest-xray") as bar, ingest_workers(options.workers) as workers:
        outcome = ingest_radiographs(
            options.sources,
            options.archive,
            grid,
            geometry,
            pairs=options.pairs,
            skip_ambiguous=options.skip_ambiguous,
            patient_facing=options.patient_facing,
            invert=options.invert,
            strict=options.strict,
            limits=options.limits,
            source_license=options.subjects.license,
            subject_pattern=options.subjects.subject_pattern,
            split_fractions=options.subjects.split_fractions,
            assigned=options.subjects.assigned(),
            samples_per_shard=options.samples_per_shard,
            workers=workers,
            progress=bar.update,
        )
    if options.verbose:
        for path, reason in outcome.left_out:
            print(f"left out: {path}: {reason}")
    return _report(options, outcome)


def _report(options: SourceOptions, outcome: IngestReport) -> int:
    """Print what was refused, changed or may be wrong, and a summary, and write the CSV; returns the exit status."""
    if options.left_out:
        # A refusal begins with its file.
        refused = [str(refusal).partition(": ")[::2] for refusal in outcome.refused]
        write_rows(options.left_out, ("file", "reason"), [*outcome.left_out, *refused])
    for line in outcome.lines():
        print(line)
    print(f"{absolute(options.archive)}: {outcome.summary()}")
    return 0 if outcome.added or outcome.already_present else 1


@dataclass(frozen=True)
class PhantomOptions:
    """Add synthetic thorax phantoms to an archive; the same seed gives the same phantoms."""

    archive: str
    """Folder or URL of the archive."""
    count: int = 32
    """Volumes."""
    seed: int = 0
    """Seed of the set of phantoms."""
    grid: Annotated[GridOptions, tyro.conf.arg(name="")] = field(default_factory=GridOptions)
    pneumothorax_fraction: float = 0.0
    """Fraction of phantoms with pneumothorax: air in one pleural cavity, up to 80 % of it, with a label of its own."""
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Fractions of phantoms in the train, validation and test split."""
    samples_per_shard: int = 8
    """Volumes in a shard."""
    workers: int = 1
    """Processes that make phantoms, or Ray tasks on the cluster of RAY_ADDRESS."""


def phantom(arguments: list[str]) -> int:
    """Synthetic thorax volumes to an archive."""
    from raylift.datasets.ingest.synthetic import ingest_phantoms

    options = tyro.cli(PhantomOptions, prog="raylift phantom", args=arguments)
    grid, geometry = options.grid.resolve(options.archive)
    with progress_bar("phantom") as bar, ingest_workers(options.workers) as workers:
        outcome = ingest_phantoms(
            options.archive,
            grid,
            geometry,
            count=options.count,
            seed=options.seed,
            pneumothorax_fraction=options.pneumothorax_fraction,
            split_fractions=options.split_fractions,
            samples_per_shard=options.samples_per_shard,
            workers=workers,
            progress=bar.update,
        )
    print(f"{absolute(options.archive)}: {outcome.summary()}")
    return 0
