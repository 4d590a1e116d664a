from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from raylift.datasets.errors import RefusedFile
from raylift.datasets.radiograph import RadiographLimits, prepare, read, shows_bone_dark


def chest(rows: int = 120, columns: int = 100, most: int = 200) -> np.ndarray:
    """A bone-bright image with dark upper corners, unlike its mirror image; values 0 to `most`."""
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    body = np.clip(1.6 - 1.6 * (x**2 + 0.5 * (y - 0.5) ** 2), 0, 1)
    lungs = 0.5 * (np.hypot((abs(x) - 0.4) / 0.25, y / 0.6) < 1)
    marker = 0.3 * (np.hypot(x + 0.6, y - 0.7) < 0.1)
    return np.rint(np.clip(body - lungs + marker, 0, 1) * 200) * (most // 200)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def dicom(pixels: np.ndarray | None = None, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """A computed radiograph; a tag given as None is left out."""
    pixels = chest(most=4000).astype("<u2") if pixels is None else pixels
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = ComputedRadiographyImageStorage, generate_uid(), "CR"
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = pixels.itemsize * 8, pixels.itemsize * 8, pixels.itemsize * 8 - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless)
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


GREY = Image.fromarray(chest().astype(np.uint8))
SIXTEEN = Image.fromarray(chest(most=40000).astype(np.uint16))

DARK = 4000 - chest(most=4000).astype("<u2")

PICTURES: dict[str, tuple[bytes, float]] = {
    "PNG": (encoded(GREY, "PNG"), 0),
    "PNG of 16 bits": (encoded(SIXTEEN, "PNG"), 0),
    "PNG in colour": (encoded(GREY.convert("RGB"), "PNG"), 0),
    "PNG with alpha": (encoded(GREY.convert("RGBA"), "PNG"), 0),
    "grey PNG with alpha": (encoded(GREY.convert("LA"), "PNG"), 0),
    "PNG with palette": (encoded(GREY.convert("P"), "PNG"), 0),
    "PNG with transparent palette": (encoded(GREY.convert("P"), "PNG", transparency=bytes([255] * 256)), 0),
    "interlaced PNG": (encoded(GREY, "PNG", interlace=1), 0),
    "JPEG": (encoded(GREY, "JPEG", quality=95), 0.08),
    "progressive JPEG": (encoded(GREY, "JPEG", quality=95, progressive=True), 0.08),
    "JPEG in colour": (encoded(GREY.convert("RGB"), "JPEG", quality=95), 0.08),
    "JPEG for print": (encoded(GREY.convert("CMYK"), "JPEG", quality=95), 0.08),
    "TIFF": (encoded(GREY, "TIFF"), 0),
    "TIFF of 16 bits": (encoded(SIXTEEN, "TIFF"), 0),
    "TIFF of 16 bits, big-endian": (encoded(Image.fromarray(chest(most=40000).astype(">u2")), "TIFF"), 0),
    "TIFF of 32 bits": (encoded(Image.fromarray(chest(most=10**6).astype(np.int32)), "TIFF"), 0),
    "TIFF of floats": (encoded(Image.fromarray(chest().astype(np.float32) / 7), "TIFF"), 1e-6),
    "packed TIFF": (encoded(GREY, "TIFF", compression="tiff_lzw"), 0),
    "BMP": (encoded(GREY, "BMP"), 0),
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


def scaled(image: np.ndarray) -> np.ndarray:
    return (image - image.min()) / np.ptp(image)


@pytest.mark.parametrize("kind", PICTURES)
def test_a_radiograph_of_each_kind_comes_out_bone_bright_and_the_right_way_round(kind: str) -> None:
    data, tolerance = PICTURES[kind]
    image = read(data, "image")
    assert image.dtype == np.float32
    assert np.abs(scaled(image) - scaled(chest())).max() <= tolerance + 1e-6


@pytest.mark.parametrize("window", [(1000, 500), (3000, 800)])
def test_the_display_window_of_a_dicom_file_is_followed(window: tuple[int, int]) -> None:
    centre, width = window
    image = scaled(read(dicom(WindowCenter=centre, WindowWidth=width), "image"))
    pixels = chest(most=4000)
    assert (image[pixels < centre - width / 2 - 1] == 0).all()
    assert (image[pixels > centre + width / 2 + 1] == 1).all()


def test_a_display_window_is_followed_before_an_inversion() -> None:
    """In a MONOCHROME1 file low values are dense, and the window is on the values of the file."""
    image = read(dicom(PhotometricInterpretation="MONOCHROME1", WindowCenter=1000, WindowWidth=500), "image")
    pixels = chest(most=4000)
    assert (scaled(image)[pixels < 740] == 1).all()
    assert (scaled(image)[pixels > 1260] == 0).all()


def test_an_inverted_dicom_is_inverted_once_though_its_presentation_says_so_again() -> None:
    inverse = dicom(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE")
    assert np.array_equal(read(inverse, "image"), read(dicom(PhotometricInterpretation="MONOCHROME1"), "image"))


@pytest.mark.parametrize("kind", ["PNG", "PNG of 16 bits"])
def test_a_picture_that_shows_bone_dark_is_inverted_unless_told_otherwise(kind: str) -> None:
    bright, _ = PICTURES[kind]
    most = np.asarray(Image.open(io.BytesIO(bright))).max()
    pixels = np.asarray(Image.open(io.BytesIO(bright)))
    dark = encoded(Image.fromarray(most - pixels), "PNG")
    assert np.array_equal(read(dark, "image"), read(bright, "image"))
    assert np.array_equal(read(dark, "image", invert="no"), most - read(bright, "image"))
    assert np.array_equal(read(bright, "image", invert="yes"), most - read(bright, "image"))


def test_a_dicom_file_is_inverted_by_hand_only() -> None:
    dark = dicom(DARK)
    assert shows_bone_dark(read(dark, "image"))
    assert not shows_bone_dark(read(dark, "image", invert="yes"))


def test_flipping_mirrors_left_and_right() -> None:
    data, _ = PICTURES["PNG"]
    assert np.array_equal(read(data, "image", flip=True), read(data, "image")[:, ::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_its_camera_was_held(orientation: int) -> None:
    turns: dict[int, list[Image.Transpose]] = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    picture = GREY
    for turn in turns[orientation]:
        picture = picture.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read(encoded(picture, "PNG", exif=exif), "image", invert="no")
    assert np.array_equal(image, chest())


def test_what_is_transparent_is_black_whatever_colour_it_hides() -> None:
    pixels = np.dstack([chest().astype(np.uint8)] * 3 + [np.full((120, 100), 255, np.uint8)])
    pixels[:20, :20, :3], pixels[:20, :20, 3] = 255, 0
    image = read(encoded(Image.fromarray(pixels, "RGBA"), "PNG"), "image", invert="no")
    assert not image[:20, :20].any()
    assert np.array_equal(image[20:], chest()[20:])


def test_a_picture_within_its_own_limits_is_read_and_one_beyond_is_refused() -> None:
    data, _ = PICTURES["PNG"]
    exact = RadiographLimits(max_bytes=len(data), max_pixels=12_000, min_side=100, max_aspect=1.2)
    assert read(data, "image", exact).shape == (120, 100)
    for limits, message in (
        (RadiographLimits(max_bytes=len(data) - 1), rf"image: {len(data)} bytes, over the limit of {len(data) - 1}"),
        (RadiographLimits(max_pixels=11_999), r"image: 120 x 100 pixels, over the limit of 11999"),
        (RadiographLimits(min_side=101), r"image: 120 x 100 pixels, a side is under 101"),
        (RadiographLimits(max_aspect=1.19), r"image: 120 x 100 pixels, more than 1.19 to 1: crop it"),
    ):
        for kind in ("PNG", "DICOM"):
            if kind == "PNG" or "bytes" not in message:
                with pytest.raises(RefusedFile, match=message):
                    read(PICTURES[kind][0], "image", limits)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_is_refused(value: int) -> None:
    with pytest.raises(RefusedFile, match="image: the image is constant"):
        read(encoded(Image.new("L", (64, 64), value), "PNG"), "image")


def test_an_image_with_values_that_are_no_numbers_is_refused() -> None:
    pixels = chest().astype(np.float32)
    pixels[3, 3] = np.nan
    with pytest.raises(RefusedFile, match="no finite values"):
        read(encoded(Image.fromarray(pixels), "TIFF"), "image")


# --- the square that a network sees ---


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
def test_preparing_forgets_the_scale_of_the_image(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    np.testing.assert_allclose(prepare(image * 4000 - 12, 64), prepare(image, 64), atol=1e-4)


def test_a_plain_frame_is_cut_and_an_empty_half_is_not() -> None:
    inside = chest(96, 96).astype(np.float32) + np.random.default_rng(0).random((96, 96), dtype=np.float32) * 40
    framed = np.pad(inside, 20)
    np.testing.assert_allclose(prepare(framed, 48), prepare(inside, 48), atol=1e-3)
    mostly_empty = np.pad(inside, 60)
    assert (prepare(mostly_empty, 48)[:10] == 0).all()


def test_preparing_smooths_before_it_makes_smaller() -> None:
    stripes = np.zeros((512, 512), np.float32)
    stripes[:, ::2] = 100
    stripes[128:384, 128:384] += 100
    result = prepare(stripes, 64)
    assert result[24:40, 24:40].std() < 0.05
    assert result[24:40, 24:40].mean() - result[2:10, 2:10].mean() > 0.5


# --- real radiographs ---


def test_real_radiographs_are_read_bone_bright_and_none_is_inverted_by_mistake(real_data: Path) -> None:
    paths = sorted((real_data / "xray").glob("*.jpg"))
    assert len(paths) == 6
    for path in paths:
        image = read(path.read_bytes(), path.name)
        assert np.array_equal(image, read(path.read_bytes(), path.name, invert="no")), path.name
        assert not shows_bone_dark(image)
        assert prepare(image, 128).mean() > 0.2


def test_real_radiographs_shown_dark_are_recognised(real_data: Path) -> None:
    for path in sorted((real_data / "xray").glob("*.jpg")):
        picture = np.asarray(Image.open(path).convert("L"))
        assert shows_bone_dark((255 - picture).astype(np.float32)), path.name


def test_a_real_dicom_radiograph_is_inverted_once(real_data: Path) -> None:
    data = (real_data / "raw" / "dx_pa_monochrome1_RG1_J2KI.dcm").read_bytes()
    image = read(data, "RG1")
    assert image.shape == (1955, 1841)
    assert not shows_bone_dark(image)
    square = prepare(image, 128)
    assert square[90:, 54:74].mean() > square[30:60, 30:45].mean() + 0.2, "the spine is brighter than the lung"


def test_a_real_ct_slice_is_refused(real_data: Path) -> None:
    data = (real_data / "raw" / "dicom_ct_lung_dx_a0002" / "1-01.dcm").read_bytes()
    with pytest.raises(RefusedFile, match=r"1-01\.dcm: modality CT: a slice is not a radiograph"):
        read(data, "1-01.dcm")
