"""DICOM CT series: grouping of files, and checks that they form one complete volume.

SimpleITK stacks any slices without an error, so their order, spacing, orientation and completeness are checked here,
from the headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float
from pydicom.uid import MediaStorageDirectoryStorage

from raylift.datasets import dicom
from raylift.datasets.errors import RefusedFile
from raylift.datasets.scans.header_checks import ScanLimits, check_bytes, check_extent, check_size, itk_message
from raylift.datasets.sources import Source

AFTER_HEADER = 0x0029_0000
"""The first DICOM tag after those that describe an image."""


def header(path: Path) -> pydicom.Dataset | None:
    """The header of a DICOM image; None for other files and for DICOMDIR.

    Raises:
        RefusedFile: see `dicom.parse`. On a damaged file pydicom may raise any exception.
    """
    head = _head(path)
    if not dicom.is_dicom(head):
        return None
    if dicom.meta(head).get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None
    return dicom.parse(head, str(path), until=AFTER_HEADER)


def key(path: Path) -> tuple[str, str] | None:
    """Series and patient of a DICOM file; None and errors as in `header`."""
    dataset = header(path)
    if dataset is None:
        return None
    # Without a PatientID, the series of one study still belong together.
    patient = dataset.get("PatientID") or dataset.get("StudyInstanceUID") or path.parent
    return str(dataset.get("SeriesInstanceUID", path.parent)), str(patient)


def read(source: Source, limits: ScanLimits) -> sitk.Image:
    """The slices as one volume.

    Raises:
        RefusedFile: not a CT, not one whole volume, truncated, or over the limits.
    """
    name = source.where
    try:
        headers = {path: dicom.parse(_head(path), str(path), until=AFTER_HEADER) for path in source.files}
        ordered = _ordered(source, headers, limits)
    except RefusedFile:
        raise
    except Exception as error:
        # On a missing tag or an invalid value pydicom raises any exception.
        raise RefusedFile(f"{name}: the DICOM header cannot be read: {error!r}") from error
    reader = sitk.ImageSeriesReader()
    # No other reader is tried, whatever the preamble or the name.
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(path) for path in ordered])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RefusedFile(f"{name}: the slices cannot be read, one may be truncated: {itk_message(error)}") from error


def _ordered(source: Source, headers: Mapping[Path, pydicom.Dataset], limits: ScanLimits) -> list[Path]:
    """The files sorted by position, or a RefusedFile if they are not one volume."""
    name = source.where
    first = headers[source.files[0]]
    for header in headers.values():
        if header.get("Modality", "none") != "CT":
            raise RefusedFile(f"{name}: DICOM modality {header.get('Modality', 'none')} is not CT")
        if int(header.get("NumberOfFrames") or 1) > 1 or int(header.get("SamplesPerPixel") or 1) > 1:
            raise RefusedFile(f"{name}: an enhanced multi-frame or color DICOM: convert it to NIfTI first")
        if not header.get("ImageOrientationPatient") or not header.get("ImagePositionPatient"):
            raise RefusedFile(f"{name}: slices without position or orientation: not a volume")
    size = (int(first.Columns), int(first.Rows), len(headers))
    check_size(name, size, limits)
    check_bytes(source, size, sitk.sitkInt16)
    if len({(int(h.Rows), int(h.Columns), tuple(h.PixelSpacing)) for h in headers.values()}) > 1:
        raise RefusedFile(f"{name}: slices differ in size or pixel spacing: split the series")
    directions = np.array([h.ImageOrientationPatient for h in headers.values()], dtype=float)
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise RefusedFile(f"{name}: slices differ in orientation (a localizer among them?): split the series")
    normal = np.cross(directions[0, :3], directions[0, 3:])
    places = {path: np.array(h.ImagePositionPatient, dtype=float) for path, h in headers.items()}
    ordered = sorted(source.files, key=lambda path: float(places[path] @ normal))
    step_mm = _check_slices(name, np.stack([places[path] for path in ordered]), normal)
    rows_mm, columns_mm = (float(value) for value in first.PixelSpacing)
    check_extent(name, size, (columns_mm, rows_mm, step_mm))
    return ordered


def _check_slices(name: str, positions: Float[np.ndarray, "slices 3"], normal: Float[np.ndarray, " 3"]) -> float:
    """The slice spacing in mm, or a RefusedFile if it is not uniform."""
    along = positions @ normal
    steps = np.diff(along)
    step = float(np.median(steps))
    where = int(np.argmin(steps))
    if steps[where] < 0.01 or step <= 0:
        raise RefusedFile(f"{name}: two slices at {along[where]:.2f} mm: remove the duplicates or split the series")
    where = int(np.argmax(np.abs(steps - step)))
    if abs(steps[where] - step) > 0.05 * step + 0.01:
        raise RefusedFile(
            f"{name}: {steps[where]:.2f} mm between the slices at {along[where]:.2f} and {along[where + 1]:.2f} mm "
            f"where the others lie {step:.2f} mm apart: slices are missing"
        )
    drift = (positions[-1] - positions[0]) - (along[-1] - along[0]) * normal
    if np.linalg.norm(drift) > 0.02 * (along[-1] - along[0]):
        raise RefusedFile(f"{name}: a tilted gantry, {np.linalg.norm(drift):.1f} mm of shear: straighten it first")
    return step


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2**18)
