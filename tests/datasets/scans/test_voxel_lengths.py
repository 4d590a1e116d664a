"""Files whose voxels contradict the sizes and lengths that their header states are refused, whatever their format."""

from __future__ import annotations

import bz2
import gzip
import re
import struct
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import thorax_image

from raylift.datasets.errors import FileError
from raylift.datasets.scans import reader
from raylift.datasets.scans.volume import check_order

SIZE = (40, 30, 20)
IMAGE = thorax_image(SIZE, (9.0, 9.0, 9.0))
HU = sitk.GetArrayFromImage(IMAGE)
LENGTH = HU.nbytes
INLINE = [".nii", ".nii.gz", ".nrrd", ".mha"]
DETACHED = [".nhdr", ".mhd"]


def read(path: Path) -> reader.Scan:
    found = reader.find([path])
    if found.refused:
        raise found.refused[0]
    return reader.read(found.sources[0])


def write(folder: Path, suffix: str, *, compressed: bool = False) -> Path:
    path = folder / f"ct{suffix}"
    sitk.WriteImage(IMAGE, str(path), useCompression=compressed or suffix == ".nii.gz")
    return path


def edit(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The file with other content; that of a compressed NIfTI is changed before compression."""
    is_gzip = path.name.endswith(".gz")
    content = change(gzip.decompress(path.read_bytes()) if is_gzip else path.read_bytes())
    path.write_bytes(gzip.compress(content) if is_gzip else content)
    return path


def sized(path: Path, *size: int) -> Path:
    """The file with other sizes in its header."""

    def change(content: bytes) -> bytes:
        if ".nii" in path.name:
            return content[:42] + struct.pack("<3h", *size) + content[48:]
        changed = re.sub(rb"(sizes: |DimSize = )40 30 20", rb"\g<1>%d %d %d" % size, content, count=1)
        assert changed != content
        return changed

    return edit(path, change)


@pytest.mark.parametrize("size", [(39, 30, 20), (40, 29, 20), (40, 30, 15)])
@pytest.mark.parametrize(
    ("suffix", "compressed"),
    [*((suffix, False) for suffix in (*INLINE, *DETACHED)), *((suffix, True) for suffix in (".nrrd", ".mha", ".mhd"))],
)
def test_more_voxels_than_the_header_states_are_refused_with_both_lengths(
    suffix: str, compressed: bool, size: tuple[int, ...], tmp_path: Path
) -> None:
    path = sized(write(tmp_path, suffix, compressed=compressed), *size)
    held = rf"at least {LENGTH} inflated bytes" if compressed else rf"{LENGTH} (inflated )?bytes"
    with pytest.raises(FileError, match=rf"{held} of voxels where its header states {2 * np.prod(size)}: correct its"):
        read(path)


@pytest.mark.parametrize("suffix", [*INLINE, *DETACHED])
@pytest.mark.parametrize("place", ["before", "after"])
def test_bytes_in_addition_to_the_voxels_that_the_header_does_not_state_are_refused(
    suffix: str, place: str, tmp_path: Path
) -> None:
    path = write(tmp_path, suffix)
    data = path.with_suffix(".raw") if suffix in DETACHED else path

    def change(content: bytes) -> bytes:
        end = len(content) - LENGTH if place == "before" else len(content)
        return content[:end] + bytes(512) + content[end:]

    edit(data, change)
    with pytest.raises(
        FileError, match=rf"{LENGTH + 512} (inflated )?bytes of voxels where its header states {LENGTH}"
    ):
        read(path)


@pytest.mark.parametrize(
    ("suffix", "field", "before"),
    [
        (".nhdr", b"byte skip: 512\n", bytes(512)), (".nhdr", b"line skip: 2\n", b"one\ntwo\n"),
        (".mhd", b"HeaderSize = 512\n", bytes(512)),
    ],
)  # fmt: skip
def test_bytes_that_the_header_skips_are_no_voxels(suffix: str, field: bytes, before: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, suffix)
    start = b"data file" if suffix == ".nhdr" else b"ElementDataFile"
    edit(path, lambda content: content.replace(start, field + start))
    with pytest.raises(FileError, match="it is truncated"):
        read(path)
    edit(path.with_suffix(".raw"), lambda content: before + content)
    scan = read(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), HU)
    assert scan.changes == ()


@pytest.mark.parametrize(("suffix", "field"), [(".nhdr", b"byte skip: -1\n"), (".mhd", b"HeaderSize = -1\n")])
def test_voxels_at_the_end_of_a_file_are_read_and_what_is_before_them_is_reported(
    suffix: str, field: bytes, tmp_path: Path
) -> None:
    path = write(tmp_path, suffix)
    start = b"data file" if suffix == ".nhdr" else b"ElementDataFile"
    edit(path, lambda content: content.replace(start, field + start))
    edit(path.with_suffix(".raw"), lambda content: bytes(512) + content)
    scan = read(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), HU)
    assert scan.changes == ("the 512 bytes before the voxels are skipped",)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_extensions_of_a_nifti_lie_between_its_flag_and_its_voxels(suffix: str, tmp_path: Path) -> None:
    extension = struct.pack("<ii", 64, 6) + b"x" * 56
    offset = struct.pack("<f", 352 + 64)
    plain = gzip.decompress(write(tmp_path, ".nii.gz").read_bytes())
    path = write(tmp_path, suffix)

    def with_extension(flag: int, at: bytes, between: bytes) -> Path:
        return edit(path, lambda _: plain[:108] + at + plain[112:348] + bytes([flag, 0, 0, 0]) + between + plain[352:])

    scan = read(with_extension(1, offset, extension))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), HU)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(with_extension(0, offset, bytes(64))).image), HU)
    with pytest.raises(FileError, match=rf"{LENGTH + 64} (inflated )?bytes of voxels where its header states {LENGTH}"):
        read(with_extension(1, plain[108:112], extension))
    with pytest.raises(
        FileError, match="the 64 bytes between header and voxels are not zeros, as the extension flag 0"
    ):
        read(with_extension(0, offset, extension))
    for other in (bytes(64), extension[8:] + extension[:8]):
        with pytest.raises(FileError, match="header and voxels are not extensions, as the extension flag 1 states"):
            read(with_extension(1, offset, other))


@pytest.mark.parametrize("numbers", [HU.size - 1, HU.size + 1])
def test_a_text_file_with_another_count_of_numbers_is_refused(numbers: int, tmp_path: Path) -> None:
    text = " ".join(map(str, np.resize(HU.ravel(), numbers))).encode()
    path = write(tmp_path, ".nrrd")
    edit(path, lambda content: content[:-LENGTH].replace(b"encoding: raw", b"encoding: ascii") + text)
    with pytest.raises(FileError, match=rf"{numbers} numbers of voxels where its header states {HU.size}"):
        read(path)


def test_an_encoding_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, ".nrrd")
    edit(
        path,
        lambda content: (
            content[:-LENGTH].replace(b"encoding: raw", b"encoding: bzip2") + bz2.compress(content[-LENGTH:])
        ),
    )
    with pytest.raises(FileError, match=r"encoding 'bzip2' is not supported: store it with encoding gzip or raw$"):
        read(path)


def test_pairs_of_key_and_value_in_a_nrrd_are_no_fields(tmp_path: Path) -> None:
    pairs = b"note:=a: 1\nnote:=a: 2\nsizes:=a: 3"
    path = edit(write(tmp_path, ".nrrd"), lambda content: content.replace(b"\n\n", b"\n" + pairs + b"\n\n", 1))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read(path).image), HU)


def test_few_thick_slices_are_read_in_every_order_and_refused_along_another_axis(real_data: Path) -> None:
    image = sitk.ReadImage(str(real_data / "ct" / "lidc_idri_0002_2mm.nii.gz"))
    thick = sitk.GetArrayFromImage(image)[2::16, :160]
    sizes = thick.shape
    for right in permutations(range(3)):
        slices = np.ascontiguousarray(thick.transpose(right))
        check_order("person", slices)
        few = right.index(0)
        for stated in permutations(range(3)):
            # Few slices along the middle axis, stated as the last, are noticed only if the first axis is right.
            if stated.index(0) != few and (few != 1 or stated.index(0) == 2 or stated[2] == right[2]):
                shape = tuple(sizes[axis] for axis in stated)
                shown = " x ".join(str(n) for n in shape[::-1])
                with pytest.raises(FileError, match=rf"{shown} voxels contradict the values, .* sizes in the"):
                    check_order("person", slices.reshape(shape))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mhd"])
@pytest.mark.parametrize("size", [(30, 40, 20), (40, 20, 30), (20, 30, 40), (30, 20, 40)])
def test_exchanged_sizes_are_refused_with_the_right_ones(suffix: str, size: tuple[int, ...], tmp_path: Path) -> None:
    stated = " x ".join(map(str, size))
    with pytest.raises(FileError, match=rf"{stated} voxels contradict the values, .* as 40 x 30 x 20 voxels: correct"):
        read(sized(write(tmp_path, suffix), *size))
