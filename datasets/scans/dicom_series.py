"""DICOM CT series: grouping of files, and checks from their headers that they form one complete volume.

Positions decide the order and the spacing of slices. SliceThickness, SpacingBetweenSlices, SliceLocation and
InstanceNumber are not used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from jaxtyping import Float
from pydicom.uid import MediaStorageDirectoryStorage

from raylift.datasets import dicom
from raylift.datasets.errors import FileError
from raylift.datasets.scans.dicom_slices import read_slices, rescales
from raylift.datasets.scans.header_checks import ScanLimits, check_bytes, check_extent, check_size
from raylift.datasets.scans.volume import Affine, Volume, check_affine, spacing_mm
from raylift.datasets.sources import Source

AFTER_HEADER = 0x0029_0000
"""The first DICOM tag after those that describe an image."""
FIRST_BYTES, MOST_BYTES = 2**18, 2**26
"""Bytes that are read first for a header, and at most: private elements may precede those of the image."""
REQUIRED = ("Rows", "Columns", "PixelSpacing", "BitsAllocated", "BitsStored", "PixelRepresentation")
"""Tags without which pixels have no place or value."""
LENGTHS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2} | dict.fromkeys(
    ("Rows", "Columns", "RescaleSlope", "RescaleIntercept"), 1
)
"""Numbers that the tags of a slice have."""
NO_SLICE = re.compile(r"(?:^|[ _\\\\])(?:LOCALIZER|MIP|MINIP|VRT)(?:$|[ _\\\\])", re.IGNORECASE)
"""Values of ImageType of localizers, and of projections and renderings of a volume."""
ROUNDING_MM = (1.0, 0.1, 0.01)
"""Multiples to which scanners and converters round positions."""


class Key(NamedTuple):
    """The series that a DICOM file belongs to. Folders stand for blank UIDs of series and for unnamed patients."""

    series: str
    study: str
    patient: str


def header(path: Path) -> pydicom.Dataset | None:
    """The header of a DICOM image; None for other files and for DICOMDIR.

    Raises:
        FileError: see `dicom.parse`. On a damaged file pydicom may raise any exception.
    """
    with path.open("rb") as file:
        head = file.read(FIRST_BYTES)
    if not dicom.is_dicom(head):
        return None
    if dicom.meta(head).get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None
    return _parse(path)


def key(path: Path) -> Key | None:
    """Series, study and patient of a DICOM file; None and errors as in `header`."""
    dataset = header(path)
    if dataset is None:
        return None
    series, study = (str(dataset.get(f"{level}InstanceUID") or "") for level in ("Series", "Study"))
    # Without a PatientID, the series of one study still belong together.
    return Key(series or str(path.parent), study, str(dataset.get("PatientID") or study or path.parent))


def frame_of_reference(path: Path) -> str:
    """FrameOfReferenceUID of a DICOM file; empty without one. Errors as in `header`."""
    dataset = header(path)
    return "" if dataset is None else str(dataset.get("FrameOfReferenceUID") or "")


def read(source: Source, limits: ScanLimits) -> Volume:
    """The slices as one volume in HU.

    Raises:
        FileError: not a CT, not one whole volume, truncated, or over the limits.
    """
    name = source.where
    try:
        headers = {path: _parse(path) for path in source.files}
        ordered, affine = _ordered(source, headers, limits)
        slopes, changes = rescales(name, {path: headers[path] for path in ordered})
    except FileError:
        raise
    except Exception as error:
        # On a missing tag or an invalid value pydicom raises any exception.
        raise FileError(f"{name}: the DICOM header cannot be read: {error!r}") from error
    voxels, more = read_slices(name, ordered, slopes)
    size = voxels.shape[::-1]
    rescale = slopes[0] if len(set(slopes)) == 1 else None
    return Volume(voxels, affine, (*check_affine(name, affine, size), *changes, *more), rescale)


def _ordered(source: Source, headers: Mapping[Path, pydicom.Dataset], limits: ScanLimits) -> tuple[list[Path], Affine]:
    """The files sorted by position and the affine of the volume, or a FileError if they are not one volume."""
    name = source.where
    first = headers[source.files[0]]
    _check_alike(source, {path: str(header.get("Modality") or "none") for path, header in headers.items()}, "modality")
    for path, header in headers.items():
        _check_slice(path, header)
    size = (int(first.Columns), int(first.Rows), len(headers))
    check_size(name, size, limits)
    check_bytes(source, size, 2)
    pixels_mm = np.array([h.PixelSpacing for h in headers.values()], dtype=float)
    _check_alike(source, {path: (int(h.Columns), int(h.Rows)) for path, h in headers.items()}, "size")
    directions = np.array([h.ImageOrientationPatient for h in headers.values()], dtype=float)
    # Writers round the same spacing and orientation differently.
    for attribute, values, rtol, atol in (("pixel spacing", pixels_mm, 1e-3, 0), ("orientation", directions, 0, 1e-3)):
        is_near = np.isclose(values, np.median(values, axis=0), rtol=rtol, atol=atol).all(axis=1)
        typical = np.median(values, axis=0).tolist()
        stated = zip(headers, is_near, values.tolist(), strict=True)
        _check_alike(source, {path: typical if near else value for path, near, value in stated}, attribute)
    along_row, along_column = directions[0].reshape(2, 3)
    if not np.allclose(directions[0].reshape(2, 3) @ directions[0].reshape(2, 3).T, np.eye(2), atol=2e-3):
        raise FileError(f"{name}: ImageOrientationPatient {directions[0].tolist()} is not two perpendicular axes")
    normal = np.cross(along_row, along_column)
    places = {path: np.array(h.ImagePositionPatient, dtype=float) for path, h in headers.items()}
    ordered = sorted(source.files, key=lambda path: float(places[path] @ normal))
    affine = np.eye(4)
    affine[:3, 2], affine[:3, 3] = _slice_axis(name, ordered, np.stack([places[path] for path in ordered]), normal)
    _check_numbers(name, headers)
    _check_alternation(name, [headers[path] for path in ordered])
    rows_mm, columns_mm = np.median(pixels_mm, axis=0)
    affine[:3, 0] = along_row / np.linalg.norm(along_row) * columns_mm
    affine[:3, 1] = along_column / np.linalg.norm(along_column) * rows_mm
    check_extent(name, size, spacing_mm(affine))
    return ordered, affine


def _check_alike(source: Source, values: Mapping[Path, Any], attribute: str) -> None:
    """Refuse slices that differ in a property from most, by name."""
    shown = {path: str(value) for path, value in values.items()}
    [(usual, _)] = Counter(shown.values()).most_common(1)
    odd = [path for path in sorted(shown) if shown[path] != usual]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise FileError(
            f"{source.where}: slices differ in {attribute}: {odd[0]}{more} {shown[odd[0]]}, the others {usual}: "
            "remove it or split the series"
        )


def _check_slice(path: Path, header: pydicom.Dataset) -> None:
    """Refuse what is no slice of a CT volume."""
    if header.get("Modality", "none") != "CT":
        raise FileError(f"{path}: DICOM modality {header.get('Modality', 'none')} is not CT")
    if int(header.get("NumberOfFrames") or 1) > 1 or int(header.get("SamplesPerPixel") or 1) > 1:
        raise FileError(f"{path}: an enhanced multi-frame or color DICOM: convert it to NIfTI first")
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    if not photometric.startswith("MONOCHROME"):
        raise FileError(f"{path}: PhotometricInterpretation {photometric}: colors are not HU: use the series in HU")
    image_type = "\\".join(header.get("ImageType") or ())
    if NO_SLICE.search(image_type):
        raise FileError(f"{path}: ImageType {image_type} is no slice of a volume: leave the file or series out")
    if not header.get("ImageOrientationPatient") or not header.get("ImagePositionPatient"):
        raise FileError(f"{path}: slices without position or orientation: not a volume")
    lacking = [tag for tag in REQUIRED if header.get(tag) in (None, "")]
    lacking += ["HighBit"] if header.get("HighBit", 0) in (None, "") else []
    if lacking:
        raise FileError(f"{path}: slices without a value of {', '.join(lacking)}: add it to all slices")
    for tag, length in LENGTHS.items():
        stored = header.get_item(tag)
        try:
            value = header.get(tag)
            is_right = value in (None, "") or np.size(np.asarray(value, dtype=float)) == length
        except (TypeError, ValueError):
            is_right = False
        if not is_right:
            raise FileError(f"{path}: {tag} {stored.value!r:.40} does not have {length} numbers: correct it")


def _check_numbers(name: str, headers: Mapping[Path, pydicom.Dataset]) -> None:
    """Refuse slices in several folders of which most have the InstanceNumber of another: they are several scans."""
    if len({path.parent for path in headers}) == 1:
        return
    first: dict[str, Path] = {}
    numbers = {path: str(header.get("InstanceNumber") or "") for path, header in headers.items()}
    pairs = [(first.setdefault(number, path), path) for path, number in numbers.items() if number]
    again = [(path, other) for path, other in pairs if path.parent != other.parent]
    if len(again) > len(headers) // 4:
        path, other = again[0]
        raise FileError(
            f"{name}: {path} and {other} have one SeriesInstanceUID and InstanceNumber, as slices of several scans: "
            "correct the UIDs"
        )


def _check_alternation(name: str, ordered: Sequence[pydicom.Dataset]) -> None:
    """Refuse slices of several acquisitions or reconstructions that lie between each other."""
    for tag in ("AcquisitionNumber", "FrameOfReferenceUID", "ConvolutionKernel", "KVP"):
        values = [str(header.get(tag)) for header in ordered]
        kinds = sorted(set(values))
        changes = sum(a != b for a, b in pairwise(values))
        # Values of blocks of slices change once for each block, and some writers number every slice.
        if 1 < len(kinds) <= len(values) // 4 and changes > len(values) // 2:
            raise FileError(
                f"{name}: slices of {tag} {' and '.join(kinds[:2])} alternate: they are several scans, split the series"
            )


def _slice_axis(
    name: str, ordered: Sequence[Path], positions: Float[np.ndarray, "slices 3"], normal: Float[np.ndarray, " 3"]
) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """The step between slices and the first position by least squares, or a FileError if they are not uniform.

    Positions may differ from uniform ones by their rounding or 5 % of a step. A missing slice displaces the others by
    more than a third of a step.
    """
    along = positions @ normal
    steps = np.diff(along)
    where = int(np.argmin(steps))
    median = float(np.median(steps))
    # A rounding of the same size as the step may bring two slices together, a duplicate brings them to one place.
    if not steps[where] >= 0.01 or not median > 0:
        raise FileError(
            f"{name}: {ordered[where]} and {ordered[where + 1]} are two slices at {along[where]:.2f} mm: remove the "
            "duplicates or split the series"
        )
    index = np.arange(len(positions))
    step, first = np.polyfit(index, positions, 1)
    residual = np.abs(positions - first - index[:, None] * step).max(axis=1)
    rounding = next((mm for mm in ROUNDING_MM if np.abs(positions / mm - np.rint(positions / mm)).max() < 1e-6), 0.0)
    step_mm = float(np.linalg.norm(step))
    if residual.max() > min(max(0.75 * rounding, 0.05 * step_mm + 0.01), 0.3 * step_mm):
        raise _irregular(name, along, positions - first - index[:, None] * step, normal)
    return step, first


def _irregular(
    name: str,
    along: Float[np.ndarray, " slices"],
    residual: Float[np.ndarray, "slices 3"],
    normal: Float[np.ndarray, " 3"],
) -> FileError:
    """The refusal that names the slices which do not fit."""
    steps = np.diff(along)
    step = float(np.median(steps))
    where = int(np.argmax(np.abs(steps - step)))
    off_axis = np.linalg.norm(residual - np.outer(residual @ normal, normal), axis=1)
    if abs(steps[where] - step) > 0.05 * step:
        return FileError(
            f"{name}: {steps[where]:.2f} mm between the slices at {along[where]:.2f} and {along[where + 1]:.2f} mm "
            f"where the others lie {step:.2f} mm apart: slices are missing"
        )
    where = int(np.argmax(off_axis))
    return FileError(
        f"{name}: the slice at {along[where]:.2f} mm lies {off_axis[where]:.1f} mm off the axis of the others: correct "
        "ImagePositionPatient or split the series"
    )


def _parse(path: Path) -> pydicom.Dataset:
    """The elements before `AFTER_HEADER`, however many bytes they take up to `MOST_BYTES`."""
    count = FIRST_BYTES
    while True:
        with path.open("rb") as file:
            head = file.read(count)
        dataset, is_whole = dicom.parse_until(head, str(path), AFTER_HEADER)
        if is_whole or len(head) < count or count >= MOST_BYTES:
            return dataset
        count *= 4
