"""The archive: CT volumes, their radiographs and labels as Zarr v3 arrays, with a manifest that names every one.

```
<url>/zarr.json                     a Zarr group, so that `zarr.open_group(url)` shows what is inside
<url>/parts/<id>/volumes            int16 HU (n, D, H, W), one volume a chunk, the part's volumes in one shard
<url>/parts/<id>/radiographs        float32 line integrals (n, view, rows, columns)
<url>/parts/<id>/labels             uint8 (n, D, H, W), values of `segmentation.Label`
<url>/manifests/000007.json         grid, geometry and every sample; the highest number is the archive
```

Parts are never changed once written, and publishing is the creation of the next manifest, which either happens whole or
not at all: a run cut at any point leaves the archive as it was, and of two writers at once the second takes the
first's samples in and tries the next number. A part that no manifest names is what a cut run left behind.

Every array of a sample has its SHA-256 in the manifest and is checked against it when read, because Zarr answers a
missing chunk with its fill value and no error. Chunks carry a CRC-32C of their own, so a damaged one is told apart.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Float32, Int16, UInt8
from zarr.codecs import BloscCodec, Crc32cCodec

from raylift import __version__
from raylift.datasets.errors import ArchiveError, ConfigError, CorruptSample, NoArchive, StoreUnreachable
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.plain import from_plain, to_plain
from raylift.datasets.splits import Split, SplitRule
from raylift.datasets.store import Folder, absolute, join, reachable, zarr_store

FORMAT, FORMAT_VERSION = "raylift-archive", 1
MANIFESTS_KEPT = 5


@dataclass(frozen=True)
class Pair:
    """A CT and its radiographs, in memory."""

    volume: Int16[np.ndarray, "d h w"]
    """HU in volume order."""
    radiographs: Float32[np.ndarray, "views rows columns"]
    """Line integrals, one image for each view of the archive's geometry."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names they have in a part."""
        return {"volumes": self.volume, "radiographs": self.radiographs}

    @property
    def nbytes(self) -> int:
        """What the arrays take in memory."""
        return sum(array.nbytes for array in self.arrays().values())


@dataclass(frozen=True)
class Sample(Pair):
    """All that an archive stores of one scan."""

    labels: UInt8[np.ndarray, "d h w"]
    """Values of `segmentation.Label`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names they have in a part."""
        return {**super().arrays(), "labels": self.labels}


@dataclass(frozen=True)
class Entry:
    """One sample in the manifest."""

    id: str
    subject: str
    source: str
    """Name of the file or series it came from, without its folder."""
    source_sha256: str
    licence: str
    label_method: Literal["threshold", "phantom"]
    record: dict[str, Any]
    """How the volume was made: the file's own size, spacing and orientation, or a phantom's seed."""
    split: Split = "train"
    part: str = ""
    index: int = -1
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What an archive holds."""

    grid: Grid
    geometry: Geometry
    split_rule: SplitRule = field(default_factory=SplitRule)
    generation: int = 0
    entries: tuple[Entry, ...] = ()

    def to_json(self) -> bytes:
        """The manifest file."""
        head = {"format": FORMAT, "version": FORMAT_VERSION, "written_by": f"raylift {__version__}"}
        return json.dumps({**head, "archive": to_plain(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> Manifest:
        """The manifest of a file's bytes, or an ArchiveError that says what is wrong with it."""
        try:
            data = json.loads(raw)
            written = (data["format"], data["version"])
            if written == (FORMAT, FORMAT_VERSION):
                return from_plain(cls, data["archive"], where)
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"{where} is not a raylift manifest: {error!r}") from error
        raise ArchiveError(f"{where} is {written}; this raylift reads {(FORMAT, FORMAT_VERSION)}")


class Archive:
    """A published archive, for reading. Threads may share it; processes each open their own."""

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self.manifest = latest_manifest(Folder(self.url))
        self._arrays: dict[tuple[str, str], zarr.Array[Any]] = {}
        self._lock = threading.Lock()

    def entries(self, split: Split | None = None) -> list[Entry]:
        """The samples of a split, or all, in the order of their ids (not of their arrival)."""
        chosen = (entry for entry in self.manifest.entries if split is None or entry.split == split)
        return sorted(chosen, key=lambda entry: entry.id)

    def read(self, entry: Entry) -> Sample:
        """All stored arrays of one sample, each checked against its digest.

        Raises:
            CorruptSample: an array is missing or differs from what was written.
            StoreUnreachable: the object store did not answer, after retries.
        """
        pair = self.read_pair(entry)
        return Sample(pair.volume, pair.radiographs, self.read_array(entry, "labels"))

    def read_pair(self, entry: Entry) -> Pair:
        """`read` without the labels, which saves a third of the requests: all that most training needs."""
        return Pair(self.read_array(entry, "volumes"), self.read_array(entry, "radiographs"))

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """One of a sample's arrays (volumes, radiographs, labels), checked against its digest."""
        try:
            with reachable(self.url):
                array = np.asarray(self._array(entry.part, name)[entry.index])
        except StoreUnreachable:
            raise
        except Exception as error:
            # What a damaged chunk, index or header brings up is up to Zarr and its codecs, a MemoryError included.
            raise self._corrupt(entry, name, f"cannot be read: {error!r}") from error
        if digest(array) != entry.sha256[name]:
            raise self._corrupt(entry, name, "is missing or is not what was written")
        return array

    def _array(self, part: str, name: str) -> zarr.Array[Any]:
        with self._lock:
            if (part, name) not in self._arrays:
                store = zarr_store(join(self.url, "parts", part, name), read_only=True)
                self._arrays[part, name] = zarr.open_array(store, mode="r", zarr_format=3)
            return self._arrays[part, name]

    def _corrupt(self, entry: Entry, name: str, what: str) -> CorruptSample:
        key = join(self.url, "parts", entry.part, name)
        return CorruptSample(
            f"sample {entry.id}: chunk {entry.index} of {key} {what} (sha256 {entry.sha256[name]}): "
            "restore the object, or remove the sample and ingest it again"
        )


class ArchiveWriter:
    """Adds samples to an archive, publishing each time a part is full.

    Use as a context manager: leaving it without an error publishes what remains; leaving it with one drops what is not
    published yet.
    """

    def __init__(
        self,
        url: str,
        grid: Grid,
        geometry: Geometry,
        *,
        split_rule: SplitRule | None = None,
        per_part: int = 8,
    ) -> None:
        if per_part < 1:
            raise ConfigError(f"{per_part} samples a part: a part holds one or more")
        self.url = absolute(url)
        self.per_part = per_part
        self.published: list[Entry] = []
        """What this writer has added to the archive so far."""
        self.superseded = 0
        """Samples given to this writer whose source was there already, or was published by another meanwhile."""
        self._folder = Folder(self.url)
        self._waiting: list[tuple[Entry, Sample]] = []
        try:
            self.manifest = latest_manifest(self._folder)
        except NoArchive:
            self.manifest = Manifest(grid, geometry, split_rule or SplitRule())
        if split_rule is not None and self.manifest.split_rule != split_rule:
            raise ConfigError(f"{self.url} was split by {self.manifest.split_rule}, which cannot change later")
        self._require(grid, geometry)

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.publish()

    def holds(self, source_sha256: str) -> bool:
        """Whether a source of that digest is published or waiting."""
        known = (*self.manifest.entries, *(entry for entry, _ in self._waiting))
        return any(entry.source_sha256 == source_sha256 for entry in known)

    def add(self, entry: Entry, sample: Sample) -> None:
        """Take a sample in; its split and a unique id are given to it when it is published with its part."""
        if self.holds(entry.source_sha256):
            self.superseded += 1
            return
        self._waiting.append((entry, sample))
        if len(self._waiting) >= self.per_part:
            self.publish()

    def publish(self) -> None:
        """Write the waiting samples as a part and publish the manifest that names them."""
        if not self._waiting:
            return
        part = uuid.uuid4().hex[:12]
        with reachable(self.url):
            self._write_part(part)
        written = [
            replace(entry, part=part, index=k, sha256={name: digest(array) for name, array in sample.arrays().items()})
            for k, (entry, sample) in enumerate(self._waiting)
        ]
        while fresh := _named(self.manifest, written):
            manifest = replace(
                self.manifest,
                generation=self.manifest.generation + 1,
                entries=(*self.manifest.entries, *fresh),
            )
            try:
                self._folder.create(_manifest_name(manifest.generation), manifest.to_json())
                self.manifest = manifest
                break
            except FileExistsError:
                # Another writer was faster: its samples are kept, and ours follow under the next number.
                mine, self.manifest = self.manifest, latest_manifest(self._folder)
                self._require(mine.grid, mine.geometry)
                if self.manifest.split_rule.assigned != mine.split_rule.assigned:
                    raise ConfigError(
                        f"{self.url} was just made by another writer with other subjects assigned to splits by hand: "
                        "use another URL, or its assignment"
                    ) from None
        self.published += fresh
        self.superseded += len(written) - len(fresh)
        self._waiting = []
        for name in _manifests(self._folder)[:-MANIFESTS_KEPT]:
            self._folder.remove(f"manifests/{name}")

    def _require(self, grid: Grid, geometry: Geometry) -> None:
        if (self.manifest.grid, self.manifest.geometry) != (grid, geometry):
            raise ConfigError(
                f"{self.url} holds {self.manifest.grid} in {self.manifest.geometry}; asked for were {grid} in "
                f"{geometry}: use the archive's own, or another URL"
            )

    def _write_part(self, part: str) -> None:
        store = zarr_store(self.url, read_only=False)
        zarr.open_group(store, mode="a", zarr_format=3).require_group("parts")
        group = zarr.open_group(zarr_store(join(self.url, "parts", part), read_only=False), mode="w-", zarr_format=3)
        for name in self._waiting[0][1].arrays():
            stacked = np.stack([sample.arrays()[name] for _, sample in self._waiting])
            group.create_array(
                name,
                shape=stacked.shape,
                dtype=stacked.dtype,
                chunks=(1, *stacked.shape[1:]),
                shards=stacked.shape,
                compressors=(
                    BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=stacked.dtype.itemsize),
                    Crc32cCodec(),
                ),
                config={"write_empty_chunks": True},
            )[:] = stacked


def latest_manifest(folder: Folder) -> Manifest:
    """The archive's newest manifest, or NoArchive where nothing was published."""
    pruned = ""
    while True:
        names = _manifests(folder)
        if not names:
            raise NoArchive(f"{folder.url} holds no raylift archive: make one with raylift ingest or raylift phantom")
        where = join(folder.url, "manifests", names[-1])
        try:
            return Manifest.from_json(folder.read(f"manifests/{names[-1]}"), where)
        except FileNotFoundError as error:
            # Pruned by a writer between listing and reading: list again.
            if names[-1] == pruned:
                raise ArchiveError(f"{where} is listed but cannot be read") from error
            pruned = names[-1]


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes in C order."""
    total = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _manifest_name(generation: int) -> str:
    return f"manifests/{generation:06d}.json"


def _manifests(folder: Folder) -> list[str]:
    """Published manifests, oldest first; what a writer has put beside them meanwhile is not among them."""
    return [name for name in folder.names("manifests") if name.endswith(".json") and not name.startswith(".")]


def _named(manifest: Manifest, written: list[Entry]) -> list[Entry]:
    """The entries whose source the manifest lacks, with a split by its rule and ids that it does not have yet."""
    known = {entry.source_sha256 for entry in manifest.entries}
    taken = {entry.id for entry in manifest.entries}
    fresh = []
    for entry in written:
        if entry.source_sha256 in known:
            continue
        unique, number = entry.id, 1
        while unique in taken:
            number += 1
            unique = f"{entry.id}-{number}"
        fresh.append(replace(entry, id=unique, split=manifest.split_rule.split(entry.subject)))
        known.add(entry.source_sha256)
        taken.add(unique)
    return fresh
