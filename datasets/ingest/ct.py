"""CT files, or phantoms, into an archive: what can be used is, what cannot is refused by name and counted."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int16

from raylift.datasets import segmentation
from raylift.datasets.archive.archive import (
    ArchiveWriter,
    Contents,
    Entry,
    Manifest,
    RadiographSample,
    Sample,
    latest_manifest,
)
from raylift.datasets.archive.splits import Split, SplitRule, balanced_split_rule
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError, NoArchive, RefusedFile
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import hu_to_attenuation
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project
from raylift.datasets.scans import reader, resample
from raylift.datasets.sources import Source

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is in all, and the name of what comes next."""


@dataclass
class IngestReport:
    """What an ingest did."""

    added: list[Entry] = field(default_factory=list)
    already_present: int = 0
    refused: list[RefusedFile] = field(default_factory=list)
    skipped: int = 0
    """Files in searched folders that are neither volumes nor DICOM."""
    absent_subjects: int = 0
    """Subjects whose split was given by hand and of whom nothing was found: misspelt, or elsewhere."""
    single_view: int = 0
    """Persons or studies with a frontal or a lateral radiograph only."""
    ambiguous: int = 0
    """Those with several radiographs of a view, where exact pairs were asked for."""
    missing_files: list[str] = field(default_factory=list)
    """Files that a table of pairs names and that are not there."""

    def summary(self) -> str:
        """One line for a person."""
        splits = Counter(entry.split for entry in self.added)
        parts = [f"{len(self.added)} added ({', '.join(f'{n} {split}' for split, n in sorted(splits.items()))})"]
        parts[0] = parts[0].replace(" ()", "")
        parts.append(f"{self.already_present} already there")
        parts.append(f"{len(self.refused)} refused")
        if self.skipped:
            parts.append(f"{self.skipped} other files passed over")
        if self.absent_subjects:
            parts.append(f"{self.absent_subjects} subjects with a given split not found")
        if self.single_view:
            parts.append(f"{self.single_view} with one of the two views only")
        if self.ambiguous:
            parts.append(f"{self.ambiguous} with several of a view left out")
        if self.missing_files:
            shown = ", ".join(self.missing_files[:3]) + (" ..." if len(self.missing_files) > 3 else "")
            parts.append(f"{len(self.missing_files)} listed files missing ({shown})")
        return ", ".join(parts)


def ingest_ct(
    sources: Sequence[Path],
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    limits: reader.ScanLimits,
    source_license: str = "not stated",
    subject_pattern: str = "",
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    assigned: Mapping[str, Split] | None = None,
    require_whole_thorax: bool = False,
    keep_table: bool = False,
    samples_per_shard: int = 8,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Bring every CT under `sources` into the archive at `url`, skipping those whose bytes are already in it.

    A run that was cut goes on: what it published is skipped. A file's subject is its name without suffix, or what the
    first group of `subject_pattern` matches in its name, or else in its path; a DICOM series' is a pseudonym of its
    patient number. See `resample` for what happens to a volume.

    Args:
        sources: files and folders.
        url: a folder or an object store; an archive that exists is added to.
        grid: the archive's voxels.
        geometry: the archive's views.
        limits: what is refused for its size.
        source_license: of the scans, kept with every sample.
        subject_pattern: a regular expression with a group.
        shares: of subjects that train, validate and test, in a new archive; one that exists keeps its rule.
        assigned: splits given by hand; an archive that exists takes no others than it was made with.
        require_whole_thorax: refuse scans without two whole lungs.
        keep_table: keep what lies around the body.
        samples_per_shard: volumes a shard; each full shard is published at once.
        progress: called before each scan and at the end.

    Raises:
        ConfigError: a pattern that fits no name, or a grid, geometry or assignment that is not the archive's.
        StoreUnreachable: the object store did not answer, after retries.
    """
    found = reader.find(sources)
    scans = [replace(source, subject=subject_of(source, subject_pattern)) for source in found.sources]
    subjects = {scan.subject for scan in scans}
    writer = open_writer(url, grid, geometry, subjects, shares, assigned, samples_per_shard)
    absent = len(set(assigned or {}) - subjects)
    outcome = IngestReport(refused=list(found.refused), skipped=found.skipped, absent_subjects=absent)

    def make(source: Source, sha256: str) -> tuple[Entry, Sample]:
        scan = reader.read(source, limits)
        if require_whole_thorax:
            resample.check_whole_thorax(scan)
        hu, record = resample.resample(scan, grid, keep_table)
        entry = Entry(
            id=source.subject,
            subject=source.subject,
            source=source.name,
            source_sha256=sha256,
            license=source_license,
            label_method="threshold",
            record=record,
        )
        return entry, Sample(hu, radiographs(hu, grid, geometry), segmentation.labels(hu, grid.spacing_mm))

    add_samples(writer, scans, make, outcome, progress)
    return outcome


Made = TypeVar("Made", bound=Source)


def add_samples(
    writer: ArchiveWriter,
    sources: Sequence[Made],
    make: Callable[[Made, str], tuple[Entry, Sample | RadiographSample]],
    outcome: IngestReport,
    progress: Progress,
) -> None:
    """Make a sample of every source that the archive lacks, given it and its digest; what is refused is counted."""
    with writer:
        for done, source in enumerate(sources):
            progress(done, len(sources), source.name)
            try:
                sha256 = source.digest()
                if writer.contains(sha256):
                    outcome.already_present += 1
                    continue
                entry, sample = make(source, sha256)
            except RefusedFile as error:
                outcome.refused.append(error)
            except (OSError, RuntimeError) as error:
                # A file that vanished or a disk that fails; what ITK gives up on.
                outcome.refused.append(RefusedFile(f"{source.where}: cannot be read: {error}"))
            else:
                writer.add(entry, sample)
        progress(len(sources), len(sources), "")
    outcome.added = writer.published
    outcome.already_present += writer.superseded


def ingest_phantoms(
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    count: int,
    seed: int,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    samples_per_shard: int = 8,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Bring `count` synthetic thoraces into the archive at `url`, skipping those already in it; see `ingest_ct`.

    Each person is drawn from `seed` and a number from 0, so a larger count adds to a smaller one.
    """
    if count < 1 or seed < 0:
        raise ConfigError(f"{count} phantoms from seed {seed}: draw one or more, from a seed of 0 or more")
    subjects = {f"phantom-{seed}-{number:04d}": number for number in range(count)}
    writer = open_writer(url, grid, geometry, set(subjects), shares, None, samples_per_shard)
    outcome = IngestReport()
    with writer:
        for done, (subject, number) in enumerate(subjects.items()):
            progress(done, count, subject)
            # A phantom's source is its name and grid: there is no file to digest.
            sha256 = hashlib.sha256(f"{subject} on {grid}".encode()).hexdigest()
            if writer.contains(sha256):
                outcome.already_present += 1
                continue
            drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            hu, labels = thorax(drawn, grid)
            entry = Entry(
                id=subject,
                subject=subject,
                source=f"phantom seed {drawn}",
                source_sha256=sha256,
                license="CC0-1.0",
                label_method="phantom",
                record={"phantom_seed": drawn},
            )
            writer.add(entry, Sample(hu, radiographs(hu, grid, geometry), labels))
        progress(count, count, "")
    outcome.added = writer.published
    outcome.already_present += writer.superseded
    return outcome


def radiographs(
    hu: Int16[np.ndarray, "d h w"], grid: Grid, geometry: Geometry
) -> Float32[np.ndarray, "views rows columns"]:
    """The line integrals of a volume in every view of the geometry."""
    density = hu_to_attenuation(torch.from_numpy(hu.astype(np.float32)))[None, None]
    images = [project(density, grid.spacing_mm, geometry, view)[0, 0] for view in geometry.views]
    return torch.stack(images).numpy()


def subject_of(source: Source, pattern: str) -> str:
    """Who a source is of: what the first group of the pattern matches in its name or path, or its own subject.

    Raises:
        ConfigError: the pattern is none, or matches nothing.
    """
    if not pattern or source.is_dicom:
        return source.subject
    try:
        # By name, or else by folder: in many collections every file has the same name.
        match = re.search(pattern, source.subject) or re.search(pattern, source.files[0].as_posix())
    except re.error as error:
        raise ConfigError(f"subject pattern '{pattern}' is not a regular expression: {error}") from error
    if match is None or not match.groups() or not match[1]:
        raise ConfigError(f"subject pattern '{pattern}' has no group that matches '{source.subject}' or its folder")
    subject: str = match[1]
    return subject


def open_writer(
    url: str,
    grid: Grid,
    geometry: Geometry,
    subjects: set[str],
    shares: tuple[float, float, float],
    assigned: Mapping[str, Split] | None,
    samples_per_shard: int,
    contents: Contents = "volumes",
) -> ArchiveWriter:
    """A writer whose split rule is the archive's own, or for a new archive suits these subjects.

    Raises:
        ConfigError: what is asked for is not what the archive is.
    """
    manifest = _manifest(url)
    rule: SplitRule | None = balanced_split_rule(subjects, shares, assigned or {}) if manifest is None else None
    if manifest is not None and assigned and dict(manifest.split_rule.assigned) != dict(assigned):
        raise ConfigError(f"{url} was split by another assignment, which cannot change once it is published")
    return ArchiveWriter(url, grid, geometry, split_rule=rule, samples_per_shard=samples_per_shard, contents=contents)


def _manifest(url: str) -> Manifest | None:
    try:
        return latest_manifest(Folder(url))
    except NoArchive:
        return None
