"""A decoded radiograph before orientation, the limits on it, and what every file format shares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped
from torch.nn import functional as F

from raylift.datasets.errors import FileError

SQUARE = 0.01
"""Largest difference of a pixel's height and width, as a fraction, that is neglected."""
GRAY_SHARE, GRAY_SPREAD = 0.001, 0.02
"""A color image is gray if at most that share of its pixels has channels that differ by more than that fraction of the
range."""
MIN_LEVELS = 8
"""Fewest gray levels of a radiograph; masks and label maps have fewer."""


@dataclass(frozen=True)
class RadiographLimits:
    """The largest radiograph that is decoded."""

    max_bytes: int = 64 * 2**20
    """Bytes of a file."""
    max_pixels: int = 32_000_000
    """Pixels in all, of up to 4 bytes in PNG and TIFF; wider ones count as several."""
    min_side: int = 32
    """Fewest pixels along an axis."""
    max_aspect: float = 4.0
    """Longer over shorter side; images are padded to a square."""


@dataclass(frozen=True)
class GrayImage:
    """The pixels of a file with square pixels, and how they were obtained."""

    pixels: Float32[np.ndarray, "rows columns"]
    """In the orientation of the file, of any range."""
    notes: tuple[str, ...] = ()
    """What was changed or ignored, each with the attribute of the file that was the reason."""
    patient_orientation: tuple[str, str] | None = None
    """Directions of the patient along rows and down columns in DICOM's letters, as ('L', 'F'); None if unknown."""
    background: Bool[np.ndarray, "rows columns"] | None = None
    """Pixels of padding, behind a shutter or transparent, which are dark before and after any inversion."""
    is_polarity_known: bool = True
    """Whether the file states if bone is bright, or has to be inverted to be so."""
    patient: str = ""
    """Pseudonym of the PatientID of a DICOM file; empty if unknown."""

    def inverted(self, reason: str) -> GrayImage:
        """The image with bright and dark exchanged, except in the background, with a note."""
        pixels = self.pixels.max() + self.pixels.min() - self.pixels
        if self.background is not None and not self.background.all():
            pixels[self.background] = pixels[~self.background].min()
        return replace(self, pixels=pixels, notes=(*self.notes, f"inverted ({reason})"))


def check_size(name: str, rows: int, columns: int, limits: RadiographLimits) -> None:
    """Raise a FileError for an image that is too large, too small or too long."""
    if rows * columns > limits.max_pixels:
        raise FileError(f"{name}: {rows} x {columns} pixels, over the limit of {limits.max_pixels}")
    if min(rows, columns) < limits.min_side:
        raise FileError(f"{name}: {rows} x {columns} pixels, a side is under {limits.min_side}")
    if max(rows, columns) > limits.max_aspect * min(rows, columns):
        raise FileError(f"{name}: {rows} x {columns} pixels, more than {limits.max_aspect:g} to 1: crop it")


def check_levels(name: str, pixels: Float32[np.ndarray, "rows columns"]) -> None:
    """Raise a FileError for a segmentation mask or label map, which has few gray levels."""
    step = max(1, min(pixels.shape) // 256)
    levels = len(np.unique(pixels[::step, ::step]))
    if levels < MIN_LEVELS:
        raise FileError(f"{name}: {levels} gray levels: a mask or label map is not a radiograph: leave it out")


def to_gray(
    channels: Shaped[np.ndarray, "rows columns 3"], label: str
) -> tuple[Float32[np.ndarray, "rows columns"], str]:
    """A color image whose channels are equal as gray, with a note.

    Args:
        channels: red, green and blue.
        label: beginning of the message: the file and the attribute that makes it a color image.

    Raises:
        FileError: the image has colors.
    """
    if channels.ndim != 3:
        raise FileError(f"{label} with one sample per pixel: correct SamplesPerPixel or PhotometricInterpretation")
    values = channels[..., :3].astype(np.float32)
    spread = values.max(axis=2) - values.min(axis=2)
    share = float((spread > GRAY_SPREAD * max(float(np.ptp(values)), 1e-6)).mean())
    if share > GRAY_SHARE:
        raise FileError(f"{label}: {share:.1%} of the pixels are colored: store the radiograph as a grayscale image")
    return values.mean(axis=2), f"gray of three equal channels ({label.rpartition(': ')[2]})"


def square_pixels(
    image: Float32[np.ndarray, "rows columns"],
    ratio: float,
    attribute: str,
    name: str,
    limits: RadiographLimits,
    notes: list[str],
) -> Float32[np.ndarray, "_ _"]:
    """The image resampled linearly to square pixels, by more rows or more columns, with a note.

    Args:
        image: any pixels.
        ratio: height of a pixel over its width.
        attribute: attribute of the file with the height and width.
        name: name of the file.
        limits: limits that hold for the result, and for the ratio itself.
        notes: the note is appended.

    Raises:
        FileError: the ratio or the result is over the limits.
    """
    if abs(ratio - 1) <= SQUARE:
        return image
    if not 1 / limits.max_aspect <= ratio <= limits.max_aspect:
        raise FileError(f"{name}: {attribute} makes pixels of {ratio:g} to 1: correct or remove it")
    rows, columns = image.shape
    rows, columns = (round(rows * ratio), columns) if ratio > 1 else (rows, round(columns / ratio))
    check_size(name, rows, columns, limits)
    notes.append(f"resampled to square pixels ({attribute})")
    resized = F.interpolate(torch.from_numpy(image)[None, None], (rows, columns), mode="bilinear", align_corners=False)
    return resized[0, 0].numpy()


def one_line(error: Exception) -> str:
    """A library's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
