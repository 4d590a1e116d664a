"""Source files of samples: scans, DICOM series and pairs of radiographs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raylift.datasets.errors import FileError


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
    """Whether a file is one in which macOS keeps the attributes of another of the same name."""
    return path.name.startswith("._")


def walk(roots: Iterable[Path], refused: list[FileError]) -> Iterator[tuple[Path, bool]]:
    """Yield every file once, with whether it was found in a folder, links followed.

    Refused are paths that are neither, folders that cannot be read, links to nothing, and names that are not UTF-8,
    with which ITK ends the process.
    """
    seen: set[Path] = set()
    for root in roots:
        if not root.is_file() and not root.is_dir():  # pipes would block
            refused.append(FileError(f"{root}: no such file or folder"))
            continue
        paths = sorted(_search(root, refused)) if root.is_dir() else [root]
        absent, misnamed = [], []
        for path in paths:
            if path.is_symlink() and not path.exists():
                absent.append(path)
            elif not _is_utf8(path):
                misnamed.append(path)
            elif path.is_file() and path.resolve() not in seen:
                seen.add(path.resolve())
                yield path, root.is_dir()
        refuse_together(refused, absent, "a link to a file that does not exist: fetch the file, or remove the link")
        refuse_together(refused, misnamed, "the name is not in UTF-8: rename it")


def refuse_together(refused: list[FileError], paths: Sequence[Path], reason: str) -> None:
    """Add one refusal of files with the same reason, with the path of the first and their number."""
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        shown = str(paths[0]).encode(errors="backslashreplace").decode()
        refused.append(FileError(f"{shown}{more}: {reason}"))


def _search(root: Path, refused: list[FileError]) -> Iterator[Path]:
    """All paths below a folder that are not folders. Links to folders in it are not followed, to others once."""
    top = os.path.realpath(root)
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        refuse_together(refused, [Path(error.filename)], f"the folder cannot be read: {error.strerror}")

    for folder, names, files in os.walk(root, onerror=refuse, followlinks=True):
        visited.add(os.path.realpath(folder))
        names[:] = [
            name
            for name in names
            if not os.path.islink(path := os.path.join(folder, name))
            or (not Path(target := os.path.realpath(path)).is_relative_to(top) and target not in visited)
        ]
        yield from (Path(folder, name) for name in files)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
