"""Finding and reading CT scans in HU; files that are no CT, incomplete or too large are refused.

SimpleITK reads all formats, so orientation and spacing come from the file. `dicom_series` and `volume_file` check what
it accepts without an error. All limits are checked from the header, before any voxel is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from raylift.datasets.errors import RefusedFile
from raylift.datasets.scans import dicom_series, volume_file
from raylift.datasets.scans.header_checks import DEFAULT_LIMITS, ScanLimits
from raylift.datasets.sources import Source, pseudonym, walk


@dataclass(frozen=True)
class Scan:
    """A CT in HU on its original grid."""

    source: Source
    image: sitk.Image
    orientation: str
    """Directions of the file's axes in the patient: LPS, RAI ..."""

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Spacing along the file's axes."""
        return tuple(round(value, 4) for value in self.image.GetSpacing())


@dataclass(frozen=True)
class Found:
    """Result of a search of files and folders."""

    sources: list[Source] = field(default_factory=list)
    refused: list[RefusedFile] = field(default_factory=list)
    skipped: int = 0
    """Files in searched folders that are neither volumes nor DICOM."""


def find(paths: Iterable[Path]) -> Found:
    """All candidate scans under files and folders, sorted by name; DICOM files are grouped by series."""
    found = Found()
    slices: dict[tuple[str, str], list[Path]] = defaultdict(list)
    others: list[Path] = []
    for path, searched in walk(paths, found.refused):
        try:
            if suffix := volume_file.suffix(path):
                files = (path, *volume_file.data_files(path))
                found.sources.append(Source(path.name, path.name[: -len(suffix)], files))
            elif key := dicom_series.key(path):
                slices[key].append(path)
            elif searched:
                others.append(path)
            else:
                kinds = ", ".join(volume_file.SUFFIXES)
                found.refused.append(RefusedFile(f"{path}: not a volume raylift reads ({kinds} or DICOM)"))
        except RefusedFile as error:
            found.refused.append(error)
        except Exception as error:
            # One unreadable file must not end the search, and on a damaged one pydicom raises any exception.
            found.refused.append(RefusedFile(f"{path}: cannot be read: {error!r}"))
    data_files = {path for source in found.sources for path in source.files[1:]}
    for (_, patient), members in slices.items():
        folder = members[0].parent
        shared = len(members) == 1 or sum(other[0].parent == folder for other in slices.values()) > 1
        name = f"{folder.name}/{members[0].name}" if shared else folder.name
        found.sources.append(Source(name, pseudonym(patient), tuple(members), is_dicom=True))
    return Found(found.sources, found.refused, skipped=len(set(others) - data_files))


def read(source: Source, limits: ScanLimits = DEFAULT_LIMITS) -> Scan:
    """The scan in HU.

    Raises:
        RefusedFile: not a CT, missing or duplicate slices, not 3-D, not in HU, truncated, or over the limits.
    """
    total = source.stored_bytes
    if total > limits.max_file_bytes:
        raise RefusedFile(
            f"{source.where}: {total} bytes, over the limit of {limits.max_file_bytes} (--limits.max-file-bytes)"
        )
    image = (dicom_series if source.is_dicom else volume_file).read(source, limits)
    _check_hu(source.where, sitk.GetArrayViewFromImage(image))
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
    return Scan(source, image, orientation)


def _check_hu(name: str, voxels: np.ndarray) -> None:
    if not all(np.isfinite(plane).all() for plane in voxels):
        raise RefusedFile(f"{name}: NaN or infinite voxels: set them to -1024")
    sample = np.asarray(voxels[:: max(1, voxels.shape[0] // 64), ::4, ::4], dtype=np.float32)
    # Padding of -2000 and less also occurs in files that are not in HU, so it does not count as air.
    air = float(((sample > -1200) & (sample < -500)).mean())
    tissue = float(((sample > -200) & (sample < 300)).mean())
    low, high = float(sample.min()), float(sample.max())
    if air < 0.01 or tissue < 0.01:
        hint = "it looks like HU + 1024: subtract 1024" if low >= 0 and high > 1100 else "convert it to HU"
        raise RefusedFile(f"{name}: values {low:g} to {high:g} are not in HU (no air near -1000): {hint}")
