"""Limits on a scan's header: size, extent and bytes are checked before any voxel is read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raylift.datasets.errors import FileError
from raylift.datasets.sources import Source

LONGEST_MM, WIDEST_MM = 2500.0, 1000.0
"""Larger than any scanner's table and bore: at most one side of a scan exceeds a meter."""


@dataclass(frozen=True)
class ScanLimits:
    """The largest scan that is read. The defaults accept a CT of 512 x 512 x 2000 voxels."""

    max_voxels: int = 2**30
    """Voxels in all."""
    max_side: int = 4096
    """Most voxels along an axis."""
    max_file_bytes: int = 8 * 2**30
    """Bytes of a file."""
    min_side: int = 8
    """Fewest voxels along an axis."""


DEFAULT_LIMITS = ScanLimits()


def check_size(name: str, size: Sequence[int], limits: ScanLimits) -> None:
    """Refuse an image that is not one volume of enough slices, or exceeds the limits."""
    shown = " x ".join(str(n) for n in size)
    if len(size) < 3 or min(size[:3]) < limits.min_side:
        raise FileError(f"{name}: {shown} voxels is not a volume of {limits.min_side} slices or more")
    if any(n != 1 for n in size[3:]):
        raise FileError(f"{name}: {shown} voxels is a series of volumes: extract one")
    if max(size) > limits.max_side:
        raise FileError(f"{name}: {shown} voxels, over the limit of {limits.max_side} per side (--limits.max-side)")
    if math.prod(size) > limits.max_voxels:
        raise FileError(f"{name}: {shown} voxels, over the limit of {limits.max_voxels} (--limits.max-voxels)")


def check_extent(name: str, size: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Refuse a spacing or an extent that no scanner produces."""
    if not all(0.05 <= value <= 20 for value in spacing_mm[:3]):
        raise FileError(f"{name}: spacing {tuple(spacing_mm[:3])} mm is not that of a CT: correct it in the header")
    extent = [n * value for n, value in zip(size[:3], spacing_mm[:3], strict=True)]
    if max(extent) > LONGEST_MM or sorted(extent)[1] > WIDEST_MM:
        shown = " x ".join(f"{value:.0f}" for value in extent)
        raise FileError(f"{name}: {shown} mm is larger than any scanner: correct the spacing in the header")


def check_bytes(source: Source, size: Sequence[int], voxel_bytes: int) -> None:
    """Refuse a header with more voxels of this many bytes than its files can contain, however compressed."""
    stored = source.stored_bytes
    if math.prod(size) * voxel_bytes > 1032 * stored:  # the highest ratio of deflate
        raise FileError(f"{source.where}: {stored} bytes cannot hold its {math.prod(size)} voxels: it is truncated")


def check_length(path: Path, count: int, expected: int, unit: str, *, is_whole: bool = True) -> None:
    """Refuse voxel data of another length than the header states.

    Args:
        path: the file with the header.
        count: number found; a lower bound unless `is_whole`.
        expected: number that the header states.
        unit: what is counted.
        is_whole: whether `count` is the number of all.
    """
    if count < expected:
        raise FileError(f"{path}: {count} {unit} of voxels where its header states {expected}: it is truncated")
    if count > expected:
        raise FileError(
            f"{path}: {'' if is_whole else 'at least '}{count} {unit} of voxels where its header states {expected}: "
            "correct its size, type or number of bytes before the voxels, or remove what follows them"
        )


def itk_message(error: Exception) -> str:
    """The last line of an ITK error, without the names of its functions and addresses of its objects."""
    last = str(error).strip().splitlines()[-1].strip()
    return re.sub(r"^(?:\[nrrd\] \w+: |(?:itk::|sitk::|ITK )ERROR: |\w+\(0x[0-9a-fA-F]+\): )+", "", last)
