"""PNG, JPEG, TIFF and BMP files as gray images with square pixels, upright by their orientation tag."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image, ImageOps, UnidentifiedImageError

from raylift.datasets import jpeg
from raylift.datasets.errors import RefusedFile
from raylift.datasets.radiographs.gray_image import GrayImage, RadiographLimits, one_line, square_pixels
from raylift.datasets.radiographs.picture_header import select_page

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
TINT_CORRELATION = 0.9
"""Smallest correlation of each channel with the luminance in a tinted gray image; color maps of heat are below."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue."""
PNG_DEPTH = 24
"""Offset of the bits of a sample in a PNG; the color type follows."""
PHOTOMETRIC, WHITE_IS_ZERO = 0x0106, 0
"""Tag of a TIFF, and its value for an image whose zeros are white."""
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Values of the orientation tag that exchange rows and columns."""
TIFF_DEFAULTS = {0x010A: ("FillOrder", 1), 0x013D: ("Predictor", 1), 0x0153: ("SampleFormat", 1)}
"""Tags that change how the values of a TIFF are read, with their usual value."""


def read_picture(data: bytes, name: str, limits: RadiographLimits) -> GrayImage:
    """The image of a PNG, JPEG, TIFF or BMP file, as bright or dark as it is stored.

    Of a file with several pages the largest is read.

    Raises:
        RefusedFile: another format, damaged, over the limits, in color, or several pages of one size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            notes: list[str] = []
            select_page(picture, data, name, limits, notes)
            notes += _unusual_tags(picture)
            ratio, what = _pixel_ratio(picture)
            if picture.format == "JPEG":
                _check_end(picture, data, name)
            pixels = _deep_png(picture, data, name, notes)
            if pixels is None:
                pixels = _gray(picture, name, notes)
            return GrayImage(square_pixels(pixels, ratio, what, name, limits, notes), tuple(notes))
    except RefusedFile:
        raise
    except UnidentifiedImageError as error:
        raise RefusedFile(f"{name}: not an image raylift reads: give DICOM, {', '.join(FORMATS)}") from error
    except Exception as error:
        # On a damaged file Pillow's plugins raise any exception: struct.error, SyntaxError, IndexError ...
        raise RefusedFile(f"{name}: the image is damaged: {one_line(error)}") from error


def _check_end(picture: Image.Image, data: bytes, name: str) -> None:
    """Decode a JPEG and refuse it if its last scan ends before its last pixel."""

    def decode(stream: bytes) -> Any:
        with Image.open(io.BytesIO(stream), formats=("JPEG",)) as other:
            return np.asarray(other)

    if jpeg.is_cut(data, jpeg.layout(data).end, np.asarray(picture), decode):
        raise RefusedFile(f"{name}: the image is damaged: its compressed data end before its last pixel")


def _unusual_tags(picture: Image.Image) -> list[str]:
    """Notes on tags that change how an image is read."""
    tags: Any = getattr(picture, "tag_v2", {})
    orientation = picture.getexif().get(ORIENTATION, 1)
    notes = [] if orientation == 1 else [f"turned upright (orientation {orientation})"]
    for tag, (keyword, usual) in TIFF_DEFAULTS.items():
        value = tags.get(tag, usual)
        first = value[0] if isinstance(value, tuple) else value
        if first != usual:
            notes.append(f"values read by {keyword} {first}")
    return notes


def _pixel_ratio(picture: Image.Image) -> tuple[float, str]:
    """Height of a pixel over its width from the resolution of the upright image, and the words for it."""
    info = picture.info
    density = info.get("dpi") or info.get("resolution") or info.get("aspect") or info.get("jfif_density") or (1, 1)
    across, down = map(float, density)
    if not (0 < across < np.inf and 0 < down < np.inf):
        return 1.0, ""
    # The density is that of pixels along an axis: more of them are smaller ones.
    sideways = picture.getexif().get(ORIENTATION) in SIDEWAYS
    return (down / across if sideways else across / down), f"a resolution of {across:g} x {down:g}"


def _deep_png(
    picture: Image.Image, data: bytes, name: str, notes: list[str]
) -> Float32[np.ndarray, "rows columns"] | None:
    """The gray values of a PNG of 16 bits in several channels, which Pillow cuts to 8 bits; None for other images."""
    bits, color = data[PNG_DEPTH : PNG_DEPTH + 2]
    if picture.format != "PNG" or bits != 16 or color not in (2, 4, 6):
        return None
    values = imagecodecs.png_decode(data)
    if color in (4, 6):
        is_clear = values[..., -1] < 2**16 - 1
        if is_clear.any():
            notes.append("transparent pixels set to black")
            values = np.rint(values * (values[..., -1:] / (2**16 - 1)))
        values = values[..., :-1]
    if color == 4:
        return np.asarray(values[..., 0], dtype=np.float32)
    if (values == values[..., :1]).all():
        return np.asarray(values[..., 0], dtype=np.float32)
    _check_tint(values.astype(np.float64) / 257, name, notes)
    return np.asarray(values @ LUMINANCE, dtype=np.float32)


def _gray(picture: Image.Image, name: str, notes: list[str]) -> Float32[np.ndarray, "rows columns"]:
    tags: Any = getattr(picture, "tag_v2", {})
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        # Pillow reads unsigned values of 32 bits as signed ones.
        is_unsigned = values.dtype == np.int32 and tags.get(0x0102) == (32,) and tags.get(0x0153, (1,))[:1] == (1,)
        values = (values.view(np.uint32) if is_unsigned else values).astype(np.float32)
        # Pillow follows this in images of up to 8 bits alone.
        return values.min() + values.max() - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
    if picture.mode == "L" and tags.get(0x0102) == (8,) and tags.get(0x0153, (1,))[:1] == (2,):
        # Pillow reads signed values of 8 bits as unsigned ones, and refuses them where zero is white.
        return np.asarray(picture).view(np.int8).astype(np.float32)
    if picture.has_transparency_data:
        # Transparent pixels have arbitrary colors.
        rgba = picture.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent pixels set to black")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    color = picture.convert("RGB")
    if picture.mode not in ("1", "L"):
        _check_tint(np.asarray(color), name, notes)
    return np.asarray(color.convert("L"), dtype=np.float32)


def _check_tint(channels: Shaped[np.ndarray, "rows columns 3"], name: str, notes: list[str]) -> None:
    """Refuse an image whose colors are not shades of one tint, as a map of heat over a radiograph."""
    step = max(1, min(channels.shape[:2]) // 256)
    values = channels[::step, ::step].reshape(-1, 3).astype(np.float64)
    if np.ptp(values, axis=1).max() <= 2:
        return
    luminance = values @ LUMINANCE
    for channel in values.T:
        if channel.std() > 2 and np.corrcoef(channel, luminance)[0, 1] < TINT_CORRELATION:
            raise RefusedFile(f"{name}: the image has colors that are no shades of gray: give the grayscale original")
    notes.append("colors converted to gray")
