"""Valid CT files with one or two header fields changed: refused, equal to the original, or noted in the record.

No field decides alone what the right volume is, so a changed field either contradicts another one, which is refused
or reported, or it is a plain statement that the record repeats: size, spacing, orientation, center or rescale.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import affine_of, thorax_image, write_image, write_series

from raylift.datasets.errors import FileError
from raylift.datasets.intensity import HU_MAX, HU_MIN
from raylift.datasets.scans import reader

IMAGE = thorax_image((30, 24, 16), (10.0, 10.0, 16.0))
HU = sitk.GetArrayFromImage(IMAGE)
MUTATIONS = settings(max_examples=45, deadline=None, derandomize=True)
VALUES = re.compile(r"\b(?:set to air|were ignored|rescaled by its own values)\b")
"""Changes of voxels in a record."""
PLACES = re.compile(r"\b(?:assumed|is used|converted|from perpendicular|differs?|contradicts)\b")
"""Assumptions about the place of voxels in a record."""
Header = dict[str, Any]
"""What the record of a sample repeats of a file."""


def outcome(path: Path) -> tuple[reader.Scan | None, list[str]]:
    """The one scan at a path, or the refusals; any other exception fails the test."""
    found = reader.find([path])
    refusals = [str(error) for error in found.refused]
    scans = []
    for source in found.sources:
        try:
            scans.append(reader.read(source))
        except FileError as error:
            refusals.append(str(error))
    assert len(scans) <= 1
    return (scans[0] if scans else None), refusals


def statements(scan: reader.Scan) -> Header:
    """What the record repeats."""
    return {
        "size": scan.image.GetSize(),
        "affine": np.round(affine_of(scan.image), 2).tolist(),
        "rescale": scan.rescale,
    }


def assert_mutations(written: Callable[[], Path], change: Callable[[Path, st.DataObject], None]) -> None:
    """Read files before and after changes: each is refused, equal, or reported, and each of them occurs."""
    outcomes: Counter[str] = Counter()

    @MUTATIONS
    @given(data=st.data())
    def mutate(data: st.DataObject) -> None:
        path = written()
        before, refused = outcome(path)
        assert before is not None, refused
        assert before.changes == ()
        np.testing.assert_array_equal(sitk.GetArrayFromImage(before.image), HU)
        change(path, data)
        outcomes[compare(path, before)] += 1

    mutate()
    assert outcomes["refused"] >= 5, outcomes
    assert outcomes["equal"] >= 5, outcomes


def compare(path: Path, before: reader.Scan) -> str:
    """How the scan at a path differs from the one before, which must not be in silence."""
    after, refusals = outcome(path)
    for refusal in refusals:
        assert "\n" not in refusal
        assert str(path) in refusal
        assert 20 < len(refusal) - len(str(path)) < 600
    if after is None:
        assert refusals
        return "refused"
    stated = {name for name, value in statements(after).items() if value != statements(before)[name]}
    voxels = sitk.GetArrayFromImage(after.image).astype(float).clip(HU_MIN, HU_MAX)
    is_equal = voxels.shape == HU.shape and np.allclose(voxels, HU, atol=2)
    text = "; ".join(after.changes)
    # The rescale, and the size with which the same voxels are read, decide them; other differences must be in words.
    is_reshaped = "size" in stated and voxels.size == HU.size
    assert is_equal or is_reshaped or "rescale" in stated or VALUES.search(text), text
    if after.changes:
        assert stated or not is_equal or PLACES.search(text) or VALUES.search(text), text
        return "reported"
    return "stated" if stated else "equal"


# --- NIfTI ---

NIFTI_FIELDS = [name for name in nib.Nifti1Header() if name not in ("db_name", "data_type", "descrip", "aux_file")]


def values_for(dtype: np.dtype) -> st.SearchStrategy[Any]:
    if dtype.kind == "S":
        return st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)
    if dtype.kind == "f":
        return st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, 1e3, -1024.0]))
    info = np.iinfo(dtype)
    return st.one_of(st.integers(info.min, info.max), st.integers(max(-2, info.min), 20))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_mutated_nifti_header_is_refused_or_changes_nothing_or_is_recorded(suffix: str, tmp_path: Path) -> None:
    opened: Any = gzip.open if suffix == ".nii.gz" else open

    def change(path: Path, data: st.DataObject) -> None:
        with opened(path, "rb") as file:
            raw = bytearray(file.read())
        for name in data.draw(st.lists(st.sampled_from(NIFTI_FIELDS), min_size=1, max_size=2, unique=True)):
            kind, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
            base = kind.base
            place = data.draw(st.integers(0, max(0, kind.itemsize // base.itemsize - 1)))
            value = np.array(data.draw(values_for(base)), dtype=base).tobytes().ljust(base.itemsize, b"\0")
            raw[offset + place * base.itemsize : offset + (place + 1) * base.itemsize] = value
        with opened(path, "wb") as file:
            file.write(bytes(raw))

    assert_mutations(lambda: write_image(IMAGE, tmp_path / f"ct{suffix}"), change)


# --- NRRD and MetaImage ---

TEXT_VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "nan", "1e30", "2 2 2", "10 10 16", "0 0 0", "True", "False", "LPS", "RAS"]),
    st.sampled_from(
        ["16 24 30", "30 24 16 1", "(1,0,0) (0,1,0) (0,0,1)", "(0,10,0) (10,0,0) (0,0,16)", "left", "gzip"]
    ),
    st.sampled_from(["MET_USHORT", "MET_FLOAT", "short", "ushort", "uchar", "double", "big", "little", "raw", "ascii"]),
    st.text("0123456789.-() ,eE", max_size=20),
)


SPELLINGS = {
    "type": ["int16", "signed short", "short int"], "space": ["LPS", "left-posterior-superior"],
    "encoding": ["gz", "gzip"], "endian": ["little"], "kinds": ["space space space", "domain domain domain"],
    "CompressedData": ["True"], "BinaryData": ["True"], "AnatomicalOrientation": ["RAI", "???"],
    "CenterOfRotation": ["1 2 3"], "ObjectType": ["Image"],
}  # fmt: skip
"""Other values of a field that mean the same."""


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_a_mutated_text_header_is_refused_or_changes_nothing_or_is_recorded(suffix: str, tmp_path: Path) -> None:
    def change(path: Path, data: st.DataObject) -> None:
        raw = path.read_bytes()
        end = raw.index(b"\n\n") if suffix == ".nrrd" else raw.index(b"ElementDataFile")
        lines = raw[:end].decode("latin-1").split("\n")
        # The last line of a MetaImage header is empty before its data file; NRRD's first line is its magic.
        fields = [k for k, line in enumerate(lines) if re.match(r"[A-Za-z ]+(:|\s=)", line)]
        for k in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2, unique=True)):
            name, sign, _ = re.split(r"(: ?|\s*= )", lines[k], maxsplit=1)
            values = st.sampled_from(SPELLINGS[name]) if name in SPELLINGS and data.draw(st.booleans()) else TEXT_VALUES
            removed = data.draw(st.integers(0, 4)) == 0
            lines[k] = f"{name}{sign}{data.draw(values)}" if not removed else ""
        kept = "\n".join(line for line in lines if line)
        tail = raw[end:] if suffix == ".nrrd" else b"\n" + raw[end:]
        path.write_bytes(kept.encode("latin-1") + tail)

    assert_mutations(lambda: write_image(IMAGE, tmp_path / f"ct{suffix}"), change)


# --- DICOM ---

DICOM_VALUES: dict[str, list[Any]] = {
    "Modality": ["MR", "", "CR"],
    "Rows": [0, 12, 30, 48],
    "Columns": [0, 15, 24, 60],
    "BitsAllocated": [8, 32, 12],
    "BitsStored": [8, 10, 11, 12, 0, 17],
    "HighBit": [7, 11, 14, 31],
    "PixelRepresentation": [0, 2],
    "SamplesPerPixel": [3, 0],
    "PhotometricInterpretation": ["MONOCHROME1", "RGB", "PALETTE COLOR", ""],
    "NumberOfFrames": [0, 1, 2],
    "PixelSpacing": [[0, 0], [-10, 10], [10, 10.001], [5, 5], [10]],
    "ImagePositionPatient": [[0, 0, 0], [1, 2], None, [1e9, 0, 0]],
    "ImageOrientationPatient": [[1, 0, 0, 0, -1, 0], [0, 1, 0, 0, 0, -1], [1, 0, 0, 1, 0, 0], [0] * 6, None],
    "RescaleIntercept": [0, -1000, -2000, None, 1e30],
    "RescaleSlope": [0, 2, -1, 0.5, None],
    "RescaleType": ["US", "HU", "Z_EFF"],
    "PixelPaddingValue": [0, 24, 1024, 1064, 32768],
    "SliceThickness": [0, -1, 99],
    "SpacingBetweenSlices": [0, -16, 3],
    "SliceLocation": [0, 1e9],
    "InstanceNumber": [0, 5],
    "SeriesInstanceUID": ["", "1.2.3"],
    "StudyInstanceUID": ["", "1.2.3"],
    "PatientID": ["", "another"],
    "GantryDetectorTilt": [15],
}
"""Other values of tags; None removes the tag."""


def test_a_series_of_mutated_tags_is_refused_or_changes_nothing_or_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "series"

    def written() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        write_series(folder, IMAGE)
        return folder

    def change(folder: Path, data: st.DataObject) -> None:
        paths = sorted(folder.iterdir())
        everywhere = data.draw(st.booleans())
        one = data.draw(st.integers(0, len(paths) - 1))
        names = data.draw(st.lists(st.sampled_from(sorted(DICOM_VALUES)), min_size=1, max_size=2, unique=True))
        values = {name: data.draw(st.sampled_from(DICOM_VALUES[name])) for name in names}
        for path in paths if everywhere else [paths[one]]:
            ds = pydicom.dcmread(path)
            for name, value in values.items():
                if value is None:
                    ds.pop(name, None)
                elif name == "PixelPaddingValue":
                    ds.add_new(name, "US", value)
                else:
                    setattr(ds, name, value)
            ds.save_as(path, enforce_file_format=True)

    assert_mutations(written, change)
