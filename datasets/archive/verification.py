"""Verification of a whole archive: its index and every stored array are read and compared with their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.store import local_path
from raylift.datasets.errors import ArchiveError, ConfigError, CorruptSampleError

BATCH = 256
"""Samples that the threads are given at a time."""


@dataclass
class Verification:
    """Numbers of samples."""

    samples: int
    """In the archive."""
    verified_before: int
    """Found sound by an interrupted verification, and not read again."""
    damaged: int = 0
    """With a missing or changed array."""
    index_is_damaged: bool = False
    """No sample was read, because some are unknown."""


def verify(
    archive: Archive,
    *,
    threads: int,
    sound_samples: Path | None,
    progress: Callable[[int, int, str], None],
    report: Callable[[ArchiveError], None],
) -> Verification:
    """Read the index and every array of an archive and compare them with their digests.

    Args:
        archive: the archive.
        threads: samples that are read at the same time.
        sound_samples: text file, to which a line is appended for each sound sample, and whose samples are not read.
        progress: callback after each sample: the number of finished ones, of all, and the sample's id.
        report: callback for each damaged object of the index, or else for each damaged array.

    Raises:
        ConfigError: less than one thread, or a file that cannot be written.
        StoreError: the object store did not respond after retries.
    """
    if threads < 1:
        raise ConfigError(f"{threads} threads: give 1 or more")

    def damage(entry: Entry) -> list[CorruptSampleError]:
        errors = []
        for name in entry.sha256:
            try:
                archive.read_array(entry, name)
            except CorruptSampleError as error:
                errors.append(error)
        return errors

    if index_damage := archive.manifest.index_damage():
        for damaged in index_damage:
            report(damaged)
        return Verification(len(archive.manifest.entries), 0, index_is_damaged=True)
    before = _lines(sound_samples)
    entries = archive.entries()
    remaining = [entry for entry in entries if _line(archive, entry) not in before]
    result = Verification(len(entries), len(entries) - len(remaining))
    pool = ThreadPoolExecutor(threads)
    try:
        for first in range(0, len(remaining), BATCH):
            batch = remaining[first : first + BATCH]
            for number, (entry, errors) in enumerate(zip(batch, pool.map(damage, batch), strict=True), first + 1):
                for error in errors:
                    report(error)
                result.damaged += bool(errors)
                if sound_samples and not errors:
                    with sound_samples.open("a") as file:
                        file.write(f"{_line(archive, entry)}\n")
                progress(result.verified_before + number, len(entries), entry.id)
    finally:
        pool.shutdown(cancel_futures=True)
    return result


def _lines(path: Path | None) -> set[str]:
    """The lines of a file of sound samples, which is made if there is none."""
    if path is None:
        return set()
    try:
        with local_path(path).open("a+") as file:
            file.seek(0)
            lines = file.read().split("\n")
            # An interrupted process may have cut the last line.
            file.write("\n" * bool(lines[-1]))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not a file of sound samples, or cannot be written: {error}") from error
    return set(lines)


def _line(archive: Archive, entry: Entry) -> str:
    """A digest of where a sample is and of what its arrays must be."""
    place = [archive.url, entry.part, entry.index, entry.sha256]
    return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
