"""A radiograph as it comes (DICOM, PNG, JPEG, TIFF) to the square, bone-bright image a network was trained on.

Files are not trusted: their size and dimensions are checked from the header before pixels are decoded, and nothing but
the listed formats is tried.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from torch.nn import functional as F

from raylift.datasets import dicom
from raylift.datasets.errors import RefusedFile
from raylift.datasets.intensity import standardise

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
NOT_PROJECTIONS = ("CT", "MR", "NM", "PT", "US")
Inversion = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class RadiographLimits:
    """The largest radiograph that is decoded."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 2**26
    min_side: int = 32
    max_aspect: float = 4.0
    """Longer over shorter side: `prepare` pads to a square."""


def read(
    data: bytes,
    name: str,
    limits: RadiographLimits = RadiographLimits(),
    *,
    invert: Inversion = "auto",
    flip: bool = False,
) -> Float32[np.ndarray, "rows columns"]:
    """A file's bytes as a bone-bright image of any size and scale.

    DICOM says by its photometric interpretation whether dark is dense, and brings its own display window; other files
    do not, so with `auto` an image whose upper corners, which are air, are brighter than its middle is inverted.

    Args:
        data: the file.
        name: what messages call it.
        limits: what is refused for its size.
        invert: whether to invert an image that shows bone dark; DICOM needs it only if its header is wrong.
        flip: mirror left and right.

    Raises:
        RefusedFile: not an image raylift reads, too large or small, or constant.
    """
    if len(data) > limits.max_bytes:
        raise RefusedFile(f"{name}: {len(data)} bytes, over the limit of {limits.max_bytes}")
    is_dicom = dicom.is_dicom(data)
    image = _read_dicom(data, name, limits) if is_dicom else _read_picture(data, name, limits)
    if not np.isfinite(image).all() or image.max() == image.min():
        raise RefusedFile(f"{name}: the image is constant or has no finite values")
    if invert == "yes" or (invert == "auto" and not is_dicom and shows_bone_dark(image)):
        image = image.max() + image.min() - image
    return np.ascontiguousarray(image[:, ::-1] if flip else image, dtype=np.float32)


def prepare(image: Float32[np.ndarray, "rows columns"], size: int) -> Float32[np.ndarray, "size size"]:
    """The image in [0, 1] on a square of `size` pixels: plain borders cut, padded, resized with anti-aliasing."""
    pixels = torch.from_numpy(standardise(_without_borders(image)))[None, None]
    # Whole pixels are averaged first, so that a large image is never padded at its full size.
    pixels = F.avg_pool2d(pixels, max(1, max(pixels.shape) // (8 * size)))
    rows, columns = pixels.shape[2:]
    side = max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    square = F.pad(pixels, (left, side - columns - left, top, side - rows - top))
    resized = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return standardise(resized[0, 0].numpy())


def shows_bone_dark(image: Float32[np.ndarray, "rows columns"]) -> bool:
    """Whether the upper corners, air beside the neck, are brighter than the middle of the image."""
    rows, columns = image.shape
    corner, height = max(1, columns // 12), max(1, rows // 12)
    corners = np.median([np.median(image[:height, :corner]), np.median(image[:height, -corner:])])
    middle = np.median(image[rows // 4 : 3 * rows // 4, columns // 4 : 3 * columns // 4])
    return bool(corners > middle)


def _read_picture(data: bytes, name: str, limits: RadiographLimits) -> Float32[np.ndarray, "rows columns"]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(name, picture.height, picture.width, limits)
            return _grey(ImageOps.exif_transpose(picture))
    except RefusedFile:
        raise
    except UnidentifiedImageError as error:
        raise RefusedFile(f"{name}: not an image raylift reads: give DICOM, {', '.join(FORMATS)}") from error
    except Exception as error:
        # What Pillow's plugins raise on a damaged file is open: struct.error, SyntaxError, IndexError ...
        raise RefusedFile(f"{name}: the image is damaged: {_words(error)}") from error


def _grey(picture: Image.Image) -> Float32[np.ndarray, "rows columns"]:
    if picture.mode.startswith(("I", "F")):
        return np.asarray(picture, dtype=np.float32)
    if picture.has_transparency_data:
        # What is transparent holds any colour; nobody has seen it.
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "black"), seen)
    return np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)


def _read_dicom(data: bytes, name: str, limits: RadiographLimits) -> Float32[np.ndarray, "rows columns"]:
    try:
        dataset = dicom.parse(data, name)
        modality = dataset.get("Modality")
        if modality in NOT_PROJECTIONS:
            raise RefusedFile(f"{name}: modality {modality}: a slice is not a radiograph")
        if int(dataset.get("NumberOfFrames") or 1) > 1 or int(dataset.get("SamplesPerPixel") or 1) != 1:
            raise RefusedFile(f"{name}: a radiograph has one frame and one sample a pixel")
        _check_size(name, int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0), limits)
    except RefusedFile:
        raise
    except Exception as error:
        # What pydicom raises on a damaged file is open, here and below.
        raise RefusedFile(f"{name}: the DICOM header cannot be read: {_words(error)}") from error
    try:
        pixels = apply_modality_lut(dataset.pixel_array, dataset)
    except Exception as error:
        raise RefusedFile(f"{name}: the pixels cannot be decoded: {_words(error)}") from error
    # A display window without width, or a table that is none, is left out: percentiles serve later.
    with suppress(Exception):
        pixels = apply_voi_lut(pixels, dataset)
    image = np.asarray(pixels, dtype=np.float32)
    # By the photometric interpretation alone: the presentation LUT says the same again in some files and nothing in
    # others, so following both would invert twice.
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        image = image.max() + image.min() - image
    return image


def _words(error: Exception) -> str:
    """What a library says, in one line of reasonable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_size(name: str, rows: int, columns: int, limits: RadiographLimits) -> None:
    if rows * columns > limits.max_pixels:
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, over the limit of {limits.max_pixels}")
    if min(rows, columns) < limits.min_side:
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, a side is under {limits.min_side}")
    if max(rows, columns) > limits.max_aspect * min(rows, columns):
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, more than {limits.max_aspect:g} to 1: crop it")


def _without_borders(image: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "_ _"]:
    """Without the plain frame that collimation or scanning leaves, if what remains is most of the image."""
    span = float(image.max() - image.min())
    rows = np.flatnonzero(np.ptp(image, axis=1) > 0.05 * span)
    columns = np.flatnonzero(np.ptp(image, axis=0) > 0.05 * span)
    if len(rows) < image.shape[0] // 2 or len(columns) < image.shape[1] // 2:
        return image
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
