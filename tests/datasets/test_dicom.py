from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian
from samples import thorax_image, write_series

from raylift.datasets import dicom


def image(values: np.ndarray, **tags: Any) -> Dataset:
    """A monochrome image of unsigned 16-bit words."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.Rows, ds.Columns = values.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = values.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    return ds


WORDS = np.array([[0x0000, 0x07FF, 0x0FFF], [0x1005, 0xF830, 0xFFFF]])


@pytest.mark.parametrize(
    ("tags", "values", "allocated", "exceeding"),
    [
        ({}, [[0, 2047, 4095], [5, 2096, 4095]], WORDS.tolist(), [[0, 0, 0], [1, 1, 1]]),
        (
            {"PixelRepresentation": 1},
            [[0, 2047, -1], [5, -2000, -1]],
            [[0, 2047, 4095], [4101, -2000, -1]],
            [[0, 0, 0], [1, 0, 0]],
        ),
        ({"HighBit": 15}, [[0, 127, 255], [256, 3971, 4095]], [[0, 127, 255], [256, 3971, 4095]], [[0] * 3] * 2),
        ({"BitsStored": 16, "HighBit": 15}, WORDS.tolist(), WORDS.tolist(), [[0] * 3] * 2),
    ],
)
def test_stored_values_have_the_bits_and_the_sign_of_the_header(
    tags: dict[str, int], values: list[list[int]], allocated: list[list[int]], exceeding: list[list[int]]
) -> None:
    pixels = dicom.stored_pixels(image(WORDS, **tags), "image")
    np.testing.assert_array_equal(pixels.values, values)
    np.testing.assert_array_equal(pixels.allocated, allocated)
    np.testing.assert_array_equal(pixels.exceed_bits_stored, exceeding)


@pytest.mark.parametrize(
    ("tags", "padding"),
    [
        ({}, []),
        ({"PixelPaddingValue": None}, []),
        ({"PixelPaddingValue": 63536}, [(1, 1)]),
        ({"PixelPaddingValue": -2000}, [(1, 1)]),
        ({"PixelPaddingValue": 63536, "PixelRepresentation": 1}, [(1, 1)]),
        ({"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 10}, [(0, 0), (1, 0)]),
        ({"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 2047}, [(0, 1), (0, 2), (1, 1), (1, 2)]),
        ({"PixelPaddingRangeLimit": 10}, []),
    ],
)
def test_padding_is_the_value_or_the_range_of_the_header_in_either_sign(
    tags: dict[str, int], padding: list[tuple[int, int]]
) -> None:
    ds = image(WORDS)
    for name, value in tags.items():
        vr = "SS" if name.startswith("PixelPadding") and value is not None and value < 0 else "US"
        ds.add_new(name, vr, value)
    mask = dicom.is_padding(ds, dicom.stored_pixels(ds, "image"))
    assert [(int(row), int(column)) for row, column in np.argwhere(mask)] == padding


def test_declared_padding_is_at_the_border_or_a_large_region_of_one_value() -> None:
    values = np.full((40, 50), 7)
    values[0, :3] = values[10:15, 10:15] = values[20:24, 20:24] = 0
    values[30:36, 30:36], values[30, 30] = 0, 1
    region = dicom.padding_region(values <= 1, values)
    expected = np.zeros_like(region)
    expected[0, :3] = expected[10:15, 10:15] = True
    np.testing.assert_array_equal(region, expected)


@pytest.mark.parametrize("kind", ["without preamble", "implicit data set", "explicit data set"])
def test_files_without_preamble_or_meta_information_are_dicom(kind: str, tmp_path: Path) -> None:
    path = write_series(tmp_path, thorax_image((20, 20, 9)))[0]
    expected = pydicom.dcmread(path)
    if kind == "without preamble":
        data = path.read_bytes()[132:]
    else:
        bare = Dataset()
        bare.update(expected)
        file = DicomBytesIO()
        file.is_little_endian, file.is_implicit_VR = True, kind.startswith("implicit")
        write_dataset(file, bare)
        data = file.getvalue()
    assert dicom.is_dicom(data)
    parsed = dicom.parse(data, "bare")
    assert parsed.SOPInstanceUID == expected.SOPInstanceUID
    np.testing.assert_array_equal(dicom.stored_pixels(parsed, "image").values, expected.pixel_array)


@pytest.mark.parametrize(
    "data", [b"", b"\x08\0\x16", b"\x08\0\x16\0 hello, world", b"NRRD0004\n", bytes(200), b"\0\x05\x16\7" + bytes(200)]
)
def test_other_files_are_not_dicom(data: bytes) -> None:
    assert not dicom.is_dicom(data)
