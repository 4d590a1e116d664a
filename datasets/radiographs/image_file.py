"""PNG, JPEG, TIFF and BMP files as gray images with square pixels, upright by their orientation tag."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
from jaxtyping import Bool, Float32, Shaped
from PIL import Image, ImageOps, UnidentifiedImageError

from raylift.datasets import jpeg
from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.gray_image import GrayImage, RadiographLimits, one_line, square_pixels
from raylift.datasets.radiographs.image_header import BITS_PER_SAMPLE, JPEGS, PLANAR_CONFIGURATION, select_page

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
SIGNATURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
}
"""First bytes of the files of each format."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TRANSPARENT = "transparent pixels set to black"
TINT_CORRELATION = 0.9
"""Smallest correlation of each channel with the luminance in a tinted gray image; color maps of heat are below."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue."""
PNG_DEPTH = 24
"""Offset of the bits of a sample in a PNG; the color type follows."""
PHOTOMETRIC, WHITE_IS_ZERO, RGB = 0x0106, 0, 2
"""Tag of a TIFF, and its values for an image whose zeros are white and for one in color."""
SEPARATE = 2
"""The planar configuration of a TIFF whose channels are one after the other."""
ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""Values of the orientation tag that exchange rows and columns."""
TIFF_DEFAULTS = {0x010A: ("FillOrder", 1), 0x013D: ("Predictor", 1), 0x0153: ("SampleFormat", 1)}
"""Tags that change how the values of a TIFF are read, with their usual value."""


def read_image(data: bytes, name: str, limits: RadiographLimits) -> GrayImage:
    """The image of a PNG, JPEG, TIFF or BMP file, as bright or dark as it is stored.

    Of a file with several pages the largest is read.

    Raises:
        FileError: another format, damaged, over the limits, in color, or several pages of one size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            notes: list[str] = []
            page = select_page(image, data, name, limits, notes)
            notes += _unusual_tags(image)
            ratio, attribute = _pixel_ratio(image)
            if image.format in JPEGS:
                _check_end(image, data, name)
            channels = _deep_channels(image, page, data, name)
            if channels is None:
                pixels, is_clear = _gray(image, name, notes)
            else:
                orientation = image.getexif().get(ORIENTATION, 1)
                pixels, is_clear = (_upright(part, orientation) for part in _deep_gray(channels, name, notes))
            pixels = square_pixels(pixels, ratio, attribute, name, limits, notes)
            background = None
            if is_clear.any():
                background = square_pixels(is_clear.astype(np.float32), ratio, attribute, name, limits, []) > 0.5
            return GrayImage(pixels, tuple(notes), background=background, is_polarity_known=False)
    except FileError:
        raise
    except UnidentifiedImageError as error:
        raise FileError(f"{name}: {_why_unidentified(data)}") from error
    except Exception as error:
        # On a damaged file Pillow's plugins raise any exception: struct.error, SyntaxError, IndexError ...
        raise FileError(f"{name}: the image is damaged: {one_line(error)}") from error


def _why_unidentified(data: bytes) -> str:
    """The reason why Pillow does not open the bytes of a file, with the remedy."""
    if not data:
        return "the file is empty: copy it again"
    if data.startswith(LFS_POINTER):
        return "a pointer of Git LFS in place of the file: run git lfs pull"
    for kind, signatures in SIGNATURES.items():
        if data.startswith(signatures):
            return (
                f"a {kind} that is damaged or whose samples or compression are not read: save it as a grayscale PNG or "
                "TIFF of 8 or 16 bits"
            )
    return f"not an image raylift reads: give DICOM, {', '.join(FORMATS)}"


def _check_end(image: Image.Image, data: bytes, name: str) -> None:
    """Decode a JPEG and refuse it if its last scan ends before its last pixel."""

    def decode(stream: bytes) -> Any:
        with Image.open(io.BytesIO(stream), formats=("JPEG",)) as other:
            return np.asarray(other)

    if jpeg.is_cut(data, jpeg.layout(data).end, np.asarray(image), decode):
        raise FileError(f"{name}: the image is damaged: its compressed data end before its last pixel")


def _unusual_tags(image: Image.Image) -> list[str]:
    """Notes on tags that change how an image is read."""
    tags: Any = getattr(image, "tag_v2", {})
    orientation = image.getexif().get(ORIENTATION, 1)
    notes = [] if orientation == 1 else [f"turned upright (orientation {orientation})"]
    for tag, (keyword, usual) in TIFF_DEFAULTS.items():
        value = tags.get(tag, usual)
        first = value[0] if isinstance(value, tuple) else value
        if first != usual:
            notes.append(f"values read by {keyword} {first}")
    return notes


def _pixel_ratio(image: Image.Image) -> tuple[float, str]:
    """Height of a pixel over its width from the resolution of the upright image, and the words for it."""
    info = image.info
    density = info.get("dpi") or info.get("resolution") or info.get("aspect") or info.get("jfif_density") or (1, 1)
    across, down = map(float, density)
    if not (0 < across < np.inf and 0 < down < np.inf):
        return 1.0, ""
    # The density is that of pixels along an axis: more of them are smaller ones.
    sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
    return (down / across if sideways else across / down), f"a resolution of {across:g} x {down:g}"


def _deep_channels(
    image: Image.Image, page: int, data: bytes, name: str
) -> Shaped[np.ndarray, "rows columns samples"] | None:
    """The channels of a PNG or TIFF whose samples Pillow cuts to 8 bits, the last may be alpha; None for other images.

    Raises:
        FileError: a TIFF of over 8 bits in other colors than RGB.
    """
    if image.format == "PNG":
        bits, color = data[PNG_DEPTH : PNG_DEPTH + 2]
        if bits != 16 or (color == 0 and "transparency" not in image.info):
            return None
        # A transparent color becomes a channel too.
        return np.asarray(imagecodecs.png_decode(data))
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (1,))
    if len(bits) < 2 or max(bits) <= 8:
        return None
    if tags.get(PHOTOMETRIC) != RGB:
        raise FileError(f"{name}: {max(bits)} bits in a color image that is not RGB: store it as a grayscale image")
    channels = np.asarray(imagecodecs.tiff_decode(data, index=page))
    return np.moveaxis(channels, 0, -1) if tags.get(PLANAR_CONFIGURATION) == SEPARATE else channels


def _deep_gray(
    channels: Shaped[np.ndarray, "rows columns samples"], name: str, notes: list[str]
) -> tuple[Float32[np.ndarray, "rows columns"], Bool[np.ndarray, "rows columns"]]:
    """The gray values of channels of over 8 bits and the mask of the pixels without opacity."""
    most = np.iinfo(channels.dtype).max
    is_clear = np.zeros(channels.shape[:2], dtype=bool)
    if channels.shape[2] in (2, 4):
        alpha, channels = channels[..., -1:], channels[..., :-1]
        is_clear = alpha[..., 0] == 0
        if (alpha < most).any():
            notes.append(TRANSPARENT)
            channels = np.rint(channels * (alpha / most))
    if (channels == channels[..., :1]).all():
        return np.asarray(channels[..., 0], dtype=np.float32), is_clear
    _check_tint(channels.astype(np.float64) * (255 / most), name, notes)
    return np.asarray(channels @ LUMINANCE, dtype=np.float32), is_clear


def _upright(values: Shaped[np.ndarray, "_ _"], orientation: int) -> Shaped[np.ndarray, "_ _"]:
    """The values rotated and flipped by an orientation tag."""
    if orientation in SIDEWAYS:
        values = values.T
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values[:, ::-1] if orientation in (2, 3, 6, 7) else values)


def _gray(
    image: Image.Image, name: str, notes: list[str]
) -> tuple[Float32[np.ndarray, "rows columns"], Bool[np.ndarray, "rows columns"]]:
    """The gray values that Pillow decodes, upright, and the mask of the pixels without opacity."""
    tags: Any = getattr(image, "tag_v2", {})
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        # Pillow reads unsigned values of 32 bits as signed ones.
        is_unsigned = (
            values.dtype == np.int32 and tags.get(BITS_PER_SAMPLE) == (32,) and tags.get(0x0153, (1,))[:1] == (1,)
        )
        values = (values.view(np.uint32) if is_unsigned else values).astype(np.float32)
        # Pillow follows this in images of up to 8 bits alone.
        is_white_zero = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
        return values.min() + values.max() - values if is_white_zero else values, np.zeros(values.shape, dtype=bool)
    is_clear = np.zeros((image.height, image.width), dtype=bool)
    if image.mode == "L" and tags.get(BITS_PER_SAMPLE) == (8,) and tags.get(0x0153, (1,))[:1] == (2,):
        # Pillow reads signed values of 8 bits as unsigned ones, and refuses them where zero is white.
        return np.asarray(image).view(np.int8).astype(np.float32), is_clear
    if image.has_transparency_data:
        # Transparent pixels have arbitrary colors.
        rgba = image.convert("RGBA")
        is_clear = np.asarray(rgba.getchannel("A")) == 0
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append(TRANSPARENT)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    color = image.convert("RGB")
    if image.mode not in ("1", "L"):
        _check_tint(np.asarray(color), name, notes)
    return np.asarray(color.convert("L"), dtype=np.float32), is_clear


def _check_tint(channels: Shaped[np.ndarray, "rows columns 3"], name: str, notes: list[str]) -> None:
    """Refuse an image whose colors are not shades of one tint, as a map of heat over a radiograph."""
    step = max(1, min(channels.shape[:2]) // 256)
    values = channels[::step, ::step].reshape(-1, 3).astype(np.float64)
    if np.ptp(values, axis=1).max() <= 2:
        return
    luminance = values @ LUMINANCE
    for channel in values.T:
        if channel.std() > 2 and np.corrcoef(channel, luminance)[0, 1] < TINT_CORRELATION:
            raise FileError(f"{name}: the image has colors that are no shades of gray: give the grayscale original")
    notes.append("colors converted to gray")
