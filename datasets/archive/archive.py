"""The archive: samples as Zarr v3 arrays, listed in an index.

A sample is a CT with its digitally reconstructed radiographs (DRRs) and labels or, in an archive whose contents are
"radiographs", radiographs without CT.

```
<url>/zarr.json                     a Zarr group, so that `zarr.open_group(url)` lists the arrays
<url>/parts/<id>/volumes            int16 HU (n, D, H, W), one volume per chunk, the part's volumes in one shard
<url>/parts/<id>/radiographs        float32 (n, view, rows, columns): line integrals of DRRs, or prepared images
<url>/parts/<id>/labels             uint8 (n, D, H, W), values of `segmentation.Label`
<url>/index/<sha256>...             grid, geometry and every sample
<url>/manifests/000007.json         which objects of the index are an archive's; the highest number is current
```

Parts never change once written. Publishing creates the next manifest atomically: an interrupted run leaves the archive
as it was, and of two concurrent writers the second merges the first's samples and retries with the next number. A part
that no entry names was left by an interrupted run.

The index stores the SHA-256 of every array, which is verified at every read, because Zarr returns its fill value for
a missing chunk without an error. Chunks also have a CRC-32C, which detects damaged ones.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Float32, Int16, UInt8

from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.manifest import Manifest, manifest_at
from raylift.datasets.archive.splits import Split
from raylift.datasets.archive.store import Folder, absolute, join, require_reachable, store_errors, zarr_store
from raylift.datasets.errors import ConfigError, CorruptSampleError, StoreError


@dataclass(frozen=True)
class RadiographSample:
    """Radiographs of one subject without CT, in memory."""

    radiographs: Float32[np.ndarray, "views rows columns"]
    """In [0, 1], as `preparation.prepare` returns them, one image per view of the archive's geometry."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names in a part."""
        return {"radiographs": self.radiographs}


@dataclass(frozen=True)
class PairedSample:
    """A CT and its DRRs, in memory."""

    volume: Int16[np.ndarray, "d h w"]
    """HU in volume order."""
    radiographs: Float32[np.ndarray, "views rows columns"]
    """Line integrals, one image per view of the archive's geometry."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names in a part."""
        return {"volumes": self.volume, "radiographs": self.radiographs}


@dataclass(frozen=True)
class Sample(PairedSample):
    """Everything that an archive stores of one scan."""

    labels: UInt8[np.ndarray, "d h w"]
    """Values of `segmentation.Label`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by their names in a part."""
        return {**super().arrays(), "labels": self.labels}


class Archive:
    """A snapshot of a published archive, opened for reading. Thread-safe; other processes open their own."""

    def __init__(self, url: str, snapshot: int | Literal["latest"] = "latest") -> None:
        require_reachable(url)
        self.url = absolute(url)
        self.manifest: Manifest = manifest_at(Folder(self.url), snapshot)
        self._arrays: dict[tuple[str, str], zarr.Array[Any]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Archive], tuple[str, int]]:
        return Archive, (self.url, self.manifest.snapshot)

    def entries(self, split: Split | None = None) -> list[Entry]:
        """The samples of a split, or all samples, sorted by id."""
        chosen = (entry for entry in self.manifest.entries if split is None or entry.split == split)
        return sorted(chosen, key=lambda entry: entry.id)

    def require_volumes(self, consumer: str) -> None:
        """Raise a ConfigError that names the consumer if the archive has no CT."""
        if self.manifest.contents != "volumes":
            raise ConfigError(
                f"{self.url} holds radiographs without CT, and {consumer} needs CT: "
                "give an archive made by raylift ingest or raylift phantom"
            )

    def read(self, entry: Entry) -> Sample:
        """All stored arrays of one sample, each verified against its digest.

        Raises:
            ConfigError: the archive holds radiographs without CT.
            CorruptSampleError: an array is missing or differs from what was written.
            StoreError: the object store did not respond after retries.
        """
        pair = self.read_pair(entry)
        return Sample(pair.volume, pair.radiographs, self.read_array(entry, "labels"))

    def read_pair(self, entry: Entry) -> PairedSample:
        """`read` without the labels."""
        return PairedSample(self.read_array(entry, "volumes"), self.read_array(entry, "radiographs"))

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """One array of a sample, verified against its digest; raises the errors of `read`."""
        if name != "radiographs":
            self.require_volumes(f"reading {name}")
        try:
            with store_errors(self.url):
                array = np.asarray(self._array(entry.part, name)[entry.index])
        except StoreError:
            raise
        except Exception as error:
            # For a damaged chunk, index or header Zarr and its codecs raise any exception, even MemoryError.
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

    def _corrupt(self, entry: Entry, name: str, defect: str) -> CorruptSampleError:
        key = join(self.url, "parts", entry.part, name)
        return CorruptSampleError(
            f"sample {entry.id}: chunk {entry.index} of {key} {defect} (sha256 {entry.sha256[name]}): "
            "restore the object, or merge the archive into a new one (raylift archive merge) and ingest the scan there"
        )


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and bytes in C order."""
    total = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
