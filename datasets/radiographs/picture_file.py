"""PNG, JPEG, TIFF and BMP files as gray images with square pixels, upright by their orientation tag."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped
from PIL import Image, ImageOps, UnidentifiedImageError

from raylift.datasets.errors import RefusedFile
from raylift.datasets.radiographs.gray_image import GrayImage, RadiographLimits, check_size, one_line, square_pixels

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
MAX_PAGES = 64
TINT_CORRELATION = 0.9
"""Smallest correlation of each channel with the luminance in a tinted gray image; color maps of heat are below."""
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Values of the orientation tag that exchange rows and columns."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples a pixel by color type."""
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column of each pass of an interlaced PNG, and its steps down and across."""
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
            _select_page(picture, name, notes)
            check_size(name, picture.height, picture.width, limits)
            if picture.format == "PNG":
                _check_length(data, name)
            _check_strips(picture, name)
            notes += _unusual_tags(picture)
            ratio, what = _pixel_ratio(picture)
            pixels = _gray(picture, name, notes)
            return GrayImage(square_pixels(pixels, ratio, what, name, limits, notes), tuple(notes))
    except RefusedFile:
        raise
    except UnidentifiedImageError as error:
        raise RefusedFile(f"{name}: not an image raylift reads: give DICOM, {', '.join(FORMATS)}") from error
    except Exception as error:
        # On a damaged file Pillow's plugins raise any exception: struct.error, SyntaxError, IndexError ...
        raise RefusedFile(f"{name}: the image is damaged: {one_line(error)}") from error


def _select_page(picture: Image.Image, name: str, notes: list[str]) -> None:
    """Go to the largest page; the others are its thumbnails and reduced copies."""
    pages = getattr(picture, "n_frames", 1)
    if pages == 1:
        return
    if pages > MAX_PAGES:
        raise RefusedFile(f"{name}: {pages} pages: a radiograph has one: save it as a file of its own")
    sizes = []
    for page in range(pages):
        picture.seek(page)
        sizes.append(picture.width * picture.height)
    largest = sizes.index(max(sizes))
    if sizes.count(max(sizes)) > 1:
        raise RefusedFile(
            f"{name}: {sizes.count(max(sizes))} of {pages} pages have the largest size: save the radiograph as a file "
            "of its own"
        )
    picture.seek(largest)
    notes.append(f"page {largest + 1} of {pages} read, the largest")


def _check_length(data: bytes, name: str) -> None:
    """Refuse a PNG whose pixel data have another length than its header gives, which decodes to torn rows."""
    columns, rows, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    pixel_bits = bits * PNG_CHANNELS.get(color, 0)
    expected = 0
    for top, left, down, across in ADAM7 if interlaced else ((0, 0, 1, 1),):
        lines, length = -(-max(0, rows - top) // down), -(-max(0, columns - left) // across)
        # Each line begins with one byte for its filter; a pass without pixels has no lines.
        expected += lines * (1 + -(-length * pixel_bits // 8)) if length else 0
    stream, found, at = zlib.decompressobj(), 0, 8
    while at + 8 <= len(data) and found <= expected:
        length, kind = struct.unpack_from(">I4s", data, at)
        block = data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        while block and found <= expected:
            found += len(stream.decompress(block, 2**20))
            block = stream.unconsumed_tail
        at += 12 + length
    if found != expected:
        raise RefusedFile(
            f"{name}: the image is damaged: its pixels have {'more than ' * (found > expected)}"
            f"{min(found, expected)} bytes, {columns} x {rows} pixels of {bits} bits have {expected}"
        )


def _check_strips(picture: Image.Image, name: str) -> None:
    """Refuse an uncompressed TIFF whose strips have another length than its header gives."""
    tags: Any = getattr(picture, "tag_v2", {})
    bits = tags.get(0x0102, (1,))
    if tags.get(0x0103, 1) != 1 or 0x0117 not in tags:
        return
    planes, samples = (len(bits), 1) if tags.get(0x011C, 1) == 2 else (1, tags.get(0x0115, 1))
    expected = planes * tags[0x0101] * -(-tags[0x0100] * samples * bits[0] // 8)
    found, strips = sum(tags[0x0117]), planes * -(-tags[0x0101] // max(1, tags.get(0x0116, tags[0x0101])))
    if found != expected or len(tags[0x0117]) != strips:
        raise RefusedFile(
            f"{name}: the image is damaged: its {len(tags[0x0117])} strips have {found} bytes, {tags[0x0100]} x "
            f"{tags[0x0101]} pixels of {bits[0]} bits have {expected} in {strips}"
        )


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


def _gray(picture: Image.Image, name: str, notes: list[str]) -> Float32[np.ndarray, "rows columns"]:
    tags: Any = getattr(picture, "tag_v2", {})
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        # Pillow reads unsigned values of 32 bits as signed ones.
        is_unsigned = values.dtype == np.int32 and tags.get(0x0102) == (32,) and tags.get(0x0153, (1,))[:1] == (1,)
        return (values.view(np.uint32) if is_unsigned else values).astype(np.float32)
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
    luminance = values @ (0.299, 0.587, 0.114)
    for channel in values.T:
        if channel.std() > 2 and np.corrcoef(channel, luminance)[0, 1] < TINT_CORRELATION:
            raise RefusedFile(f"{name}: the image has colors that are no shades of gray: give the grayscale original")
    notes.append("colors converted to gray")
