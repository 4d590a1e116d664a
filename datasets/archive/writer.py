"""Writing an archive: samples become shards, and each full shard is published in the next manifest."""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from raylift.datasets.archive.archive import RadiographSample, Sample, digest
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.index import KnownKeys
from raylift.datasets.archive.manifest import Contents, Manifest, latest_manifest, new_entries, prune, publish
from raylift.datasets.archive.splits import SplitRule
from raylift.datasets.archive.store import Folder, absolute, join, require_reachable, store_errors, zarr_store
from raylift.datasets.errors import ArchiveError, ArchiveNotFoundError, ConfigError
from raylift.datasets.geometry import Geometry, Grid

MANIFESTS_KEPT = 5


class ArchiveWriter:
    """Adds samples to an archive and publishes each full part.

    A context manager: on a normal exit it publishes the remaining samples, after an exception it discards them.
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
            raise ConfigError(f"{samples_per_shard} samples per shard: give 1 or more")
        require_reachable(url)
        self.url = absolute(url)
        self.samples_per_shard = samples_per_shard
        self.published: list[Entry] = []
        """Entries that this writer has added to the archive."""
        self.superseded = 0
        """Number of samples given to this writer whose source was already published, or was published concurrently."""
        self._folder = Folder(self.url)
        self._pending: list[tuple[Entry, Sample | RadiographSample]] = []
        try:
            self.manifest: Manifest = latest_manifest(self._folder)
        except ArchiveNotFoundError:
            self.manifest = Manifest(grid, geometry, split_rule or SplitRule(), contents=contents)
        if split_rule is not None and self.manifest.split_rule != split_rule:
            raise ConfigError(f"{self.url} was split by {self.manifest.split_rule}, which cannot change later")
        self._known = KnownKeys(self.manifest.entries)
        self._require(grid, geometry, contents)

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.publish()

    def contains(self, source_sha256: str) -> bool:
        """Whether a source with that digest is published or pending."""
        return self._known.has_source(source_sha256) or any(e.source_sha256 == source_sha256 for e, _ in self._pending)

    def add(self, entry: Entry, sample: Sample | RadiographSample) -> None:
        """Add a sample; it gets its split and a unique id when its part is published.

        Raises:
            ConfigError: the sample is not of the archive's contents.
        """
        if isinstance(sample, Sample) != (self.manifest.contents == "volumes"):
            raise ConfigError(f"{self.url} holds {self.manifest.contents}, and {entry.id} is another kind of sample")
        if self.contains(entry.source_sha256):
            self.superseded += 1
            return
        self._pending.append((entry, sample))
        if len(self._pending) >= self.samples_per_shard:
            self.publish()

    def publish(self) -> None:
        """Write the pending samples as a part and publish the manifest that lists them."""
        if not self._pending:
            return
        part = uuid.uuid4().hex[:12]
        with store_errors(self.url):
            self._write_part(part)
        written = [
            replace(entry, part=part, index=k, sha256={name: digest(array) for name, array in sample.arrays().items()})
            for k, (entry, sample) in enumerate(self._pending)
        ]
        while new := new_entries(self.manifest.split_rule, self._known, written):
            try:
                self.manifest = publish(self._folder, self.manifest, new)
                self._known.add(new)
                break
            except (FileExistsError, FileNotFoundError) as error:
                # Another writer published first: its samples are kept, and these follow under the next number.
                own, self.manifest = self.manifest, latest_manifest(self._folder)
                if own.snapshot == self.manifest.snapshot:
                    raise ArchiveError(f"{self.url}, snapshot {own.snapshot}: {error}") from error
                self._known.add(self.manifest.entries)
                self._require(own.grid, own.geometry, own.contents)
                if self.manifest.split_rule.assigned != own.split_rule.assigned:
                    raise ConfigError(
                        f"{self.url} was just made by another writer with other subjects assigned to splits by hand: "
                        "use another URL, or its assignment"
                    ) from None
        self.published += new
        self.superseded += len(written) - len(new)
        self._pending = []
        prune(self._folder, MANIFESTS_KEPT)

    def _require(self, grid: Grid, geometry: Geometry, contents: Contents) -> None:
        if self.manifest.contents != contents:
            raise ConfigError(f"{self.url} holds {self.manifest.contents}, not {contents}: use another URL")
        if (self.manifest.grid, self.manifest.geometry) != (grid, geometry):
            raise ConfigError(
                f"{self.url} holds {self.manifest.grid} in {self.manifest.geometry}; requested were {grid} in "
                f"{geometry}: use the archive's own, or another URL"
            )

    def _write_part(self, part: str) -> None:
        store = zarr_store(self.url, read_only=False)
        zarr.open_group(store, mode="a", zarr_format=3).require_group("parts")
        group = zarr.open_group(zarr_store(join(self.url, "parts", part), read_only=False), mode="w-", zarr_format=3)
        for name in self._pending[0][1].arrays():
            stacked = np.stack([sample.arrays()[name] for _, sample in self._pending])
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
