"""The index of an archive: its entries in segments of immutable objects, to which a publication adds one.

```
<url>/index/<sha256>.jsonl.gz       a line for each publication: {"snapshot": 7, "entries": [...]}
<url>/index/<sha256>.keys           32 bytes for each entry: hashes of its source (16), id (8) and subject (8)
```

The name of an object is the SHA-256 of its bytes. When `FAN_IN` segments of about one size have come together they
become one, until it has `FULL` entries; so an entry is written a fixed number of times, however large the archive is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, overload

import numpy as np
from jaxtyping import UInt64

from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.store import Folder, join
from raylift.datasets.errors import ArchiveError
from raylift.datasets.serialization import from_plain, to_plain

FAN_IN, TIERS = 8, 4
FULL = FAN_IN**TIERS
READERS = 8
"""Objects that are read at the same time."""
COLUMNS = {"source_sha256": slice(0, 2), "id": slice(2, 3), "subject": slice(3, 4)}
"""Words of 64 bits in the keys of an entry."""
WORDS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Publication:
    """A line of a segment: a snapshot, and the entries that it added."""

    snapshot: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Segment:
    """Successive publications in two objects."""

    samples: int
    snapshot: int
    """Number of the last publication."""
    entries: str
    """Names of the objects in the folder `index`."""
    keys: str


def read_object(folder: Folder, name: str) -> bytes:
    """The content of an object of the index.

    Raises:
        FileNotFoundError: it is missing; a writer may have merged its segment into another one.
        ArchiveError: it is not what was written.
    """
    where = join(folder.url, "index", name)
    try:
        data = folder.read(f"index/{name}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} is missing: restore it") from None
    if hashlib.sha256(data).hexdigest() != name.partition(".")[0]:
        raise ArchiveError(f"{where} is not what was written, its name is its SHA-256: restore it")
    return data


def write_object(folder: Folder, data: bytes, suffix: str) -> str:
    """Write an object of the index, or the same one again, and return its name."""
    name = f"{hashlib.sha256(data).hexdigest()}{suffix}"
    folder.write(f"index/{name}", data)
    return name


def append(folder: Folder, segments: Sequence[Segment], publications: Sequence[Publication]) -> tuple[Segment, ...]:
    """The segments with new publications after the others, in objects that are written; the last ones may be merged.

    Raises:
        FileNotFoundError: a segment to merge is missing.
        ArchiveError: it is not what was written.
    """
    lines = b"".join(json.dumps(to_plain(publication)).encode() + b"\n" for publication in publications)
    new = [entry for publication in publications for entry in publication.entries]
    kept = len(segments) + 1 - merge_count([*(segment.samples for segment in segments), len(new)])
    merged = segments[kept:]
    names = [*(segment.entries for segment in merged), *(segment.keys for segment in merged)]
    stored = list(_read_objects(folder, names))
    # Compressed files one after the other are a compressed file.
    entries = b"".join([*stored[: len(merged)], gzip.compress(lines, compresslevel=6, mtime=0)])
    keys = b"".join([*stored[len(merged) :], keys_of(new).tobytes()])
    segment = Segment(
        sum(segment.samples for segment in merged) + len(new),
        publications[-1].snapshot,
        write_object(folder, entries, ".jsonl.gz"),
        write_object(folder, keys, ".keys"),
    )
    return (*segments[:kept], segment)


def merge_count(samples: Sequence[int]) -> int:
    """How many of the last segments become one, from the numbers of samples in them; 1 to merge none."""
    count = 1
    for tier in range(TIERS):
        tiers = [_tier(number) for number in (*samples[:-count], sum(samples[-count:]))]
        length = next((k for k, one in enumerate(reversed(tiers)) if one > tier), len(tiers))
        if tiers[len(tiers) - length :].count(tier) >= FAN_IN:
            count += length - 1
    return len(samples) if sum(samples[-count:]) >= FULL else count


def _tier(samples: int) -> int:
    return sum(samples >= FAN_IN**tier for tier in range(1, TIERS + 1))


def keys_of(entries: Sequence[Entry]) -> UInt64[np.ndarray, "entries words"]:
    """Hashes of the source, id and subject of each entry."""
    joined = b"".join(_key(name, getattr(entry, name)).tobytes() for entry in entries for name in COLUMNS)
    return _as_keys(joined)


def _key(column: str, value: str) -> np.ndarray:
    words = np.frombuffer(hashlib.sha256(value.encode()).digest(), "<u8")
    return words[: COLUMNS[column].stop - COLUMNS[column].start]


def _as_keys(raw: bytes) -> UInt64[np.ndarray, "entries words"]:
    return np.frombuffer(raw, "<u8").reshape(-1, WORDS)


def _read_objects(folder: Folder, names: Sequence[str]) -> Iterator[bytes]:
    if len(names) <= 1:
        yield from (read_object(folder, name) for name in names)
        return
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(names), READERS):
            yield from pool.map(lambda name: read_object(folder, name), names[first : first + READERS])


class StoredEntries:
    """The entries of a snapshot, which are read when the first of them is used."""

    def __init__(
        self, folder: Folder, segments: Sequence[Segment], snapshot: int, newest: Callable[[], Sequence[Segment]]
    ) -> None:
        """`newest` returns the present segments, which have the same entries after a writer merged some of these."""
        self._folder, self._snapshot, self._newest = folder, snapshot, newest
        self.segments = self._until(segments, snapshot)

    def __len__(self) -> int:
        if not self.segments or self.segments[-1].snapshot <= self._snapshot:
            return sum(segment.samples for segment in self.segments)
        return len(self._all)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._all)

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, place: int | slice) -> Entry | tuple[Entry, ...]:
        return self._all[place]

    def until(self, snapshot: int) -> StoredEntries:
        """Those of an earlier snapshot."""
        return StoredEntries(self._folder, self.segments, snapshot, self._newest)

    def matching(self, column: str, values: Collection[str]) -> list[Entry]:
        """Those with one of the values of a column of `COLUMNS`; segments without any are not read."""
        wanted = [_key(column, value)[0] for value in values]

        def read(segments: Sequence[Segment]) -> list[Entry]:
            keys = map(_as_keys, _read_objects(self._folder, [segment.keys for segment in segments]))
            first = COLUMNS[column].start
            hit = [part for part, rows in zip(segments, keys, strict=True) if np.isin(rows[:, first], wanted).any()]
            return [entry for entry in self._read_entries(hit) if getattr(entry, column) in values]

        return self._retried(read) if values else []

    def keys(self, read_before: set[str]) -> UInt64[np.ndarray, "entries words"]:
        """Keys in all objects that were not read before, to which these are added."""

        def read(segments: Sequence[Segment]) -> UInt64[np.ndarray, "entries words"]:
            names = [segment.keys for segment in segments if segment.keys not in read_before]
            raw = b"".join(_read_objects(self._folder, names))
            read_before.update(names)
            return _as_keys(raw)

        return self._retried(read)

    def damage(self) -> list[ArchiveError]:
        """An error for each object that is missing, is not what was written, or contradicts another one."""
        errors: list[ArchiveError] = []
        for segment in self.segments:
            try:
                entries, keys = (read_object(self._folder, name) for name in (segment.entries, segment.keys))
                read = [entry for part in self._publications(entries, segment) for entry in part.entries]
                if len(read) != segment.samples or keys_of(read).tobytes() != keys:
                    where = join(self._folder.url, "index", segment.keys)
                    errors.append(ArchiveError(f"{where} has not the keys of {segment.entries}"))
            except FileNotFoundError as error:
                # Or a writer has merged it meanwhile.
                if segment in self._newest():
                    errors.append(ArchiveError(str(error)))
            except ArchiveError as error:
                errors.append(error)
        return errors

    @cached_property
    def _all(self) -> tuple[Entry, ...]:
        return tuple(self._retried(self._read_entries))

    def _read_entries(self, segments: Sequence[Segment]) -> list[Entry]:
        objects = _read_objects(self._folder, [segment.entries for segment in segments])
        return [
            entry
            for segment, raw in zip(segments, objects, strict=True)
            for publication in self._publications(raw, segment)
            if publication.snapshot <= self._snapshot
            for entry in publication.entries
        ]

    def _publications(self, raw: bytes, segment: Segment) -> Iterator[Publication]:
        where = join(self._folder.url, "index", segment.entries)
        for line in gzip.decompress(raw).splitlines():
            yield from_plain(Publication, json.loads(line), where)

    def _retried(self, read: Callable[[Sequence[Segment]], T]) -> T:
        """What is read of the segments or, if a writer merged some meanwhile, of the present ones."""
        while True:
            try:
                return read(self.segments)
            except FileNotFoundError as error:
                before, self.segments = self.segments, self._until(self._newest(), self._snapshot)
                if before == self.segments:
                    raise ArchiveError(str(error)) from error

    @staticmethod
    def _until(segments: Sequence[Segment], snapshot: int) -> tuple[Segment, ...]:
        """The segments with publications up to a snapshot; the last one may have further ones."""
        count = sum(segment.snapshot < snapshot for segment in segments)
        return tuple(segments[: count + 1])


class KnownKeys:
    """Which sources and ids an archive has: 24 bytes of memory for each entry, and a binary search for each query."""

    def __init__(self, entries: StoredEntries | Sequence[Entry]) -> None:
        self._objects: set[str] = set()
        keys = self._new(entries)
        order = np.argsort(keys[:, 0])
        self._sources, self._sources_rest, self._ids = keys[order, 0], keys[order, 1], np.sort(keys[:, 2])
        self._added: set[bytes] = set()

    def add(self, entries: StoredEntries | Sequence[Entry]) -> None:
        """Add entries; of those stored in an archive only segments that were not read before are read."""
        for row in self._new(entries):
            self._added |= {row[COLUMNS[name]].tobytes() for name in ("source_sha256", "id")}

    def has_source(self, sha256: str) -> bool:
        """Whether an entry has this source."""
        key = _key("source_sha256", sha256)
        begin, end = (np.searchsorted(self._sources, key[0], side) for side in ("left", "right"))
        return key.tobytes() in self._added or bool((self._sources_rest[begin:end] == key[1]).any())

    def has_id(self, name: str) -> bool:
        """Whether an entry has this id."""
        key = _key("id", name)
        place = np.searchsorted(self._ids, key[0])
        return key.tobytes() in self._added or bool((self._ids[place : place + 1] == key[0]).any())

    def _new(self, entries: StoredEntries | Sequence[Entry]) -> UInt64[np.ndarray, "entries words"]:
        return entries.keys(self._objects) if isinstance(entries, StoredEntries) else keys_of(entries)
