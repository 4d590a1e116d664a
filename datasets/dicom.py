"""Parsing of DICOM headers with limits on hostile files."""

from __future__ import annotations

import io

import pydicom
from pydicom.filereader import read_dataset, read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian

from raylift.datasets.errors import RefusedFile

MAX_ELEMENTS = 10_000
"""Limit for elements at the top level and for items in sequences. An image has a few hundred, and 8 bytes of a hostile
file take a kilobyte of memory."""


def is_dicom(data: bytes) -> bool:
    """Whether the DICOM prefix follows the preamble."""
    return data[128:132] == b"DICM"


def meta(data: bytes) -> pydicom.Dataset:
    """The file meta information, group 0002."""
    file = io.BytesIO(data)
    file.seek(132)
    return read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag.group != 2)


def parse(data: bytes, name: str, *, until: int = 0xFFFF_FFFF) -> pydicom.Dataset:
    """The elements before the tag `until`; `data` may end after them.

    Raises:
        RefusedFile: deflated, or more than `MAX_ELEMENTS` elements or items. On a damaged file pydicom may raise any
            exception.
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
