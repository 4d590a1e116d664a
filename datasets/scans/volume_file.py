"""Reading of NIfTI, NRRD and MetaImage files, each with the reader of its suffix; incomplete files are refused.

ITK fills missing or damaged voxels without an error, so before a file is read its length is compared with its header,
and compressed data are inflated to their end.
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import SimpleITK as sitk

from raylift.datasets.errors import RefusedFile
from raylift.datasets.scans.header_checks import (
    VOXEL_BYTES,
    ScanLimits,
    check_bytes,
    check_extent,
    check_size,
    itk_message,
)
from raylift.datasets.sources import Source

IMAGE_IO = {
    ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO", ".mhd": "MetaImageIO",
}  # fmt: skip
"""ITK's reader for each suffix; no other is tried."""
SUFFIXES = tuple(IMAGE_IO)

HEADER_END = {
    "NrrdImageIO": re.compile(rb"\r?\n\r?\n|\Z"),
    "MetaImageIO": re.compile(rb"^ElementDataFile *=.*(?:\n|\Z)", re.IGNORECASE | re.MULTILINE),
}
DATA_FILE = re.compile(rb"^(?:data ?file *:|ElementDataFile *=)[ \t]*(.*?)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)
COMPRESSED = re.compile(rb"^(?:encoding *: *gz(?:ip)?|CompressedData *= *True)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)


def suffix(path: Path) -> str:
    """The suffix in `SUFFIXES` of a file name, or an empty string."""
    return max((end for end in SUFFIXES if path.name.lower().endswith(end)), key=len, default="")


def data_files(path: Path) -> list[Path]:
    """The separate voxel file of a NRRD or MetaImage header; empty if the voxels follow the header.

    Raises:
        RefusedFile: the header has no end, or the voxel file is not beside it.
    """
    named = None if IMAGE_IO[suffix(path)] == "NiftiImageIO" else DATA_FILE.search(_text_header(path))
    if named is None or named[1] == b"LOCAL":
        return []
    value = named[1].decode("latin-1")
    # A header that names a file in another folder could read any file of this machine as voxels.
    if Path(value).name != value or not path.with_name(value).is_file():
        raise RefusedFile(f"{path}: its voxels are in '{value}', which is not a file beside it: convert it to one file")
    return [path.with_name(value)]


def read(source: Source, limits: ScanLimits) -> sitk.Image:
    """The volume in its stored pixel type.

    Raises:
        RefusedFile: not a 3-D volume of scalars, no orientation, truncated, damaged, or over the limits.
    """
    path, name = source.files[0], source.where
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(IMAGE_IO[suffix(path)])
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise RefusedFile(f"{name}: the header cannot be read: {itk_message(error)}") from error
    size = reader.GetSize()
    check_size(name, size, limits)
    check_extent(name, size, reader.GetSpacing())
    if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in VOXEL_BYTES:
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise RefusedFile(f"{name}: {kind} voxels, a CT has one number each")
    check_bytes(source, size, reader.GetPixelID())
    if reader.GetImageIO() == "NiftiImageIO":
        header = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
        if int(header["qform_code"]) == int(header["sform_code"]) == 0:
            raise RefusedFile(f"{name}: neither qform nor sform is set, so its orientation is unknown: set one")
        voxels = math.prod(size) * int(header["bitpix"]) // 8
        _check_whole(path, int(float(header["vox_offset"])) + voxels, compressed=path.suffix.lower() == ".gz")
    elif COMPRESSED.search(text := _text_header(path)):
        voxels = math.prod(size) * VOXEL_BYTES[reader.GetPixelID()]
        _check_whole(source.files[-1], voxels, compressed=True, start=len(text) if len(source.files) == 1 else 0)
    # A fourth dimension of size 1 is dropped.
    reader.SetExtractSize([*size[:3], *[0] * (reader.GetDimension() - 3)])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RefusedFile(
            f"{name}: the voxels cannot be read, the file may be truncated: {itk_message(error)}"
        ) from error


def _text_header(path: Path) -> bytes:
    """The text header of a NRRD or MetaImage file, up to its voxels."""
    with path.open("rb") as file:
        head = file.read(2**16)
    end = HEADER_END[IMAGE_IO[suffix(path)]].search(head)
    if end is None or end.end() == 2**16:
        raise RefusedFile(f"{path}: the header cannot be read: no end of it in the first {len(head)} bytes")
    return head[: end.end()]


def _check_whole(path: Path, expected: int, *, compressed: bool, start: int = 0) -> None:
    """Refuse a file with truncated or damaged voxels; `expected` is the number of inflated bytes from `start`."""
    try:
        held = _inflated(path, start, expected) if compressed else path.stat().st_size
    except zlib.error as error:
        raise RefusedFile(f"{path}: the voxels are damaged: {error}") from error
    if held < expected:
        raise RefusedFile(f"{path}: {held} bytes where its header promises {expected}: it is truncated")


def _inflated(path: Path, start: int, enough: int) -> int:
    """Inflated size of a complete gzip or zlib stream, read to at most a block beyond `enough` bytes."""
    held, inflate = 0, zlib.decompressobj(wbits=47)  # gzip or zlib
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(2**20)
        while data and held <= enough:
            held += len(inflate.decompress(data, 2**20))
            if inflate.eof:
                # A gzip file may have several members, and trailing zeros.
                data = inflate.unused_data.lstrip(b"\0") or file.read(2**20).lstrip(b"\0")
                inflate = zlib.decompressobj(wbits=47) if data else inflate
            else:
                data = inflate.unconsumed_tail or file.read(2**20)
    return held if inflate.eof or held > enough else min(held, enough - 1)
