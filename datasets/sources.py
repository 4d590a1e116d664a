"""Files that may become samples, and what a scan's header may claim: all of it is checked before a voxel is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from raylift.datasets.errors import RefusedFile

LONGEST_MM, WIDEST_MM = 2500.0, 1000.0
"""More than any scanner's table and bore: at most one side of a scan is over a meter."""

BYTES = {
    sitk.sitkUInt8: 1, sitk.sitkInt8: 1, sitk.sitkUInt16: 2, sitk.sitkInt16: 2, sitk.sitkUInt32: 4, sitk.sitkInt32: 4,
    sitk.sitkUInt64: 8, sitk.sitkInt64: 8, sitk.sitkFloat32: 4, sitk.sitkFloat64: 8,
}  # fmt: skip
"""Width of a voxel, for the types that a CT may have."""


@dataclass(frozen=True)
class ScanLimits:
    """The largest scan that is read. A 512 x 512 x 2000 CT passes the defaults."""

    max_voxels: int = 2**30
    max_side: int = 4096
    max_file_bytes: int = 8 * 2**30
    min_slices: int = 8


DEFAULT_LIMITS = ScanLimits()


@dataclass(frozen=True)
class Source:
    """One candidate: a volume file, the files of one DICOM series, or the radiographs of one person."""

    name: str
    subject: str
    files: tuple[Path, ...]
    """A volume file and what holds its voxels where that is another; or the slices of a series in any order."""
    is_dicom: bool = False

    @property
    def where(self) -> str:
        """Its path, for messages; the name alone goes into archives."""
        rest = len(self.files) - 1
        return f"{self.files[0]} and {rest} more" if self.is_dicom and rest else str(self.files[0])

    @property
    def stored_bytes(self) -> int:
        """What all its files take on disk."""
        return sum(path.stat().st_size for path in self.files)

    def digest(self) -> str:
        """SHA-256 over the bytes of all files, in order of their names."""
        total = hashlib.sha256()
        for path in sorted(self.files):
            with path.open("rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    total.update(block)
        return total.hexdigest()


def walk(roots: Iterable[Path], refused: list[RefusedFile]) -> Iterator[tuple[Path, bool]]:
    """Every file once, and whether it was searched for in a folder; what is neither file nor folder is refused."""
    seen: set[Path] = set()
    for root in roots:
        if not root.is_file() and not root.is_dir():  # nor a pipe, which would be waited for
            refused.append(RefusedFile(f"{root}: no such file or folder"))
            continue
        for path in sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path, root.is_dir()


def check_size(name: str, size: Sequence[int], limits: ScanLimits) -> None:
    """Refuse what is not one volume of some slices, or is over the limits."""
    shown = " x ".join(str(n) for n in size)
    if len(size) < 3 or min(size[:3]) < limits.min_slices:
        raise RefusedFile(f"{name}: {shown} voxels is not a volume of {limits.min_slices} slices or more")
    if any(n != 1 for n in size[3:]):
        raise RefusedFile(f"{name}: {shown} voxels is a series of volumes: extract one")
    if max(size) > limits.max_side:
        raise RefusedFile(f"{name}: {shown} voxels, over the limit of {limits.max_side} a side (--limits.max-side)")
    if math.prod(size) > limits.max_voxels:
        raise RefusedFile(f"{name}: {shown} voxels, over the limit of {limits.max_voxels} (--limits.max-voxels)")


def check_extent(name: str, size: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Refuse a spacing or an extent that no scanner has."""
    if not all(0.05 <= value <= 20 for value in spacing_mm[:3]):
        raise RefusedFile(f"{name}: spacing {tuple(spacing_mm[:3])} mm is not that of a CT: correct it in the header")
    extent = [n * value for n, value in zip(size[:3], spacing_mm[:3], strict=True)]
    if max(extent) > LONGEST_MM or sorted(extent)[1] > WIDEST_MM:
        shown = " x ".join(f"{value:.0f}" for value in extent)
        raise RefusedFile(f"{name}: {shown} mm is more than a scanner holds: correct the spacing in the header")


def check_bytes(source: Source, size: Sequence[int], pixel: int) -> None:
    """Refuse a header that claims more voxels of that SimpleITK type than any compression could put into its files."""
    stored = source.stored_bytes
    if math.prod(size) * BYTES[pixel] > 1032 * stored:  # the best that deflate can do
        raise RefusedFile(f"{source.where}: {stored} bytes cannot hold its {math.prod(size)} voxels: it is truncated")


def last_line(error: Exception) -> str:
    """What ITK says went wrong, without where in its sources."""
    return str(error).strip().splitlines()[-1].strip()
