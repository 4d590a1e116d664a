"""One or two header fields of a valid radiograph changed: a refusal, the same image, or a record of the change.

The same image is one whose values, mapped to 0 to 1, differ by at most `TOLERANCE`.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from radiograph_samples import chest, dicom, encoded, scaled

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import FRONTAL
from raylift.datasets.radiographs.orientation import OrientedRadiograph
from raylift.datasets.radiographs.preparation import load_radiograph

TOLERANCE = 0.02
"""Fraction of the image's range; a change of HighBit alone loses the lowest bits."""
# Fixed examples: a failure is the same on every machine.
MUTATIONS = settings(max_examples=60, derandomize=True)
PIXELS = chest(most=4000).astype("<u2")

numbers = st.sampled_from([0, 1, 2, 3, 7, 8, 11, 12, 15, 16, 32, 99, 100, 119, 120, 200, 4095, 65535])
spacings = st.lists(st.sampled_from(["0", "-1", "0.1", "0.2", "0.4", "40", "1e9"]), min_size=1, max_size=3)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "NumberOfFrames"), numbers
    ),
    "PixelRepresentation": st.sampled_from([0, 1, 2]),
    "PhotometricInterpretation": st.sampled_from(
        ["MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "PALETTE COLOR", "", "monochrome2", "HSV"]
    ),
    "RescaleSlope": st.sampled_from(["0", "-1", "1", "0.001", "1e6", "1e300"]),
    "RescaleIntercept": st.sampled_from(["0", "-1024", "5000", "1e300"]),
    "WindowCenter": st.sampled_from(["", "0", "-5000", "2000", "60000", "1e300"]),
    "WindowWidth": st.sampled_from(["", "0", "-1", "1", "50", "4000", "1e300"]),
    "VOILUTFunction": st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID", "CUBIC", ""]),
    "PixelPaddingValue": numbers,
    "PixelPaddingRangeLimit": numbers,
    **dict.fromkeys(("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"), spacings),
    "PixelAspectRatio": st.lists(st.sampled_from(["0", "1", "2", "100"]), min_size=1, max_size=3),
    "PatientOrientation": st.lists(st.sampled_from(["L", "R", "F", "H", "A", "P", "LF", "LE", ""]), max_size=3),
    "Modality": st.sampled_from(["CR", "DX", "CT", "MR", "", "XX"]),
    "BodyPartExamined": st.sampled_from(["CHEST", "HAND", "", "Thorax"]),
    "ShutterShape": st.sampled_from(["RECTANGULAR", "CIRCULAR", "POLYGONAL", "STAR"]),
    "PresentationLUTShape": st.sampled_from(["IDENTITY", "INVERSE"]),
    "PlanarConfiguration": st.sampled_from([0, 1, 5]),
}
SHUTTER = {
    "ShutterUpperHorizontalEdge": 10, "ShutterLowerHorizontalEdge": 100, "ShutterLeftVerticalEdge": 5,
    "ShutterRightVerticalEdge": 90, "CenterOfCircularShutter": [60, 50], "RadiusOfCircularShutter": 40,
}  # fmt: skip
BASE = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2000, "WindowWidth": 4002, "RescaleSlope": 1,
        "RescaleIntercept": 0, "PixelSpacing": [0.2, 0.2], "PatientOrientation": ["L", "F"]}  # fmt: skip


def outcome(data: bytes) -> OrientedRadiograph | None:
    """The image, or None for a refusal in a sentence that begins with the file."""
    try:
        return load_radiograph(data, FRONTAL)
    except FileError as error:
        text = str(error)
    assert text.startswith("frontal: ")
    assert "\n" not in text
    assert len(text) > 25
    return None


def is_same(one: OrientedRadiograph, other: OrientedRadiograph) -> bool:
    return one.image.shape == other.image.shape and bool(
        np.abs(scaled(one.image) - scaled(other.image)).max() <= TOLERANCE
    )


def mutated_dicom(changes: dict[str, Any]) -> bytes:
    """A file with these values whether they are valid or not."""
    settings_before = pydicom.config.settings.writing_validation_mode
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        return dicom(PIXELS, **(BASE | changes))
    finally:
        pydicom.config.settings.writing_validation_mode = settings_before


@pytest.mark.filterwarnings("ignore")  # pydicom warns of invalid values that it reads
@settings(MUTATIONS, max_examples=90)
@given(st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=2, unique=True), st.data())
def test_a_mutated_dicom_header_is_refused_or_changes_nothing_or_is_recorded(
    names: list[str], data: st.DataObject
) -> None:
    changes = {name: data.draw(FIELDS[name], name) for name in names}
    shutter = SHUTTER if "ShutterShape" in names else {}
    expected = outcome(mutated_dicom(shutter))
    assert expected is not None
    found = outcome(mutated_dicom(shutter | changes))
    if found is not None and not is_same(found, expected):
        assert any(name in note for name in names for note in found.notes), (changes, found.notes)


# --- PNG, TIFF and JPEG: fields in their binary form ---

PNG = encoded(Image.fromarray(PIXELS.astype(np.uint16) * 16), "PNG")
TIFF = encoded(Image.fromarray(PIXELS.astype(np.uint16) * 16), "TIFF")
JPEG = encoded(Image.fromarray(chest().astype(np.uint8)), "JPEG", quality=95, dpi=(72, 72))
IHDR = {"width": (16, ">I"), "height": (20, ">I"), "depth": (24, ">B"), "color": (25, ">B"), "interlace": (28, ">B")}
JFIF = {"version": (11, ">B"), "unit": (13, ">B"), "x density": (14, ">H"), "y density": (16, ">H")}
TAGS = {
    "ImageWidth": 0x100, "ImageLength": 0x101, "BitsPerSample": 0x102, "Compression": 0x103, "Photometric": 0x106,
    "SamplesPerPixel": 0x115, "RowsPerStrip": 0x116, "StripByteCounts": 0x117, "PlanarConfiguration": 0x11C,
}  # fmt: skip
ADDED = {"FillOrder": 0x10A, "Orientation": 0x112, "ResolutionUnit": 0x128, "Predictor": 0x13D, "SampleFormat": 0x153}


def check_image(original: bytes, changed: bytes) -> None:
    expected, found = outcome(original), outcome(changed)
    assert expected is not None
    if found is not None and not is_same(found, expected):
        assert found.notes != expected.notes


@MUTATIONS
@given(st.dictionaries(st.sampled_from(sorted(IHDR)), numbers, min_size=1, max_size=2))
def test_a_mutated_png_header_is_refused_or_changes_nothing_or_is_recorded(changes: dict[str, int]) -> None:
    data = bytearray(PNG)
    for name, value in changes.items():
        at, form = IHDR[name]
        struct.pack_into(form, data, at, min(value, 255) if form == ">B" else value)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    check_image(PNG, bytes(data))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@settings(MUTATIONS, max_examples=15)
@given(st.tuples(numbers, numbers), st.sampled_from([0, 1, 9]), st.one_of(st.none(), numbers))
def test_a_png_with_other_chunks_is_refused_or_changes_nothing_or_is_recorded(
    density: tuple[int, int], unit: int, transparent: int | None
) -> None:
    chunks = chunk(b"pHYs", struct.pack(">IIB", *density, unit))
    if transparent is not None:
        chunks += chunk(b"tRNS", struct.pack(">H", transparent))
    check_image(PNG, PNG[:33] + chunks + PNG[33:])


@MUTATIONS
@given(st.dictionaries(st.sampled_from(sorted({**TAGS, **ADDED})), numbers, min_size=1, max_size=2))
def test_a_mutated_tiff_header_is_refused_or_changes_nothing_or_is_recorded(changes: dict[str, int]) -> None:
    data = bytearray(TIFF)
    at = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, at)[0]
    entries = {
        struct.unpack_from("<H", data, at + 2 + 12 * k)[0]: bytes(data[at + 2 + 12 * k :][:12]) for k in range(count)
    }
    for name, value in changes.items():
        tag = {**TAGS, **ADDED}[name]
        entries[tag] = struct.pack("<HHII", tag, 4, 1, value)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    struct.pack_into("<I", data, 4, len(data))
    check_image(TIFF, bytes(data) + directory)


@settings(MUTATIONS, max_examples=15)
@given(st.dictionaries(st.sampled_from(sorted(JFIF)), numbers, min_size=1, max_size=2), st.integers(0, 9))
def test_a_mutated_jpeg_header_is_refused_or_changes_nothing_or_is_recorded(
    changes: dict[str, int], orientation: int
) -> None:
    data = bytearray(JPEG)
    assert data[6:10] == b"JFIF"
    for name, value in changes.items():
        at, form = JFIF[name]
        struct.pack_into(form, data, at, min(value, 255) if form == ">B" else value)
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = exif.tobytes()
    marker = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    check_image(JPEG, bytes(data[:20]) + marker + bytes(data[20:]))


def test_the_unmutated_files_are_read() -> None:
    for data in (PNG, TIFF, JPEG, mutated_dicom({})):
        found = outcome(data)
        assert found is not None
        assert np.abs(scaled(found.image) - PIXELS / 4000).max() < 0.08
