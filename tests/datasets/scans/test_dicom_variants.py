"""DICOM series as scanners and converters write them: each is read to the right HU at the right place, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, JPEGLSLossless, RLELossless
from samples import affine_of, centered, thorax_hu, thorax_image, thorax_on, turned, write_series
from scipy import ndimage

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import Grid
from raylift.datasets.scans import reader
from raylift.datasets.scans.resample import resample

SIZE = (40, 30, 20)
IMAGE = thorax_image(SIZE, (9, 9, 9))
HU = sitk.GetArrayFromImage(IMAGE)
Change = Callable[[int, Dataset], Dataset | None]


def series(folder: Path, change: Change = lambda _, ds: ds, image: sitk.Image = IMAGE) -> reader.Scan:
    """A series with changed slices, read."""
    write_series(folder / "series", image, change=change)
    found = reader.find([folder / "series"])
    assert (len(found.sources), found.refused) == (1, [])
    return reader.read(found.sources[0])


def voxels(scan: reader.Scan) -> np.ndarray:
    return sitk.GetArrayFromImage(scan.image)


def stored(ds: Dataset) -> np.ndarray:
    return np.frombuffer(ds.PixelData, "<i2").reshape(ds.Rows, ds.Columns).astype(np.int64)


def store(ds: Dataset, values: np.ndarray) -> Dataset:
    ds.PixelData = (np.asarray(values, dtype=np.int64) & 0xFFFF).astype("<u2").tobytes()
    return ds


# --- rescale ---


@pytest.mark.parametrize("tags", [["RescaleSlope", "RescaleIntercept"], ["RescaleIntercept"], ["RescaleSlope"]])
@pytest.mark.parametrize("empty", [True, False])
def test_a_slice_without_the_rescale_of_the_others_is_refused_by_name(
    tags: list[str], empty: bool, tmp_path: Path
) -> None:
    def without(k: int, ds: Dataset) -> Dataset:
        for tag in tags if k == 4 else ():
            if empty:
                setattr(ds, tag, None)
            else:
                delattr(ds, tag)
        return ds

    with pytest.raises(FileError, match=rf"1 of 20 slices \(676\.dcm\) have no {tags[0]}: add it or split the series"):
        series(tmp_path, without)


def test_a_series_without_any_rescale_is_read_as_a_whole(tmp_path: Path) -> None:
    def bare(k: int, ds: Dataset) -> Dataset:
        del ds.RescaleSlope, ds.RescaleIntercept
        return store(ds, HU[k])

    scan = series(tmp_path, bare)
    np.testing.assert_array_equal(voxels(scan), HU)
    assert scan.rescale == (1, 0)
    with pytest.raises(FileError, match="HU \\+ 1024: subtract 1024"):
        series(tmp_path / "stored", lambda k, ds: store(bare(k, ds), HU[k] + 1024))


@pytest.mark.parametrize("first", [0, 19])
def test_a_slice_of_another_sign_and_intercept_is_rescaled_by_its_own(first: int, tmp_path: Path) -> None:
    def unsigned(k: int, ds: Dataset) -> Dataset:
        if k == first:
            ds.PixelRepresentation, ds.RescaleIntercept = 0, 0
            store(ds, HU[k].clip(0))
        return ds

    expected = HU.copy()
    regions, _ = ndimage.label(HU[first] < 0)
    is_air = regions == regions[0, 0]
    expected[first] = np.where(is_air, -1024, expected[first].clip(0))
    scan = series(tmp_path, unsigned)
    np.testing.assert_array_equal(voxels(scan), expected)
    assert scan.changes == (
        "every slice was rescaled by its own values: slope 1, intercepts -1024 to 0",
        f"{is_air.sum()} voxels of exactly 0 HU at the border were set to air",
    )
    assert scan.rescale is None


def test_slopes_that_differ_are_applied_in_a_type_that_holds_fractions(tmp_path: Path) -> None:
    def finer(k: int, ds: Dataset) -> Dataset:
        if k % 2:
            ds.RescaleSlope, ds.RescaleIntercept = 0.5, -1024.5
            store(ds, 2 * (HU[k].astype(np.int64) + 1024) + 1)
        return ds

    scan = series(tmp_path, finer)
    np.testing.assert_array_equal(voxels(scan), HU)
    assert "slopes 0.5 to 1, intercepts -1024.5 to -1024" in scan.changes[0]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"RescaleSlope": 0}, r"RescaleSlope 0 and RescaleIntercept -1024: correct them"),
        ({"RescaleSlope": -1}, r"RescaleSlope -1 and"),
        ({"RescaleType": "Z_EFF"}, r"RescaleType Z_EFF is not HU"),
        ({"ModalityLUTSequence": [Dataset()]}, r"modality lookup table"),
        (
            {"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]},
            r"ImageOrientationPatient .* is not two perpendicular axes",
        ),
    ],
)
def test_what_is_no_scale_to_hu_or_no_orientation_is_refused(
    tags: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def change(_: int, ds: Dataset) -> Dataset:
        for name, value in tags.items():
            setattr(ds, name, value)
        return ds

    with pytest.raises(FileError, match=message):
        series(tmp_path, change)


# --- positions ---


@pytest.mark.parametrize(("step", "digits"), [(0.625, 1), (0.75, 1), (1.25, 1), (2.5, 1), (2.5, 0)])
def test_rounded_positions_are_those_of_a_uniform_step(step: float, digits: int, tmp_path: Path) -> None:
    image = thorax_image((40, 30, 40), (9, 9, step))

    def rounded(_: int, ds: Dataset) -> Dataset:
        ds.ImagePositionPatient = [round(float(value), digits) for value in ds.ImagePositionPatient]
        return ds

    scan = series(tmp_path, rounded, image)
    np.testing.assert_array_equal(voxels(scan), sitk.GetArrayFromImage(image))
    assert scan.spacing_mm[2] == pytest.approx(step, rel=0.01)
    middle = np.array(image.TransformIndexToPhysicalPoint((20, 15, 20)))
    assert np.abs(np.array(scan.image.TransformIndexToPhysicalPoint((20, 15, 20))) - middle).max() <= 0.6 * 10**-digits


@pytest.mark.parametrize("missing", [1, 5, 20, 38])
@pytest.mark.parametrize("step", [0.625, 1.25])
def test_a_missing_slice_is_noticed_among_rounded_positions(missing: int, step: float, tmp_path: Path) -> None:
    def rounded(k: int, ds: Dataset) -> Dataset | None:
        ds.ImagePositionPatient = [round(float(value), 1) for value in ds.ImagePositionPatient]
        return None if k == missing else ds

    with pytest.raises(FileError, match="apart: slices are missing"):
        series(tmp_path, rounded, thorax_image((40, 30, 40), (9, 9, step)))


@pytest.mark.parametrize(
    "tags",
    [
        {"SpacingBetweenSlices": 0}, {"SpacingBetweenSlices": 3}, {"SpacingBetweenSlices": -9}, {"SliceThickness": 0},
        {"SliceLocation": 7}, {"InstanceNumber": 1},
    ],
)  # fmt: skip
def test_positions_decide_whatever_other_tags_state(tags: dict[str, float], tmp_path: Path) -> None:
    def change(_: int, ds: Dataset) -> Dataset:
        for name, value in tags.items():
            setattr(ds, name, value)
        return ds

    scan = series(tmp_path, change)
    np.testing.assert_array_equal(voxels(scan), HU)
    np.testing.assert_allclose(affine_of(scan.image), affine_of(IMAGE), atol=1e-3)


def test_the_same_pixel_spacing_in_fewer_digits_is_the_same(tmp_path: Path) -> None:
    def change(k: int, ds: Dataset) -> Dataset:
        ds.PixelSpacing = [9.001, 9.001] if k % 3 else [9, 9]
        return ds

    assert series(tmp_path, change).spacing_mm == pytest.approx((9, 9, 9), abs=2e-3)


def test_a_slice_off_the_axis_of_the_others_is_refused(tmp_path: Path) -> None:
    def aside(k: int, ds: Dataset) -> Dataset:
        x, y, z = ds.ImagePositionPatient
        ds.ImagePositionPatient = [x + 30 * (k == 7), y, z]
        return ds

    with pytest.raises(FileError, match=r"the slice at -22\.50 mm lies 2\d\.\d mm off the axis of the others"):
        series(tmp_path, aside)


@pytest.mark.parametrize("degrees", [-28, 0.5, 15])
@pytest.mark.parametrize("oblique", [False, True])
def test_slices_of_a_tilted_gantry_are_at_their_positions(degrees: float, oblique: bool, tmp_path: Path) -> None:
    """The rows and columns of a slice are tilted about x, and the table moves along the patient."""
    axes = turned(degrees) * [4.5, 4.5, 1]
    axes[:, 2] = [0, 0, 4.5]
    if oblique:
        axes = turned(5, -7, 9) @ axes
    size = (84, 70, 80)
    affine = centered(axes, size)
    image = sitk.GetImageFromArray(thorax_on(affine, size))
    image.SetSpacing([4.5] * 3)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((axes / 4.5).ravel().tolist())
    scan = series(tmp_path, image=image)
    np.testing.assert_array_equal(voxels(scan), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(affine_of(scan.image) @ [*size, 1], affine @ [*size, 1], atol=0.05)
    assert f"the axes are {abs(degrees):.2f} degrees from perpendicular" in scan.changes[0]
    hu, record, _ = resample(scan, Grid(48, 6.0), keep_table=True)
    along = (np.arange(48) - 23.5) * 6.0
    x, y, z = record["center_lps_mm"]
    truly = thorax_hu(along[None, None] + x, along[None, :, None] + y, z - along[:, None, None])
    # Corners of the cube are outside the grid.
    inside = np.s_[8:-8, 8:-8, 8:-8]
    assert np.abs(hu - truly)[inside].mean() < 8
    assert record["changes"] == list(scan.changes)


# --- pixels ---

X, Y = np.meshgrid((np.arange(40) - 19.5) * 9, (np.arange(30) - 14.5) * 9)
OUTSIDE = np.hypot(X, Y) > 165
"""The corners of a slice, outside the round field of view."""


@pytest.mark.parametrize(
    ("value", "tag", "bits"),
    [
        (63536, 63536, 16), (63536, -2000, 16), (63536, None, 16), (63536, 63536, 12), (63536, None, 12),
        (32768, None, 16), (65535, None, 16),
        (32767, None, 16), (20000, None, 16), (4095, 4095, 12), (3000, 3000, 16), (0, 0, 16), (5, 0, 16),
    ],
)  # fmt: skip
def test_padding_round_the_field_of_view_is_air(value: int, tag: int | None, bits: int, tmp_path: Path) -> None:
    def padded(k: int, ds: Dataset) -> Dataset:
        values = np.where(OUTSIDE, value, stored(ds))
        values[15, 20] = 3000
        store(ds, values)
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, bits, bits - 1
        if tag is not None:
            ds.add_new("PixelPaddingValue", "SS" if tag < 0 else "US", tag)
            if tag == 0:
                ds.add_new("PixelPaddingRangeLimit", "US", 10)
        return ds

    expected = np.where(OUTSIDE, -1024, HU)
    expected[:, 15, 20] = 3000 - 1024  # a voxel of padding's value inside the body is none
    scan = series(tmp_path, padded)
    np.testing.assert_array_equal(voxels(scan), expected)
    changed = OUTSIDE.sum() * 20
    wanted = f"{changed} voxels of padding were set to air"
    if tag is None and bits == 16:
        wanted = f"{changed} voxels over 3071 HU at the border were set to air"
    assert scan.changes == (() if value == 0 else (wanted,))


def test_negative_values_without_an_extension_of_their_sign_are_not_padding(tmp_path: Path) -> None:
    """12 signed bits in 16: -1000 is stored as 3096."""

    def change(_: int, ds: Dataset) -> Dataset:
        ds.PixelData = ((stored(ds) - 1024).clip(-2048, 2047) & 0x0FFF).astype("<u2").tobytes()
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit, ds.RescaleIntercept = 1, 12, 11, 0
        return ds

    scan = series(tmp_path, change)
    np.testing.assert_array_equal(voxels(scan), HU.clip(-1024, 2047))
    assert scan.changes == ()


def test_an_overlay_above_bits_stored_that_the_header_does_not_place_is_not_padding(tmp_path: Path) -> None:
    def change(_: int, ds: Dataset) -> Dataset:
        values = stored(ds)
        values[14:16] |= 1 << 15
        values[:, 20] |= 1 << 15
        store(ds, values)
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 12, 11
        return ds

    scan = series(tmp_path, change)
    np.testing.assert_array_equal(voxels(scan), HU)
    assert any("the bits above BitsStored of" in one for one in scan.changes)
    assert not any("padding" in one for one in scan.changes)


def test_negative_padding_of_signed_pixels_is_clamped_to_air(tmp_path: Path) -> None:
    scan = series(tmp_path, lambda _, ds: store(ds, np.where(OUTSIDE, -2000, stored(ds))))
    hu = resample(scan, Grid(32, 9.0), keep_table=True)[0]
    plain = resample(series(tmp_path / "plain"), Grid(32, 9.0), keep_table=True)[0]
    assert np.abs(hu.astype(int) - plain).max() <= 24  # air of -1000 and padding of -1024


def test_an_overlay_in_the_upper_bits_does_not_count(tmp_path: Path) -> None:
    def overlaid(_: int, ds: Dataset) -> Dataset:
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 12, 11
        ds.add_new((0x6000, 0x0010), "US", ds.Rows)
        ds.add_new((0x6000, 0x0011), "US", ds.Columns)
        ds.add_new((0x6000, 0x0100), "US", 16)
        ds.add_new((0x6000, 0x0102), "US", 12)
        values = stored(ds)
        values[5:12] |= 1 << 12
        return store(ds, values)

    scan = series(tmp_path, overlaid)
    np.testing.assert_array_equal(voxels(scan), HU)
    assert scan.changes == ()


def test_bits_above_those_stored_are_ignored_and_reported(tmp_path: Path) -> None:
    def annotated(_: int, ds: Dataset) -> Dataset:
        ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 0, 12, 11
        values = stored(ds)
        values[12, 15:18] |= 1 << 14
        return store(ds, values)

    scan = series(tmp_path, annotated)
    np.testing.assert_array_equal(voxels(scan), HU)
    assert scan.changes == ("the bits above BitsStored of 60 voxels were ignored",)


def test_fewer_bits_than_the_pixels_have_are_refused(tmp_path: Path) -> None:
    def fewer(_: int, ds: Dataset) -> Dataset:
        ds.BitsStored, ds.HighBit = 11, 10
        return ds

    with pytest.raises(FileError, match="BitsStored 11 and PixelRepresentation 1 contradict the pixels"):
        series(tmp_path, fewer)


@pytest.mark.parametrize("signed", [0, 1])
def test_metal_over_bits_stored_that_wraps_around_is_refused(signed: int, tmp_path: Path) -> None:
    """12 bits: 7000 would be read as 2904, and 4200 as 104."""

    def metal(core: int, edge: int) -> Change:
        def change(_: int, ds: Dataset) -> Dataset:
            values = stored(ds)
            values[13:17, 18:22] = edge
            values[14:16, 19:21] = core
            ds.PixelRepresentation, ds.BitsStored, ds.HighBit = signed, 12, 11
            ds.RescaleIntercept = -1024 * (1 - signed)
            return store(ds, values - 1024 * signed)

        return change

    message = f"BitsStored 12 and PixelRepresentation {signed} contradict the pixels, whose values wrap around"
    for k, (core, edge) in enumerate([(7000, 7000), (4200 + 1024 * signed, 3000), (6000, 3000)]):
        with pytest.raises(FileError, match=message):
            series(tmp_path / str(k), metal(core, edge))
    expected = HU.copy()
    expected[:, 13:17, 18:22] = 2000 - 1024
    expected[:, 14:16, 19:21] = 3071 - 1024
    np.testing.assert_array_equal(voxels(series(tmp_path / "fits", metal(3071, 2000))), expected)


def test_exchanged_rows_and_columns_are_refused(tmp_path: Path) -> None:
    def exchanged(_: int, ds: Dataset) -> Dataset:
        ds.Rows, ds.Columns = ds.Columns, ds.Rows
        return ds

    with pytest.raises(
        FileError, match=r"30 x 40 x 20 voxels contradict the values, which continue each other as 40 x 30 x 20"
    ):
        series(tmp_path, exchanged)


def test_private_elements_before_those_of_the_image_may_be_long(tmp_path: Path) -> None:
    def private(_: int, ds: Dataset) -> Dataset:
        ds.add_new(0x00090010, "LO", "X")
        ds.add_new(0x00091001, "OB", bytes(300_000))
        return ds

    np.testing.assert_array_equal(voxels(series(tmp_path, private)), HU)


@pytest.mark.parametrize("tag", ["PixelSpacing", "HighBit", "BitsStored"])
def test_slices_without_a_tag_of_the_pixels_are_refused_with_its_name(tag: str, tmp_path: Path) -> None:
    def empty(_: int, ds: Dataset) -> Dataset:
        setattr(ds, tag, None)
        return ds

    with pytest.raises(FileError, match=rf"slices without a value of {tag}: add it to all slices$"):
        series(tmp_path, empty)


def test_big_endian_slices_are_read(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", IMAGE)
    for path in paths:
        ds = pydicom.dcmread(path)
        big = Dataset()
        big.update(ds)
        big.file_meta = ds.file_meta
        big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        big.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
        big["PixelData"].VR = "OW"
        pydicom.dcmwrite(path, big, enforce_file_format=True, little_endian=False, implicit_vr=False)
    [source] = reader.find([tmp_path]).sources
    np.testing.assert_array_equal(voxels(reader.read(source)), HU)


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000", "JPEG-LS", "RLE"])
def test_compressed_slices_are_read_each_by_its_own_rescale(compressor: str, tmp_path: Path) -> None:
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(tmp_path / "slice.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000" if compressor == "JPEG2000" else "JPEG")

    def compressed(k: int, ds: Dataset) -> Dataset:
        intercept = -1024 - k % 2
        values = (HU[k].astype(np.int64) - intercept).astype(np.int16)
        values[OUTSIDE] = 3000
        ds.RescaleIntercept, ds.PixelPaddingValue = intercept, 3000
        if compressor == "RLE":
            store(ds, values).compress(RLELossless, generate_instance_uid=False)
            return ds
        if compressor == "JPEG-LS":
            ds.file_meta.TransferSyntaxUID, ds.PixelRepresentation = JPEGLSLossless, 0
            ds.PixelData = pydicom.encaps.encapsulate([imagecodecs.jpegls_encode(values.astype(np.uint16))])
            ds["PixelData"].is_undefined_length = True
            return ds
        writer.Execute(sitk.GetImageFromArray(values[None]))
        written = pydicom.dcmread(tmp_path / "slice.dcm")
        assert written.file_meta.TransferSyntaxUID.is_compressed
        ds.file_meta.TransferSyntaxUID = written.file_meta.TransferSyntaxUID
        ds.BitsStored, ds.HighBit, ds.PixelData = written.BitsStored, written.HighBit, written.PixelData
        ds["PixelData"].is_undefined_length = True
        return ds

    scan = series(tmp_path, compressed)
    np.testing.assert_array_equal(voxels(scan), np.where(OUTSIDE, -1024, HU))
    assert scan.changes[-1] == f"{OUTSIDE.sum() * 20} voxels of padding were set to air"


def test_slices_without_preamble_are_found_and_read(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "series", IMAGE):
        path.write_bytes(path.read_bytes()[132:])
    found = reader.find([tmp_path])
    assert (len(found.sources), found.skipped) == (1, 0)
    np.testing.assert_array_equal(voxels(reader.read(found.sources[0])), HU)
