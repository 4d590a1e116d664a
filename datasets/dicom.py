"""Parsing of DICOM files with limits on hostile ones, and their stored pixel values."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import pydicom
from jaxtyping import Bool, Int, Num
from pydicom.filereader import read_dataset, read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import VR
from scipy import ndimage

from raylift.datasets.dicom_frame import decode_containers
from raylift.datasets.errors import FileError

MAX_ELEMENTS = 10_000
"""Limit for elements at the top level and for items in sequences. An image has a few hundred, and 8 bytes of a hostile
file take a kilobyte of memory."""
MIN_PADDING = 0.01
"""Fraction of the image from which a connected region of a declared padding's value is padding wherever it lies."""
VRS = {vr.value.encode() for vr in VR if len(vr.value) == 2}


def is_dicom(data: bytes) -> bool:
    """Whether the data are DICOM: the prefix after the preamble, or without both an element of group 0002 or 0008."""
    return data[128:132] == b"DICM" or _is_bare(data)


def _is_bare(data: bytes) -> bool:
    """Whether the data begin with a data set, as files of some archives and of old software do."""
    if len(data) < 8:
        return False
    group, element, vr, length = struct.unpack("<HH2sH", data[:8])
    # Without a VR its place and that of the length are a length of 32 bits, which is short for the first elements.
    return group in (2, 8) and element < 0x100 and (vr in VRS or (length == 0 and vr[1] == 0))


def meta(data: bytes) -> pydicom.Dataset:
    """The file meta information, group 0002; empty in files that have none."""
    start = 0 if _is_bare(data) else 132
    if data[start : start + 2] != b"\2\0":
        return pydicom.Dataset()
    file = io.BytesIO(data)
    file.seek(start)
    return read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag.group != 2)


def parse(data: bytes, name: str, *, until: int = 0xFFFF_FFFF) -> pydicom.Dataset:
    """The elements before the tag `until`; `data` may end after them.

    Raises:
        FileError: deflated, or more than `MAX_ELEMENTS` elements or items. On a damaged file pydicom may raise any
            exception.
    """
    return parse_until(data, name, until)[0]


def parse_until(data: bytes, name: str, until: int) -> tuple[pydicom.Dataset, bool]:
    """The elements before the tag `until`, and whether the data reach a tag after them; errors as in `parse`."""
    if meta(data).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise FileError(f"{name}: deflated DICOM, which may inflate to any size: store it in another transfer syntax")
    if data.count(b"\xfe\xff\x00\xe0") + data.count(b"\xff\xfe\xe0\x00") > MAX_ELEMENTS:
        raise FileError(f"{name}: more than {MAX_ELEMENTS} items in DICOM sequences: not an image")
    count, is_whole = 0, False

    def is_beyond(tag: int, *_: object) -> bool:
        nonlocal count, is_whole
        count += 1
        if count > MAX_ELEMENTS:
            raise FileError(f"{name}: more than {MAX_ELEMENTS} DICOM elements: not an image")
        is_whole = tag >= until
        return is_whole

    dataset = read_partial(io.BytesIO(data), stop_when=is_beyond, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit = dataset.original_encoding[0]
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
    return dataset, is_whole


@dataclass(frozen=True)
class StoredPixels:
    """The pixels of one frame before any rescale."""

    values: Int[np.ndarray, "rows columns"]
    """Values of BitsStored bits, signed as PixelRepresentation states."""
    allocated: Int[np.ndarray, "rows columns"]
    """Values of all BitsAllocated bits, of the same sign: they differ where the bits above BitsStored hold an overlay,
    or a padding outside the range of values, or where the sign is not extended."""
    bits: int
    """BitsStored."""

    @property
    def exceed_bits_stored(self) -> Bool[np.ndarray, "rows columns"]:
        """Mask of the pixels that use bits above BitsStored for something else than the sign."""
        return np.asarray((self.allocated != self.values) & (self.allocated != self.values & ((1 << self.bits) - 1)))


def stored_pixels(dataset: pydicom.Dataset, name: str) -> StoredPixels:
    """The pixels of a frame with one sample per pixel.

    Raises:
        FileError: see `dicom_frame.decode_containers`. On a damaged file pydicom may raise any exception.
    """
    container, shift = decode_containers(dataset, name)
    allocated, stored = 8 * container.dtype.itemsize, int(dataset.BitsStored)
    unsigned = container.view(f"u{container.dtype.itemsize}").astype(np.int64) >> shift
    is_signed = bool(dataset.PixelRepresentation)
    return StoredPixels(_with_sign(unsigned, stored, is_signed), _with_sign(unsigned, allocated, is_signed), stored)


def is_padding(dataset: pydicom.Dataset, pixels: StoredPixels) -> Bool[np.ndarray, "rows columns"]:
    """Mask of the pixels from PixelPaddingValue to PixelPaddingRangeLimit; all False without them."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    # Some files state the value with the other sign: 63536 for -2000.
    bits, is_signed = int(dataset.BitsAllocated), bool(dataset.PixelRepresentation)
    if ends[0] in (None, ""):
        return np.zeros(pixels.values.shape, dtype=bool)
    limits = _with_sign(np.array([int(end) for end in ends if end not in (None, "")]), bits, is_signed)
    low, high = limits.min(), limits.max()
    values, allocated = pixels.values, pixels.allocated
    mask = (values >= low) & (values <= high) | (allocated >= low) & (allocated <= high)
    return np.asarray(mask)


def connected_to_border(mask: Bool[np.ndarray, "rows columns"]) -> Bool[np.ndarray, "rows columns"]:
    """The part of a mask that is connected to the border of the image."""
    edge = np.pad(np.zeros(mask.shape, dtype=bool), 1, constant_values=True)
    reached: Bool[np.ndarray, "_ _"] = ndimage.binary_propagation(edge, mask=np.pad(mask, 1, constant_values=True))
    return reached[1:-1, 1:-1]


def padding_region(
    mask: Bool[np.ndarray, "rows columns"], values: Num[np.ndarray, "rows columns"]
) -> Bool[np.ndarray, "rows columns"]:
    """The part of a mask of declared padding that is padding: at the border, or large and of one value.

    Smaller regions of its value inside are saturated or tissue.
    """
    region = connected_to_border(mask)
    labels, count = ndimage.label(mask & ~region)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    for label in np.flatnonzero(sizes > MIN_PADDING * mask.size):
        part = labels == label
        if label and np.ptp(values[part]) == 0:
            region |= part
    return region


def _with_sign(values: Int[np.ndarray, "*shape"], bits: int, is_signed: bool) -> Int[np.ndarray, "*shape"]:
    """The lowest bits of the values, with the sign of two's complement."""
    values = values & ((1 << bits) - 1)
    return values - ((values >> (bits - 1)) << bits) if is_signed else values
