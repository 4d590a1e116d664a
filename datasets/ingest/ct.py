"""Add CT scans to an archive; files that cannot be used are refused by name and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raylift.datasets.archive.archive import Sample
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.splits import Split, absent
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.pipeline import (
    IngestReport,
    Progress,
    Workers,
    add_samples,
    open_writer,
    shared_subjects,
    subject_of,
)
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.datasets.projector import render_drrs
from raylift.datasets.scans import reader, resample
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.datasets.sources import Source


def ingest_ct(
    sources: Sequence[Path],
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    limits: ScanLimits,
    source_license: str = "not stated",
    subject_pattern: str = "",
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    assigned: Mapping[str, Split] | None = None,
    require_whole_thorax: bool = False,
    assume_spacing_mm: Sequence[float] | None = None,
    keep_table: bool = False,
    beyond_field_of_view: resample.FieldOfView = "keep",
    segmenter: Segmenter = THRESHOLDS,
    samples_per_shard: int = 8,
    workers: Workers | None = None,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Add every CT under `sources` to the archive at `url`, skipping those whose bytes are already in it.

    An interrupted run can be repeated: published scans are skipped. The subject of a file is its name without suffix,
    or what the first group of `subject_pattern` matches in its name, or else in its path. The subject of a DICOM series
    is a pseudonym of its PatientID, or what `subject_pattern` matches in the path of its first file. `resample`
    describes the preprocessing.

    Args:
        sources: files and folders.
        url: folder or object store of a new or existing archive.
        grid: the archive's voxel grid.
        geometry: the archive's X-ray geometry and views.
        limits: largest scan accepted.
        source_license: license of the scans, stored with every sample.
        subject_pattern: regular expression with a group.
        split_fractions: of the train, validation and test split in a new archive; an existing one keeps its rule.
        assigned: splits of subjects assigned by hand; must equal those of an existing archive.
        require_whole_thorax: refuse scans without two whole lungs.
        assume_spacing_mm: spacing along the axes of NRRD and MetaImage files that state none.
        keep_table: keep the scanner table and everything else outside the body.
        beyond_field_of_view: whether air beyond a truncating field of view is kept, becomes tissue before projection,
            or is marked in the labels and left out of losses of supervised CNNs and GANs, metrics and figures.
        segmenter: finds the lungs of the labels.
        samples_per_shard: volumes in a shard; each full shard is published at once.
        workers: processes or tasks that read the scans; by default this process reads one after the other.
        progress: callback before each scan and at the end.

    Raises:
        ConfigError: a pattern that does not match, or a grid, geometry or assignment that differs from the archive's.
        StoreError: the object store did not respond after retries.
    """
    listing = reader.find(sources)
    scans = [replace(source, subject=subject_of(source, subject_pattern)) for source in listing.sources]
    subjects = {scan.subject for scan in scans}
    writer = open_writer(url, grid, geometry, subjects, split_fractions, assigned, samples_per_shard)
    outcome = IngestReport(
        refused=list(listing.refused), skipped=listing.skipped, absent_subjects=absent(assigned or {}, subjects)
    )
    if listing.split_series:
        first, second = listing.split_series[0]
        outcome.warnings.append(
            f"{len(listing.split_series)} SeriesInstanceUIDs belong to several patients or studies, such as that of "
            f"{first.where} and {second.where}: they were read as different scans. If they are one, correct "
            "PatientID and StudyInstanceUID"
        )
    if listing.shared_subjects and not subject_pattern:
        outcome.warnings.append(_shared(listing.shared_subjects))

    make = _MakeSample(
        grid,
        geometry,
        limits,
        source_license,
        require_whole_thorax,
        keep_table,
        assume_spacing_mm,
        beyond_field_of_view,
        segmenter,
    )
    add_samples(writer, scans, make, outcome, progress, workers=workers, subjects_are_named=bool(subject_pattern))
    requested = {"beyond_field_of_view": beyond_field_of_view, "table_removed": not keep_table}
    outcome.warnings.extend(_kept_options(outcome.present, requested))
    return outcome


@dataclass(frozen=True)
class _MakeSample:
    """Reads, resamples and projects a scan; its fields are arguments of `ingest_ct`."""

    grid: Grid
    geometry: Geometry
    limits: ScanLimits
    source_license: str
    require_whole_thorax: bool
    keep_table: bool
    assume_spacing_mm: Sequence[float] | None
    beyond_field_of_view: resample.FieldOfView
    segmenter: Segmenter

    def __call__(self, source: Source, sha256: str) -> tuple[Entry, Sample]:
        scan = reader.read(source, self.limits, self.assume_spacing_mm)
        if self.require_whole_thorax:
            resample.check_whole_thorax(scan)
        hu, record, labels = resample.resample(
            scan, self.grid, self.keep_table, self.beyond_field_of_view, self.segmenter
        )
        entry = Entry(
            id=source.subject,
            subject=source.subject,
            source=source.name,
            source_sha256=sha256,
            license=self.source_license,
            label_method="threshold" if self.segmenter == THRESHOLDS else "network",
            record=record if self.segmenter == THRESHOLDS else {**record, "segmenter": self.segmenter.name},
        )
        return entry, Sample(hu, render_drrs(hu, self.grid, self.geometry), labels)


def _kept_options(present: Sequence[Entry], requested: Mapping[str, str | bool]) -> list[str]:
    """The warning about scans that the archive has with other options than those requested."""
    earlier = {"beyond_field_of_view": "keep", "table_removed": True}
    differing = [
        entry.source
        for entry in present
        if any(entry.record.get(name, earlier[name]) != choice for name, choice in requested.items())
    ]
    if not differing:
        return []
    names = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
    return [
        f"already in the archive, with another --beyond-field-of-view or --keep-table, and unchanged: {names}. To "
        "apply the requested option, ingest into another archive"
    ]


def _shared(pairs: Sequence[tuple[Source, Source]]) -> str:
    """The warning about subjects that have scans in several folders or studies."""
    first, second = pairs[0]
    return shared_subjects(len(pairs), "several scans in different folders or studies", first.files[0], second.files[0])
