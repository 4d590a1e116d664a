"""Finding and reading CT scans in HU; files that are no CT, incomplete or too large are refused.

`dicom_series` and `volume_file` return voxels and their affine, and what they changed, assumed or
preferred to a contradicting statement. All limits are checked from the header, before any voxel is read. Reading is a
pure function of the files and the options.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from raylift.datasets.errors import FileError, SegmentationMaskError
from raylift.datasets.scans import dicom_series, volume_file
from raylift.datasets.scans.header_checks import DEFAULT_LIMITS, ScanLimits
from raylift.datasets.scans.volume import check_order, fill_to_air, outliers_to_air, to_image
from raylift.datasets.sources import Source, is_apple_double, pseudonym, refuse_together, walk

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
"""Suffixes of files that are not passed over if they are not DICOM: a slice would be missing."""
MAX_LABELS = 128
"""Most distinct values of a segmentation mask."""
MIN_SOFT = 0.4
"""Least share of soft tissue in a body. It is 0.87 to 0.94 in 21 scans, and at most 0.08 with 1.5 times their slope."""


@dataclass(frozen=True)
class Scan:
    """A CT in HU on its original grid."""

    source: Source
    image: sitk.Image
    orientation: str
    """Directions of the file's axes in the patient: LPS, RAI ..."""
    changes: tuple[str, ...] = ()
    """What was changed, assumed, or preferred to a contradicting statement of the file, in sentences."""
    rescale: tuple[float, float] | None = (1.0, 0.0)
    """Slope and intercept of the stored values; None where slices of a series differ."""

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Spacing along the file's axes."""
        return tuple(round(value, 4) for value in self.image.GetSpacing())


@dataclass(frozen=True)
class Listing:
    """Result of a search of files and folders."""

    sources: list[Source] = field(default_factory=list)
    refused: list[FileError] = field(default_factory=list)
    skipped: int = 0
    """Files in searched folders that are neither volumes nor DICOM, and those of macOS with their attributes."""
    shared_subjects: list[tuple[Source, Source]] = field(default_factory=list)
    """Two scans of each subject that has several: volume files of one name in different folders, or DICOM series of
    one patient in different studies, or in one and `_are_apart`."""
    split_series: list[tuple[Source, Source]] = field(default_factory=list)
    """Two of the scans that have one SeriesInstanceUID and different patients or studies."""


def find(paths: Iterable[Path]) -> Listing:
    """All candidate scans under files and folders, sorted by name; DICOM files are grouped by series."""
    listing = Listing()
    slices: dict[dicom_series.Key, list[Path]] = defaultdict(list)
    studies: dict[str, list[tuple[str, Source]]] = defaultdict(list)
    series: dict[str, list[Source]] = defaultdict(list)
    others: list[Path] = []
    unread: list[Path] = []
    for path, searched in walk(paths, listing.refused):
        try:
            if is_apple_double(path):
                if not searched:
                    raise FileError(f"{path}: attributes that macOS wrote for a file: pass the file without ._")
                others.append(path)
            elif suffix := volume_file.suffix(path):
                files = (path, *volume_file.data_files(path))
                source = Source(path.name, path.name[: -len(suffix)], files)
                listing.sources.append(source)
                studies[source.subject].append((str(path.parent), source))
            elif key := dicom_series.key(path):
                slices[key].append(path)
            elif path.suffix.lower() in DICOM_SUFFIXES:
                unread.append(path)
            elif searched:
                others.append(path)
            else:
                kinds = ", ".join(volume_file.SUFFIXES)
                listing.refused.append(FileError(f"{path}: not a volume raylift reads ({kinds} or DICOM)"))
        except FileError as error:
            listing.refused.append(error)
        except Exception as error:
            # One unreadable file must not end the search, and on a damaged one pydicom raises any exception.
            listing.refused.append(FileError(f"{path}: cannot be read: {error!r}"))
    refuse_together(
        listing.refused, unread, "not DICOM in spite of the suffix, or empty: copy it again, or leave it out"
    )
    data_files = {path for source in listing.sources for path in source.files[1:]}
    for key, members in slices.items():
        folder = members[0].parent
        shared = len(members) == 1 or sum(other[0].parent == folder for other in slices.values()) > 1
        name = f"{folder.name}/{members[0].name}" if shared else folder.name
        source = Source(name, pseudonym(key.patient), tuple(members), is_dicom=True)
        listing.sources.append(source)
        studies[source.subject].append((key.study or str(folder), source))
        series[key.series].append(source)
    pairs = [
        (first, other)
        for (study, first), *rest in studies.values()
        if (other := next((source for own, source in rest if own != study or _are_apart(first, source)), None))
    ]
    split = [(sources[0], sources[1]) for sources in series.values() if len(sources) > 1]
    return Listing(listing.sources, listing.refused, len(set(others) - data_files), pairs, split)


def _are_apart(first: Source, second: Source) -> bool:
    """Whether two series lie in different folders and do not state the same frame of reference.

    Series of one session share it. Anonymized patients may share the UID of a study.
    """
    if not first.is_dicom or first.files[0].parent == second.files[0].parent:
        return False
    frame = dicom_series.frame_of_reference(first.files[0])
    return not frame or frame != dicom_series.frame_of_reference(second.files[0])


def read(source: Source, limits: ScanLimits = DEFAULT_LIMITS, assume_spacing_mm: Sequence[float] | None = None) -> Scan:
    """A CT in HU.

    Args:
        source: the files.
        limits: largest scan accepted.
        assume_spacing_mm: spacing of a NRRD or MetaImage that states none; see `text_header.header_geometry`.

    Raises:
        SegmentationMaskError: a volume of labels.
        FileError: not a CT, missing or duplicate slices, not 3-D, not in HU, truncated, torn, or over the limits.
    """
    scan = read_values(source, limits, assume_spacing_mm)
    stored = sitk.GetArrayViewFromImage(scan.image)
    _check_hu(source.where, stored)
    check_order(source.where, stored)
    voxels, changes = fill_to_air(source.where, stored)
    if not changes:
        return scan
    _check_hu(source.where, voxels)
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(scan.image)
    return replace(scan, image=image, changes=(*scan.changes, *changes))


def read_values(
    source: Source, limits: ScanLimits = DEFAULT_LIMITS, assume_spacing_mm: Sequence[float] | None = None
) -> Scan:
    """A volume whose values need not be those of a CT, such as a prediction of one; arguments and errors as in `read`.

    Raises:
        FileError: missing or duplicate slices, not 3-D, truncated, NaN or infinite, or over the limits.
    """
    total = source.stored_bytes
    if total > limits.max_file_bytes:
        raise FileError(
            f"{source.where}: {total} bytes, over the limit of {limits.max_file_bytes} (--limits.max-file-bytes)"
        )
    volume = (
        dicom_series.read(source, limits) if source.is_dicom else volume_file.read(source, limits, assume_spacing_mm)
    )
    if not all(np.isfinite(plane).all() for plane in volume.voxels):
        raise FileError(f"{source.where}: NaN or infinite voxels: set them to -1024")
    voxels, more = outliers_to_air(source.where, volume.voxels)
    image = to_image(replace(volume, voxels=voxels))
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
    return Scan(source, image, orientation, (*volume.changes, *more), volume.rescale)


def _check_hu(name: str, voxels: np.ndarray) -> None:
    sample = np.asarray(voxels[:: max(1, voxels.shape[0] // 64), ::4, ::4], dtype=np.float32)
    # Padding of -2000 and less also occurs in files that are not in HU, so it does not count as air.
    air = float(((sample > -1200) & (sample < -500)).mean())
    tissue = float(((sample > -200) & (sample < 300)).mean())
    low, high = float(sample.min()), float(sample.max())
    if air < 0.01 or tissue < 0.01:
        if low == 0 and (sample == np.rint(sample)).all() and len(np.unique(sample)) <= MAX_LABELS:
            raise SegmentationMaskError(
                f"{name}: values {low:g} to {high:g} are not in HU but labels of a segmentation mask: leave it out or "
                "convert it to HU"
            )
        hint = "it looks like HU + 1024: subtract 1024" if low >= 0 and high > 1100 else "convert it to HU"
        raise FileError(f"{name}: values {low:g} to {high:g} are not in HU (no air near -1000): {hint}")
    soft = tissue / float((sample > -500).mean())
    if soft < MIN_SOFT:
        raise FileError(
            f"{name}: {soft:.0%} of the values over -500 are those of soft tissue, -200 to 300 HU: correct the slope "
            "and intercept, or convert it to HU"
        )
