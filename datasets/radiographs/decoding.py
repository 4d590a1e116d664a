"""Decoding of radiographs in DICOM, PNG, JPEG, TIFF and BMP to bone-bright images.

Files are untrusted: size and dimensions are checked from the header before pixels are decoded, and only the listed
formats are tried.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydicom
from jaxtyping import Float32
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from raylift.datasets import dicom
from raylift.datasets.errors import RefusedFile
from raylift.datasets.intensity import standardize
from raylift.datasets.radiographs.borders import crop_uniform_margin

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
CROSS_SECTIONAL_MODALITIES = ("CT", "MR", "NM", "PT", "US")
MAX_RANGE = 1e30
"""Larger ranges of values overflow in float32 arithmetic."""
Inversion = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class RadiographLimits:
    """The largest radiograph that is decoded."""

    max_bytes: int = 64 * 2**20
    """Bytes of a file."""
    max_pixels: int = 2**26
    """Pixels in all."""
    min_side: int = 32
    """Fewest pixels along an axis."""
    max_aspect: float = 4.0
    """Longer over shorter side; images are padded to a square."""


DEFAULT_RADIOGRAPH_LIMITS = RadiographLimits()


def read(
    data: bytes,
    name: str,
    limits: RadiographLimits = DEFAULT_RADIOGRAPH_LIMITS,
    *,
    view: str | None = None,
    invert: Inversion = "auto",
    flip: bool = False,
) -> Float32[np.ndarray, "rows columns"]:
    """Decode a file to a bone-bright image of any size and scale.

    DICOM has a photometric interpretation and a display window. Other formats have neither, so with `auto` they are
    inverted if `is_bone_dark`.

    Args:
        data: content of the file.
        name: name of the file in messages.
        limits: largest file and image accepted.
        view: "frontal", "lateral", or None if unknown; used by `auto`.
        invert: whether to invert an image with dark bone; DICOM needs it only if its header is wrong.
        flip: mirror left and right.

    Raises:
        RefusedFile: not a supported image, too large or small, or constant.
    """
    if len(data) > limits.max_bytes:
        raise RefusedFile(f"{name}: {len(data)} bytes, over the limit of {limits.max_bytes}")
    is_dicom = dicom.is_dicom(data)
    image = _read_dicom(data, name, limits) if is_dicom else _read_picture(data, name, limits)
    low, high = float(image.min()), float(image.max())
    if not 0 < high - low < MAX_RANGE:
        raise RefusedFile(f"{name}: the image is constant or has no finite values: {low:g} to {high:g}")
    if invert == "yes" or (invert == "auto" and not is_dicom and is_bone_dark(image, view)):
        image = high + low - image
    return np.ascontiguousarray(image[:, ::-1] if flip else image, dtype=np.float32)


def read_file(
    path: Path,
    limits: RadiographLimits = DEFAULT_RADIOGRAPH_LIMITS,
    *,
    view: str | None = None,
    invert: Inversion = "auto",
    flip: bool = False,
) -> Float32[np.ndarray, "rows columns"]:
    """`read` of a file whose size is checked before its bytes are read; messages name its path."""
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise RefusedFile(f"{path}: {size} bytes, over the limit of {limits.max_bytes}")
    return read(path.read_bytes(), str(path), limits, view=view, invert=invert, flip=flip)


def is_bone_dark(image: Float32[np.ndarray, "rows columns"], view: str | None = None) -> bool:
    """Whether dense tissue is dark, by the contrast between regions of known density.

    In a frontal image spine and mediastinum are denser than the lungs. In a lateral one shoulders and abdomen are
    denser than the air anterior and posterior to the patient, in either orientation. Without a view both differences
    are added. Uniform margins are cropped first.
    """
    step = max(1, max(image.shape) // 512)
    pixels = standardize(crop_uniform_margin(image[::step, ::step]))

    def mean(top: float, bottom: float, left: float, right: float) -> float:
        """Mean of a region given in fractions of height and width, at least one pixel."""
        rows, columns = pixels.shape
        first, last = int(rows * top), max(int(rows * bottom), int(rows * top) + 1)
        start, end = int(columns * left), max(int(columns * right), int(columns * left) + 1)
        return float(pixels[first:last, start:end].mean())

    lungs = (mean(0.35, 0.75, 0.12, 0.32) + mean(0.35, 0.75, 0.68, 0.88)) / 2
    frontal = mean(0.35, 0.75, 0.44, 0.56) - lungs
    edges = (mean(0, 0.4, 0, 0.05) + mean(0, 0.4, 0.95, 1)) / 2
    lateral = (mean(0.05, 0.2, 0.4, 0.6) + mean(0.85, 0.97, 0.4, 0.6)) / 2 - edges
    return {"frontal": frontal, "lateral": lateral}.get(view or "", frontal + lateral) < 0


def _read_picture(data: bytes, name: str, limits: RadiographLimits) -> Float32[np.ndarray, "rows columns"]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(name, picture.height, picture.width, limits)
            return _gray(ImageOps.exif_transpose(picture))
    except RefusedFile:
        raise
    except UnidentifiedImageError as error:
        raise RefusedFile(f"{name}: not an image raylift reads: give DICOM, {', '.join(FORMATS)}") from error
    except Exception as error:
        # On a damaged file Pillow's plugins raise any exception: struct.error, SyntaxError, IndexError ...
        raise RefusedFile(f"{name}: the image is damaged: {_one_line(error)}") from error


def _gray(picture: Image.Image) -> Float32[np.ndarray, "rows columns"]:
    if picture.mode.startswith(("I", "F")):
        return np.asarray(picture, dtype=np.float32)
    if picture.has_transparency_data:
        # Transparent pixels have arbitrary colors.
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)


def _read_dicom(data: bytes, name: str, limits: RadiographLimits) -> Float32[np.ndarray, "rows columns"]:
    try:
        dataset = dicom.parse(data, name)
        modality = dataset.get("Modality")
        if modality in CROSS_SECTIONAL_MODALITIES:
            raise RefusedFile(f"{name}: modality {modality}: a slice is not a radiograph")
        if int(dataset.get("NumberOfFrames") or 1) > 1 or int(dataset.get("SamplesPerPixel") or 1) != 1:
            raise RefusedFile(f"{name}: a radiograph has one frame and one sample a pixel")
        _check_size(name, int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0), limits)
    except RefusedFile:
        raise
    except Exception as error:
        # On a damaged file pydicom raises any exception, here and below.
        raise RefusedFile(f"{name}: the DICOM header cannot be read: {_one_line(error)}") from error
    try:
        pixels = apply_modality_lut(dataset.pixel_array, dataset)
    except Exception as error:
        raise RefusedFile(f"{name}: the pixels cannot be decoded: {_one_line(error)}") from error
    # An invalid display window or lookup table is ignored: standardization by percentiles follows.
    with suppress(Exception):
        pixels = apply_voi_lut(pixels, dataset)
    image = _within_shutter(np.asarray(pixels, dtype=np.float32), dataset)
    # Only the photometric interpretation counts: in some files the presentation LUT repeats it, so that applying both
    # would invert twice.
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        image = image.max() + image.min() - image
    return image


def _within_shutter(image: Float32[np.ndarray, "rows columns"], dataset: pydicom.Dataset) -> Float32[np.ndarray, "_ _"]:
    """Crop to the rectangular display shutter or else collimator of the header, if there is one."""
    for kind in ("Shutter", "Collimator"):
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            shapes = dataset[f"{kind}Shape"].value
            if "RECTANGULAR" not in ([shapes] if isinstance(shapes, str) else shapes):
                continue
            top, bottom = (int(dataset[f"{kind}{side}HorizontalEdge"].value) for side in ("Upper", "Lower"))
            left, right = (int(dataset[f"{kind}{side}VerticalEdge"].value) for side in ("Left", "Right"))
            # Edges are row and column numbers from 1 and are themselves covered; some are outside the image.
            inside = image[max(top, 0) : max(bottom - 1, 0), max(left, 0) : max(right - 1, 0)]
            if 2 * inside.shape[0] >= image.shape[0] and 2 * inside.shape[1] >= image.shape[1]:
                return inside
    return image


def _one_line(error: Exception) -> str:
    """A library's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_size(name: str, rows: int, columns: int, limits: RadiographLimits) -> None:
    if rows * columns > limits.max_pixels:
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, over the limit of {limits.max_pixels}")
    if min(rows, columns) < limits.min_side:
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, a side is under {limits.min_side}")
    if max(rows, columns) > limits.max_aspect * min(rows, columns):
        raise RefusedFile(f"{name}: {rows} x {columns} pixels, more than {limits.max_aspect:g} to 1: crop it")
