"""Reading of NIfTI, NRRD and MetaImage files by their suffix; incomplete files are refused.

ITK, which reads NRRD and MetaImage, fills missing or damaged voxels without an error, so before a file is read its
length is compared with its header, and compressed data are inflated to their end.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from raylift.datasets.errors import FileError
from raylift.datasets.scans import nifti, text_header
from raylift.datasets.scans.compression import inflate
from raylift.datasets.scans.header_checks import (
    ScanLimits,
    check_bytes,
    check_extent,
    check_length,
    check_size,
    itk_message,
)
from raylift.datasets.scans.volume import Volume, check_affine, spacing_mm
from raylift.datasets.sources import Source

IMAGE_IO = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
"""ITK's reader for each suffix; no other is tried."""
SUFFIXES = (".nii", ".nii.gz", *IMAGE_IO)
VOXEL_BYTES = {
    sitk.sitkUInt8: 1, sitk.sitkInt8: 1, sitk.sitkUInt16: 2, sitk.sitkInt16: 2, sitk.sitkUInt32: 4, sitk.sitkInt32: 4,
    sitk.sitkUInt64: 8, sitk.sitkInt64: 8, sitk.sitkFloat32: 4, sitk.sitkFloat64: 8,
}  # fmt: skip
"""Bytes per voxel of ITK's scalar pixel types."""


def suffix(path: Path) -> str:
    """The suffix in `SUFFIXES` of a file name, or an empty string."""
    return max((end for end in SUFFIXES if path.name.lower().endswith(end)), key=len, default="")


def data_files(path: Path) -> list[Path]:
    """The separate voxel file of a NRRD or MetaImage header; empty if the voxels follow the header.

    Raises:
        FileError: no NRRD or MetaImage header, or the voxel file is not in its folder.
    """
    value = text_header.read_header(path).data_file if suffix(path) in IMAGE_IO else ""
    if not value:
        return []
    # A header that names a file in another folder could read any file of this machine as voxels.
    if Path(value).name != value or not path.with_name(value).is_file():
        raise FileError(
            f"{path}: its voxels are in '{value}', which is not a file in its folder: convert it to one file"
        )
    return [path.with_name(value)]


def read(source: Source, limits: ScanLimits, assume_spacing_mm: Sequence[float] | None = None) -> Volume:
    """The volume, in HU if the file states its rescale.

    Args:
        source: the file, and its separate voxel file if it has one.
        limits: largest volume accepted.
        assume_spacing_mm: spacing of a NRRD or MetaImage that states none.

    Raises:
        FileError: not a 3-D volume of scalars, no spacing or orientation, truncated, damaged, or over the limits.
    """
    if suffix(source.files[0]) in IMAGE_IO:
        return _read_with_itk(source, limits, assume_spacing_mm)
    return nifti.read(source, limits)


def _read_with_itk(source: Source, limits: ScanLimits, assume_spacing_mm: Sequence[float] | None) -> Volume:
    path, name = source.files[0], source.where
    header = text_header.read_header(path)
    text_header.check_shape(header)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(IMAGE_IO[suffix(path)])
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise FileError(f"{name}: the header cannot be read: {itk_message(error)}: correct it") from error
    size = reader.GetSize()
    check_size(name, size, limits)
    if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in VOXEL_BYTES:
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise FileError(f"{name}: {kind} voxels, a CT has one number each")
    stated = text_header.header_geometry(header, assume_spacing_mm)
    axes = len(size)
    affine = np.eye(4)
    directions = np.array(reader.GetDirection()).reshape(axes, axes)[:3, :3]
    affine[:3, :3] = directions * (stated.spacing_mm or np.array(reader.GetSpacing()[:3]) * stated.unit_mm)
    affine[:3, 3] = np.array(reader.GetOrigin()[:3]) * stated.unit_mm
    check_extent(name, size, spacing_mm(affine))
    changes = (*stated.changes, *check_affine(name, affine, size))
    check_bytes(source, size, VOXEL_BYTES[reader.GetPixelID()])
    changes += _check_length(header, source.files[-1], math.prod(size), VOXEL_BYTES[reader.GetPixelID()])
    # A fourth dimension of size 1 is dropped.
    reader.SetExtractSize([*size[:3], *[0] * (axes - 3)])
    try:
        voxels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise FileError(
            f"{name}: the voxels cannot be read, the file may be truncated: {itk_message(error)}"
        ) from error
    slope, intercept = stated.rescale
    if stated.rescale != (1.0, 0.0):
        with np.errstate(all="ignore"):  # what overflows is refused as infinite
            voxels = voxels * np.float32(slope) + np.float32(intercept)
    return Volume(voxels, affine, changes, stated.rescale)


def _check_length(header: text_header.TextHeader, path: Path, count: int, voxel_bytes: int) -> tuple[str, ...]:
    """Refuse a file whose voxels are damaged, or more or fewer than stated, and report skipped bytes.

    Args:
        header: the header.
        path: the file with the voxels.
        count: number of voxels.
        voxel_bytes: bytes of a voxel.
    """
    start = header.length if path == header.path else 0
    if header.encoding == "text":
        with path.open("rb") as file:
            file.seek(start)
            check_length(header.path, sum(len(line.split()) for line in file), count, "numbers")
        return ()
    skipped = header.skipped("byte skip" if header.kind == "NRRD" else "HeaderSize")
    if header.kind == "MetaImage" and skipped > 0:
        start, skipped = skipped, 0  # counted from the beginning of the file
    with path.open("rb") as file:
        file.seek(start)
        start += sum(len(file.readline()) for _ in range(header.skipped("line skip")))
    expected = count * voxel_bytes
    if header.encoding == "raw":
        held = path.stat().st_size - start
        if skipped < 0 and held > expected:
            return (f"the {held - expected} bytes before the voxels are skipped",)
        check_length(header.path, held - max(0, skipped), expected, "bytes")
        return ()
    if skipped:
        raise FileError(f"{header.path}: bytes to skip in compressed voxels are not supported: store them uncompressed")
    try:
        held = sum(len(block) for block in inflate(path, start, expected, zlib_stream=True))
    except zlib.error as error:
        raise FileError(f"{header.path}: the voxels are damaged: {error}") from error
    check_length(header.path, held, expected, "inflated bytes", is_whole=False)
    return ()
