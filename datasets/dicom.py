"""The elements of a DICOM file, unless reading them would cost far more than its bytes."""

from __future__ import annotations

import io

import pydicom
from pydicom.filereader import read_dataset, read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian

from raylift.datasets.errors import RefusedFile

MAX_ELEMENTS = 10_000
"""At the top level, and of items in sequences: an image has a few hundred, and 8 bytes of a hostile file become a
kilobyte of objects."""


def is_dicom(data: bytes) -> bool:
    """Whether the file has the mark of DICOM behind its preamble."""
    return data[128:132] == b"DICM"


def meta(data: bytes) -> pydicom.Dataset:
    """The group that says how the rest is written."""
    file = io.BytesIO(data)
    file.seek(132)
    return read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag.group != 2)


def parse(data: bytes, name: str, *, until: int = 0xFFFF_FFFF) -> pydicom.Dataset:
    """The elements before the tag `until`; `data` need not hold what comes after.

    Raises:
        RefusedFile: deflated, or of more elements or items than an image has. What pydicom raises on a damaged file
            is open.
    """
    if meta(data).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise RefusedFile(f"{name}: deflated DICOM, which may inflate to any size: store it in another transfer syntax")
    if data.count(b"\xfe\xff\x00\xe0") + data.count(b"\xff\xfe\xe0\x00") > MAX_ELEMENTS:
        raise RefusedFile(f"{name}: more than {MAX_ELEMENTS} items in DICOM sequences: not an image")
    count = 0

    def is_beyond(tag: int, *_: object) -> bool:
        nonlocal count
        count += 1
        if count > MAX_ELEMENTS:
            raise RefusedFile(f"{name}: more than {MAX_ELEMENTS} DICOM elements: not an image")
        return tag >= until

    return read_partial(io.BytesIO(data), stop_when=is_beyond)
