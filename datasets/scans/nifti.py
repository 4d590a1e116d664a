"""Reading of NIfTI-1 and NIfTI-2 files, plain or compressed whatever their name, without any voxels missing.

Of sform and qform the sform is used if both are set, as the standard recommends; every disagreement is reported, or
refused where it leaves the size of a voxel open.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from raylift.datasets.errors import FileError
from raylift.datasets.scans.compression import inflate, is_compressed
from raylift.datasets.scans.header_checks import ScanLimits, check_bytes, check_extent, check_length, check_size
from raylift.datasets.scans.volume import REPORTED_SHEAR_DEG, Affine, Volume, check_affine, shear_deg, spacing_mm
from raylift.datasets.sources import Source

HEADER_BYTES = 544
"""Length of the longer header, NIfTI-2's with its extension flag."""
MILLIMETERS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""By spatial unit: not stated, meter, millimeter, micrometer."""
LONGEST_EXTENSIONS = 2**26
"""Most bytes between header and voxels."""
SAME_SPACING = 0.01
"""Relative difference up to which two spacings are the same."""


def read(source: Source, limits: ScanLimits) -> Volume:
    """The volume in HU.

    Raises:
        FileError: not a 3-D volume of real scalars, no orientation or a contradicting one, truncated, damaged, or
            over the limits.
    """
    path, name = source.files[0], source.where
    try:
        header = _header(path, b"".join(inflate(path, 0, HEADER_BYTES))[:HEADER_BYTES])
    except zlib.error as error:
        raise FileError(f"{name}: the header cannot be read: {error}: the file is damaged or truncated") from error
    dim = [int(value) for value in header["dim"]]
    size = dim[1 : 1 + dim[0]] if 0 < dim[0] < 8 else []
    check_size(name, size, limits)
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise FileError(f"{name}: the header cannot be read: datatype {int(header['datatype'])} is none") from error
    if dtype.kind not in "iuf":
        raise FileError(f"{name}: {dtype} voxels, a CT has one number each")
    affine, changes = _affine(header, name)
    check_extent(name, size, spacing_mm(affine))
    check_bytes(source, size, dtype.itemsize)
    slope, intercept = _rescale(header, name)
    stored = _voxels(path, header, math.prod(size) * dtype.itemsize)
    voxels = np.frombuffer(stored, dtype).reshape(size[2::-1]).astype(dtype.newbyteorder("="), copy=False)
    if (slope, intercept) != (1.0, 0.0):
        with np.errstate(all="ignore"):  # what overflows is refused as infinite
            voxels = voxels * np.float32(slope) + np.float32(intercept)
    return Volume(voxels, affine, changes, (slope, intercept))


def _header(path: Path, head: bytes) -> Nifti1Header:
    kinds: tuple[tuple[Any, bytes], ...] = ((Nifti1Header, b"n+1"), (Nifti2Header, b"n+2"))
    for kind, magic in kinds:
        size = kind.template_dtype.itemsize
        for endianness in "<>":
            if len(head) >= size and head[:4] == struct.pack(f"{endianness}i", size):
                header: Nifti1Header = kind(head[:size], endianness=endianness, check=False)
                if header["magic"].item()[:3] == magic:
                    return header
    raise FileError(
        f"{path}: the header cannot be read: not NIfTI in one file, it begins with {head[:8]!r}: convert it to NIfTI"
    )


def _affine(header: Nifti1Header, name: str) -> tuple[Affine, tuple[str, ...]]:
    """The affine in LPS millimeters, and what was preferred or assumed."""
    changes = []
    unit = int(header["xyzt_units"]) & 7
    if unit not in MILLIMETERS:
        raise FileError(f"{name}: unit of length {unit} in xyzt_units is not NIfTI: set it to 2, millimeters")
    if unit == 0:
        changes.append("xyzt_units states no unit of length: millimeters are assumed")
    sform, qform = header.get_sform() if header["sform_code"] > 0 else None, None
    if header["qform_code"] > 0:
        if header["pixdim"][0] == 0:
            header["pixdim"][0] = 1  # as the standard requires
        try:
            qform = header.get_qform()
        except (HeaderDataError, ValueError) as error:
            if sform is None:
                raise FileError(f"{name}: the qform is invalid: {error}: correct it or set the sform") from error
            changes.append(f"the qform is invalid ({error}): the sform is used")
    chosen = sform if sform is not None else qform
    if chosen is None:
        raise FileError(f"{name}: neither qform nor sform is set, so its orientation is unknown: set one")
    to_mm = np.diag([-MILLIMETERS[unit], -MILLIMETERS[unit], MILLIMETERS[unit], 1.0])
    affine = to_mm @ chosen.astype(np.float64)
    changes += check_affine(name, affine, [int(n) for n in header["dim"][1:4]])
    if sform is not None:
        changes += _disagreements(header, name, affine, None if qform is None else to_mm @ qform, MILLIMETERS[unit])
    return affine, tuple(changes)


def _disagreements(
    header: Nifti1Header, name: str, sform: Affine, qform: Affine | None, unit_mm: float
) -> tuple[str, ...]:
    """How the sform differs from the qform and the voxel size in pixdim.

    Raises:
        FileError: a qform of another voxel size.
    """
    stated = np.abs(header["pixdim"][1:4].astype(np.float64)) * unit_mm
    if not _same_spacing(sform, stated):
        sizes = " and ".join(" x ".join(f"{v:.4g}" for v in value) for value in (spacing_mm(sform), stated))
        if qform is not None:
            raise FileError(f"{name}: sform and qform disagree, voxels of {sizes} mm: correct one or unset its code")
        return (f"sform and pixdim disagree, voxels of {sizes} mm: the sform is used",)
    if qform is None:
        return ()
    last = header["dim"][1:4] - 1.0
    corners = np.array([[*(last * corner), 1.0] for corner in np.ndindex(2, 2, 2)])
    apart_mm = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max())
    if apart_mm <= 0.1 * min(spacing_mm(sform)):
        return ()
    return (f"sform and qform put a corner {apart_mm:.1f} mm apart: the sform is used",)


def _same_spacing(affine: Affine, stated: Num[np.ndarray, " 3"]) -> bool:
    """Whether an affine has this voxel size, along its axes or, if it is sheared, perpendicular to the others."""
    along = np.array(spacing_mm(affine))
    across = 1 / np.linalg.norm(np.linalg.inv(affine[:3, :3]), axis=1)
    choices = [along, across] if shear_deg(affine) > REPORTED_SHEAR_DEG else [along]
    near = [np.abs(choice - stated) <= SAME_SPACING * choice for choice in choices]
    return bool(np.logical_or.reduce(near).all())


def _rescale(header: Nifti1Header, name: str) -> tuple[float, float]:
    """Slope and intercept; a slope of zero means none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        return 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise FileError(f"{name}: scl_slope {slope:g} and scl_inter {intercept:g} are no numbers: correct them")
    return slope, intercept


def _voxels(path: Path, header: Nifti1Header, expected: int) -> bytearray:
    """The bytes of all voxels."""
    first = header.sizeof_hdr + 4  # after the extension flag
    offset = float(header["vox_offset"])
    if not first <= offset <= first + LONGEST_EXTENSIONS or offset != int(offset):
        raise FileError(f"{path}: voxels at byte {offset:g} are not after the header: correct vox_offset")
    start, content = int(offset), bytearray()
    try:
        for block in inflate(path, 0, start + expected):
            content += block
    except zlib.error as error:
        raise FileError(f"{path}: the voxels are damaged: {error}") from error
    compressed = is_compressed(path)
    count = (len(content) if compressed else path.stat().st_size) - start
    check_length(path, max(0, count), expected, "inflated bytes" if compressed else "bytes", is_whole=not compressed)
    _check_extensions(path, bytes(content[header.sizeof_hdr : start]), header.endianness)
    del content[:start]
    return content


def _check_extensions(path: Path, between: bytes, endianness: str) -> None:
    """Refuse bytes between header and voxels that are neither extensions, as their flag states, nor zeros."""
    at = 4
    if between[0]:
        while at + 8 <= len(between) and any(between[at : at + 4]):
            (length,) = struct.unpack_from(f"{endianness}i", between, at)
            if length < 8 or at + length > len(between):
                break
            at += length
    if any(between[at:]) or (between[0] and at == 4):
        kind = "extensions" if between[0] else "zeros"
        raise FileError(
            f"{path}: the {len(between) - 4} bytes between header and voxels are not {kind}, as the extension flag "
            f"{between[0]} states: correct vox_offset or the flag"
        )
