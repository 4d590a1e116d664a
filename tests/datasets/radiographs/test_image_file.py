"""PNG, JPEG, TIFF and BMP as the world makes them: pages, resolutions, tints, types of values."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from radiograph_samples import chest, encoded, scaled
from scipy import ndimage

from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.decoding import read

GRAY = chest().astype(np.uint8)


def tiff(*pages: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, contiguous=False, metadata=None, **options)
    return file.getvalue()


def difference(data: bytes, expected: np.ndarray) -> float:
    image = read(data, "image", invert="no").pixels
    assert image.shape == expected.shape
    return float(np.abs(scaled(image) - scaled(expected)).max())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_largest_page_of_a_tiff_is_read(place: int) -> None:
    pages = [GRAY[::2, ::2], GRAY[::3, ::3]]
    pages.insert(place, GRAY)
    data = tiff(*pages)
    assert difference(data, GRAY) < 1e-6
    assert read(data, "image").notes == (f"page {place + 1} of 3 read, the largest",)


def test_pages_of_one_size_are_refused() -> None:
    with pytest.raises(FileError, match=r"image: 2 of 3 pages have the largest size: save the radiograph as a file"):
        read(tiff(GRAY, GRAY[::2, ::2], GRAY[::-1].copy()), "image")
    with pytest.raises(FileError, match=r"image: over 64 pages: a radiograph has one"):
        read(tiff(*[GRAY[:40, :40]] * 70), "image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_resolution_that_differs_along_the_axes_gives_square_pixels(kind: str, axis: int) -> None:
    smooth = ndimage.gaussian_filter(GRAY.astype(float), 3)
    halved = (smooth[::2] + smooth[1::2]) / 2 if axis == 0 else (smooth[:, ::2] + smooth[:, 1::2]) / 2
    # Columns a unit, rows a unit: the axis with half of the pixels has half of the resolution.
    dpi = (300, 150) if axis == 0 else (150, 300)
    options = {"quality": 98} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(halved.round().astype(np.uint8)), kind, dpi=dpi, **options)
    assert difference(data, smooth) < 0.04
    assert "resampled to square pixels (a resolution of" in read(data, "image").notes[0]


def test_a_resolution_far_from_square_is_refused() -> None:
    with pytest.raises(FileError, match=r"image: a resolution of .* x .* makes pixels of .* to 1: correct or"):
        read(encoded(Image.fromarray(GRAY), "PNG", dpi=(300, 30)), "image")


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_orientation_tag_is_followed_once(kind: str, orientation: int) -> None:
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.rot90(GRAY, turns).copy()), kind, exif=exif, quality=97)
    assert difference(data, GRAY) < 0.12
    assert read(data, "image").notes == ((f"turned upright (orientation {orientation})",) if turns else ())


@pytest.mark.parametrize(
    "pixels",
    [
        GRAY.astype(np.int16) * 100 - 5000, GRAY.astype(np.uint32) * 16_000_000, GRAY.astype(np.int32) - 100,
        GRAY.astype(np.float32) / 3, (GRAY.astype(np.int16) - 100).astype(np.int8),
    ],
    ids=["signed 16 bits", "unsigned 32 bits", "signed 32 bits", "floats of 32 bits", "signed 8 bits"],
)  # fmt: skip
def test_a_tiff_of_any_type_of_values_is_read(pixels: np.ndarray) -> None:
    assert difference(tiff(pixels), pixels.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_tiff_that_shows_zero_white_is_inverted_once(dtype: type) -> None:
    data = tiff((255 - GRAY).astype(dtype) * (257 if dtype == np.uint16 else 1), photometric="miniswhite")
    for invert in ("auto", "no"):
        image = read(data, "image", invert=invert).pixels
        assert np.abs(scaled(image) - scaled(GRAY)).max() < 1e-6


@pytest.mark.parametrize("color", [2, 4, 6], ids=["RGB", "gray and alpha", "RGB and alpha"])
def test_a_png_of_16_bits_in_several_channels_keeps_them(color: int) -> None:
    gray = GRAY.astype(">u2") * 300 + np.arange(100, dtype=">u2")
    channels = np.dstack([gray] * {2: 3, 4: 1, 6: 3}[color] + [np.full_like(gray, 65535)] * (color > 3))
    data = png(channels.astype(">u2"), color)
    image = read(data, "image", invert="no")
    np.testing.assert_array_equal(image.pixels, gray)
    assert image.notes == ()


def png(pixels: np.ndarray, color: int, transparent: bytes = b"", exif: bytes = b"") -> bytes:
    """A PNG of 16 bits, which Pillow does not write in several channels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"eXIf", exif)]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks if one[1]) + chunk(b"IEND", b"")


def test_a_png_of_16_bits_in_color_or_transparent_is_converted_as_one_of_8_bits() -> None:
    wide = np.dstack([GRAY * 0.7, GRAY * 0.85, GRAY]) * 257
    image = read(png(wide.astype(">u2"), 2), "image", invert="no")
    assert image.notes == ("colors converted to gray",)
    assert np.abs(scaled(image.pixels) - scaled(GRAY)).max() < 1e-3
    clear = np.dstack([GRAY.astype(">u2") * 257, np.where(GRAY > 100, 65535, 0)])
    image = read(png(clear.astype(">u2"), 4), "image", invert="no")
    assert image.notes == ("transparent pixels set to black",)
    np.testing.assert_array_equal(image.pixels, np.where(GRAY > 100, GRAY * 257.0, 0))


@pytest.mark.parametrize("color", [0, 2], ids=["gray", "RGB"])
def test_the_transparent_color_of_a_png_of_16_bits_is_black(color: int) -> None:
    gray = np.where(np.arange(100) < 20, 65535, GRAY.astype(">u2") * 250).astype(">u2")
    samples = 3 if color else 1
    data = png(np.dstack([gray] * samples), color, struct.pack(">H", 65535) * samples)
    image = read(data, "image", invert="no")
    np.testing.assert_array_equal(image.pixels, np.where(gray == 65535, 0, gray))
    assert image.notes == ("transparent pixels set to black",)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_tiff_of_16_bits_in_several_channels_keeps_them(planar: str, orientation: int) -> None:
    gray = GRAY.astype("<u2") * 300 + np.arange(100, dtype="<u2")
    turned = np.rot90(gray, 1 if orientation == 6 else 0)
    channels = np.stack([turned] * 3, axis=-1 if planar == "contig" else 0)
    data = tiff(channels, photometric="rgb", planarconfig=planar, extratags=[(0x0112, "H", 1, orientation, True)])
    np.testing.assert_array_equal(read(data, "image", invert="no").pixels, gray)


def test_a_deep_png_is_turned_by_its_orientation_tag() -> None:
    gray = GRAY.astype(">u2") * 300
    for orientation in range(1, 9):
        exif = b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)
        data = png(np.dstack([gray] * 3), 2, exif=exif)
        shallow = encoded(Image.fromarray(GRAY), "PNG", exif=exif)
        images = [scaled(read(one, "image", invert="no").pixels) for one in (data, shallow)]
        np.testing.assert_allclose(images[0], images[1], atol=1e-6)


def test_transparent_pixels_are_dark_after_an_inversion_too() -> None:
    is_clear = np.hypot(*np.ogrid[-1:1:120j, -1:1:100j]) > 1
    for invert in ("auto", "yes"):
        data = encoded(
            Image.merge("LA", [Image.fromarray(250 - GRAY), Image.fromarray(np.where(is_clear, 0, 255).astype("u1"))]),
            "PNG",
        )
        image = read(data, "image", invert=invert)
        assert np.abs(image.pixels - GRAY)[~is_clear].max() == 0
        assert (image.pixels[is_clear] == GRAY[~is_clear].min()).all()
        assert image.notes[0] == "transparent pixels set to black"


def test_the_first_image_of_a_jpeg_of_a_phone_is_read() -> None:
    file = io.BytesIO()
    Image.fromarray(GRAY).save(file, "MPO", save_all=True, append_images=[Image.fromarray(GRAY[::2, ::2])], quality=98)
    assert difference(file.getvalue(), GRAY) < 0.03
    assert read(file.getvalue(), "image").notes == ("the first of 2 images read",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image: the file is empty: copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "image: a pointer of Git LFS .*: run git lfs pull"),
        (tiff(GRAY.astype(np.float64)), "image: a TIFF that is damaged or .* not read: save it as a grayscale PNG"),
        (imagecodecs.jpeg8_encode(GRAY.astype("u2"), bitspersample=12), "image: a JPEG that is damaged or .* not read"),
        (encoded(Image.fromarray(GRAY), "WEBP"), "image: not an image raylift reads: give DICOM, PNG"),
        (tiff(np.dstack([GRAY.astype("u2")] * 4), photometric="separated"), "image: 16 bits in a color image"),
    ],
    ids=["empty", "pointer", "TIFF of 64 bits", "JPEG of 12 bits", "WebP", "CMYK of 16 bits"],
)  # fmt: skip
def test_a_file_that_is_not_read_is_refused_with_what_it_is(data: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message):
        read(data, "image")


def test_a_tint_is_gray_and_a_map_of_heat_is_refused() -> None:
    tint = np.stack([GRAY * 0.7, GRAY * 0.85, GRAY], axis=-1).astype(np.uint8)
    data = encoded(Image.fromarray(tint), "PNG")
    assert difference(data, GRAY) < 0.02
    assert read(data, "image", invert="no").notes == ("colors converted to gray",)
    heat = np.stack([GRAY, 100 - abs(GRAY.astype(int) - 100), 255 - GRAY], axis=-1).astype(np.uint8)
    with pytest.raises(FileError, match="image: the image has colors that are no shades of gray: give the grayscale"):
        read(encoded(Image.fromarray(heat), "PNG"), "image")


@pytest.mark.parametrize("levels", [2, 5])
def test_a_mask_is_refused(levels: int) -> None:
    mask = (GRAY // (201 // levels + 1)).astype(np.uint8) * 50
    with pytest.raises(FileError, match=r"image: \d gray levels: a mask or label map is not a radiograph"):
        read(encoded(Image.fromarray(mask), "PNG"), "image")


def test_transparency_is_recorded() -> None:
    pixels = np.dstack([GRAY] * 3 + [np.where(GRAY > 100, 255, 0).astype(np.uint8)])
    assert "transparent pixels set to black" in read(encoded(Image.fromarray(pixels), "PNG"), "image").notes


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(("columns", "rows"), [(99, 120), (100, 119), (101, 120), (60, 200)])
def test_a_png_whose_header_has_another_size_than_its_pixels_is_refused(
    columns: int, rows: int, interlace: int
) -> None:
    data = bytearray(encoded(Image.fromarray(GRAY), "PNG", interlace=interlace))
    struct.pack_into(">II", data, 16, columns, rows)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    with pytest.raises(FileError, match="image: the image is damaged"):
        read(bytes(data), "image")
