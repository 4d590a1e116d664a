"""The manifest: a numbered, immutable JSON file that lists the contents of an archive.

```
<url>/manifests/000007.json         grid, geometry and every sample; the highest number is current
```
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raylift import __version__
from raylift.datasets.archive.splits import Split, SplitRule
from raylift.datasets.archive.store import Folder, join
from raylift.datasets.errors import ArchiveError, ArchiveNotFoundError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.serialization import from_plain, to_plain

FORMAT, FORMAT_VERSION, MASKED_FORMAT_VERSION = "raylift-archive", 1, 2
"""A manifest has the second version if labels of an entry mask its field of view, which a reader must not ignore."""

Contents = Literal["volumes", "radiographs"]
"""CT with digitally reconstructed radiographs (DRRs) and labels, or real radiographs without CT."""


@dataclass(frozen=True)
class Entry:
    """One sample in the manifest."""

    id: str
    subject: str
    source: str
    """Name of the source file or series, without its folder."""
    source_sha256: str
    license: str
    label_method: Literal["threshold", "phantom", "none"]
    record: dict[str, Any]
    """Provenance: a scan's original size, spacing and orientation, a phantom's seed, or a radiograph's orientation."""
    split: Split = "train"
    part: str = ""
    index: int = -1
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def has_field_of_view_mask(self) -> bool:
        """Whether any voxel of its labels is `Label.OUTSIDE_FIELD_OF_VIEW`."""
        record = self.record
        # Records of an earlier raylift lack the fraction.
        return record.get("beyond_field_of_view") == "mask" and record.get("masked_fraction") != 0


@dataclass(frozen=True)
class Manifest:
    """The contents of an archive."""

    grid: Grid
    geometry: Geometry
    split_rule: SplitRule = field(default_factory=SplitRule)
    snapshot: int = 0
    entries: tuple[Entry, ...] = ()
    contents: Contents = "volumes"
    """For radiographs without CT, grid and geometry describe the volumes and poses that they are intended for."""
    samples_at: tuple[int, ...] = ()
    """Number of entries at each snapshot from 1 to this one; 0 where an older raylift did not record it."""

    def with_entries(self, new: list[Entry]) -> Manifest:
        """The next snapshot, with new entries after the others."""
        entries = (*self.entries, *new)
        unknown = (0,) * (self.snapshot - len(self.samples_at))
        counts = (*self.samples_at, *unknown, len(entries))
        return replace(self, snapshot=self.snapshot + 1, entries=entries, samples_at=counts)

    def at(self, snapshot: int) -> Manifest | None:
        """An earlier snapshot, whose entries are the first ones of this one; None if their number is unknown."""
        if snapshot == self.snapshot:
            return self
        counts = self.samples_at[:snapshot] if 0 < snapshot < self.snapshot else ()
        if len(counts) < snapshot or not counts or not counts[-1]:
            return None
        return replace(self, snapshot=snapshot, entries=self.entries[: counts[-1]], samples_at=counts)

    def sha256(self) -> str:
        """A digest of everything that samples and their order depend on; the same in a copy of the archive."""
        contents = (self.grid, self.geometry, self.contents, self.entries)
        return hashlib.sha256(json.dumps([to_plain(part) for part in contents], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The manifest file."""
        masked = any(entry.has_field_of_view_mask for entry in self.entries)
        version = MASKED_FORMAT_VERSION if masked else FORMAT_VERSION
        head = {"format": FORMAT, "version": version, "written_by": f"raylift {__version__}"}
        plain = to_plain(self)
        if self.contents == "volumes":
            # The default is left out.
            del plain["contents"]
        if not self.samples_at:
            del plain["samples_at"]
        return json.dumps({**head, "archive": plain}, indent=1).encode()

    @classmethod
    def from_json(cls, raw: bytes, where: str) -> Manifest:
        """Parse a manifest file.

        Raises:
            ArchiveError: it is not a manifest, or of another format version.
        """
        try:
            data = json.loads(raw)
            written = (data["format"], data["version"])
            if written in ((FORMAT, FORMAT_VERSION), (FORMAT, MASKED_FORMAT_VERSION)):
                return from_plain(cls, data["archive"], where)
        except (KeyError, TypeError, ValueError) as error:
            raise ArchiveError(f"{where} is not a raylift manifest: {error!r}") from error
        raise ArchiveError(
            f"{where} is {written}; this raylift reads {FORMAT} {FORMAT_VERSION} and {MASKED_FORMAT_VERSION}"
        )


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
        where = join(folder.url, "manifests", names[-1])
        try:
            return Manifest.from_json(folder.read(f"manifests/{names[-1]}"), where)
        except FileNotFoundError as error:
            # Pruned by a writer between listing and reading: list again.
            if names[-1] == pruned:
                raise ArchiveError(f"{where} is listed but cannot be read") from error
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
        name = manifest_path(snapshot)
        return Manifest.from_json(folder.read(name), join(folder.url, name))
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


def new_entries(manifest: Manifest, written: list[Entry]) -> list[Entry]:
    """The entries whose source is not in the manifest, with their splits by its rule and unique ids."""
    known = {entry.source_sha256 for entry in manifest.entries}
    taken = {entry.id for entry in manifest.entries}
    new = []
    for entry in written:
        if entry.source_sha256 in known:
            continue
        unique, number = entry.id, 1
        while unique in taken:
            number += 1
            unique = f"{entry.id}-{number}"
        new.append(replace(entry, id=unique, split=manifest.split_rule.split(entry.subject)))
        known.add(entry.source_sha256)
        taken.add(unique)
    return new
