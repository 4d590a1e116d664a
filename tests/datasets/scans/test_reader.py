from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from samples import thorax_hu, thorax_image, turned, write_image, write_series

from raylift.datasets import segmentation
from raylift.datasets.errors import FileError
from raylift.datasets.geometry import Grid
from raylift.datasets.scans import reader, volume_file
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.datasets.scans.resample import check_whole_thorax, resample
from raylift.datasets.sources import Source

CUBE = Grid(64, 6.0)
SUFFIXES = sorted(volume_file.SUFFIXES)


def only(path: Path) -> Source:
    """The one scan there."""
    found = reader.find([path])
    assert (len(found.sources), found.refused, found.skipped) == (1, [], 0)
    return found.sources[0]


def on_grid(path: Path, grid: Grid = CUBE, **options: bool) -> tuple[np.ndarray, dict[str, Any]]:
    return resample(reader.read(only(path)), grid, **options)[:2]


def expected(grid: Grid, center: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The thorax where the cube lies by the record, in volume order, and which voxels the default scan reached."""
    along = (np.arange(grid.size) - (grid.size - 1) / 2) * grid.spacing_mm
    x, y, z = along[None, None] + center[0], along[None, :, None] + center[1], center[2] - along[:, None, None]
    inside = (abs(x) < 150) & (abs(y) < 110) & (abs(z) < 150)
    return thorax_hu(x, y, z), inside


def mean_error(hu: np.ndarray, record: dict[str, Any], grid: Grid = CUBE) -> float:
    ground_truth, inside = expected(grid, record["center_lps_mm"])
    return float(np.abs(hu - ground_truth)[inside].mean())


def assert_right_way_round(hu: np.ndarray, record: dict[str, Any]) -> None:
    assert mean_error(hu, record) < 8
    for axis in range(3):
        assert mean_error(np.flip(hu, axis), record) > 25
    assert mean_error(hu.transpose(0, 2, 1), record) > 25


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_each_kind_comes_out_in_volume_order(suffix: str, tmp_path: Path) -> None:
    path = write_image(thorax_image(), tmp_path / f"person{suffix}")
    source = reader.find([path]).sources[0]
    assert (source.name, source.subject) == (path.name, "person")
    assert_right_way_round(*resample(reader.read(source), CUBE, keep_table=True)[:2])


def test_a_dicom_series_comes_out_in_volume_order_whatever_its_files_are_called(tmp_path: Path) -> None:
    write_series(tmp_path / "series", thorax_image())
    assert_right_way_round(*on_grid(tmp_path, keep_table=True))


DIRECTIONS = {
    "flipped": np.diag([-1.0, -1, 1]),
    "upside down": np.diag([1.0, -1, -1]),
    "left-handed": np.diag([1.0, 1, -1]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "oblique": turned(12, -7, 9),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_orientation_is_brought_to_volume_order(direction: str, tmp_path: Path) -> None:
    image = thorax_image((84, 84, 84), direction=DIRECTIONS[direction])
    assert_right_way_round(*on_grid(write_image(image, tmp_path / "person.nii.gz"), keep_table=True))


@pytest.mark.parametrize("direction", ["oblique", "coronal", "flipped"])
def test_every_orientation_of_a_dicom_series_is_brought_to_volume_order(direction: str, tmp_path: Path) -> None:
    write_series(tmp_path, thorax_image((84, 84, 84), direction=DIRECTIONS[direction]))
    assert_right_way_round(*on_grid(tmp_path, keep_table=True))


def test_slices_thicker_than_pixels_come_out_in_true_proportion(tmp_path: Path) -> None:
    image = thorax_image((180, 135, 36), (2.0, 2.0, 10.0))
    hu, record = on_grid(write_image(image, tmp_path / "person.mha"), keep_table=True)
    assert mean_error(hu, record) < 10
    assert record["source_spacing_mm"] == [2.0, 2.0, 10.0]
    assert record["source_size"] == [180, 135, 36]


def test_the_record_states_how_the_file_was_oriented(tmp_path: Path) -> None:
    scan = reader.read(only(write_image(thorax_image(direction=np.diag([-1.0, -1, 1])), tmp_path / "person.nrrd")))
    assert scan.orientation == "RAS"


def test_hu_are_clamped_before_anything_is_averaged(tmp_path: Path) -> None:
    def with_padding_and_metal(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        hu = thorax_hu(x, y, z)
        hu = np.where(np.hypot(x, y) > 165, -3024, hu)
        return np.where(np.abs(x) + np.abs(y - 70) + np.abs(z) < 12, 30000, hu)

    path = write_image(thorax_image((180, 140, 80), (2, 2, 4.5), hu=with_padding_and_metal), tmp_path / "person.mha")
    hu, _ = on_grid(path, keep_table=True)
    assert hu.dtype == np.int16
    assert hu.min() == -1024
    assert 500 < hu.max() <= 3071
    # Padding of -3024 that was averaged with the adjacent air would leave values below what air can have.
    air = hu[hu < -900]
    assert set(np.unique(air)) <= set(range(-1024, -899))


def test_what_becomes_coarser_is_smoothed_first(tmp_path: Path) -> None:
    def striped(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        hu = thorax_hu(x, y, z)
        return hu + np.where(hu > -200, 200 * (-1.0) ** np.floor(z / 1.5), 0)

    path = write_image(thorax_image((80, 60, 240), (4.5, 4.5, 1.5), hu=striped), tmp_path / "person.mha")
    hu, record = on_grid(path, keep_table=True)
    # Taking the nearest slice, or interpolating two of them, would leave stripes of many times that.
    assert mean_error(hu, record) < 10


def test_the_body_is_centered_where_the_scanner_did_not(tmp_path: Path) -> None:
    def aside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return thorax_hu(x - 60, y + 40, z)

    hu, record = on_grid(write_image(thorax_image((110, 100, 80), hu=aside), tmp_path / "person.mha"))
    assert record["center_lps_mm"][:2] == pytest.approx([60, -40], abs=6)
    body = segmentation.body(hu, CUBE.spacing_mm)
    for axis in (1, 2):
        where = np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))
        assert (where[0] + where[-1]) / 2 == pytest.approx((CUBE.size - 1) / 2, abs=1.5)


@pytest.mark.parametrize(("shift_mm", "center_mm"), [(0, 0), (60, 60), (-60, -60), (150, 105), (-150, -105)])
def test_a_long_scan_is_cropped_about_the_lungs_but_never_beyond_its_ends(
    shift_mm: float, center_mm: float, tmp_path: Path
) -> None:
    def shifted(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return thorax_hu(x, y, z - shift_mm)

    # 600 mm long, so a cube of 384 mm may be centered up to 105 mm from the middle.
    path = write_image(thorax_image((80, 60, 120), (4.5, 4.5, 5.0), hu=shifted), tmp_path / "person.mha")
    hu, record = on_grid(path)
    assert record["centered_on"] == "lungs"
    assert record["center_lps_mm"][2] == pytest.approx(center_mm, abs=6)
    assert (hu[[0, -1]] > -200).any(axis=(1, 2)).all(), "the first and the last slice are inside the scan"


def test_a_short_scan_is_padded_with_air_about_its_middle(tmp_path: Path) -> None:
    hu, record = on_grid(write_image(thorax_image((80, 60, 40)), tmp_path / "person.mha"))
    assert record["centered_on"] == "scan"
    assert record["center_lps_mm"][2] == pytest.approx(0, abs=3)
    assert (hu[:16] == -1024).all()
    assert (hu[-16:] == -1024).all()
    assert (hu[18:-18] > -200).any(axis=(1, 2)).all()


def test_the_table_is_removed_unless_it_is_to_be_kept(tmp_path: Path) -> None:
    def on_a_table(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        table = (abs(y - 122) < 8) & (abs(x) < 140)
        return np.where(table, 200, thorax_hu(x, y, z))

    path = write_image(thorax_image((80, 64, 80), hu=on_a_table), tmp_path / "person.mha")
    for keep, seen in ((False, False), (True, True)):
        hu, record = on_grid(path, keep_table=keep)
        behind = hu[:, CUBE.size // 2 + 20 : CUBE.size // 2 + 22]
        assert (behind > 0).any() == seen
        assert record["table_removed"] != keep
        assert (hu[CUBE.size // 2] > -100).sum() > 500


def test_voxels_between_two_grids_keep_their_place(tmp_path: Path) -> None:
    path = write_image(thorax_image(), tmp_path / "person.mha")
    fine, coarse = Grid(96, 4.0), Grid(48, 8.0)
    for grid in (fine, coarse):
        hu, record = on_grid(path, grid, keep_table=True)
        assert hu.shape == grid.shape
        assert mean_error(hu, record, grid) < 12


# --- what is found ---


def test_a_folder_brings_up_every_series_and_counts_what_else_is_in_it(tmp_path: Path) -> None:
    write_series(tmp_path / "disc", thorax_image((20, 20, 10)), patient="p1")
    second = write_series(tmp_path / "spare", thorax_image((20, 20, 12)), patient="p2")
    for path in second:
        path.rename(tmp_path / "disc" / f"b{path.name}")
    write_series(tmp_path / "disc" / "deep", thorax_image((20, 20, 14)), patient="p1")
    write_image(thorax_image((20, 20, 16)), tmp_path / "disc" / "volume.nii.gz")
    write_image(thorax_image((20, 20, 18)), tmp_path / "disc" / "apart.mhd")
    (tmp_path / "disc" / "notes.txt").write_text("none of this is a scan" * 20)
    (tmp_path / "disc" / "empty").write_bytes(b"")
    index = Dataset()
    index.file_meta = pydicom.dataset.FileMetaDataset()
    index.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    index.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    pydicom.dcmwrite(tmp_path / "disc" / "DICOMDIR", index, enforce_file_format=True)

    found = reader.find([tmp_path / "disc"])
    assert not found.refused
    assert found.skipped == 3  # notes.txt, empty and DICOMDIR; apart.raw belongs to apart.mhd
    slices = {source.name: reader.read(source).image.GetSize()[2] for source in found.sources}
    assert sorted(slices.values()) == [10, 12, 14, 16, 18]
    assert len(slices) == 5, "no two have one name"


def test_what_lies_under_two_of_the_paths_given_is_found_once(tmp_path: Path) -> None:
    write_series(tmp_path / "a" / "b", thorax_image((12, 12, 9)))
    write_image(thorax_image((12, 12, 9)), tmp_path / "a" / "person.nii")
    (tmp_path / "a" / "notes.txt").touch()
    found = reader.find([tmp_path, tmp_path / "a" / "b", tmp_path / "a" / "b" / ".." / "person.nii"])
    assert sorted(source.name for source in found.sources) == ["b", "person.nii"]
    assert [len(source.files) for source in found.sources if source.is_dicom] == [9]
    assert found.skipped == 1


def test_one_patient_is_one_subject_in_every_series_and_is_not_named(tmp_path: Path) -> None:
    small = thorax_image((12, 12, 9))
    write_series(tmp_path / "a", small, patient="MRN-0042")
    write_series(tmp_path / "b", small, patient="MRN-0042")
    write_series(tmp_path / "c", small, patient="MRN-0043")
    one, other, third = (source.subject for source in reader.find([tmp_path]).sources)
    assert one == other != third
    assert "0042" not in one


def test_without_a_patient_id_the_series_of_one_study_are_one_subject(tmp_path: Path) -> None:
    study = pydicom.uid.generate_uid()

    def anonymous(_: int, ds: Dataset) -> Dataset:
        ds.StudyInstanceUID = study
        return ds

    small = thorax_image((12, 12, 9))
    write_series(tmp_path / "soft", small, patient="", change=anonymous)
    write_series(tmp_path / "sharp", small, patient="", change=anonymous)
    write_series(tmp_path / "another", small, patient="")
    subjects = {source.name: source.subject for source in reader.find([tmp_path]).sources}
    assert subjects["soft"] == subjects["sharp"] != subjects["another"]


def test_a_subject_does_not_depend_on_where_its_files_lie(tmp_path: Path) -> None:
    write_series(tmp_path / "here" / "series", thorax_image((12, 12, 9)), patient="")
    before = reader.find([tmp_path / "here"]).sources[0]
    shutil.move(tmp_path / "here", tmp_path / "there")
    after = reader.find([tmp_path / "there"]).sources[0]
    assert (before.subject, before.name) == (after.subject, after.name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_digest_of_a_scan_changes_with_its_voxels(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"person{suffix}"
    digests = set()
    for value in (0, 1):
        image = thorax_image((20, 20, 12))
        image[3, 3, 3] = 1000 + value
        digests.add(reader.find([write_image(image, path)]).sources[0].digest())
    assert len(digests) == 2


def test_the_digest_of_a_series_depends_on_names_neither_of_files_nor_of_folders(tmp_path: Path) -> None:
    write_series(tmp_path / "one", thorax_image((20, 20, 12)))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (only(tmp_path / name).digest() for name in ("one", "two"))
    assert one == two


def test_a_path_that_is_not_there_and_a_file_that_is_no_volume_are_refused_by_name(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    found = reader.find([tmp_path / "nowhere", text])
    assert not found.sources
    missing, other = (str(error) for error in found.refused)
    assert missing == f"{tmp_path / 'nowhere'}: no such file or folder"
    assert str(text) in other
    assert ".nii.gz" in other


# --- what is refused ---


def save(
    make: Callable[..., sitk.Image], *args: Any, name: str = "person.mha", **options: Any
) -> Callable[[Path], Path]:
    return lambda folder: write_image(make(*args, **options), folder / name)


def changed_series(change: Callable[[int, Dataset], Dataset | None], **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_series(folder / "series", thorax_image((40, 30, 20), (9, 9, 9)), change=change, **options)
        return folder / "series"

    return write


def without(k: int, ds: Dataset, *, slices: tuple[int, ...] = (7,)) -> Dataset | None:
    return None if k in slices else ds


def setting(only_slice: int | None = None, **tags: Any) -> Callable[[int, Dataset], Dataset]:
    def change(k: int, ds: Dataset) -> Dataset:
        if only_slice in (None, k):
            for name, value in tags.items():
                if value is None:
                    delattr(ds, name)
                else:
                    setattr(ds, name, value)
        return ds

    return change


def moved(where: int, by_mm: float) -> Callable[[int, Dataset], Dataset]:
    def change(k: int, ds: Dataset) -> Dataset:
        if k == where:
            x, y, z = ds.ImagePositionPatient
            ds.ImagePositionPatient = [x, y, z + by_mm]
        return ds

    return change


def tilted(k: int, ds: Dataset) -> Dataset:
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, y + 8 * k, z]
    return ds


def truncated(suffix: str, share: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_image(thorax_image(), folder / f"person{suffix}")
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * share)])
        return path

    return write


def truncated_data(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_image(thorax_image(), folder / f"person{suffix}")
        data = path.with_suffix(".raw")
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        return path

    return write


def damaged(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_image(thorax_image(), folder / f"person{suffix}")
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 0x55
        path.write_bytes(raw)
        return path

    return write


def truncated_slice(folder: Path) -> Path:
    paths = write_series(folder / "series", thorax_image((40, 30, 20), (9, 9, 9)))
    paths[11].write_bytes(paths[11].read_bytes()[:-900])
    return folder / "series"


def copied_slice(folder: Path) -> Path:
    paths = write_series(folder / "series", thorax_image((40, 30, 20), (9, 9, 9)))
    shutil.copy(paths[4], folder / "series" / "copy.dcm")
    return folder / "series"


def without_orientation(folder: Path) -> Path:
    path = write_image(thorax_image(), folder / "person.nii")
    raw = bytearray(path.read_bytes())
    raw[252:256] = bytes(4)  # qform_code and sform_code
    path.write_bytes(raw)
    return path


def in_other_units(scale: float, offset: float, kind: type[Any] = np.float32) -> sitk.Image:
    return thorax_image(hu=lambda x, y, z: thorax_hu(x, y, z) * scale + offset, kind=kind)


def with_nan() -> sitk.Image:
    image = thorax_image(kind=np.float32)
    image[1, 1, 1] = float("nan")
    return image


def padded_and_not_in_hu() -> sitk.Image:
    """As scanners store it before the intercept is added: air 24, water 1024, and -2000 outside the field of view."""
    return thorax_image(hu=lambda x, y, z: np.where(np.hypot(x, y) > 160, -2000, thorax_hu(x, y, z) + 1024))


def air(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.full(np.broadcast(x, y, z).shape, -1000)


def complex_values() -> sitk.Image:
    part = sitk.Cast(thorax_image((20, 20, 20)), sitk.sitkFloat32)
    return sitk.RealAndImaginaryToComplex(part, part)


def plane() -> sitk.Image:
    return sitk.GetImageFromArray(np.zeros((64, 64), dtype=np.int16))


def several_volumes() -> sitk.Image:
    return sitk.JoinSeries([thorax_image((20, 20, 20))] * 3)


def colored() -> sitk.Image:
    return sitk.Compose([thorax_image((20, 20, 20))] * 3)


REFUSALS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a missing slice": (changed_series(without), r"18\.00 mm between the slices at .* 9\.00 mm apart: .*missing"),
    "two missing slices": (
        changed_series(lambda k, ds: without(k, ds, slices=(7, 8))), r"27\.00 mm between.*missing",
    ),
    "a slice that was moved": (changed_series(moved(5, 3.0)), r"mm between the slices.*missing"),
    "a duplicate slice": (copied_slice, r"two slices at -?\d+\.\d\d mm: remove the duplicates"),
    "two slices at one place": (changed_series(moved(5, 9.0)), r"two slices at .* remove the duplicates"),
    "another modality": (changed_series(setting(Modality="MR")), r"modality MR is not CT"),
    "no modality": (changed_series(setting(Modality=None)), r"modality none is not CT"),
    "slices of two sizes": (changed_series(setting(3, Rows=20)), r"differ in size.*split the series"),
    "slices of two spacings": (changed_series(setting(3, PixelSpacing=[8, 8])), r"differ in pixel spacing"),
    "a localizer among the slices": (
        changed_series(setting(3, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])), r"differ in orientation.*split",
    ),
    "a tilt beyond any gantry": (changed_series(tilted), r"axes 41\.6 degrees from perpendicular, .* at most 35"),
    "no position": (changed_series(setting(4, ImagePositionPatient=None)), r"without position or orientation"),
    "an empty position": (changed_series(setting(4, ImagePositionPatient=[])), r"without position or orientation"),
    "no rows": (changed_series(setting(Rows=None)), r"without a value of Rows: add it"),
    "no pixel spacing": (changed_series(setting(4, PixelSpacing=None)), r"without a value of PixelSpacing: add it"),
    "no room for the position": (
        changed_series(setting(4, ImagePositionPatient=[1, 2])), r"ImagePositionPatient .* does not have 3 numbers",
    ),
    "pixels of no size": (changed_series(setting(PixelSpacing=[0, 0])), r"spacing .*0.* is not that of a CT"),
    "several frames": (changed_series(setting(NumberOfFrames=20)), r"multi-frame.*convert it to NIfTI"),
    "a series in color": (changed_series(setting(SamplesPerPixel=3)), r"color"),
    "pixels without intercept": (
        changed_series(setting(RescaleIntercept=0)), r"not in HU.*subtract 1024",
    ),
    "too few slices": (changed_series(lambda k, ds: ds if k < 5 else None), r"40 x 30 x 5 voxels is not a volume of 8"),
    "a truncated slice": (truncated_slice, r"slices cannot be read|not in HU|truncated"),
    "a plane": (save(plane), r"64 x 64 voxels is not a volume of 8 slices"),
    "a thin volume": (save(thorax_image, (60, 60, 4)), r"60 x 60 x 4 voxels is not a volume"),
    "a series of volumes": (save(several_volumes, name="person.nii.gz"), r"20 x 20 x 20 x 3 voxels.*extract one"),
    "several values a voxel": (save(colored), r"voxels, a CT has one number each"),
    "complex values": (save(complex_values), r"voxels, a CT has one number each"),
    "HU and 1024": (save(in_other_units, 1, 1024), r"values 2\d to 1\d{3} are not in HU.*subtract 1024"),
    "a range of 0 to 1": (save(in_other_units, 1 / 4096, 0.25), r"are not in HU.*convert it to HU"),
    "eight bits": (save(in_other_units, 0.1, 110, np.uint8), r"are not in HU"),
    "padding but no HU": (save(padded_and_not_in_hu), r"are not in HU"),
    "nothing but air": (save(thorax_image, hu=air), r"not in HU"),
    "a voxel that is no number": (save(with_nan), r"NaN or infinite voxels"),
    "no orientation": (without_orientation, r"neither qform nor sform is set"),
    "spacing in meters": (save(thorax_image, spacing=(0.0045, 0.0045, 0.0045)), r"spacing .* is not that of a CT"),
    "a person ten meters tall": (save(thorax_image, (20, 20, 600), (15, 15, 18)), r"10800 mm is larger than"),
    "a person two meters wide": (save(thorax_image, (100, 100, 60), (18, 18, 18)), r"1800 x 1800 x 1080 mm is larger"),
    "half a NIfTI": (truncated(".nii", 0.5), r"truncated"),
    "half a compressed NIfTI": (truncated(".nii.gz", 0.5), r"truncated"),
    "half a NRRD": (truncated(".nrrd", 0.5), r"truncated"),
    "half a MetaImage": (truncated(".mha", 0.5), r"truncated"),
    "half the voxels of a detached NRRD": (truncated_data(".nhdr"), r"truncated"),
    "half the voxels of a detached MetaImage": (truncated_data(".mhd"), r"truncated"),
    "a damaged compressed NIfTI": (damaged(".nii.gz"), r"damaged"),
    "a damaged NRRD": (damaged(".nrrd"), r"voxels are damaged"),
    "a damaged MetaImage": (damaged(".mha"), r"voxels are damaged"),
    "the head of a NIfTI": (truncated(".nii", 0.0003), r"header cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_no_whole_ct_in_hu_is_refused_by_name(what: str, tmp_path: Path) -> None:
    write, message = REFUSALS[what]
    path = write(tmp_path)
    found = reader.find([path])
    assert len(found.sources) == 1
    with pytest.raises(FileError, match=message) as caught:
        reader.read(found.sources[0])
    assert str(path) in str(caught.value)


def test_a_fourth_axis_of_one_is_a_volume(tmp_path: Path) -> None:
    path = write_image(sitk.JoinSeries([thorax_image()]), tmp_path / "person.nii.gz")
    assert_right_way_round(*on_grid(path, keep_table=True))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            ScanLimits(max_voxels=80 * 60 * 80 - 1),
            r"80 x 60 x 80 voxels, over the limit of 383999 \(--limits.max-voxels\)",
        ),
        (ScanLimits(max_side=79), r"80 x 60 x 80 voxels, over the limit of 79 per side \(--limits.max-side\)"),
        (ScanLimits(max_file_bytes=1000), r"\d+ bytes, over the limit of 1000 \(--limits.max-file-bytes\)"),
        (ScanLimits(min_side=70), r"80 x 60 x 80 voxels is not a volume of 70 slices"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "series"])
def test_limits_are_named_with_the_option_that_moves_them(
    kind: str, limits: ScanLimits, message: str, tmp_path: Path
) -> None:
    if kind == "series":
        write_series(tmp_path, thorax_image())
    else:
        write_image(thorax_image(), tmp_path / "person.nii.gz")
    source = only(tmp_path)
    with pytest.raises(FileError, match=message):
        reader.read(source, limits)
    just_enough = replace(ScanLimits(), max_voxels=80 * 60 * 80, max_side=80, min_side=60)
    assert reader.read(source, just_enough).image.GetSize() == (80, 60, 80)


def test_a_header_over_the_limits_is_refused_before_its_voxels_are_looked_for(tmp_path: Path) -> None:
    path = write_image(thorax_image(), tmp_path / "person.mhd")
    (tmp_path / "person.raw").write_bytes(b"not voxels")
    with pytest.raises(FileError, match="over the limit of 79 per side"):
        reader.read(reader.find([path]).sources[0], ScanLimits(max_side=79))


def test_a_volume_without_a_body_in_its_middle_is_refused(tmp_path: Path) -> None:
    def dust(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.where(np.random.default_rng(0).random(x.shape) < 0.1, 40.0, -1000.0)

    path = write_image(thorax_image(hu=dust), tmp_path / "person.mha")
    with pytest.raises(FileError, match=r"person\.mha: no body found in the central 384 mm"):
        on_grid(path)


def test_a_cube_that_cuts_the_flanks_keeps_the_lungs_behind_them(tmp_path: Path) -> None:
    """Outside the cube's own body such a lung cannot be distinguished from the air around a patient."""
    path = write_image(thorax_image(), tmp_path / "person.mha")
    narrow = Grid(53, 4.0)  # 212 mm, where the lungs reach from -118 to 112 mm
    hu, _ = on_grid(path, narrow)
    kept, _ = on_grid(path, narrow, keep_table=True)
    lung = (kept < -700) & (kept > -900)
    lung[:, :13] = lung[:, -13:] = False  # the skin
    assert lung[26, 26, 0]
    assert lung.mean() > 0.15
    assert np.array_equal(hu[lung], kept[lung])


def test_outside_a_cube_that_is_wider_than_the_body_is_air_as_before(tmp_path: Path) -> None:
    def on_a_table(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.where(np.abs(y - 118) < 5, 100.0, thorax_hu(x, y, z))

    hu, _ = on_grid(write_image(thorax_image(hu=on_a_table), tmp_path / "person.mha"), Grid(64, 6.0))
    plain, _ = on_grid(write_image(thorax_image(), tmp_path / "alone.mha"), Grid(64, 6.0))
    assert ((hu > -900) != (plain > -900)).mean() < 0.005


# --- a whole thorax ---


def check(tmp_path: Path, hu: Callable[..., np.ndarray] = thorax_hu, **placed: Any) -> None:
    check_whole_thorax(reader.read(only(write_image(thorax_image(hu=hu, **placed), tmp_path / "person.mha"))))


def test_two_whole_lungs_are_a_whole_thorax(tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(("side", "sign"), [("right", -1), ("left", 1)])
def test_a_thorax_with_one_lung_is_refused_by_its_side(side: str, sign: int, tmp_path: Path) -> None:
    def one_lung(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        hu = thorax_hu(x, y, z)
        return np.where((x * sign > 5) & (np.hypot(x / 1.4, y) < 95), np.maximum(hu, 40), hu)

    with pytest.raises(FileError, match=rf"person\.mha: \d+ ml of {side} lung.*--require-whole-thorax"):
        check(tmp_path, one_lung)


@pytest.mark.parametrize(("end", "up_mm"), [("first", 70), ("last", -70)])
def test_lungs_cut_by_an_end_of_the_scan_are_refused_by_that_end(end: str, up_mm: float, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"the lungs are truncated by the {end} slice"):
        check(tmp_path, lambda x, y, z: thorax_hu(x, y, z - up_mm), size=(80, 60, 40))


@pytest.mark.parametrize(("side", "left_mm"), [("right", -60), ("left", 60)])
def test_lungs_cut_by_a_side_of_the_scan_are_refused_by_that_side(side: str, left_mm: float, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"the lungs are truncated by the {side} side"):
        check(tmp_path, lambda x, y, z: thorax_hu(x - left_mm, y, z), size=(70, 60, 80))


def test_a_scan_without_lungs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no lungs inside the field of view"):
        check(tmp_path, lambda x, y, z: thorax_hu(x, y, z + 400))


# --- real scans ---


def test_real_scans_of_every_kind_are_read_and_the_radiograph_among_them_is_refused(real_data: Path) -> None:
    found = reader.find([real_data / "raw"])
    read, refused = {}, []
    for source in found.sources:
        try:
            read[source.name] = reader.read(source)
        except FileError as error:
            refused.append(str(error))
    assert read["dicom_ct_lung_dx_a0002"].image.GetSize() == (512, 512, 30)
    assert read["dicom_ct_lung_dx_a0002"].spacing_mm == pytest.approx((0.6465, 0.6465, 8.0), abs=1e-3)
    assert read["elastix_3DCT_lung.mha"].image.GetSize() == (115, 157, 129)
    # A part of a scan that was resampled: its corners are filled with 0.
    assert read["elastix_3DCT_lung.mha"].changes[-1].endswith(" voxels of exactly 0 HU at the border were set to air")
    assert len(refused) == 1
    assert "RG1_J2KI.dcm: DICOM modality CR is not CT" in refused[0]


def test_real_whole_thoraces_pass_and_half_of_one_does_not(real_data: Path) -> None:
    for name in ("lidc_idri_0003_2mm.nii.gz", "lidc_idri_0007_2mm.nii.gz"):
        check_whole_thorax(reader.read(only(real_data / "ct" / name)))
    with pytest.raises(FileError, match="lung"):
        check_whole_thorax(reader.read(only(real_data / "raw" / "elastix_3DCT_lung.mha")))


def test_a_real_scan_is_the_right_way_round_and_within_the_scale(real_data: Path) -> None:
    grid = Grid(64, 5.0)
    hu, record = on_grid(real_data / "ct" / "lidc_idri_0002_2mm.nii.gz", grid)
    assert -1024 == hu.min() < hu.max() <= 3071
    assert record["centered_on"] == "lungs"
    lung = segmentation.lungs(hu, grid.spacing_mm)
    assert 2000 < lung.sum() * grid.spacing_mm**3 / 1000 < 8000
    # The spine is behind the middle of the body, and lungs narrow towards the neck.
    bone = np.argwhere(hu > 300)
    assert bone[:, 1].mean() > grid.size / 2
    area = lung.sum(axis=(1, 2))
    present = np.flatnonzero(area)
    assert area[present[:5]].mean() < 0.5 * area.max()
    # The heart is on the left, so the right lung is the larger one.
    assert lung[:, :, : grid.size // 2].sum() > lung[:, :, grid.size // 2 :].sum()
