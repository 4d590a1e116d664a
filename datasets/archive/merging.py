"""Merging of archives: samples of several ones are added to another one, each scan once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raylift.datasets.archive.archive import Archive, RadiographSample
from raylift.datasets.archive.store import absolute
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import ArchiveNotFoundError, ConfigError


@dataclass(frozen=True)
class Merged:
    """Numbers of samples."""

    added: int
    duplicates: int
    """Not added, because the destination or an earlier source has the same scan."""
    moved: int
    """Added to another split than that in their source, because the destination's rule is another one."""


def merge(
    sources: Sequence[str], destination: str, *, samples_per_shard: int, progress: Callable[[int, int, str], None]
) -> Merged:
    """Add the samples of archives to another one, which may exist; a new one has the first source's split rule.

    Every array is compared with its digest. An interrupted merge continues where its last publication ended.

    Args:
        sources: URLs of archives of one grid, geometry and kind of contents.
        destination: URL of the other one.
        samples_per_shard: samples in a shard; each full shard is published at once.
        progress: callback before each sample and at the end: finished samples, all samples, the sample's id.

    Raises:
        ConfigError: grids, geometries or contents differ, or the destination is a source.
        CorruptSampleError: an array is missing or differs from what was written.
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
    total, done = sum(len(archive.manifest.entries) for archive in archives), 0
    splits = {}
    with writer:
        for archive in archives:
            for entry in archive.manifest.entries:
                progress(done, total, entry.id)
                done += 1
                if writer.contains(entry.source_sha256):
                    continue
                splits[entry.source_sha256] = entry.split
                if first.contents == "volumes":
                    writer.add(entry, archive.read(entry))
                else:
                    writer.add(entry, RadiographSample(archive.read_array(entry, "radiographs")))
    progress(done, total, "")
    added = writer.published
    moved = sum(entry.split != splits[entry.source_sha256] for entry in added)
    return Merged(len(added), total - len(added), moved)
