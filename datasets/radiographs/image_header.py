"""Checks of a PNG, JPEG, TIFF or BMP file by its header, before memory for its pixels is allocated."""

from __future__ import annotations

import struct
import zlib
from typing import Any

from PIL import Image

from raylift.datasets import jpeg
from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.gray_image import RadiographLimits, check_size

MAX_PAGES = 64
JPEGS = ("JPEG", "MPO")
"""Pillow's names of a JPEG, and of one of a phone with further images, of which the first is read."""
PIXEL_BYTES = 4
"""Bytes of a decoded pixel for which `RadiographLimits.max_pixels` holds; wider pixels count as several."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples per pixel by color type."""
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column of each pass of an interlaced PNG, and its steps down and across."""
BLOCK_BYTES = 2**16
"""Compressed bytes that are inflated at once."""
IMAGE_WIDTH, IMAGE_LENGTH, BITS_PER_SAMPLE, COMPRESSION = 0x0100, 0x0101, 0x0102, 0x0103
SAMPLES_PER_PIXEL, ROWS_PER_STRIP, STRIP_BYTE_COUNTS, PLANAR_CONFIGURATION = 0x0115, 0x0116, 0x0117, 0x011C
TILE_WIDTH, TILE_LENGTH = 0x0142, 0x0143


def select_page(image: Image.Image, data: bytes, name: str, limits: RadiographLimits, notes: list[str]) -> int:
    """Go to the page with the radiograph, which is the largest, and check it.

    Args:
        image: the opened file.
        data: its bytes.
        name: name of the file in messages.
        limits: limits on the page that is read.
        notes: a note is appended if there are several pages.

    Returns:
        The number of that page from 0.

    Raises:
        FileError: over the limits, truncated, or several pages of one size.
    """
    page = 0
    if image.format == "TIFF":
        page = _select_largest(image, name, notes)
    elif image.format == "MPO":
        notes.append(f"the first of {image.n_frames} images read")  # type: ignore[attr-defined]
    elif getattr(image, "n_frames", 1) > 1:
        raise FileError(f"{name}: an animation of {image.n_frames} frames: save one as a file of its own")  # type: ignore[attr-defined]
    check_size(name, image.height, image.width, limits)
    if image.format == "PNG":
        _check_png(data, name, limits)
    elif image.format in JPEGS:
        jpeg.layout(data)
    elif image.format == "TIFF":
        _check_tiff(image, name, limits)
    return page


def _select_largest(image: Image.Image, name: str, notes: list[str]) -> int:
    """Go to the largest page of a TIFF; the others are its thumbnails and reduced copies."""
    sizes: list[int] = []
    try:
        while len(sizes) <= MAX_PAGES:
            image.seek(len(sizes))
            sizes.append(image.width * image.height)
    except EOFError:
        pass
    if len(sizes) > MAX_PAGES:
        raise FileError(f"{name}: over {MAX_PAGES} pages: a radiograph has one: save it as a file of its own")
    if sizes.count(max(sizes)) > 1:
        raise FileError(
            f"{name}: {sizes.count(max(sizes))} of {len(sizes)} pages have the largest size: save the radiograph as a "
            "file of its own"
        )
    largest = sizes.index(max(sizes))
    image.seek(largest)
    if len(sizes) > 1:
        notes.append(f"page {largest + 1} of {len(sizes)} read, the largest")
    return largest


def _check_decoded(size: int, name: str, limits: RadiographLimits) -> None:
    if size > PIXEL_BYTES * limits.max_pixels:
        raise FileError(f"{name}: {size} bytes when it is decoded, over the limit of {PIXEL_BYTES * limits.max_pixels}")


def _check_png(data: bytes, name: str, limits: RadiographLimits) -> None:
    """Refuse a PNG whose pixel data have another length than its header gives, which decodes to torn rows."""
    columns, rows, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    pixel_bits = bits * PNG_CHANNELS.get(color, 0)
    expected = 0
    for top, left, down, across in ADAM7 if interlaced else ((0, 0, 1, 1),):
        lines, length = -(-max(0, rows - top) // down), -(-max(0, columns - left) // across)
        # Each line begins with one byte for its filter; a pass without pixels has no lines.
        expected += lines * (1 + -(-length * pixel_bits // 8)) if length else 0
    _check_decoded(expected, name, limits)
    stream, inflated, at = zlib.decompressobj(), 0, 8
    while at + 8 <= len(data) and inflated <= expected:
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at + 8, at + 12 + length
        for first in range(start, min(start + length, len(data)), BLOCK_BYTES) if kind == b"IDAT" else ():
            block = data[first : min(first + BLOCK_BYTES, start + length)]
            while block and inflated <= expected:
                inflated += len(stream.decompress(block, 2**20))
                block = stream.unconsumed_tail
    if inflated != expected:
        raise FileError(
            f"{name}: the image is damaged: its pixels have {'more than ' * (inflated > expected)}"
            f"{min(inflated, expected)} bytes, {columns} x {rows} pixels of {bits} bits have {expected}"
        )


def _check_tiff(image: Image.Image, name: str, limits: RadiographLimits) -> None:
    """Refuse a TIFF with pixels or tiles over the limits, or uncompressed strips of another length than its header's.

    A decoder allocates whole tiles, which may be larger than the image.
    """
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    columns, rows = tags[IMAGE_WIDTH], tags[IMAGE_LENGTH]
    bits, samples = tags.get(BITS_PER_SAMPLE, (1,)), tags.get(SAMPLES_PER_PIXEL, 1)
    width, length = max(columns, tags.get(TILE_WIDTH, 0)), max(rows, tags.get(TILE_LENGTH, 0))
    _check_decoded(width * length * max(samples, len(bits)) * max(bits) // 8, name, limits)
    if tags.get(COMPRESSION, 1) != 1 or STRIP_BYTE_COUNTS not in tags:
        return
    planes, samples = (len(bits), 1) if tags.get(PLANAR_CONFIGURATION, 1) == 2 else (1, samples)
    counts = tags[STRIP_BYTE_COUNTS]
    expected = planes * rows * -(-columns * samples * bits[0] // 8)
    stored, strips = sum(counts), planes * -(-rows // max(1, tags.get(ROWS_PER_STRIP, rows)))
    if stored != expected or len(counts) != strips:
        raise FileError(
            f"{name}: the image is damaged: its {len(counts)} strips have {stored} bytes, {columns} x "
            f"{rows} pixels of {bits} bits have {expected} in {strips}"
        )
