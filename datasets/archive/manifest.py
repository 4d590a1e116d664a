"""The manifest: a numbered, immutable JSON file that names the contents of an archive.

```
<url>/manifests/000007.json         the snapshot's number, and the segments that changed last; the highest is current
<url>/index/<sha256>.json           grid, geometry, split rule, and the segments that do not change any more
```

Format versions 1 and 2, which are read, have all entries in the manifest. Version 2 has entries whose labels mask their
field of view; in version 3 any may.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from raylift import __version__
from raylift.datasets import hashed_json
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.index import (
    FULL,
    KnownKeys,
    Publication,
    Segment,
    StoredEntries,
    append,
    read_object,
    write_object,
)
from raylift.datasets.archive.splits import SplitRule
from raylift.datasets.archive.store import Folder, join
from raylift.datasets.errors import ArchiveError, ArchiveNotFoundError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.serialization import from_plain, to_plain

FORMAT, FORMAT_VERSION, OLD_FORMAT_VERSIONS = "raylift-archive", 3, (1, 2)

Contents = Literal["volumes", "radiographs"]
"""CT with digitally reconstructed radiographs (DRRs) and labels, or real radiographs without CT."""


@dataclass(frozen=True)
class Base:
    """What all snapshots have in common, and the segments that do not change any more."""

    grid: Grid
    geometry: Geometry
    split_rule: SplitRule
    contents: Contents
    first_snapshot: int
    """The earliest snapshot whose samples are known; after 1 if an old raylift did not record those before."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Head:
    """What a manifest file has."""

    snapshot: int
    base: str
    """Name of the object of the index with the `Base`."""
    segments: tuple[Segment, ...]
    """After those of the base; further publications may merge them."""


@dataclass(frozen=True)
class Manifest:
    """The contents of an archive."""

    grid: Grid
    geometry: Geometry
    split_rule: SplitRule = field(default_factory=SplitRule)
    snapshot: int = 0
    entries: StoredEntries | tuple[Entry, ...] = ()
    contents: Contents = "volumes"
    """For radiographs without CT, grid and geometry describe the volumes and poses that they are intended for."""
    samples_at: tuple[int, ...] = ()
    """In format versions 1 and 2 the number of entries at each snapshot; 0 where it is unknown."""
    stored: tuple[Head, Base] | None = None
    """The files of an archive of format version 3."""

    def at(self, snapshot: int) -> Manifest | None:
        """An earlier snapshot, whose entries are the first ones of this one; None if their number is unknown."""
        if snapshot == self.snapshot:
            return self
        if not 0 < snapshot < self.snapshot:
            return None
        if self.stored and isinstance(self.entries, StoredEntries):
            known = snapshot >= self.stored[1].first_snapshot
            return replace(self, snapshot=snapshot, entries=self.entries.until(snapshot)) if known else None
        counts = self.samples_at[:snapshot]
        if len(counts) < snapshot or not counts[-1]:
            return None
        return replace(self, snapshot=snapshot, entries=self.entries[: counts[-1]], samples_at=counts)

    def matching(self, column: Literal["source_sha256", "subject"], values: Collection[str]) -> list[Entry]:
        """The entries with one of the values in a column; of a stored index only the segments that have some."""
        if isinstance(self.entries, StoredEntries):
            return self.entries.matching(column, values)
        return [entry for entry in self.entries if getattr(entry, column) in values]

    def index_damage(self) -> list[ArchiveError]:
        """An error for each object of the index that is missing or is not what was written."""
        return self.entries.damage() if isinstance(self.entries, StoredEntries) else []

    def sha256(self) -> str:
        """A digest of everything that samples and their order depend on; the same in a copy of the archive."""
        contents = (self.grid, self.geometry, self.contents, list(self.entries))
        return hashlib.sha256(json.dumps([to_plain(part) for part in contents], sort_keys=True).encode()).hexdigest()

    def publications(self) -> list[Publication]:
        """The entries of a manifest of an old format version by the snapshot that added them."""
        counts = [*self.samples_at, *[0] * (self.snapshot - len(self.samples_at))]
        counts[-1:] = [len(self.entries)]
        known = [(number, count) for number, count in enumerate(counts, 1) if count]
        begins = [0, *(count for _, count in known)]
        return [
            Publication(number, tuple(self.entries[begin:count]))
            for (number, count), begin in zip(known, begins, strict=False)
        ]


def publish(folder: Folder, manifest: Manifest, new: Sequence[Entry]) -> Manifest:
    """Publish the snapshot after this one, with new entries after the others.

    Raises:
        FileExistsError: another writer has published a snapshot after this one; nothing is changed.
        FileNotFoundError: a segment is missing, as after another writer has merged it.
    """
    _require_newest(folder, manifest.snapshot)
    snapshot = manifest.snapshot + 1
    publications = [Publication(snapshot, tuple(new))]
    if manifest.stored:
        head, base = manifest.stored
        name, segments = head.base, head.segments
    else:
        publications = [*manifest.publications(), *publications] if manifest.snapshot else publications
        base = Base(
            manifest.grid,
            manifest.geometry,
            manifest.split_rule,
            manifest.contents,
            publications[0].snapshot,
            segments=(),
        )
        name, segments = "", ()
    segments = append(folder, segments, publications)
    if segments[-1].samples >= FULL:
        base, segments, name = replace(base, segments=(*base.segments, *segments)), (), ""
    name = name or write_object(folder, json.dumps(to_plain(base)).encode(), ".json")
    head = Head(snapshot, name, segments)
    written = {"format": FORMAT, "version": FORMAT_VERSION, "written_by": f"raylift {__version__}"}
    folder.create(manifest_path(snapshot), hashed_json.encode({**written, "archive": to_plain(head)}))
    try:
        _require_newest(folder, snapshot)
    except FileExistsError:
        # Others may have published and pruned that number since the first check: their manifests lack the entries.
        parts = {entry.source_sha256: entry.part for entry in new}
        listed = latest_manifest(folder).matching("source_sha256", parts.keys())
        if {entry.source_sha256: entry.part for entry in listed} != parts:
            with suppress(FileNotFoundError):
                folder.remove(manifest_path(snapshot))
            raise
    return _manifest(folder, head, base)


def _require_newest(folder: Folder, snapshot: int) -> None:
    """Raise a FileExistsError if there is a manifest of a later snapshot."""
    names = published_manifests(folder)
    if names and names[-1] > manifest_path(snapshot).removeprefix("manifests/"):
        raise FileExistsError(f"{join(folder.url, 'manifests', names[-1])} is newer than snapshot {snapshot}")


def _manifest(folder: Folder, head: Head, base: Base) -> Manifest:
    def newest() -> Sequence[Segment]:
        stored = latest_manifest(folder).stored
        return (*stored[1].segments, *stored[0].segments) if stored else ()

    entries = StoredEntries(folder, (*base.segments, *head.segments), head.snapshot, newest)
    return Manifest(
        base.grid, base.geometry, base.split_rule, head.snapshot, entries, base.contents, stored=(head, base)
    )


@dataclass(frozen=True)
class _Listed:
    """A manifest of format version 1 or 2."""

    grid: Grid
    geometry: Geometry
    split_rule: SplitRule
    snapshot: int
    entries: tuple[Entry, ...]
    contents: Contents = "volumes"
    samples_at: tuple[int, ...] = ()


def read_manifest(folder: Folder, name: str) -> Manifest:
    """The manifest in a file.

    Raises:
        FileNotFoundError: it is missing, or its base is, as after a writer has pruned it.
        ArchiveError: it is not a manifest, is damaged, or is of another format version.
    """
    head = _read_file(folder, name)
    if isinstance(head, Manifest):
        return head
    return _manifest(folder, head, _read_base(folder, head))


def _read_base(folder: Folder, head: Head) -> Base:
    where = join(folder.url, "index", head.base)
    return from_plain(Base, json.loads(read_object(folder, head.base)), where)


def _read_file(folder: Folder, name: str) -> Head | Manifest:
    raw, where = folder.read(f"manifests/{name}"), join(folder.url, "manifests", name)
    try:
        data = json.loads(raw)
        written = (data["format"], data["version"])
        if written == (FORMAT, FORMAT_VERSION):
            return from_plain(Head, hashed_json.decode(raw, where)["archive"], where)
        if written in itertools.product([FORMAT], OLD_FORMAT_VERSIONS):
            return Manifest(**vars(from_plain(_Listed, data["archive"], where)))
    except (KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{where} is not a raylift manifest: {error!r}") from error
    read = ", ".join(map(str, (*OLD_FORMAT_VERSIONS, FORMAT_VERSION)))
    raise ArchiveError(f"{where} is {written}; this raylift reads {FORMAT} {read}")


def latest_manifest(folder: Folder) -> Manifest:
    """The archive's newest manifest.

    Raises:
        ArchiveNotFoundError: nothing was published.
    """
    pruned = ""
    while True:
        names = published_manifests(folder)
        if not names:
            raise ArchiveNotFoundError(
                f"{folder.url} holds no raylift archive: make one with raylift ingest or raylift phantom"
            )
        try:
            return read_manifest(folder, names[-1])
        except FileNotFoundError as error:
            # Pruned by a writer between listing and reading: list again.
            if names[-1] == pruned:
                where = join(folder.url, "manifests", names[-1])
                raise ArchiveError(f"{where} is listed but cannot be read: {error}") from error
            pruned = names[-1]


def manifest_at(folder: Folder, snapshot: int | Literal["latest"]) -> Manifest:
    """The manifest of a snapshot of an archive, also if its file was pruned.

    Raises:
        ArchiveNotFoundError: nothing was published.
        ArchiveError: the archive has no such snapshot, or the samples of that one are unknown.
    """
    newest = latest_manifest(folder)
    if snapshot == "latest":
        return newest
    if manifest := newest.at(snapshot):
        return manifest
    try:
        return read_manifest(folder, manifest_path(snapshot).removeprefix("manifests/"))
    except FileNotFoundError as error:
        raise ArchiveError(
            f"{folder.url} has no snapshot {snapshot}, its newest is {newest.snapshot}: restore the archive, or "
            "move to its newest snapshot with --data.snapshot latest"
        ) from error


def manifest_path(snapshot: int) -> str:
    """Path of the manifest with that number inside the archive."""
    return f"manifests/{snapshot:06d}.json"


def published_manifests(folder: Folder) -> list[str]:
    """File names of the published manifests, oldest first, without the temporary files of writers."""
    return [name for name in folder.names("manifests") if name.endswith(".json") and not name.startswith(".")]


def prune(folder: Folder, kept: int) -> None:
    """Remove all but the last manifests, and the objects of the index that only these had."""
    names = published_manifests(folder)
    for place, name in enumerate(names[:-kept], 1):
        # Another writer may prune too, and a damaged manifest has no objects.
        with suppress(FileNotFoundError, ArchiveError):
            pruned, needed = (_read_file(folder, one) for one in (name, names[place]))
            if isinstance(pruned, Head) and isinstance(needed, Head):
                # What a manifest does not have any more, no later one has.
                objects = _objects(pruned) - _objects(needed)
                if pruned.base != needed.base:
                    objects -= _objects(_read_base(folder, needed))
                for unneeded in objects:
                    folder.remove(f"index/{unneeded}")
        folder.remove(f"manifests/{name}")


def _objects(part: Head | Base) -> set[str]:
    names = {name for segment in part.segments for name in (segment.entries, segment.keys)}
    return {part.base, *names} if isinstance(part, Head) else names


def new_entries(split_rule: SplitRule, known: KnownKeys, written: Sequence[Entry]) -> list[Entry]:
    """The entries whose source an archive does not have, with their splits by its rule and unique ids."""
    new: dict[str, Entry] = {}
    taken: set[str] = set()
    for entry in written:
        if entry.source_sha256 in new or known.has_source(entry.source_sha256):
            continue
        unique, number = entry.id, 1
        while unique in taken or known.has_id(unique):
            number += 1
            unique = f"{entry.id}-{number}"
        new[entry.source_sha256] = replace(entry, id=unique, split=split_rule.split(entry.subject))
        taken.add(unique)
    return list(new.values())
