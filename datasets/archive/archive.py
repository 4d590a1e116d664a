"""The archive: samples as Zarr v3 arrays, with a manifest that names every one.

A sample is a CT with its projections and labels, or, in an archive that says so, radiographs without CT.

```
<url>/zarr.json                     a Zarr group, so that `zarr.open_group(url)` shows what is inside
<url>/parts/<id>/volumes            int16 HU (n, D, H, W), one volume a chunk, the part's volumes in one shard
<url>/parts/<id>/radiographs        float32 (n, view, rows, columns): line integrals, or `radiograph.prepare`d images
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
import threading
import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float32, Int16, UInt8
from zarr.codecs import BloscCodec, Crc32cCodec

from raylift.datasets.archive import manifest as manifests
from raylift.datasets.archive.manifest import Contents, Entry, Manifest, latest_manifest
from raylift.datasets.archive.splits import Split, SplitRule
from raylift.datasets.archive.store import Folder, absolute, join, store_errors, zarr_store
from raylift.datasets.errors import ConfigError, CorruptSample, NoArchive, StoreUnreachable
from raylift.datasets.geometry import Geometry, Grid

__all__ = [
    "Archive",
    "ArchiveWriter",
    "Contents",
    "Entry",
    "Manifest",
    "PairedSample",
    "RadiographSample",
    "Sample",
    "digest",
    "latest_manifest",
]

MANIFESTS_KEPT = 5


@dataclass(frozen=True)
class RadiographSample:
    """Radiographs of one person without CT, in memory."""

    radiographs: Float32[np.ndarray, "views rows columns"]
    """In [0, 1], as `radiograph.prepare` makes them, one image for each view of the archive's geometry."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names they have in a part."""
        return {"radiographs": self.radiographs}


@dataclass(frozen=True)
class PairedSample:
    """A CT and its radiographs, in memory."""

    volume: Int16[np.ndarray, "d h w"]
    """HU in volume order."""
    radiographs: Float32[np.ndarray, "views rows columns"]
    """Line integrals, one image for each view of the archive's geometry."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names they have in a part."""
        return {"volumes": self.volume, "radiographs": self.radiographs}


@dataclass(frozen=True)
class Sample(PairedSample):
    """All that an archive stores of one scan."""

    labels: UInt8[np.ndarray, "d h w"]
    """Values of `segmentation.Label`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names they have in a part."""
        return {**super().arrays(), "labels": self.labels}


class Archive:
    """A published archive, for reading. Threads may share it; processes each open their own."""

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self.manifest: Manifest = latest_manifest(Folder(self.url))
        self._arrays: dict[tuple[str, str], zarr.Array[Any]] = {}
        self._lock = threading.Lock()

    def entries(self, split: Split | None = None) -> list[Entry]:
        """The samples of a split, or all, in the order of their ids (not of their arrival)."""
        chosen = (entry for entry in self.manifest.entries if split is None or entry.split == split)
        return sorted(chosen, key=lambda entry: entry.id)

    def require_volumes(self, who: str) -> None:
        """Raise a ConfigError where the archive holds no CT, and say who needs it."""
        if self.manifest.contents != "volumes":
            raise ConfigError(
                f"{self.url} holds radiographs without CT, and {who} needs CT: "
                "give an archive made by raylift ingest or raylift phantom"
            )

    def read(self, entry: Entry) -> Sample:
        """All stored arrays of one sample, each checked against its digest.

        Raises:
            ConfigError: the archive holds radiographs without CT.
            CorruptSample: an array is missing or differs from what was written.
            StoreUnreachable: the object store did not answer, after retries.
        """
        pair = self.read_pair(entry)
        return Sample(pair.volume, pair.radiographs, self.read_array(entry, "labels"))

    def read_pair(self, entry: Entry) -> PairedSample:
        """`read` without the labels."""
        return PairedSample(self.read_array(entry, "volumes"), self.read_array(entry, "radiographs"))

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """One of a sample's arrays, checked against its digest; raises what `read` does."""
        if name != "radiographs":
            self.require_volumes(f"whoever reads {name}")
        try:
            with store_errors(self.url):
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
        samples_per_shard: int = 8,
        contents: Contents = "volumes",
    ) -> None:
        if samples_per_shard < 1:
            raise ConfigError(f"{samples_per_shard} samples a part: a part holds one or more")
        self.url = absolute(url)
        self.samples_per_shard = samples_per_shard
        self.published: list[Entry] = []
        """What this writer has added to the archive so far."""
        self.superseded = 0
        """Samples given to this writer whose source was there already, or was published by another meanwhile."""
        self._folder = Folder(self.url)
        self._waiting: list[tuple[Entry, Sample | RadiographSample]] = []
        try:
            self.manifest: Manifest = latest_manifest(self._folder)
        except NoArchive:
            self.manifest = Manifest(grid, geometry, split_rule or SplitRule(), contents=contents)
        if split_rule is not None and self.manifest.split_rule != split_rule:
            raise ConfigError(f"{self.url} was split by {self.manifest.split_rule}, which cannot change later")
        self._require(grid, geometry, contents)

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.publish()

    def contains(self, source_sha256: str) -> bool:
        """Whether a source of that digest is published or waiting."""
        known = (*self.manifest.entries, *(entry for entry, _ in self._waiting))
        return any(entry.source_sha256 == source_sha256 for entry in known)

    def add(self, entry: Entry, sample: Sample | RadiographSample) -> None:
        """Take a sample in; its split and a unique id are given to it when it is published with its part.

        Raises:
            ConfigError: it is not of the kind that the archive holds.
        """
        if isinstance(sample, Sample) != (self.manifest.contents == "volumes"):
            raise ConfigError(f"{self.url} holds {self.manifest.contents}, and {entry.id} is another kind of sample")
        if self.contains(entry.source_sha256):
            self.superseded += 1
            return
        self._waiting.append((entry, sample))
        if len(self._waiting) >= self.samples_per_shard:
            self.publish()

    def publish(self) -> None:
        """Write the waiting samples as a part and publish the manifest that names them."""
        if not self._waiting:
            return
        part = uuid.uuid4().hex[:12]
        with store_errors(self.url):
            self._write_part(part)
        written = [
            replace(entry, part=part, index=k, sha256={name: digest(array) for name, array in sample.arrays().items()})
            for k, (entry, sample) in enumerate(self._waiting)
        ]
        while fresh := manifests.new_entries(self.manifest, written):
            manifest = replace(
                self.manifest,
                generation=self.manifest.generation + 1,
                entries=(*self.manifest.entries, *fresh),
            )
            try:
                self._folder.create(manifests.manifest_path(manifest.generation), manifest.to_json())
                self.manifest = manifest
                break
            except FileExistsError:
                # Another writer was faster: its samples are kept, and ours follow under the next number.
                mine, self.manifest = self.manifest, latest_manifest(self._folder)
                self._require(mine.grid, mine.geometry, mine.contents)
                if self.manifest.split_rule.assigned != mine.split_rule.assigned:
                    raise ConfigError(
                        f"{self.url} was just made by another writer with other subjects assigned to splits by hand: "
                        "use another URL, or its assignment"
                    ) from None
        self.published += fresh
        self.superseded += len(written) - len(fresh)
        self._waiting = []
        for name in manifests.published_manifests(self._folder)[:-MANIFESTS_KEPT]:
            self._folder.remove(f"manifests/{name}")

    def _require(self, grid: Grid, geometry: Geometry, contents: Contents) -> None:
        if self.manifest.contents != contents:
            raise ConfigError(f"{self.url} holds {self.manifest.contents}, not {contents}: use another URL")
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


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes in C order."""
    total = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
