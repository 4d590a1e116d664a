"""Source files of samples: scans, DICOM series and pairs of radiographs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raylift.datasets.errors import RefusedFile


@dataclass(frozen=True)
class Source:
    """One candidate: a volume file, the files of a DICOM series, or the radiographs of one subject."""

    name: str
    subject: str
    files: tuple[Path, ...]
    """A volume file and its separate voxel file if it has one, or the slices of a series in any order."""
    is_dicom: bool = False

    @property
    def where(self) -> str:
        """Its path, for messages; archives store only the name."""
        rest = len(self.files) - 1
        return f"{self.files[0]} and {rest} more" if self.is_dicom and rest else str(self.files[0])

    @property
    def stored_bytes(self) -> int:
        """Total size of its files on disk."""
        return sum(path.stat().st_size for path in self.files)

    def digest(self) -> str:
        """SHA-256 over the bytes of all files, sorted by name."""
        total = hashlib.sha256()
        for path in sorted(self.files):
            with path.open("rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    total.update(block)
        return total.hexdigest()


def pseudonym(patient_id: str) -> str:
    """A stable pseudonym: patient identifiers are not stored in archives, and splits by subject still hold."""
    return "sub-" + hashlib.sha256(patient_id.encode()).hexdigest()[:12]


def is_apple_double(path: Path) -> bool:
    """Whether a file is one that macOS writes beside another of the same name, for its attributes."""
    return path.name.startswith("._")


def walk(roots: Iterable[Path], refused: list[RefusedFile]) -> Iterator[tuple[Path, bool]]:
    """Yield every file once, with whether it was found in a folder; paths that are neither are refused."""
    seen: set[Path] = set()
    for root in roots:
        if not root.is_file() and not root.is_dir():  # pipes would block
            refused.append(RefusedFile(f"{root}: no such file or folder"))
            continue
        for path in sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path, root.is_dir()
