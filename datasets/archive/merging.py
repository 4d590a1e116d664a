"""Merging of archives: samples of several ones are added to another one, each scan once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raylift.datasets.archive.archive import Archive, RadiographSample
from raylift.datasets.archive.store import absolute
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import ArchiveNotFoundError, ConfigError, CorruptSampleError


@dataclass(frozen=True)
class Merged:
    """Numbers of samples."""

    added: int
    duplicates: int
    """Not added, because the destination or an earlier source has the same scan."""
    damaged: int
    """Not added, because an array is missing or is not what was written."""
    moved: int
    """In another split of the destination than in their source, duplicates included."""


def merge(
    sources: Sequence[str],
    destination: str,
    *,
    samples_per_shard: int,
    progress: Callable[[int, int, str], None],
    report: Callable[[CorruptSampleError], None],
) -> Merged:
    """Add the samples of archives to another one, which may exist; a new one has the first source's split rule.

    Every array is compared with its digest, and a damaged sample is left out. An interrupted merge continues where its
    last publication ended.

    Args:
        sources: URLs of archives of one grid, geometry and kind of contents.
        destination: URL of the other one.
        samples_per_shard: samples in a shard; each full shard is published at once.
        progress: callback before each sample and at the end: finished samples, all samples, the sample's id.
        report: callback with the error of each damaged sample.

    Raises:
        ConfigError: grids, geometries or contents differ, or the destination is a source.
    """
    if absolute(destination) in map(absolute, sources):
        raise ConfigError(f"{absolute(destination)} is a source and the destination: name another destination")
    archives = [Archive(url) for url in sources]
    first = archives[0].manifest
    for archive in archives[1:]:
        for name in ("contents", "grid", "geometry"):
            one, other = getattr(first, name), getattr(archive.manifest, name)
            if one != other:
                raise ConfigError(
                    f"{archive.url} has {name} {other}, {archives[0].url} has {one}: they cannot be merged"
                )
    try:
        Archive(destination)
        rule = None
    except ArchiveNotFoundError:
        rule = first.split_rule
    writer = ArchiveWriter(
        destination,
        first.grid,
        first.geometry,
        split_rule=rule,
        samples_per_shard=samples_per_shard,
        contents=first.contents,
    )
    total, done, damaged = sum(len(archive.manifest.entries) for archive in archives), 0, 0
    with writer:
        for archive in archives:
            for entry in archive.manifest.entries:
                progress(done, total, entry.id)
                done += 1
                if writer.contains(entry.source_sha256):
                    continue
                try:
                    if first.contents == "volumes":
                        writer.add(entry, archive.read(entry))
                    else:
                        writer.add(entry, RadiographSample(archive.read_array(entry, "radiographs")))
                except CorruptSampleError as error:
                    damaged += 1
                    report(error)
    progress(done, total, "")
    added, moved = len(writer.published), sum(_moved(archive, writer) for archive in archives)
    return Merged(added, total - added - damaged, damaged, moved)


def _moved(source: Archive, writer: ArchiveWriter) -> int:
    """The number of the source's scans that are in another split of the written archive."""
    splits = {entry.source_sha256: entry.split for entry in source.manifest.entries}
    merged = writer.manifest.matching("source_sha256", splits.keys())
    return sum(entry.split != splits[entry.source_sha256] for entry in merged)
