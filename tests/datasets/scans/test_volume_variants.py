"""NIfTI, NRRD and MetaImage files as tools write them: read to the right HU at the right place, or refused."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from samples import affine_of, centered, thorax_hu, thorax_image, thorax_on, turned, write_image

from raylift.datasets.errors import FileError, SegmentationMaskError
from raylift.datasets.geometry import Grid
from raylift.datasets.scans import reader
from raylift.datasets.scans.resample import resample

SIZE = (60, 50, 40)
SPACING = np.array([6.0, 6.0, 8.0])
AFFINE = centered(np.diag(SPACING), SIZE)
HU = thorax_on(AFFINE, SIZE)
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(path: Path, **options: Any) -> reader.Scan:
    found = reader.find([path])
    if found.refused:
        raise found.refused[0]
    return reader.read(found.sources[0], **options)


def assert_read(path: Path, hu: np.ndarray, affine: np.ndarray, change: str = "", **options: Any) -> reader.Scan:
    """Every voxel has its value and its place, and the one change is reported."""
    scan = read(path, **options)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), hu)
    np.testing.assert_allclose(affine_of(scan.image), affine, atol=2e-3)
    assert len(scan.changes) == bool(change)
    assert re.search(change, "".join(scan.changes))
    return scan


def nifti(
    path: Path,
    hu: np.ndarray = HU,
    *,
    sform: np.ndarray | None = AFFINE,
    qform: np.ndarray | None = AFFINE,
    units: int = 2,
    kind: type[nib.Nifti1Image] = nib.Nifti1Image,
    **header: Any,
) -> Path:
    """A NIfTI whose forms are given in LPS; None leaves a form unset."""
    image = kind(hu.transpose(2, 1, 0), None)
    image.header.set_sform(None if sform is None else TO_RAS @ sform, code=0 if sform is None else 1)
    if qform is not None:
        image.header.set_qform(TO_RAS @ qform, code=1, strip_shears=True)
    elif sform is not None:
        image.header["pixdim"][1:4] = np.linalg.norm(sform[:3, :3], axis=0)
    image.header["xyzt_units"] = units
    for key, value in header.items():
        image.header[key] = value
    slope, inter = header.get("scl_slope", 1), header.get("scl_inter", 0)
    raw = bytearray(image.to_bytes())
    if kind is nib.Nifti1Image:
        struct.pack_into(image.header.endianness + "ff", raw, 112, slope, inter)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def scaled(factors: Any) -> np.ndarray:
    return AFFINE @ np.diag([*np.broadcast_to(factors, 3), 1.0])


def sheared(y_per_slice_mm: float) -> np.ndarray:
    axes = np.diag(SPACING)
    axes[1, 2] = y_per_slice_mm
    return centered(axes, SIZE)


# --- NIfTI ---


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("forms", ["both", "sform", "qform"])
def test_either_form_places_the_voxels(kind: type[nib.Nifti1Image], forms: str, tmp_path: Path) -> None:
    oblique = centered(turned(12, -7, 9) * SPACING, SIZE)
    hu = thorax_on(oblique, SIZE)
    placed = {"sform": oblique if forms != "qform" else None, "qform": oblique if forms != "sform" else None}
    assert_read(nifti(tmp_path / "ct.nii.gz", hu, kind=kind, **placed), hu, oblique)


@pytest.mark.parametrize(
    ("y_per_slice_mm", "degrees"), [(8 * np.tan(np.deg2rad(15)), "15.00"), (0.008, "0.06"), (-0.8, "5.71")]
)
@pytest.mark.parametrize("qform", [True, False])
def test_a_sheared_sform_places_every_slice_whatever_the_qform(
    y_per_slice_mm: float, degrees: str, qform: bool, tmp_path: Path
) -> None:
    affine = sheared(y_per_slice_mm)
    hu = thorax_on(affine, SIZE)
    scan = read(nifti(tmp_path / "ct.nii.gz", hu, sform=affine, qform=AFFINE if qform else None))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(scan.image), hu)
    np.testing.assert_allclose(affine_of(scan.image), affine, atol=2e-3)
    assert f"the axes are {degrees} degrees from perpendicular" in scan.changes[0]
    apart = any("sform and qform put a corner" in change for change in scan.changes)
    assert apart == (qform and abs(y_per_slice_mm) > 0.1)
    resampled, record, _ = resample(scan, Grid(48, 6.0), keep_table=True)
    along = (np.arange(48) - 23.5) * 6.0
    x, y, z = record["center_lps_mm"]
    truly = thorax_hu(along[None, None] + x, along[None, :, None] + y, z - along[:, None, None])
    assert np.abs(resampled - truly)[8:-8, 8:-8, 8:-8].mean() < 8


def test_a_sform_sheared_beyond_any_gantry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"axes 45\.0 degrees from perpendicular, where a gantry tilts at most 35"):
        read(nifti(tmp_path / "ct.nii", sform=sheared(8.0)))


@pytest.mark.parametrize("factor", [3 / 4, 1.02, (1, 1, 1.5)])
def test_forms_of_different_voxel_sizes_are_refused_with_both(factor: Any, tmp_path: Path) -> None:
    stated = " x ".join(f"{value:.4g}" for value in SPACING * factor)
    with pytest.raises(FileError, match=rf"disagree, voxels of 6 x 6 x 8 and {stated} mm: correct one or unset"):
        read(nifti(tmp_path / "ct.nii.gz", qform=scaled(factor)))


@pytest.mark.parametrize("turn", [np.diag([-1.0, 1, 1]), np.diag([-1.0, -1, 1]), turned(0, 0, 10)])
def test_forms_of_different_directions_are_those_of_the_sform_and_reported(turn: np.ndarray, tmp_path: Path) -> None:
    other = centered(turn * SPACING, SIZE)
    path = nifti(tmp_path / "ct.nii.gz", qform=other)
    assert_read(path, HU, AFFINE, r"sform and qform put a corner \d+\.\d mm apart: the sform is used")


def test_forms_of_different_origins_are_reported(tmp_path: Path) -> None:
    other = AFFINE.copy()
    other[0, 3] += 25
    path = nifti(tmp_path / "ct.nii.gz", qform=other)
    assert_read(path, HU, AFFINE, r"put a corner 25\.0 mm apart: the sform is used")


def test_a_voxel_size_that_contradicts_the_sform_is_reported(tmp_path: Path) -> None:
    path = nifti(tmp_path / "ct.nii", qform=None, pixdim=[1, 1, 1, 1, 0, 0, 0, 0])
    assert_read(path, HU, AFFINE, "sform and pixdim disagree, voxels of 6 x 6 x 8 and 1 x 1 x 1 mm: the sform is used")


def test_an_invalid_qform_gives_way_to_the_sform(tmp_path: Path) -> None:
    path = nifti(tmp_path / "ct.nii", quatern_b=3.0)
    assert_read(path, HU, AFFINE, "the qform is invalid .*: the sform is used")
    with pytest.raises(FileError, match="the qform is invalid"):
        read(nifti(tmp_path / "alone.nii", sform=None, quatern_b=3.0))


@pytest.mark.parametrize(("unit", "factor"), [(1, 1e-3), (3, 1e3)])
def test_lengths_in_meters_and_micrometers_are_converted(unit: int, factor: float, tmp_path: Path) -> None:
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    assert_read(nifti(tmp_path / "ct.nii", sform=affine, qform=affine, units=unit), HU, AFFINE)


def test_a_nifti_without_a_unit_is_in_millimeters_and_reported(tmp_path: Path) -> None:
    assert_read(nifti(tmp_path / "ct.nii", units=0), HU, AFFINE, "no unit of length: millimeters are assumed")
    with pytest.raises(FileError, match="unit of length 5 in xyzt_units"):
        read(nifti(tmp_path / "other.nii", units=5))


def test_slope_and_intercept_are_applied_in_a_type_that_holds_fractions(tmp_path: Path) -> None:
    stored = (2 * (HU.astype(np.int32) + 1024) + 1).astype(np.uint16)
    scan = assert_read(nifti(tmp_path / "ct.nii.gz", stored, scl_slope=0.5, scl_inter=-1024.5), HU, AFFINE)
    assert scan.rescale == (0.5, -1024.5)


@pytest.mark.parametrize(("slope", "inter"), [(np.nan, 0), (np.inf, 0), (1, np.nan)])
def test_a_slope_or_intercept_that_is_no_number_is_refused(slope: float, inter: float, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"scl_slope .* and scl_inter .* are no numbers"):
        read(nifti(tmp_path / "ct.nii", scl_slope=slope, scl_inter=inter))


def test_big_endian_voxels_are_read(tmp_path: Path) -> None:
    path = nifti(tmp_path / "ct.nii")
    image = nib.load(path)
    big = nib.Nifti1Image(image.dataobj, image.affine, image.header.as_byteswapped(">"))
    path.write_bytes(big.to_bytes())
    assert struct.unpack_from(">i", path.read_bytes())[0] == 348
    assert_read(path, HU, AFFINE)


def test_negative_values_stored_as_unsigned_are_air_at_the_border_and_refused_inside(tmp_path: Path) -> None:
    ramp = np.hypot(*np.meshgrid(np.arange(60) - 29.5, np.arange(50) - 24.5)) > 28
    padded = np.where(ramp, 63536, HU.clip(-1024) + 1024).astype(np.uint16)
    path = nifti(tmp_path / "padded.nii.gz", padded, scl_inter=-1024.0, scl_slope=1.0)
    count = int(ramp.sum()) * SIZE[2]
    assert_read(path, np.where(ramp, -1024, HU), AFFINE, rf"^{count} voxels over 3071 HU at the border were set to air")
    with pytest.raises(FileError, match=r"of the voxels inside are over 31743 HU, up to 65\d+: negative values stored"):
        read(nifti(tmp_path / "wrapped.nii.gz", HU.astype(np.uint16)))


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("compressed", [True, False])
def test_the_content_decides_whether_a_nifti_is_compressed(name: str, compressed: bool, tmp_path: Path) -> None:
    data = nifti(tmp_path / "plain.nii").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if compressed else data)
    assert_read(tmp_path / name, HU, AFFINE)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.nrrd", "ct.mha"])
@pytest.mark.parametrize(
    "content", [b"", b"Dear Sir or Madam," * 40, b"PK\3\4" + bytes(900), b"BZh9" + bytes(900), b"\x1f\x8b" + bytes(900)]
)
def test_other_content_is_refused_in_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = reader.find([tmp_path / name])
    refusals = list(found.refused)
    for source in found.sources:
        with pytest.raises(FileError) as caught:
            reader.read(source)
        refusals.append(caught.value)
    [refusal] = refusals
    assert re.match(rf"{tmp_path / name}: the header cannot be read: .{{10,150}}$", str(refusal))
    assert "0x" not in str(refusal), "no pointer of a library"


def test_a_nifti_pair_is_refused(tmp_path: Path) -> None:
    data = bytearray(nifti(tmp_path / "ct.nii").read_bytes())
    data[344:348] = b"ni1\0"
    (tmp_path / "ct.nii").write_bytes(data)
    with pytest.raises(FileError, match="not NIfTI in one file"):
        read(tmp_path / "ct.nii")


def test_files_of_macos_next_to_others_are_skipped(tmp_path: Path) -> None:
    nifti(tmp_path / "ct.nii")
    double = tmp_path / "._ct.nii"
    double.write_bytes(b"\0\5\26\7" + bytes(300))
    (tmp_path / "._1.dcm").write_bytes(b"\0\5\26\7" + bytes(300))
    found = reader.find([tmp_path])
    assert ([source.name for source in found.sources], found.refused, found.skipped) == (["ct.nii"], [], 2)
    [refusal] = reader.find([double]).refused
    assert str(refusal) == f"{double}: attributes that macOS wrote for a file: pass the file without ._"


# --- NRRD ---


def nrrd(path: Path, *fields: str, hu: np.ndarray = HU) -> Path:
    sizes = " ".join(map(str, hu.shape[::-1]))
    head = ["NRRD0004", "# made by a test", "type: short", "dimension: 3", f"sizes: {sizes}", "encoding: raw"]
    path.write_bytes("\n".join([*head, "endian: little", *fields, "", ""]).encode() + hu.astype("<i2").tobytes())
    return path


def directions(
    affine: np.ndarray, space: str = "left-posterior-superior", sign: tuple[int, ...] = (1, 1, 1)
) -> list[str]:
    rows = (np.diag(sign) @ affine[:3, :3]).T.round(6).tolist()
    origin = (np.array(sign) * affine[:3, 3]).round(6).tolist()
    listed = " ".join(f"({','.join(map(str, row))})" for row in rows)
    return [f"space: {space}", f"space directions: {listed}", f"space origin: ({','.join(map(str, origin))})"]


@pytest.mark.parametrize(
    ("space", "sign"),
    [
        ("left-posterior-superior", (1, 1, 1)), ("LPS", (1, 1, 1)), ("RAS", (-1, -1, 1)),
        ("right-anterior-superior", (-1, -1, 1)), ("left-anterior-superior", (1, -1, 1)),
    ],
)  # fmt: skip
def test_a_nrrd_is_placed_by_its_space(space: str, sign: tuple[int, ...], tmp_path: Path) -> None:
    assert_read(nrrd(tmp_path / "ct.nrrd", *directions(AFFINE, space, sign)), HU, AFFINE)


def test_a_sheared_nrrd_is_at_its_positions(tmp_path: Path) -> None:
    affine = sheared(2.0)
    hu = thorax_on(affine, SIZE)
    path = nrrd(tmp_path / "ct.nrrd", *directions(affine), hu=hu)
    assert_read(path, hu, affine, r"the axes are 14\.04 degrees from perpendicular: .* a shift of 80\.0 mm")


@pytest.mark.parametrize("fields", [[], ["spacings: nan nan nan"], ["content: chest"]])
def test_a_nrrd_without_a_space_is_refused_or_read_with_the_spacing_given(fields: list[str], tmp_path: Path) -> None:
    path = nrrd(tmp_path / "ct.nrrd", *fields)
    with pytest.raises(FileError, match=r"states no space and space directions.*pass --assume-spacing-mm with three"):
        read(path)
    affine = np.diag([*SPACING, 1.0])
    change = "^no space and space directions: 6 x 6 x 8 mm and axes to the left, posterior and superior are assumed"
    assert_read(path, HU, affine, change, assume_spacing_mm=(6, 6, 8))


def test_spacings_of_a_nrrd_without_a_space_are_used_before_the_spacing_given(tmp_path: Path) -> None:
    path = nrrd(tmp_path / "ct.nrrd", "spacings: 6 6 8")
    with pytest.raises(FileError, match=r"states no space and space directions.*pass --assume-spacing-mm with three"):
        read(path)
    change = "^no space and space directions: its spacings 6 x 6 x 8 in mm and axes to the left, posterior and superior"
    assert_read(path, HU, np.diag([*SPACING, 1.0]), change, assume_spacing_mm=(1, 1, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (directions(AFFINE, "scanner-xyz"), "space 'scanner-xyz' has no known axes in the patient"),
        (directions(AFFINE, "3D-right-handed"), "space '3d-right-handed' has no known axes"),
        (["space dimension: 3", *directions(AFFINE)[1:]], "space '' has no known axes in the patient"),
        (["space: LPS", "space origin: (0,0,0)"], "a space without space directions"),
        (
            ["space: LPS", "space directions: (4,0,0) (0,4,0) none", "space origin: (0,0,0)"],
            r"do not have one vector for each of three axes",
        ),
        (
            [*directions(AFFINE), "spacings: 6 6 8"],
            "read: axis.0. has a direction vector, and so can't have .*spacing.*: correct it$",
        ),
        ([*directions(AFFINE), "space: RAS"], "space is 'left-posterior-superior' and again 'RAS': remove the wrong"),
        ([*directions(AFFINE), "type: foo"], r"type is '\w+' and again 'foo': remove the wrong line"),
        ([*directions(AFFINE), "foo: bar"], r'read: failed to parse "foo" as field identifier: correct it$'),
        ([*directions(AFFINE), 'space units: "inch" "inch" "inch"'], "units of length inch, inch, inch"),
        ([*directions(AFFINE), 'space units: "mm" "mm" "cm"'], "units of length mm, mm, cm"),
    ],
)
def test_a_nrrd_of_unknown_axes_or_units_is_refused(fields: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        read(nrrd(tmp_path / "ct.nrrd", *fields), assume_spacing_mm=(6, 6, 8))


@pytest.mark.parametrize(("unit", "factor"), [("cm", 0.1), ("m", 0.001), ("mm", 1.0)])
def test_a_nrrd_in_other_units_is_converted(unit: str, factor: float, tmp_path: Path) -> None:
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    units = f'space units: "{unit}" "{unit}" "{unit}"'
    change = "" if factor == 1 else f"lengths in {unit} were converted to mm"
    assert_read(nrrd(tmp_path / "ct.nrrd", *directions(affine), units), HU, AFFINE, change)


# --- MetaImage ---


def meta_image(
    path: Path, *fields: str, spacing: str = "ElementSpacing = 6 6 8", hu: np.ndarray = HU, with_axes: bool = True
) -> Path:
    sizes = " ".join(map(str, hu.shape[::-1]))
    head = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    head += [f"DimSize = {sizes}", f"Offset = {' '.join(map(str, AFFINE[:3, 3]))}", *fields]
    if with_axes and not any(field.startswith(("TransformMatrix", "AnatomicalOrientation")) for field in fields):
        head += ["TransformMatrix = 1 0 0 0 1 0 0 0 1"]
    head += [spacing] if spacing else []
    tail = ["ElementType = MET_SHORT", "ElementDataFile = LOCAL", ""]
    path.write_bytes("\n".join([*head, *tail]).encode() + hu.astype("<i2").tobytes())
    return path


def test_a_metaimage_without_a_spacing_is_refused_or_read_with_the_one_given(tmp_path: Path) -> None:
    path = meta_image(tmp_path / "ct.mha", spacing="")
    with pytest.raises(FileError, match=r"states no ElementSpacing.*pass --assume-spacing-mm with three values"):
        read(path)
    assert_read(path, HU, AFFINE, "^no ElementSpacing: 6 x 6 x 8 mm and axes", assume_spacing_mm=(6, 6, 8))


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({}, ""),
        ({"spacing": "ElementSize = 6 6 8"}, "no ElementSpacing: ElementSize is used"),
        ({"fields": ["ElementSize = 1 1 1"]}, "ElementSize 1 1 1 differs from ElementSpacing: ElementSpacing is used"),
        ({"fields": ["DistanceUnits = cm"], "spacing": "ElementSpacing = .6 .6 .8"}, "lengths in cm were converted"),
        ({"fields": ["AnatomicalOrientation = RAI", "TransformMatrix = 1 0 0 0 1 0 0 0 1"]}, ""),
        ({"fields": ["AnatomicalOrientation = RAI"]}, ""),
        (
            {"fields": ["AnatomicalOrientation = ???"]},
            "no TransformMatrix: axes to the left, posterior and superior are assumed",
        ),
        ({"with_axes": False}, "no TransformMatrix: axes to the left, posterior and superior are assumed"),
        ({"fields": ["ElementSpacing = 6 6 8"]}, ""),
        (
            {"fields": ["AnatomicalOrientation = LPS", "TransformMatrix = 1 0 0 0 1 0 0 0 1"]},
            "AnatomicalOrientation LPS contradicts the direction matrix, which is RAI: the matrix is used",
        ),
        ({"fields": ["ElementToIntensityFunctionSlope = 1", "ElementToIntensityFunctionOffset = 0"]}, ""),
    ],
)
def test_a_metaimage_is_placed_by_its_header(fields: dict[str, Any], change: str, tmp_path: Path) -> None:
    others = {key: value for key, value in fields.items() if key != "fields"}
    path = meta_image(tmp_path / "ct.mha", *fields.get("fields", []), **others)
    affine = AFFINE.copy()
    if "cm" in change:
        affine[:3, 3] *= 10
    assert_read(path, HU, affine, change)


def test_the_intensity_function_of_a_metaimage_is_applied(tmp_path: Path) -> None:
    fields = ["ElementToIntensityFunctionSlope = 0.5", "ElementToIntensityFunctionOffset = -1024"]
    path = meta_image(tmp_path / "ct.mha", *fields, hu=2 * (HU + 1024))
    assert assert_read(path, HU, AFFINE).rescale == (0.5, -1024)


@pytest.mark.parametrize(
    ("fields", "spacing", "message"),
    [
        (["TransformMatrix = 2 0 0 0 2 0 0 0 2"], "6 6 8", "rows of the direction matrix are not of length 1"),
        (["ElementSpacing = 1 1 1"], "6 6 8", "ElementSpacing is '1 1 1' and again '6 6 8': remove the wrong line"),
        (["AnatomicalOrientation = LAS"], "6 6 8", "AnatomicalOrientation LAS without a TransformMatrix"),
        (["DistanceUnits = furlong"], "6 6 8", "units of length furlong are not supported"),
        (["Modality = MET_MOD_MR"], "6 6 8", "modality MET_MOD_MR is not CT"),
        ([], "-6 6 8", "ElementSpacing -6 6 8 is not positive"),
        ([], "0 6 8", "is not"),
    ],
)
def test_a_metaimage_of_no_clear_place_is_refused(
    fields: list[str], spacing: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=message):
        read(meta_image(tmp_path / "ct.mha", *fields, spacing=f"ElementSpacing = {spacing}"))


@pytest.mark.parametrize(
    ("stated", "changed"),
    [("NDims = 3", "NDims = -1"), ("NDims = 3", "NDims = 99"), ("NDims = 3", "NDims = 2"), ("= 60 50 40", "= 60 50")],
)
def test_a_metaimage_with_which_itk_would_crash_is_refused(stated: str, changed: str, tmp_path: Path) -> None:
    path = meta_image(tmp_path / "ct.mha")
    path.write_bytes(path.read_bytes().replace(stated.encode(), changed.encode()))
    with pytest.raises(FileError, match=r"is not that of a volume|does not have \d numbers"):
        read(path)


# --- masks ---


@pytest.mark.parametrize("labels", [1, 2, 104])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_a_segmentation_mask_is_refused_as_one(labels: int, kind: type[Any], tmp_path: Path) -> None:
    image = thorax_image(SIZE, SPACING, kind=kind, hu=lambda x, y, z: np.where(thorax_hu(x, y, z) > -500, 1, 0) * (
        1 + np.floor((np.abs(z) / 161 * labels).clip(0, labels - 1))
    ))  # fmt: skip
    with pytest.raises(SegmentationMaskError, match=r"values 0 to \d+ are not in HU but labels of a segmentation mask"):
        read(write_image(image, tmp_path / "heart.nii.gz"))


def test_an_image_of_gray_values_is_no_mask(tmp_path: Path) -> None:
    image = thorax_image(
        SIZE, SPACING, kind=np.uint8, hu=lambda x, y, z: (thorax_hu(x, y, z) + 1024).clip(0, 2550) / 10
    )
    with pytest.raises(FileError, match="are not in HU") as caught:
        read(write_image(image, tmp_path / "ct.nii.gz"))
    assert not isinstance(caught.value, SegmentationMaskError)
