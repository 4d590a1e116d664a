"""Hostile files: each is refused with a message, quickly, and without allocating the memory that it declares."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    generate_uid,
)
from samples import thorax_image, write_image, write_series

from raylift.datasets.errors import FileError
from raylift.datasets.radiographs import decoding
from raylift.datasets.radiographs.preparation import prepare
from raylift.datasets.scans import reader, volume_file

SOON_S = 5.0
MEMORY = 2**30
"""What a test may allocate beyond what it has, in bytes."""


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Any allocation over a gibibyte fails with a MemoryError, which no test expects."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_bound_on_memory_holds() -> None:
    with pytest.raises(MemoryError):
        np.ones(2 * MEMORY, dtype=np.uint8)


def assert_sentence(error: FileError, name: str) -> None:
    text = str(error)
    assert text.startswith(name)
    assert "\n" not in text
    assert 15 < len(text) - len(name) < 400


def bomb(megabytes: int) -> bytes:
    """A deflate stream, without head and checksum, of that many megabytes of zeros."""
    squeeze = zlib.compressobj(9, wbits=-15)
    one = squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return one * megabytes + squeeze.flush()


def refusal_of(source: reader.Source) -> FileError:
    with pytest.raises(FileError) as caught:
        reader.read(source)
    return caught.value


# --- volumes ---


def nifti(*size: int, bits: int = 16, datatype: int = 4, voxels: bytes = b"") -> bytes:
    """A NIfTI-1 header that claims this size, and these voxels."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(size), *size, *[1] * (7 - len(size)))
    struct.pack_into("<hh", header, 70, datatype, bits)
    struct.pack_into("<8f", header, 76, 1, *[1.0] * 7)
    struct.pack_into("<fff", header, 108, 352, 1, 0)
    struct.pack_into("<hh", header, 252, 1, 1)
    for row in range(3):
        struct.pack_into("<4f", header, 280 + 16 * row, *(float(row == k) for k in range(3)), 0)
    header[344:348] = b"n+1\0"
    return bytes(header) + voxels


def nifti2(*size: int) -> bytes:
    """A NIfTI-2 header, whose sizes have 64 bits."""
    header = bytearray(544)
    struct.pack_into("<i8s", header, 0, 540, b"n+2\0\r\n\x1a\n")
    struct.pack_into("<hh8q", header, 12, 4, 16, len(size), *size, *[1] * (7 - len(size)))
    struct.pack_into("<8d", header, 104, 1, *[1.0] * 7)
    struct.pack_into("<q", header, 168, 544)
    struct.pack_into("<ii", header, 344, 1, 1)
    for row in range(3):
        struct.pack_into("<4d", header, 400 + 32 * row, *(float(row == k) for k in range(3)), 0)
    return bytes(header)


def nrrd(*size: int, kind: str = "short", encoding: str = "raw", more: str = "", voxels: bytes = b"") -> bytes:
    sizes = " ".join(map(str, size))
    axes = " ".join("(" + ",".join(str(int(k == axis)) for k in range(3)) + ")" for axis in range(3))
    lines = ["NRRD0004", f"type: {kind}", "dimension: 3", "space: left-posterior-superior", f"sizes: {sizes}"]
    lines += [f"space directions: {axes}", "endian: little", f"encoding: {encoding}", "space origin: (0,0,0)"]
    return ("\n".join(lines) + f"\n{more}\n").encode() + voxels


def metaimage(*size: int, kind: str = "MET_SHORT", data: str = "LOCAL", more: str = "", voxels: bytes = b"") -> bytes:
    sizes = " ".join(map(str, size))
    lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", f"DimSize = {sizes}", "ElementSpacing = 1 1 1"]
    return ("\n".join(lines) + f"\n{more}ElementType = {kind}\nElementDataFile = {data}\n").encode() + voxels


OVER_LIMITS: dict[str, tuple[str, bytes]] = {
    "sides of 100000 in a NRRD": ("a.nrrd", nrrd(100_000, 100_000, 100_000)),
    "sides of 100000 in a MetaImage": ("a.mha", metaimage(100_000, 100_000, 100_000)),
    "sides of 100000 in a NIfTI-2": ("a.nii", nifti2(100_000, 100_000, 100_000)),
    "sides of 32767 in a NIfTI": ("a.nii", nifti(32767, 32767, 32767)),
    "sides of 32767 in a compressed NIfTI": ("a.nii.gz", gzip.compress(nifti(32767, 32767, 32767))),
    "ten billion voxels in a NRRD": ("a.nrrd", nrrd(2160, 2160, 2160)),
    "ten billion voxels in a NIfTI": ("a.nii", nifti(2160, 2160, 2160)),
    "ten billion voxels in a MetaImage": ("a.mha", metaimage(2160, 2160, 2160)),
    "a size that overflows 64 bits": ("a.nrrd", nrrd(2**40, 2**40, 2**40)),
    "a size that is negative": ("a.mha", metaimage(-512, 512, 512)),
    "a size of zero": ("a.nrrd", nrrd(512, 0, 512)),
    "voxels within the limits that no file of this size can hold": ("a.nrrd", nrrd(1000, 1000, 1000, kind="double")),
    "the same in a compressed NRRD": ("a.nrrd", nrrd(1000, 1000, 1000, kind="double", encoding="gzip", voxels=b"\x1f")),
    "the same in a NIfTI": ("a.nii", nifti(1000, 1000, 1000, bits=64, datatype=64)),
    "the same in a compressed NIfTI": ("a.nii.gz", gzip.compress(nifti(1000, 1000, 1000, bits=64, datatype=64))),
    "the same in a MetaImage": ("a.mha", metaimage(1000, 1000, 1000, kind="MET_DOUBLE")),
    "the same in a compressed MetaImage": (
        "a.mha", metaimage(1000, 1000, 1000, kind="MET_DOUBLE", more="CompressedData = True\n", voxels=b"\x78"),
    ),
    "voxels far apart, for a segmentation of the whole": ("a.nrrd", nrrd(600, 600, 60).replace(b"(1,", b"(20,")),
}  # fmt: skip


@pytest.mark.parametrize("what", OVER_LIMITS)
def test_a_header_that_claims_too_much_is_refused_from_the_header(what: str, tmp_path: Path) -> None:
    name, data = OVER_LIMITS[what]
    path = tmp_path / name
    path.write_bytes(data)
    begun = time.monotonic()
    [source] = reader.find([path]).sources
    with pytest.raises(FileError) as caught:
        reader.read(source)
    assert time.monotonic() - begun < SOON_S
    assert_sentence(caught.value, str(path))


def test_slices_that_claim_too_much_are_refused_from_their_headers(tmp_path: Path) -> None:
    def enlarge(_: int, ds: Dataset) -> Dataset:
        ds.Rows = ds.Columns = 4096
        return ds

    for k, size in enumerate(((8, 8, 70), (8, 8, 20))):  # over a thousand million voxels, and under
        folder = tmp_path / str(k)
        write_series(folder, thorax_image(size, (9, 9, 9)), change=enlarge)
        with pytest.raises(FileError, match="over the limit of 1073741824" if k == 0 else "cannot hold") as caught:
            reader.read(reader.find([folder]).sources[0])
        assert_sentence(caught.value, str(folder))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_stream_that_inflates_far_beyond_its_volume_is_not_inflated(suffix: str, tmp_path: Path) -> None:
    gz = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    if suffix == ".nii.gz":
        data = gzip.compress(nifti(64, 64, 64)) + gz + bomb(4000)
    elif suffix == ".nrrd":
        data = nrrd(64, 64, 64, encoding="gzip", voxels=gz + bomb(4000))
    else:
        packed = b"\x78\xda" + bomb(4000)
        more = f"CompressedData = True\nCompressedDataSize = {len(packed)}\n"
        data = metaimage(64, 64, 64, more=more, voxels=packed)
    assert len(data) < 5 * 2**20
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(data)
    begun = time.monotonic()
    with pytest.raises(FileError) as caught:
        reader.read(reader.find([path]).sources[0])
    assert time.monotonic() - begun < SOON_S
    assert_sentence(caught.value, str(path))


@pytest.mark.parametrize(
    "value", ["/etc/passwd", "../secret.raw", "sub/secret.raw", "LIST", "slice%03d.raw 1 9 1", ".."]
)
@pytest.mark.parametrize("suffix", [".nhdr", ".nrrd", ".mhd", ".mha"])
def test_a_header_cannot_have_other_files_read_as_voxels(suffix: str, value: str, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    (folder / "sub").mkdir(parents=True)
    for secret in (tmp_path / "secret.raw", folder / "sub" / "secret.raw"):
        secret.write_bytes(b"the secret " * 10_000)
    is_nrrd = suffix in (".nhdr", ".nrrd")
    path = folder / f"scan{suffix}"
    path.write_bytes(nrrd(20, 20, 20, more=f"data file: {value}\n") if is_nrrd else metaimage(20, 20, 20, data=value))
    found = reader.find([path])
    assert not found.sources
    [refusal] = found.refused
    assert_sentence(refusal, str(path))
    assert value in str(refusal)
    assert "the secret" not in str(refusal)


def test_the_key_of_the_data_file_in_any_spelling_is_seen(tmp_path: Path) -> None:
    spellings = [
        "datafile: /etc/passwd",
        "Data File:   /etc/passwd",
        "data file:\t/etc/passwd",
        "DATA FILE : /etc/passwd",
    ]
    for k, line in enumerate(spellings):
        path = tmp_path / f"{k}.nhdr"
        path.write_bytes(nrrd(20, 20, 20, more=f"{line}\n"))
        assert "/etc/passwd" in str(reader.find([path]).refused[0])
    path = tmp_path / "a.mhd"
    path.write_bytes(metaimage(20, 20, 20).replace(b"ElementDataFile = LOCAL", b"elementdatafile=/etc/passwd"))
    assert "/etc/passwd" in str(reader.find([path]).refused[0])


def test_a_header_without_end_is_not_read_for_ever(tmp_path: Path) -> None:
    for name, line in (("a.nrrd", b"# a comment\n"), ("a.mha", b"Comment = x\n"), ("b.mha", b"x"), ("b.nrrd", b"y")):
        path = tmp_path / name
        path.write_bytes((b"NRRD0004\n" if "nrrd" in name else b"") + line * (2**23 // len(line)))
        begun = time.monotonic()
        found = reader.find([path])
        refusal = found.refused[0] if found.refused else refusal_of(found.sources[0])
        assert time.monotonic() - begun < SOON_S
        assert_sentence(refusal, str(path))


def deflated(megabytes: int) -> bytes:
    """A DICOM file whose deflated body inflates to that many megabytes of zeros."""
    return meta(DeflatedExplicitVRLittleEndian) + bomb(megabytes)


def meta(syntax: str) -> bytes:
    """The head of a DICOM file up to its first element."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    empty = zlib.compressobj(9, wbits=-15).flush() if syntax == DeflatedExplicitVRLittleEndian else b""
    return file.getvalue().removesuffix(empty)


def elements(count: int) -> bytes:
    return b"".join(struct.pack("<HH2sH", 0x0009 + 2 * (k >> 15), k & 0x7FFF, b"LO", 0) for k in range(count))


def items(count: int) -> bytes:
    start, item, end = ((0x0008, 0x1140, b"SQ", 0, 2**32 - 1), (0xFFFE, 0xE000, 0), (0xFFFE, 0xE0DD, 0))
    return struct.pack("<HH2sHI", *start) + struct.pack("<HHI", *item) * count + struct.pack("<HHI", *end)


def nested(depth: int) -> bytes:
    start = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 2**32 - 1)
    return (start + struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)) * depth


def dicom(**tags: object) -> bytes:
    """A small radiograph with other tags."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = ComputedRadiographyImageStorage, generate_uid(), "CR"
    ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.Rows, ds.Columns = "MONOCHROME2", 1, 64, 64
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.arange(64 * 64, dtype="<u2").tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes(128) + b"DICM", id="nothing behind the mark"),
        pytest.param(bytes(128) + b"DICM" + b"\xff" * 5000, id="nonsense behind the mark"),
        pytest.param(meta(ExplicitVRLittleEndian) + nested(50_000), id="sequences in sequences"),
        pytest.param(deflated(4000), id="deflated"),
        pytest.param(meta(ExplicitVRLittleEndian) + items(3_000_000), id="a million items"),
        pytest.param(meta(ExplicitVRLittleEndian) + elements(100_000), id="a hundred thousand elements"),
        pytest.param(dicom()[:700], id="cut in its header"),
    ],
)
def test_hostile_dicom_next_to_good_scans_is_refused_and_the_scans_are_found(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "hostile.dcm").write_bytes(data)
    write_image(thorax_image((20, 20, 12)), tmp_path / "scan.nii.gz")
    begun = time.monotonic()
    found = reader.find([tmp_path])
    assert [source.name for source in found.sources if not source.is_dicom] == ["scan.nii.gz"]
    refused = found.refused + [refusal_of(source) for source in found.sources if source.is_dicom]
    assert time.monotonic() - begun < SOON_S
    [refusal] = refused
    assert_sentence(refusal, str(tmp_path / "hostile.dcm"))


def test_links_in_circles_and_pipes_do_not_hold_a_search_up(tmp_path: Path) -> None:
    write_image(thorax_image((20, 20, 12)), tmp_path / "scan.nii.gz")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "nowhere.nii").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.nii")
    found = reader.find([tmp_path, tmp_path / "pipe.nii", tmp_path / "nowhere.nii"])
    assert "scan.nii.gz" in {source.name for source in found.sources}
    assert {str(error).partition(":")[0] for error in found.refused} == {
        str(tmp_path / "pipe.nii"), str(tmp_path / "nowhere.nii"), f"{tmp_path / 'itself'} and 1 more",
    }  # fmt: skip


# --- radiographs ---


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def ihdr(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(np.add.outer(np.arange(100), np.arange(90)).astype(np.uint8))).save(file, kind, **options)
    return file.getvalue()


def zeros(megabytes: int) -> bytes:
    return b"\x78\xda" + bomb(megabytes)


def tiff_in_a_circle() -> bytes:
    """A TIFF whose second directory is its first again."""
    data = bytearray(encoded("TIFF"))
    at = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, at)[0]
    struct.pack_into("<I", data, at + 2 + 12 * count, at)
    return bytes(data)[: len(data) - 4000]


def huge_jpeg2000() -> bytes:
    """A codestream that claims a hundred times the sides of the DICOM file around it."""
    stream = bytearray(encoded("JPEG2000", irreversible=False, no_jp2=True))
    siz = stream.index(b"\xff\x51")
    struct.pack_into(">II", stream, siz + 6, 60_000, 60_000)
    struct.pack_into(">II", stream, siz + 22, 60_000, 60_000)
    return dicom_jpeg(bytes(stream), syntax=JPEG2000Lossless)


def rgba16(side: int) -> bytes:
    """The header of a PNG with 8 bytes per pixel, and pixels that inflate to 500 MB."""
    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zeros(500)), (b"IEND", b""))


def tiff_with_huge_tiles() -> bytes:
    """A deflated TIFF of 100 x 90 pixels in one tile of 60000 x 50000."""
    entries = [
        (0x100, 4, 90), (0x101, 4, 100), (0x102, 3, 8), (0x103, 3, 8), (0x106, 3, 1), (0x115, 3, 1), (0x142, 4, 60_000),
        (0x143, 4, 50_000), (0x144, 4, 200), (0x145, 4, 3_000_000),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(200, b"\0") + zeros(3000)


def tiff_of_many_pages() -> bytes:
    """A TIFF with half a million directories."""
    entries = [(0x100, 90), (0x101, 100), (0x111, 8), (0x117, 1200)]
    page = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    size = len(page) + 4
    return b"II*\0" + b"".join(struct.pack("<I", 8 + size * k) + page for k in range(500_000)) + bytes(4)


def jpeg_of_many_scans(scans: int = 2000) -> bytes:
    """A progressive JPEG of 5600 x 5600 whose last scan is repeated."""
    data = encoded("JPEG", Image.new("L", (5600, 5600), 90), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def jpeg_without_pixels() -> bytes:
    """A JPEG of 5600 x 5600 whose scan has no data."""
    data = encoded("JPEG", Image.new("L", (5600, 5600), 90))
    scan = data.index(b"\xff\xda")
    return data[: scan + 2 + struct.unpack_from(">H", data, scan + 2)[0]] + b"\xff\xd9"


def dicom_jpeg(stream: bytes, **tags: object) -> bytes:
    usual = {"syntax": JPEGBaseline8Bit, "Rows": 100, "Columns": 90, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    return dicom(PixelData=pydicom.encaps.encapsulate([stream]), **usual | tags)


def jpeg2000_of_many_components() -> bytes:
    """A codestream that claims 16384 samples per pixel in a DICOM file of one."""
    stream = bytearray(encoded("JPEG2000", irreversible=False, no_jp2=True))
    struct.pack_into(">H", stream, stream.index(b"\xff\x51") + 38, 16_384)
    return dicom_jpeg(bytes(stream), syntax=JPEG2000Lossless)


def animation() -> bytes:
    frames = [Image.new("L", (3000, 3000), level) for level in (10, 90)]
    return encoded("PNG", frames[0], save_all=True, append_images=frames[1:])


FROM_THE_HEADER: dict[str, tuple[Callable[[], bytes], str]] = {
    "a PNG of 8192 x 8192, RGBA of 16 bits": (lambda: rgba16(8192), "8192 x 8192 pixels, over the limit of 32000000"),
    "a PNG of 5000 x 5000, RGBA of 16 bits": (lambda: rgba16(5000), "200005000 bytes when it is decoded"),
    "a TIFF with tiles of 3 GB": (tiff_with_huge_tiles, "3000000000 bytes when it is decoded"),
    "a TIFF of half a million pages": (tiff_of_many_pages, "over 64 pages"),
    "an animation": (animation, "2 frames"),
    "a JPEG of 2006 scans": (jpeg_of_many_scans, "over 32 scans"),
    "a DICOM file with a JPEG of 2006 scans": (
        lambda: dicom_jpeg(jpeg_of_many_scans(), Rows=5600, Columns=5600), "over 32 scans",
    ),
    "a JPEG 2000 of many components": (jpeg2000_of_many_components, "16384 samples per pixel"),
    "a DICOM file of 65535 x 65535": (lambda: dicom(Rows=65535, Columns=65535), "over the limit of 32000000"),
}  # fmt: skip
"""Files that would cost much time or memory if they were decoded, with a part of the refusal."""


def test_costly_files_are_refused_from_the_header_in_a_fifth_of_a_second_and_64_mb(tmp_path: Path) -> None:
    code = (
        "import json, resource, sys, time; from pathlib import Path\n"
        "from raylift.datasets.radiographs import decoding; from raylift.datasets.errors import FileError\n"
        "files = [Path(name).read_bytes() for name in sys.argv[1:]]\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20,) * 2)\n"
        "for data in files:\n"
        "    begun = time.process_time()\n"
        "    try: decoding.read(data, 'upload'); text = 'read'\n"
        "    except FileError as error: text = str(error)\n"
        "    print(json.dumps([text, time.process_time() - begun]))"
    )
    paths = [tmp_path / str(k) for k in range(len(FROM_THE_HEADER))]
    for path, (make, _) in zip(paths, FROM_THE_HEADER.values(), strict=True):
        path.write_bytes(make())
    run = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    for (text, seconds), (what, (_, words)) in zip(lines, FROM_THE_HEADER.items(), strict=True):
        assert text.startswith("upload: "), what
        assert words in text, what
        assert seconds < 0.2, what


NO_RADIOGRAPHS: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\x89",
    "text": lambda: b"Dear Sir or Madam,\n" * 100,
    "a PDF named .png": lambda: b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n",
    "a web page": lambda: b"<!DOCTYPE html><html><img src=x></html>",
    "an SVG": lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>',
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n(x) run\n%%EOF",
    "an archive": lambda: b"PK\x03\x04" + bytes(200),
    "a program": lambda: b"\x7fELF" + bytes(4000),
    "noise": lambda: random.Random(0).randbytes(50_000),
    "a GIF": lambda: encoded("GIF"),
    "a WebP": lambda: encoded("WEBP"),
    "a bare JPEG 2000": lambda: encoded("JPEG2000"),
    "half a PNG": lambda: encoded("PNG")[:-60],
    "the head of a PNG": lambda: encoded("PNG")[:30],
    "half a JPEG": lambda: encoded("JPEG")[:500],
    "half a JPEG with an end": lambda: encoded("JPEG")[:700] + b"\xff\xd9",
    "a JPEG without its last bytes": lambda: encoded("JPEG")[:-12] + b"\xff\xd9",
    "half a progressive JPEG with an end": lambda: encoded("JPEG", progressive=True)[:380] + b"\xff\xd9",
    "a JPEG of 700 bytes that claims 5600 x 5600": jpeg_without_pixels,
    "half a JPEG in a DICOM file": lambda: dicom_jpeg(encoded("JPEG")[:700] + b"\xff\xd9"),
    "half a TIFF": lambda: encoded("TIFF")[:3000],
    "half a packed TIFF": lambda: encoded("TIFF", compression="tiff_lzw")[:-700],
    "a TIFF in a circle": tiff_in_a_circle,
    "half a BMP": lambda: encoded("BMP")[:2000],
    "half a DICOM file": lambda: dicom()[:-3000],
    "the head of a DICOM file": lambda: dicom()[:140],
    "a PNG of 100000 x 100000": lambda: png(ihdr(100_000, 100_000), (b"IDAT", zlib.compress(bytes(1000)))),
    "a PNG of 13000 x 13000": lambda: png(ihdr(13_000, 13_000), (b"IDAT", zeros(162)), (b"IEND", b"")),
    "a PNG of 9000 x 9000": lambda: png(ihdr(9_000, 9_000), (b"IDAT", zeros(78)), (b"IEND", b"")),
    "a PNG of 60000000 x 1": lambda: png(ihdr(60_000_000, 1), (b"IDAT", zeros(58)), (b"IEND", b"")),
    "a PNG that a square of its longer side would not fit": lambda: png(
        ihdr(2_000_000, 32), (b"IDAT", zlib.compress((b"\0" + bytes(range(250)) * 8000) * 32, 9)), (b"IEND", b"")
    ),
    "a PNG with a text that inflates": lambda: png(
        ihdr(64, 64), (b"zTXt", b"k\0\0" + zeros(500)), (b"IDAT", zlib.compress(bytes(65 * 64))), (b"IEND", b"")
    ),
    "a PNG with a profile that inflates": lambda: png(
        ihdr(64, 64), (b"iCCP", b"k\0\0" + zeros(500)), (b"IDAT", zlib.compress(bytes(65 * 64))), (b"IEND", b"")
    ),
    "a TIFF of 60000 x 60000": lambda: encoded("TIFF").replace(
        struct.pack("<HHII", 0x100, 4, 1, 90), struct.pack("<HHII", 0x100, 4, 1, 60_000)
    ).replace(struct.pack("<HHII", 0x101, 4, 1, 100), struct.pack("<HHII", 0x101, 4, 1, 60_000)),
    "a constant DICOM image": lambda: dicom(PixelData=bytes(64 * 64 * 2)),
    "a DICOM file of 65535 x 65535": lambda: dicom(Rows=65535, Columns=65535),
    "a DICOM file without pixels": lambda: dicom(PixelData=None),
    "a DICOM file without rows": lambda: dicom(Rows=None),
    "a DICOM film": lambda: dicom(NumberOfFrames=1000),
    "a DICOM image in color": lambda: dicom(SamplesPerPixel=3),
    "a DICOM report": lambda: dicom(Modality="SR", PixelData=None, Rows=None, Columns=None),
    "a CT slice": lambda: dicom(Modality="CT"),
    "an MR slice": lambda: dicom(Modality="MR"),
    "a DICOM file of 3 bits": lambda: dicom(BitsAllocated=3, BitsStored=3, HighBit=2),
    "a DICOM file with an unknown transfer syntax": lambda: dicom().replace(b"10008.1.2.1\0", b"99999.1.2.1\0"),
    "a JPEG 2000 larger than the DICOM file around it states": huge_jpeg2000,
    "a DICOM file that inflates": lambda: deflated(2000),
    "a DICOM file of a million elements": lambda: meta(ExplicitVRLittleEndian) + elements(1_000_000),
    "a DICOM file of a million items": lambda: meta(ExplicitVRLittleEndian) + items(1_000_000),
    "a DICOM file of sequences in sequences": lambda: meta(ExplicitVRLittleEndian) + nested(200_000),
    "a DICOM element longer than its file": lambda: meta(ExplicitVRLittleEndian)
    + struct.pack("<HH2sHI", 0x0009, 0x0001, b"OB", 0, 2**31),
    "a DICOM file whose meta group never ends": lambda: bytes(128) + b"DICM"
    + struct.pack("<HH2sHI", 2, 0, b"UL", 4, 2**31) + struct.pack("<HH2sH", 2, 0x100, b"LO", 0) * 100,
}  # fmt: skip


@pytest.mark.parametrize("what", NO_RADIOGRAPHS)
def test_what_is_no_radiograph_is_refused_in_a_sentence(what: str) -> None:
    data = NO_RADIOGRAPHS[what]()
    assert len(data) < 64 * 2**20
    begun = time.monotonic()
    with pytest.raises(FileError) as caught:
        decoding.read(data, "upload.png")
    assert time.monotonic() - begun < SOON_S
    assert_sentence(caught.value, "upload.png: ")


def test_a_file_that_passes_every_limit_is_prepared_in_bounded_memory() -> None:
    """A long narrow image is padded to a square of its longer side."""
    narrow = np.tile(np.arange(3000, dtype=np.uint8) % 251, (10600, 1))
    image = decoding.read(encoded("PNG", Image.fromarray(narrow)), "narrow").pixels
    assert prepare(image, 64).shape == (64, 64)


def test_the_bytes_of_an_upload_are_counted_before_anything_is_parsed() -> None:
    with pytest.raises(FileError, match=rf"upload: {2**26 + 1} bytes, over the limit of {2**26}"):
        decoding.read(bytes(2**26 + 1), "upload")


# --- damage at random ---


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in or cut out, mostly near the front where headers are."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not result:
            break
        at = rng.randrange(min(len(result), 600) if rng.random() < 0.8 else len(result))
        kind = rng.random()
        if kind < 0.6:
            result[at] = rng.randrange(256)
        elif kind < 0.75:
            result[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind < 0.9:
            del result[at : at + rng.choice([1, 4, 1000])]
        else:
            del result[at + 1 :]
    return bytes(result)


@pytest.mark.filterwarnings("ignore")  # a library may warn of damage that it can live with
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "DICOM"])
def test_a_damaged_radiograph_is_read_or_refused_and_nothing_else(kind: str) -> None:
    data = dicom() if kind == "DICOM" else encoded(kind)
    rng = random.Random(kind)
    refused = 0
    for _ in range(150):
        try:
            prepare(decoding.read(damaged(data, rng), "upload").pixels, 32)
        except FileError as error:
            assert_sentence(error, "upload: ")
            refused += 1
    assert refused > 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [*volume_file.SUFFIXES, ".dcm"])
def test_a_damaged_scan_is_read_or_refused_and_nothing_else(suffix: str, tmp_path: Path) -> None:
    image = thorax_image((30, 24, 12), (10.0, 10.0, 20.0))
    path = write_series(tmp_path, image)[5] if suffix == ".dcm" else write_image(image, tmp_path / f"scan{suffix}")
    data = path.read_bytes()
    rng = random.Random(suffix)
    refused = 0
    for _ in range(60):
        path.write_bytes(damaged(data, rng))
        found = reader.find([tmp_path if suffix == ".dcm" else path])
        refused += len(found.refused)
        for source in found.sources:
            try:
                reader.read(source)
            except FileError:
                refused += 1
    assert refused > 10


def test_nothing_of_a_hostile_file_is_run(tmp_path: Path) -> None:
    """Reading through the listed formats starts no other program, whatever the file would like."""
    code = (
        "import sys, json; from pathlib import Path\n"
        "from raylift.datasets.radiographs import decoding; from raylift.datasets.scans import reader\n"
        "from raylift.datasets.errors import FileError\n"
        "started = []\n"
        "sys.addaudithook(lambda name, args: started.append(name) if name in\n"
        "    ('subprocess.Popen', 'os.exec', 'os.system', 'os.posix_spawn', 'pickle.find_class') else None)\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: decoding.read(path.read_bytes(), path.name)\n"
        "    except FileError: pass\n"
        "    for source in reader.find([path]).sources:\n"
        "        try: reader.read(source)\n"
        "        except FileError: pass\n"
        "print(json.dumps(started))"
    )
    for k, make in enumerate(NO_RADIOGRAPHS.values()):
        (tmp_path / f"{k}.mha").write_bytes(make())
        (tmp_path / f"{k}.png").write_bytes(make())
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == []
