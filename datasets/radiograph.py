"""A radiograph as it comes (DICOM, PNG, JPEG, TIFF) to the square, bone-bright image a network was trained on.

Files are not trusted: their size and dimensions are checked from the header before pixels are decoded, and nothing but
the listed formats is tried.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pydicom
import torch
from jaxtyping import Float32
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from torch.nn import functional as F

from raylift.datasets.errors import RefusedFile
from raylift.datasets.intensity import standardise

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
Inversion = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class RadiographLimits:
    """The largest radiograph that is decoded."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 100_000_000
    min_side: int = 32


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
    is_dicom = data[128:132] == b"DICM"
    image = _read_dicom(data, name, limits) if is_dicom else _read_picture(data, name, limits)
    if not np.isfinite(image).all() or image.max() == image.min():
        raise RefusedFile(f"{name}: the image is constant or has no finite values")
    if invert == "yes" or (invert == "auto" and not is_dicom and shows_bone_dark(image)):
        image = image.max() + image.min() - image
    return np.ascontiguousarray(image[:, ::-1] if flip else image, dtype=np.float32)


def prepare(image: Float32[np.ndarray, "rows columns"], size: int) -> Float32[np.ndarray, "size size"]:
    """The image in [0, 1] on a square of `size` pixels: plain borders cut, padded, resized with anti-aliasing."""
    image = standardise(_without_borders(image))
    rows, columns = image.shape
    side = max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    square = np.zeros((side, side), dtype=np.float32)
    square[top : top + rows, left : left + columns] = image
    resized = F.interpolate(
        torch.from_numpy(square)[None, None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
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
        with warnings.catch_warnings():
            # Pillow warns of large images; the limits here are stricter and raise.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check_size(name, picture.height, picture.width, limits)
                if picture.mode.startswith(("I", "F")):
                    return np.asarray(picture, dtype=np.float32)
                return np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
    except UnidentifiedImageError as error:
        raise RefusedFile(f"{name}: not an image raylift reads: give DICOM, {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, RefusedFile):
            raise
        raise RefusedFile(f"{name}: the image is damaged: {error}") from error


def _read_dicom(data: bytes, name: str, limits: RadiographLimits) -> Float32[np.ndarray, "rows columns"]:
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
    except (InvalidDicomError, ValueError, OSError) as error:
        raise RefusedFile(f"{name}: the DICOM header cannot be read: {error}") from error
    if dataset.get("Modality") == "CT":
        raise RefusedFile(f"{name}: a CT slice is not a radiograph")
    if int(dataset.get("NumberOfFrames") or 1) > 1 or int(dataset.get("SamplesPerPixel", 1)) != 1:
        raise RefusedFile(f"{name}: a radiograph has one frame and one sample a pixel")
    _check_size(name, int(dataset.get("Rows", 0)), int(dataset.get("Columns", 0)), limits)
    try:
        pixels = apply_modality_lut(dataset.pixel_array, dataset)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise RefusedFile(f"{name}: the pixels cannot be decoded: {error}") from error
    try:
        pixels = apply_voi_lut(pixels, dataset)
    except ValueError:
        # A window without width: percentiles serve later.
        pixels = np.asarray(pixels)
    image = np.asarray(pixels, dtype=np.float32)
    # By the photometric interpretation alone: the presentation LUT says the same again in some files and nothing in
    # others, so following both would invert twice.
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        image = image.max() + image.min() - image
    return image


def _check_size(name: str, rows: int, columns: int, limits: RadiographLimits) -> None:
    if rows * columns > limits.max_pixels:
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, over the limit of {limits.max_pixels}")
    if min(rows, columns) < limits.min_side:
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, a side is under {limits.min_side}")


def _without_borders(image: Float32[np.ndarray, "rows columns"]) -> Float32[np.ndarray, "rows columns"]:
    """Without the plain frame that collimation or scanning leaves, if what remains is most of the image."""
    span = float(image.max() - image.min())
    rows = np.flatnonzero(np.ptp(image, axis=1) > 0.05 * span)
    columns = np.flatnonzero(np.ptp(image, axis=0) > 0.05 * span)
    if len(rows) < image.shape[0] // 2 or len(columns) < image.shape[1] // 2:
        return image
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
