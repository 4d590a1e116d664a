"""Shared by all ingests: the loop over sources, its report, subjects, and the writer with its split rule."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from raylift.datasets.archive.archive import RadiographSample, Sample
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.manifest import Contents, Manifest, latest_manifest
from raylift.datasets.archive.splits import Split, balanced_split_rule
from raylift.datasets.archive.store import Folder
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import ArchiveNotFoundError, ConfigError, FileError, SegmentationMaskError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.radiographs.pairing import LeftOut
from raylift.datasets.sources import Source

Progress = Callable[[int, int, str], None]
"""Called with the number of finished sources, their total, and the name of the next one."""


@dataclass(frozen=True)
class Workers:
    """Processes or tasks that make samples."""

    count: int
    submit: Callable[..., Future[Any]]
    """Called with a function and its arguments; the future has the result."""


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: Workers | None
) -> Iterator[Result]:
    """The results in the order of the items. At most two for each worker are unfinished or not yet taken."""
    if workers is None:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    for item in items:
        if len(pending) == 2 * workers.count:
            yield pending.popleft().result()
        pending.append(workers.submit(function, item))
    while pending:
        yield pending.popleft().result()


@dataclass
class IngestReport:
    """Counts and errors of an ingest."""

    added: list[Entry] = field(default_factory=list)
    already_present: int = 0
    present: list[Entry] = field(default_factory=list)
    """Entries that the archive had from these sources before."""
    refused: list[FileError] = field(default_factory=list)
    skipped: int = 0
    """Files in searched folders that are not of a supported format."""
    absent_subjects: int = 0
    """Subjects assigned to a split by hand without any source: misspelled, or in another folder."""
    single_view: int = 0
    """Subjects or studies with only one of the two views."""
    ambiguous: int = 0
    """Subjects or studies skipped for several radiographs of a view, where ambiguous ones are skipped."""
    missing_files: list[str] = field(default_factory=list)
    """Files in a table of pairs that do not exist."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Radiographs and other files that are in no pair, with the reason."""
    warnings: list[str] = field(default_factory=list)
    """What may be wrong with subjects or files that were added."""

    def lines(self) -> list[str]:
        """Refusals, changes and warnings, each in a line; masks and equal changes are counted in one line."""
        masks = [error for error in self.refused if isinstance(error, SegmentationMaskError)]
        lines = [f"refused: {error}" for error in self.refused if not isinstance(error, SegmentationMaskError)]
        if masks:
            lines.append(f"refused: {masks[0]}" + (f"; and {len(masks) - 1} more masks" if len(masks) > 1 else ""))
        changed: dict[str, list[str]] = {}
        for entry in self.added:
            for change in entry.record.get("changes", ()):
                changed.setdefault(change, []).append(entry.source)
        for change, names in changed.items():
            lines.append(f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {change}")
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def summary(self) -> str:
        """The report in one line."""
        splits = Counter(entry.split for entry in self.added)
        parts = [f"{len(self.added)} added ({', '.join(f'{n} {split}' for split, n in sorted(splits.items()))})"]
        parts[0] = parts[0].replace(" ()", "")
        parts.append(f"{self.already_present} already present")
        parts.append(f"{len(self.refused)} refused")
        if self.skipped and not self.left_out:
            parts.append(f"{self.skipped} other files skipped")
        if self.absent_subjects:
            parts.append(f"{self.absent_subjects} assigned subjects not found")
        if self.single_view:
            parts.append(f"{self.single_view} with only one of the two views")
        if self.left_out:
            parts.append(f"{len(self.left_out)} files in no pair (--verbose lists them)")
        if self.ambiguous:
            parts.append(f"{self.ambiguous} skipped for several images of a view")
        if self.missing_files:
            shown = ", ".join(self.missing_files[:3]) + (" ..." if len(self.missing_files) > 3 else "")
            parts.append(f"{len(self.missing_files)} listed files missing ({shown})")
        return ", ".join(parts)


SourceType = TypeVar("SourceType", bound=Source)
NewSample = tuple[Entry, Sample | RadiographSample]


def _digest(source: SourceType) -> tuple[SourceType, str | FileError]:
    try:
        return source, source.digest()
    except OSError as error:
        return source, _unreadable(source, error)


@dataclass(frozen=True)
class _MakeOrRefuse(Generic[SourceType]):
    """Makes the sample of a source from its digest, in this process or in a worker, or returns why it is refused."""

    make: Callable[[SourceType, str], NewSample]

    def __call__(self, item: tuple[SourceType, str | FileError]) -> NewSample | FileError:
        source, digest = item
        if isinstance(digest, FileError):
            return digest
        try:
            return self.make(source, digest)
        except FileError as error:
            return error
        except (OSError, RuntimeError) as error:
            return _unreadable(source, error)


def _unreadable(source: Source, error: OSError | RuntimeError) -> FileError:
    """The refusal for a file that was removed, a disk error, or an error of ITK."""
    return error if isinstance(error, FileError) else FileError(f"{source.where}: cannot be read: {error}")


def add_samples(
    writer: ArchiveWriter,
    sources: Sequence[SourceType],
    make: Callable[[SourceType, str], NewSample],
    outcome: IngestReport,
    progress: Progress,
    *,
    workers: Workers | None = None,
    subjects_are_named: bool = False,
) -> None:
    """Add a sample of every source that is not in the archive; `make` gets the source and its digest.

    Samples and refusals are in the order of the sources, whatever the number of workers; `make` must be picklable for
    them. Refused sources are added to the report, and unless the user has named the subjects also a warning of those
    that the archive had from other sources.
    """
    earlier = writer.manifest
    digests: set[str] = set()
    finished = 0

    def new() -> Iterator[tuple[SourceType, str | FileError]]:
        nonlocal finished
        for source, digest in map_in_order(_digest, sources, workers):
            progress(finished, len(sources), source.name)
            if isinstance(digest, str):
                digests.add(digest)
            if isinstance(digest, str) and writer.contains(digest):
                outcome.already_present += 1
                finished += 1
            else:
                yield source, digest

    with writer:
        for result in map_in_order(_MakeOrRefuse(make), new(), workers):
            if isinstance(result, FileError):
                outcome.refused.append(result)
            else:
                writer.add(*result)
            finished += 1
        progress(len(sources), len(sources), "")
    outcome.added = writer.published
    outcome.already_present += writer.superseded
    outcome.present = earlier.matching("source_sha256", digests)
    of_subjects = earlier.matching("subject", {entry.subject for entry in outcome.added})
    known = {entry.subject: entry.source for entry in of_subjects if entry.source_sha256 not in digests}
    shared = {entry.subject: entry.source for entry in outcome.added if entry.subject in known}
    if shared and not subjects_are_named:
        subject, added = next(iter(shared.items()))
        outcome.warnings.append(
            f"{len(shared)} subjects were in the archive before, such as {subject}, with {known[subject]} and now "
            f"{added}: each subject is kept in one split. If they are different patients, make a new archive with "
            "--subject-pattern and a group that matches the patient in the path"
        )


def subject_of(source: Source, pattern: str) -> str:
    """The subject of a source: what the first group of the pattern matches in its name or path, or its own subject.

    Raises:
        ConfigError: the pattern is invalid, or does not match.
    """
    if not pattern:
        return source.subject
    name = "" if source.is_dicom else source.subject  # a pseudonym is no name
    try:
        # By name, or else by folder: in many collections all files have the same name.
        match = re.search(pattern, name) or re.search(pattern, source.files[0].as_posix())
    except re.error as error:
        raise ConfigError(f"subject pattern '{pattern}' is not a regular expression: {error}") from error
    if match is None or not match.groups() or not match[1]:
        raise ConfigError(
            f"subject pattern '{pattern}' has no group that matches '{name or source.files[0]}' or its folder"
        )
    subject: str = match[1]
    return subject


def open_writer(
    url: str,
    grid: Grid,
    geometry: Geometry,
    subjects: set[str],
    split_fractions: tuple[float, float, float],
    assigned: Mapping[str, Split] | None,
    samples_per_shard: int,
    contents: Contents = "volumes",
) -> ArchiveWriter:
    """A writer with the archive's split rule, or for a new archive one that is balanced for these subjects.

    Raises:
        ConfigError: the arguments differ from those of the archive.
    """
    manifest = _manifest(url)
    rule = None if manifest is not None else balanced_split_rule(subjects, split_fractions, assigned or {})
    if manifest is not None and assigned and dict(manifest.split_rule.assigned) != dict(assigned):
        raise ConfigError(f"{url} was split by another assignment, which cannot change once it is published")
    return ArchiveWriter(url, grid, geometry, split_rule=rule, samples_per_shard=samples_per_shard, contents=contents)


def shared_subjects(count: int, what: str, first: Path, second: Path) -> str:
    """The warning about subjects whose samples stay in one split, with two files of one of them."""
    return (
        f"{count} subjects have {what}, such as {first} and {second}: each subject is kept in one split. If they are "
        "different patients, pass --subject-pattern with a group that matches the patient in the path"
    )


def _manifest(url: str) -> Manifest | None:
    try:
        return latest_manifest(Folder(url))
    except ArchiveNotFoundError:
        return None
