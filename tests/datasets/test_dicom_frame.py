"""Every transfer syntax that the documentation lists, each with a frame encoded here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.filereader import dcmread
from radiograph_samples import chest, dicom, scaled

from raylift.datasets.dicom_frame import DECODERS
from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.decoding import read

TWELVE = chest(most=4000).astype("<u2")
EIGHT = chest().astype(np.uint8)
REFERENCE_PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "what-raylift-reads.md"


def jpeg2000(pixels: np.ndarray, **options: Any) -> bytes:
    return imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", bitspersample=12, **options)


FRAMES: dict[str, tuple[np.ndarray, Callable[[np.ndarray], bytes], float]] = {
    uid.JPEGBaseline8Bit: (EIGHT, lambda p: imagecodecs.jpeg8_encode(p, level=97), 0.05),
    uid.JPEGExtended12Bit: (TWELVE, lambda p: imagecodecs.jpeg8_encode(p, level=97, bitspersample=12), 0.05),
    uid.JPEGLossless: (TWELVE, lambda p: imagecodecs.jpeg8_encode(p, lossless=True, bitspersample=16, predictor=4), 0),
    uid.JPEGLosslessSV1: (TWELVE, lambda p: imagecodecs.jpeg8_encode(p, lossless=True, bitspersample=16), 0),
    uid.JPEGLSLossless: (TWELVE, imagecodecs.jpegls_encode, 0),
    uid.JPEGLSNearLossless: (TWELVE, lambda p: imagecodecs.jpegls_encode(p, level=4), 0.002),
    uid.JPEG2000Lossless: (TWELVE, lambda p: jpeg2000(p, reversible=True), 0),
    uid.JPEG2000: (TWELVE, lambda p: jpeg2000(p, level=60), 0.05),
    uid.HTJ2KLossless: (TWELVE, lambda p: imagecodecs.htj2k_encode(p, reversible=True), 0),
    uid.HTJ2KLosslessRPCL: (TWELVE, lambda p: imagecodecs.htj2k_encode(p, reversible=True), 0),
    uid.HTJ2K: (TWELVE, lambda p: imagecodecs.htj2k_encode(p, reversible=False), 0.05),
}  # fmt: skip


@pytest.mark.parametrize("syntax", FRAMES, ids=lambda syntax: uid.UID(syntax).keyword)
def test_a_compressed_frame_is_decoded(syntax: str) -> None:
    pixels, encode, tolerance = FRAMES[syntax]
    bits = {} if pixels.itemsize == 1 else {"BitsStored": 12, "HighBit": 11}
    image = read(dicom(pixels, syntax=syntax, PixelData=encapsulate([encode(pixels)]), **bits), "image").pixels
    assert np.abs(scaled(image) - scaled(pixels)).max() <= tolerance + 1e-6


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.RLELossless], ids=lambda one: one.keyword
)
def test_an_uncompressed_or_run_length_frame_is_decoded(syntax: str) -> None:
    assert np.array_equal(read(dicom(TWELVE, syntax=syntax), "image").pixels, TWELVE)


def test_a_big_endian_frame_is_decoded() -> None:
    path = get_testdata_file("MR_small_bigendian.dcm")
    little = get_testdata_file("MR_small.dcm")
    images = []
    for file in (path, little):
        dataset = dcmread(file)
        dataset.Modality = "CR"
        data = Path(file).read_bytes().replace(b"\x08\x00\x60\x00CS\x02\x00MR", b"\x08\x00\x60\x00CS\x02\x00CR")
        data = data.replace(b"\x00\x08\x00\x60CS\x00\x02MR", b"\x00\x08\x00\x60CS\x00\x02CR")
        images.append(read(data, "image").pixels)
    assert np.array_equal(*images)


def test_every_transfer_syntax_is_in_a_test_and_in_the_documentation() -> None:
    tested = {*FRAMES, uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless}
    assert set(DECODERS) == tested
    page = REFERENCE_PAGE.read_text()
    assert [syntax for syntax in DECODERS if f"`{syntax}`" not in page] == []


@pytest.mark.parametrize("syntax", FRAMES, ids=lambda syntax: uid.UID(syntax).keyword)
def test_a_damaged_frame_is_read_or_refused(syntax: str) -> None:
    pixels, encode, _ = FRAMES[syntax]
    frame = encode(pixels)
    rng = np.random.default_rng(0)
    for cut in (len(frame) // 2, len(frame) - 2):
        with pytest.raises(FileError, match="image: ") if cut < len(frame) // 2 else _either():
            read(dicom(pixels, syntax=syntax, PixelData=encapsulate([frame[:cut]])), "image")
    for _ in range(3):
        damaged = bytearray(frame)
        for at in rng.integers(40, len(frame), 3):
            damaged[at] = rng.integers(256)
        with _either():
            read(dicom(pixels, syntax=syntax, PixelData=encapsulate([bytes(damaged)])), "image")


class _either:  # noqa: N801
    """An image or a FileError, and no other exception."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, FileError)


def test_another_transfer_syntax_is_refused_with_its_name() -> None:
    data = dicom(TWELVE, syntax="1.2.840.10008.1.2.4.100", PixelData=encapsulate([b"\0\0\1\xb3"]))
    with pytest.raises(FileError, match=r"transfer syntax MPEG2 .* is not supported: convert the file to RLE"):
        read(data, "image")
