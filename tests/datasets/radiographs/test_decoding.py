from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import (
    ImplicitVRLittleEndian,
    RLELossless,
)
from radiograph_samples import REAL, chest, dicom, disturbed, encoded, scaled

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import FRONTAL, GEOMETRIES, Grid
from raylift.datasets.intensity import normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.chest import is_bone_dark
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.preparation import load_radiograph, prepare
from raylift.datasets.scans import reader
from raylift.datasets.scans.resample import resample

GRAY = Image.fromarray(chest().astype(np.uint8))
SIXTEEN = Image.fromarray(chest(most=40000).astype(np.uint16))

DARK = 4000 - chest(most=4000).astype("<u2")

IMAGES: dict[str, tuple[bytes, float]] = {
    "PNG": (encoded(GRAY, "PNG"), 0),
    "PNG of 16 bits": (encoded(SIXTEEN, "PNG"), 0),
    "PNG in color": (encoded(GRAY.convert("RGB"), "PNG"), 0),
    "PNG with alpha": (encoded(GRAY.convert("RGBA"), "PNG"), 0),
    "gray PNG with alpha": (encoded(GRAY.convert("LA"), "PNG"), 0),
    "PNG with palette": (encoded(GRAY.convert("P"), "PNG"), 0),
    "PNG with transparent palette": (encoded(GRAY.convert("P"), "PNG", transparency=bytes([255] * 256)), 0),
    "interlaced PNG": (encoded(GRAY, "PNG", interlace=1), 0),
    "JPEG": (encoded(GRAY, "JPEG", quality=95), 0.08),
    "progressive JPEG": (encoded(GRAY, "JPEG", quality=95, progressive=True), 0.08),
    "JPEG in color": (encoded(GRAY.convert("RGB"), "JPEG", quality=95), 0.08),
    "JPEG for print": (encoded(GRAY.convert("CMYK"), "JPEG", quality=95), 0.08),
    "TIFF": (encoded(GRAY, "TIFF"), 0),
    "TIFF of 16 bits": (encoded(SIXTEEN, "TIFF"), 0),
    "TIFF of 16 bits, big-endian": (encoded(Image.fromarray(chest(most=40000).astype(">u2")), "TIFF"), 0),
    "TIFF of 32 bits": (encoded(Image.fromarray(chest(most=10**6).astype(np.int32)), "TIFF"), 0),
    "TIFF of floats": (encoded(Image.fromarray(chest().astype(np.float32) / 7), "TIFF"), 1e-6),
    "packed TIFF": (encoded(GRAY, "TIFF", compression="tiff_lzw"), 0),
    "BMP": (encoded(GRAY, "BMP"), 0),
    "DICOM": (dicom(), 0),
    "DICOM of signed values": (dicom(chest(most=4000).astype("<i2") - 2000), 0),
    "DICOM of 8 bits": (dicom(chest().astype(np.uint8)), 0),
    "DICOM with implicit types": (dicom(syntax=ImplicitVRLittleEndian), 0),
    "packed DICOM": (dicom(syntax=RLELossless), 0),
    "DICOM that shows bone dark": (dicom(DARK, PhotometricInterpretation="MONOCHROME1"), 0),
    "DICOM with slope": (dicom(RescaleSlope=2.5, RescaleIntercept=-7), 1e-6),
    "DICOM with a wide window": (dicom(WindowCenter=2000, WindowWidth=4002), 1e-3),
    "DICOM with half a window": (dicom(WindowCenter=2000), 0),
    "DICOM with a window of no width": (dicom(WindowCenter=2000, WindowWidth=0), 0),
    "DICOM with empty tags": (dicom(WindowCenter="", WindowWidth="", Modality=""), 0),
    "DICOM without modality": (dicom(Modality=None), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_a_radiograph_of_each_kind_comes_out_bone_bright_and_the_right_way_round(kind: str) -> None:
    data, tolerance = IMAGES[kind]
    image = read(data, "image").pixels
    assert image.dtype == np.float32
    assert np.abs(scaled(image) - scaled(chest())).max() <= tolerance + 1e-6


@pytest.mark.parametrize("window", [(1000, 500), (3000, 800)])
def test_the_display_window_of_a_dicom_file_is_followed(window: tuple[int, int]) -> None:
    center, width = window
    image = scaled(read(dicom(WindowCenter=center, WindowWidth=width), "image").pixels)
    pixels = chest(most=4000)
    assert (image[pixels < center - width / 2 - 1] == 0).all()
    assert (image[pixels > center + width / 2 + 1] == 1).all()


def test_a_display_window_is_followed_before_an_inversion() -> None:
    """In a MONOCHROME1 file low values are dense, and the window is on the values of the file."""
    image = read(dicom(PhotometricInterpretation="MONOCHROME1", WindowCenter=1000, WindowWidth=500), "image").pixels
    pixels = chest(most=4000)
    assert (scaled(image)[pixels < 740] == 1).all()
    assert (scaled(image)[pixels > 1260] == 0).all()


def test_an_inverted_dicom_is_inverted_once_though_its_presentation_states_it_again() -> None:
    inverse = dicom(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    assert np.array_equal(
        read(inverse, "image").pixels, read(dicom(PhotometricInterpretation="MONOCHROME1"), "image").pixels
    )


@pytest.mark.parametrize("kind", ["PNG", "PNG of 16 bits"])
def test_an_image_with_dark_bone_is_inverted_unless_the_caller_decides(kind: str) -> None:
    bright, _ = IMAGES[kind]
    most = np.asarray(Image.open(io.BytesIO(bright))).max()
    pixels = np.asarray(Image.open(io.BytesIO(bright)))
    dark = encoded(Image.fromarray(most - pixels), "PNG")
    assert np.array_equal(read(dark, "image").pixels, read(bright, "image").pixels)
    assert np.array_equal(read(dark, "image", invert="no").pixels, most - read(bright, "image").pixels)
    assert np.array_equal(read(bright, "image", invert="yes").pixels, most - read(bright, "image").pixels)


def test_a_dicom_file_is_inverted_by_hand_only() -> None:
    dark = dicom(DARK)
    assert is_bone_dark(read(dark, "image").pixels)
    assert not is_bone_dark(read(dark, "image", invert="yes").pixels)


def test_flipping_flips_left_and_right() -> None:
    data, _ = IMAGES["PNG"]
    flipped = load_radiograph(data, FRONTAL, flip=True).image
    assert np.array_equal(flipped, load_radiograph(data, FRONTAL).image[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(orientation: int) -> None:
    turns: dict[int, list[Image.Transpose]] = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    stored = GRAY
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read(encoded(stored, "PNG", exif=exif), "image", invert="no").pixels
    assert np.array_equal(image, chest())


def test_what_is_transparent_is_black_whatever_color_it_hides() -> None:
    pixels = np.dstack([chest().astype(np.uint8)] * 3 + [np.full((120, 100), 255, np.uint8)])
    pixels[:20, :20, :3], pixels[:20, :20, 3] = 255, 0
    image = read(encoded(Image.fromarray(pixels, "RGBA"), "PNG"), "image", invert="no").pixels
    assert not image[:20, :20].any()
    assert np.array_equal(image[20:], chest()[20:])


def test_an_image_within_its_own_limits_is_read_and_one_beyond_is_refused() -> None:
    data, _ = IMAGES["PNG"]
    exact = RadiographLimits(max_bytes=len(data), max_pixels=12_000, min_side=100, max_aspect=1.2)
    assert read(data, "image", exact).pixels.shape == (120, 100)
    for limits, message in (
        (RadiographLimits(max_bytes=len(data) - 1), rf"image: {len(data)} bytes, over the limit of {len(data) - 1}"),
        (RadiographLimits(max_pixels=11_999), r"image: 120 x 100 pixels, over the limit of 11999"),
        (RadiographLimits(min_side=101), r"image: 120 x 100 pixels, a side is under 101"),
        (RadiographLimits(max_aspect=1.19), r"image: 120 x 100 pixels, more than 1.19 to 1: crop it"),
    ):
        for kind in ("PNG", "DICOM"):
            if kind == "PNG" or "bytes" not in message:
                with pytest.raises(FileError, match=message):
                    read(IMAGES[kind][0], "image", limits)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_is_refused(value: int) -> None:
    with pytest.raises(FileError, match="image: the image is constant"):
        read(encoded(Image.new("L", (64, 64), value), "PNG"), "image")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_an_image_with_values_that_cannot_be_computed_with_is_refused(value: float) -> None:
    pixels = chest().astype(np.float32)
    pixels[3, 3] = value
    with pytest.raises(FileError, match="no finite values"):
        read(encoded(Image.fromarray(pixels), "TIFF"), "image")


SHUTTER = {"UpperHorizontalEdge": 10, "LowerHorizontalEdge": 111, "LeftVerticalEdge": 5, "RightVerticalEdge": 96}


def behind(kind: str, **edges: Any) -> dict[str, Any]:
    """The tags of a rectangular shutter or collimator, edges counted from 1 and covered themselves."""
    return {f"{kind}Shape": "RECTANGULAR", **{f"{kind}{name}": value for name, value in (SHUTTER | edges).items()}}


@pytest.mark.parametrize("kind", ["Shutter", "Collimator"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_what_a_collimator_covers_by_the_header_is_cut(kind: str, photometric: str) -> None:
    """Whatever stands behind it, and before an inversion would take its values for the densest."""
    pixels = chest(most=4000).astype("<u2") if photometric == "MONOCHROME2" else DARK.copy()
    free = pixels[10:110, 5:95].copy()
    pixels[:10], pixels[110:], pixels[:, :5], pixels[:, 95:] = 60000, 60000, 0, 60000
    image = read(dicom(pixels, PhotometricInterpretation=photometric, **behind(kind)), "image").pixels
    expected = read(dicom(free, PhotometricInterpretation=photometric), "image").pixels
    assert np.array_equal(image, expected)


@pytest.mark.parametrize(
    "tags",
    [
        behind("Shutter", LowerHorizontalEdge=40),
        behind("Shutter", RightVerticalEdge=None),
        {**behind("Shutter"), "ShutterShape": "CIRCULAR"},
        {"ShutterShape": "RECTANGULAR"},
    ],
    ids=["leaves under half", "an edge is empty", "no rectangle", "no edges"],
)
def test_a_shutter_that_cannot_be_one_covers_nothing(tags: dict[str, Any]) -> None:
    image = read(dicom(**{k: v for k, v in tags.items() if v is not None}), "image")
    assert np.array_equal(image.pixels, read(dicom(), "image").pixels)
    [note] = image.notes
    assert note.startswith("ShutterShape ")
    assert " ignored: it" in note


# --- the square input of a network ---


def test_a_prepared_image_is_square_in_0_to_1_and_keeps_its_proportions() -> None:
    y, x = np.mgrid[0:150, 0:100]
    circle = ((np.hypot(y - 75, x - 50) < 30) * 200 + (y + x) * 0.1).astype(np.float32)
    result = prepare(circle, 60)
    assert result.shape == (60, 60)
    assert result.dtype == np.float32
    assert (result.min(), result.max()) == (0, 1)
    bright = np.argwhere(result > 0.5)
    height, width = np.ptp(bright, axis=0) + 1
    assert abs(height - width) <= 1
    assert height == pytest.approx(60 / 150 * 60, abs=1.5)


@pytest.mark.parametrize("shape", [(96, 96), (300, 200), (61, 240)])
def test_preparing_removes_the_scale_of_the_image(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    np.testing.assert_allclose(prepare(image * 4000 - 12, 64), prepare(image, 64), atol=1e-4)


def chest_with_grain() -> np.ndarray:
    return chest(96, 96).astype(np.float32) + np.random.default_rng(0).random((96, 96), dtype=np.float32) * 40


@pytest.mark.parametrize("sides", [((20, 20), (20, 20)), ((0, 0), (9, 30)), ((7, 0), (0, 0))])
def test_a_border_as_bright_as_bone_is_cropped(sides: tuple[tuple[int, int], tuple[int, int]]) -> None:
    inside = chest_with_grain()
    (top, bottom), (left, right) = sides
    framed = 240 + np.random.default_rng(1).random((96 + top + bottom, 96 + left + right), dtype=np.float32) * 4
    framed[top : top + 96, left : left + 96] = inside
    np.testing.assert_allclose(prepare(framed, 48), prepare(inside, 48), atol=0.02)


def test_a_dark_margin_is_kept_for_it_may_be_air() -> None:
    inside = chest_with_grain()
    result = prepare(np.pad(inside, 24), 48)
    assert not result[:7].any()
    assert not result[:, -7:].any()
    assert np.corrcoef(result[8:40, 8:40].ravel(), prepare(inside, 32).ravel())[0, 1] > 0.99


def test_a_bright_border_that_leaves_under_half_of_the_image_is_not_cropped() -> None:
    image = np.pad(chest_with_grain(), 100, constant_values=240)
    assert prepare(image, 48)[:10].min() > 0.99


def test_preparing_smooths_before_it_makes_smaller() -> None:
    stripes = np.zeros((512, 512), np.float32)
    stripes[:, ::2] = 100
    stripes[128:384, 128:384] += 100
    result = prepare(stripes, 64)
    assert result[24:40, 24:40].std() < 0.05
    assert result[24:40, 24:40].mean() - result[2:10, 2:10].mean() > 0.5


# --- projections, with which serving must do what training does ---

RUNS = [(Grid(32, 10.0), range(12)), (Grid(64, 5.0), range(12, 30)), (Grid(128, 2.5), range(30, 34))]


@pytest.fixture(scope="module")
def phantom_views() -> list[tuple[str, str, np.ndarray]]:
    """Name, view and image of many people in each geometry."""
    return [
        (f"seed {seed} at {grid.size} in {name}", view, image)
        for grid, seeds in RUNS
        for seed in seeds
        for name, view, image in projected(thorax(seed, grid)[0], grid)
    ]


@pytest.fixture(scope="module")
def ct_views(real_data: Path) -> list[tuple[str, str, np.ndarray]]:
    """The same of every real CT, without and with the table."""
    grid = Grid(64, 5.0)
    sources = reader.find([real_data / "ct", real_data / "raw" / "dicom_ct_lung_dx_a0002"]).sources
    assert len(sources) == 9
    return [
        (f"{source.name} in {name}", view, image)
        for source in sources
        for keep_table in (False, True)
        for name, view, image in projected(resample(reader.read(source), grid, keep_table)[0], grid)
    ]


def projected(hu: np.ndarray, grid: Grid) -> Iterator[tuple[str, str, np.ndarray]]:
    for name, geometry in GEOMETRIES.items():
        images = render_drrs(hu, grid, geometry(grid))
        yield from ((name, view, image) for view, image in zip(("frontal", "lateral"), images, strict=True))


@pytest.mark.parametrize("views", ["phantom_views", "ct_views"])
def test_a_projection_is_prepared_for_serving_as_it_is_for_training(views: str, request: pytest.FixtureRequest) -> None:
    for name, view, image in request.getfixturevalue(views):
        trained_on = normalize(image)
        assert np.abs(prepare(image, len(image)) - trained_on).max() < 1e-6, (name, view)
        stored = Image.fromarray((trained_on * 65535).round().astype(np.uint16))
        served = prepare(read(encoded(stored, "PNG"), name, view=view).pixels, len(image))
        assert np.abs(served - trained_on).max() < 2e-5, (name, view)


@pytest.mark.parametrize("views", ["phantom_views", "ct_views"])
def test_no_projection_is_taken_for_its_negative_nor_its_negative_for_it(
    views: str, request: pytest.FixtureRequest
) -> None:
    for name, view, image in request.getfixturevalue(views):
        for known in (view, None):
            assert not is_bone_dark(image, known), (name, view)
            assert is_bone_dark(image.max() - image, known), (name, view)


@pytest.mark.parametrize("views", ["phantom_views", "ct_views"])
def test_bone_is_detected_as_bright_or_dark_with_borders_crops_and_tone_curves(
    views: str, request: pytest.FixtureRequest
) -> None:
    for name, view, image in request.getfixturevalue(views)[::3]:
        for what, other in disturbed(image):
            assert not is_bone_dark(other, view), (name, view, what)
            assert is_bone_dark(1 - other, view), (name, view, what)


# --- real radiographs ---


@pytest.mark.parametrize("name", REAL)
def test_a_real_radiograph_and_its_negative_come_out_bone_bright(name: str, real_data: Path) -> None:
    data, view = (real_data / "xray" / f"{name}.jpg").read_bytes(), name.rpartition("_")[2]
    image = read(data, name, invert="no").pixels
    negative = encoded(Image.fromarray((255 - image).astype(np.uint8)), "PNG")
    for known in (view, None):
        assert np.array_equal(read(data, name, view=known).pixels, image)
        assert np.corrcoef(read(negative, name, view=known).pixels.ravel(), image.ravel())[0, 1] > 0.999
    for what, other in disturbed(image[::8, ::8] if image.shape[0] > 1000 else image):
        assert not is_bone_dark(other, view), what
        assert is_bone_dark(1 - other, view), what
    assert prepare(image, 128).mean() > 0.2


@pytest.mark.parametrize("name", REAL)
def test_nothing_is_cut_from_a_real_radiograph(name: str, real_data: Path) -> None:
    image = read((real_data / "xray" / f"{name}.jpg").read_bytes(), name).pixels
    seen = prepare(image, 64) > 0.02
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    height, width = image.shape
    assert abs((np.ptp(columns) + 1) / (np.ptp(rows) + 1) - width / height) < 0.08


def test_a_real_dicom_radiograph_is_inverted_once(real_data: Path) -> None:
    data = (real_data / "raw" / "dx_pa_monochrome1_RG1_J2KI.dcm").read_bytes()
    image = read(data, "RG1").pixels
    assert image.shape == (1955, 1841)
    assert not is_bone_dark(image, "frontal")
    square = prepare(image, 128)
    assert square[90:, 54:74].mean() > square[30:60, 30:45].mean() + 0.2, "the spine is brighter than the lung"


def test_a_real_ct_slice_is_refused(real_data: Path) -> None:
    data = (real_data / "raw" / "dicom_ct_lung_dx_a0002" / "1-01.dcm").read_bytes()
    with pytest.raises(FileError, match=r"1-01\.dcm: modality CT is not that of a radiograph: give a radiograph"):
        read(data, "1-01.dcm")
