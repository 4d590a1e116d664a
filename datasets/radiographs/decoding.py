"""A radiograph as it comes (DICOM, PNG, JPEG, TIFF) to the square, bone-bright image a network was trained on.

Files are not trusted: their size and dimensions are checked from the header before pixels are decoded, and nothing but
the listed formats is tried.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pydicom
import torch
from jaxtyping import Float32
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from torch.nn import functional as F

from raylift.datasets import dicom
from raylift.datasets.errors import RefusedFile
from raylift.datasets.intensity import standardize
from raylift.datasets.radiographs.annotations import remove_annotations
from raylift.datasets.radiographs.borders import crop_bright_border, crop_uniform_margin
from raylift.datasets.radiographs.histogram import Quantiles, standardize_and_match

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
CROSS_SECTIONAL_MODALITIES = ("CT", "MR", "NM", "PT", "US")
MOST = 1e30
"""The range of values that float32 can still be computed with."""
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
    view: str | None = None,
    invert: Inversion = "auto",
    flip: bool = False,
) -> Float32[np.ndarray, "rows columns"]:
    """A file's bytes as a bone-bright image of any size and scale.

    DICOM says by its photometric interpretation whether dark is dense, and brings its own display window; other files
    do not, so with `auto` they are inverted where `is_bone_dark` says so.

    Args:
        data: the file.
        name: what messages call it.
        limits: what is refused for its size.
        view: "frontal", "lateral", or None where it is not known: what to look for with `auto`.
        invert: whether to invert an image that shows bone dark; DICOM needs it only if its header is wrong.
        flip: mirror left and right.

    Raises:
        RefusedFile: not an image raylift reads, too large or small, or constant.
    """
    if len(data) > limits.max_bytes:
        raise RefusedFile(f"{name}: {len(data)} bytes, over the limit of {limits.max_bytes}")
    is_dicom = dicom.is_dicom(data)
    image = _read_dicom(data, name, limits) if is_dicom else _read_picture(data, name, limits)
    low, high = float(image.min()), float(image.max())
    if not 0 < high - low < MOST:
        raise RefusedFile(f"{name}: the image is constant or has no finite values: {low:g} to {high:g}")
    if invert == "yes" or (invert == "auto" and not is_dicom and is_bone_dark(image, view)):
        image = high + low - image
    return np.ascontiguousarray(image[:, ::-1] if flip else image, dtype=np.float32)


def read_file(
    path: Path,
    limits: RadiographLimits = RadiographLimits(),
    *,
    view: str | None = None,
    invert: Inversion = "auto",
) -> Float32[np.ndarray, "rows columns"]:
    """`read` of a file, whose size is looked at before its bytes; messages name its path."""
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise RefusedFile(f"{path}: {size} bytes, over the limit of {limits.max_bytes}")
    return read(path.read_bytes(), str(path), limits, view=view, invert=invert)


def prepare(
    image: Float32[np.ndarray, "rows columns"], size: int, reference: Quantiles | None = None
) -> Float32[np.ndarray, "size size"]:
    """The image in [0, 1] on a square of `size` pixels, as archives hold it and networks see it.

    In this order: bright frame cut, written marks filled, padded dark to a square, resized with anti-aliasing,
    standardized by its own percentiles, and, where a model asks for it, its histogram matched to projections.

    The projections a network was trained on keep the air round the patient, and so does this: a dark margin stays,
    because a collimator's cannot be told from air, nor from where a CT ended. Only a frame that cannot be air is cut:
    rows and columns at the sides as bright as the densest bone, which a mask around an inverted image or the border of
    a scanned film leaves. A projection at its own size comes out as `standardize` gives it to training.
    """
    pixels = torch.from_numpy(standardize(remove_annotations(crop_bright_border(image))))[None, None]
    # Whole pixels are averaged first, so that a large image is never padded at its full size.
    pixels = F.avg_pool2d(pixels, max(1, max(pixels.shape) // (8 * size)))
    rows, columns = pixels.shape[2:]
    side = max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    square = F.pad(pixels, (left, side - columns - left, top, side - rows - top))
    resized = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return standardize_and_match(resized[0, 0].numpy(), reference)


def is_bone_dark(image: Float32[np.ndarray, "rows columns"], view: str | None = None) -> bool:
    """Whether the image shows dense tissue dark, judged by what is dense in every chest.

    In a frontal image spine and mediastinum are denser than the lungs left and right of them. In a lateral one
    shoulders and belly are denser than what lies in front of the chest and behind the back, wherever the patient faces.
    Without a view both differences are added. Plain margins of any brightness are left out first.
    """
    step = max(1, max(image.shape) // 512)
    pixels = standardize(crop_uniform_margin(image[::step, ::step]))

    def mean(top: float, bottom: float, left: float, right: float) -> float:
        """Of a region given by shares of the height and the width; an edge takes one pixel at least."""
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
        # What Pillow's plugins raise on a damaged file is open: struct.error, SyntaxError, IndexError ...
        raise RefusedFile(f"{name}: the image is damaged: {_words(error)}") from error


def _gray(picture: Image.Image) -> Float32[np.ndarray, "rows columns"]:
    if picture.mode.startswith(("I", "F")):
        return np.asarray(picture, dtype=np.float32)
    if picture.has_transparency_data:
        # What is transparent holds any color; nobody has seen it.
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "black"), seen)
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
        # What pydicom raises on a damaged file is open, here and below.
        raise RefusedFile(f"{name}: the DICOM header cannot be read: {_words(error)}") from error
    try:
        pixels = apply_modality_lut(dataset.pixel_array, dataset)
    except Exception as error:
        raise RefusedFile(f"{name}: the pixels cannot be decoded: {_words(error)}") from error
    # A display window without width, or a table that is none, is left out: percentiles serve later.
    with suppress(Exception):
        pixels = apply_voi_lut(pixels, dataset)
    image = _within_shutter(np.asarray(pixels, dtype=np.float32), dataset)
    # By the photometric interpretation alone: the presentation LUT says the same again in some files and nothing in
    # others, so following both would invert twice.
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        image = image.max() + image.min() - image
    return image


def _within_shutter(image: Float32[np.ndarray, "rows columns"], dataset: pydicom.Dataset) -> Float32[np.ndarray, "_ _"]:
    """What a rectangular display shutter or, without one, collimator leaves free, if the header names one."""
    for kind in ("Shutter", "Collimator"):
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            shapes = dataset[f"{kind}Shape"].value
            if "RECTANGULAR" not in ([shapes] if isinstance(shapes, str) else shapes):
                continue
            top, bottom = (int(dataset[f"{kind}{side}HorizontalEdge"].value) for side in ("Upper", "Lower"))
            left, right = (int(dataset[f"{kind}{side}VerticalEdge"].value) for side in ("Left", "Right"))
            # Edges are rows and columns counted from 1, and covered themselves; some lie outside the image.
            inside = image[max(top, 0) : max(bottom - 1, 0), max(left, 0) : max(right - 1, 0)]
            if 2 * inside.shape[0] >= image.shape[0] and 2 * inside.shape[1] >= image.shape[1]:
                return inside
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
