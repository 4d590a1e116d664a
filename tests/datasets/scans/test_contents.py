"""Volumes whose values or slices are not those of one CT in HU: mended where only one value is right, else refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid
from samples import thorax_image, write_image, write_series

from raylift.datasets.errors import FileError
from raylift.datasets.scans import reader

IMAGE = thorax_image((40, 30, 20), (9, 9, 9))
HU = sitk.GetArrayFromImage(IMAGE)
Y, X = np.indices(HU.shape[1:])


def volume(folder: Path, hu: np.ndarray) -> reader.Scan:
    image = sitk.GetImageFromArray(hu.astype(np.int16))
    image.CopyInformation(IMAGE)
    return reader.read(reader.find([write_image(image, folder / "person.nii.gz")]).sources[0])


def read_series(folder: Path) -> reader.Scan:
    found = reader.find([folder])
    assert (len(found.sources), found.refused) == (1, [])
    return reader.read(found.sources[0])


def setting(**tags: object) -> Callable[[int, Dataset], Dataset]:
    """Sets tags, those that are a function by the number of the slice."""

    def change(k: int, ds: Dataset) -> Dataset:
        for tag, value in tags.items():
            setattr(ds, tag, value(k) if callable(value) else value)
        return ds

    return change


# --- values ---


@pytest.mark.parametrize(
    "fill",
    [
        pytest.param(np.hypot((X - 19.5) / 20, (Y - 14.5) / 15) > 0.98, id="outside a cylinder"),
        pytest.param((X < 2) | (Y > 27), id="at two sides"),
        pytest.param(np.arange(20)[:, None, None] * np.ones_like(X) < 3, id="in the first slices"),
    ],
)
def test_zeros_that_a_tool_filled_in_at_the_border_are_air(fill: np.ndarray, tmp_path: Path) -> None:
    fill = np.broadcast_to(fill, HU.shape)
    scan = volume(tmp_path, np.where(fill, 0, HU))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), np.where(fill, -1024, HU))
    assert scan.changes == (f"{fill.sum()} voxels of exactly 0 HU at the border were set to air",)
    assert scan.image.GetOrigin() == pytest.approx(IMAGE.GetOrigin(), abs=1e-3)


def test_zeros_inside_the_body_and_few_at_the_border_remain(tmp_path: Path) -> None:
    hu = HU.copy()
    hu[:, 14:16, 18:22] = 0
    hu[:, :3, :3] = 0
    scan = volume(tmp_path, hu)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), hu)
    assert scan.changes == ()


def test_lungs_alone_are_refused_whatever_surrounds_them(tmp_path: Path) -> None:
    lungs = (HU < -600) & (np.hypot((X - 19.5) / 17, (Y - 14.5) / 11) < 1)
    for outside in (0, -1024):
        with pytest.raises(FileError, match="are not in HU"):
            volume(tmp_path, np.where(lungs, HU, outside))


@pytest.mark.parametrize("value", [-1024, 0, 40])
def test_a_slice_of_one_value_between_others_is_refused_by_its_number(value: int, tmp_path: Path) -> None:
    hu = HU.copy()
    hu[8] = value
    with pytest.raises(FileError, match=rf"all voxels of slice 8 of 20 are {value}, .*: copy the file again$"):
        volume(tmp_path, hu)


@pytest.mark.parametrize("slope", [1.5, 2.0])
def test_a_wrong_slope_of_all_slices_is_refused(slope: float, tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, change=setting(RescaleSlope=slope))
    with pytest.raises(FileError, match=r"\d% of the values over -500 are those of soft tissue.*correct the slope"):
        read_series(tmp_path)


@pytest.mark.parametrize("wrong", [{7}, {0}, {19}, {0, 1, 2, 3, 4, 5, 6}])
@pytest.mark.parametrize(("tag", "value"), [("RescaleIntercept", 0), ("RescaleSlope", 0.5)])
def test_a_rescale_by_which_a_slice_does_not_continue_the_adjacent_one_is_refused(
    tag: str, value: float, wrong: set[int], tmp_path: Path
) -> None:
    def change(k: int, ds: Dataset) -> Dataset:
        if k in wrong:
            setattr(ds, tag, value)
        return ds

    write_series(tmp_path, IMAGE, change=change)
    with pytest.raises(FileError, match=r"dcm: RescaleSlope .* HU off the slice before it, .*: correct one"):
        read_series(tmp_path)


# --- slices ---


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR: colors are not HU"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, r"ImageType ORIGINAL\\PRIMARY\\LOCALIZER is no slice"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MIP"]}, r"CT_SOM5 MIP is no slice of a volume"),
        ({"AcquisitionNumber": lambda k: 1 + k % 2}, "slices of AcquisitionNumber 1 and 2 alternate"),
        ({"ConvolutionKernel": lambda k: f"B{k % 3}0f"}, "slices of ConvolutionKernel B00f and B10f alternate"),
    ],
)
def test_what_is_no_slice_of_one_scan_is_refused(tags: dict[str, object], message: str, tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, change=setting(**tags))
    with pytest.raises(FileError, match=message):
        read_series(tmp_path)


@pytest.mark.parametrize(
    "tags",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 SPI"]},
        {"AcquisitionNumber": lambda k: 1 + k // 4},
        {"AcquisitionNumber": lambda k: k},
        {"FrameOfReferenceUID": lambda k: generate_uid()},
    ],
)
def test_tags_without_a_meaning_for_the_values_are_not_used(tags: dict[str, object], tmp_path: Path) -> None:
    write_series(tmp_path, IMAGE, change=setting(**tags))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_series(tmp_path).image), HU)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"Modality": "PT"}, "differ in modality: {odd} PT, the others CT"),
        ({"Rows": 60}, r"differ in size: {odd} \(40, 60\), the others \(40, 30\)"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "differ in orientation: {odd} "),
        ({"PixelSpacing": [9, 8]}, r"differ in pixel spacing: {odd} \[9.0, 8.0\], the others \[9.0, 9.0\]"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "{odd}: ImageType "),
        ({}, r"000.dcm and {odd} are two slices at -85.50 mm"),
    ],
)
def test_a_file_that_does_not_belong_to_its_series_is_named(
    tags: dict[str, object], message: str, tmp_path: Path
) -> None:
    first = write_series(tmp_path, IMAGE)[0]
    odd = shutil.copy(first, tmp_path / "odd.dcm")
    ds = pydicom.dcmread(odd)
    for tag, value in tags.items():
        setattr(ds, tag, value)
    ds.save_as(odd)
    with pytest.raises(FileError, match=message.format(odd=odd)):
        read_series(tmp_path)


@pytest.mark.parametrize(
    ("tag", "kind", "value", "length"),
    [
        (0x00281052, "LO", "-1024,0", 1),
        (0x00281053, "DS", ["1", "1"], 1),
        (0x00280030, "DS", ["9"], 2),
        (0x00200037, "DS", ["1", "0", "0", "0", "1"], 6),
    ],
)
def test_a_tag_of_other_than_its_numbers_is_refused_by_name(
    tag: int, kind: str, value: object, length: int, tmp_path: Path
) -> None:
    def change(k: int, ds: Dataset) -> Dataset:
        if k == 3:
            ds.add_new(tag, kind, value)
        return ds

    odd = write_series(tmp_path, IMAGE, change=change)[3]
    name = pydicom.datadict.keyword_for_tag(tag)
    with pytest.raises(FileError, match=rf"^{odd}: {name} .* does not have {length} numbers: correct it$"):
        read_series(tmp_path)


def test_two_scans_of_one_series_uid_in_two_folders_are_no_volume_even_if_they_continue(tmp_path: Path) -> None:
    beyond = sitk.Image(IMAGE)
    beyond.SetOrigin(IMAGE.TransformIndexToPhysicalPoint((0, 0, 20)))
    for folder, image in (("a", IMAGE), ("b", beyond)):
        write_series(tmp_path / folder, image, series="1.2.3", change=setting(StudyInstanceUID="1.2"))
    with pytest.raises(
        FileError, match=r"/a/\d+.dcm and .*/b/\d+.dcm have one SeriesInstanceUID and InstanceNumber, .*: correct"
    ):
        read_series(tmp_path)


def test_slices_without_pixels_are_refused_as_such(tmp_path: Path) -> None:
    paths = write_series(tmp_path, IMAGE, change=lambda k, ds: setting(PixelData=b"")(k, ds) if k == 3 else ds)
    with pytest.raises(FileError, match=rf"^{paths[3]}: the DICOM file has no PixelData"):
        read_series(tmp_path)


def test_slices_of_several_transfer_syntaxes_are_read(tmp_path: Path) -> None:
    for path in write_series(tmp_path, IMAGE)[::3]:
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        ds.save_as(path, implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_series(tmp_path).image), HU)
