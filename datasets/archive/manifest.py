"""The manifest: a small JSON file that is the archive's table of contents, numbered, never changed.

```
<url>/manifests/000007.json         grid, geometry and every sample; the highest number is the archive
```
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raylift import __version__
from raylift.datasets.archive.splits import Split, SplitRule
from raylift.datasets.archive.store import Folder, join
from raylift.datasets.errors import ArchiveError, NoArchive
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.serialization import from_plain, to_plain

FORMAT, FORMAT_VERSION = "raylift-archive", 1

Contents = Literal["volumes", "radiographs"]
"""CT with radiographs projected from it and labels, or radiographs that were taken, without CT."""


@dataclass(frozen=True)
class Entry:
    """One sample in the manifest."""

    id: str
    subject: str
    source: str
    """Name of the file or series it came from, without its folder."""
    source_sha256: str
    license: str
    label_method: Literal["threshold", "phantom", "none"]
    record: dict[str, Any]
    """How the sample was made: a file's own size, spacing and orientation, a phantom's seed, or how a radiograph was
    hung."""
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
    contents: Contents = "volumes"
    """Of radiographs without CT, grid and geometry say for which volumes and poses they are meant."""

    def to_json(self) -> bytes:
        """The manifest file."""
        head = {"format": FORMAT, "version": FORMAT_VERSION, "written_by": f"raylift {__version__}"}
        plain = to_plain(self)
        if self.contents == "volumes":
            # As it was before there was another kind, so that what reads those archives reads these.
            del plain["contents"]
        return json.dumps({**head, "archive": plain}, indent=1).encode()

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


def latest_manifest(folder: Folder) -> Manifest:
    """The archive's newest manifest, or NoArchive where nothing was published."""
    pruned = ""
    while True:
        names = published_manifests(folder)
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


def manifest_path(generation: int) -> str:
    """Where a manifest of that number stands in the archive."""
    return f"manifests/{generation:06d}.json"


def published_manifests(folder: Folder) -> list[str]:
    """Published manifests, oldest first; what a writer has put beside them meanwhile is not among them."""
    return [name for name in folder.names("manifests") if name.endswith(".json") and not name.startswith(".")]


def new_entries(manifest: Manifest, written: list[Entry]) -> list[Entry]:
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
