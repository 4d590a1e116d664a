"""Decoding of radiographs in DICOM, PNG, JPEG, TIFF and BMP to bone-bright images.

Files are untrusted: size and dimensions are checked from the header before pixels are decoded, and only the listed
formats are tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from raylift.datasets import dicom
from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.chest import is_bone_dark
from raylift.datasets.radiographs.dicom_image import read_dicom
from raylift.datasets.radiographs.gray_image import GrayImage, RadiographLimits, check_levels
from raylift.datasets.radiographs.image_file import read_image

MAX_RANGE = 1e30
"""Larger ranges of values overflow in float32 arithmetic."""
Inversion = Literal["auto", "yes", "no"]
DEFAULT_RADIOGRAPH_LIMITS = RadiographLimits()


def read(
    data: bytes,
    name: str,
    limits: RadiographLimits = DEFAULT_RADIOGRAPH_LIMITS,
    *,
    view: str | None = None,
    invert: Inversion = "auto",
) -> GrayImage:
    """Decode a file to a bone-bright image of any size and scale, in the orientation of the file.

    DICOM has a photometric interpretation and a display window. Other formats have neither, so with `auto` they are
    inverted if `is_bone_dark`, as is DICOM FOR PROCESSING or with a PresentationLUTShape that contradicts its
    photometric interpretation.

    Args:
        data: content of the file.
        name: name of the file in messages.
        limits: largest file and image accepted.
        view: "frontal", "lateral", or None if unknown; used by `auto` and compared with the header of DICOM.
        invert: yes inverts, no does not, auto inverts if bone is dark; DICOM needs yes only if its header is wrong.

    Raises:
        FileError: not a supported image, too large or small, constant, a mask, or with contradicting tags.
    """
    if len(data) > limits.max_bytes:
        raise FileError(f"{name}: {len(data)} bytes, over the limit of {limits.max_bytes}")
    image = read_dicom(data, name, limits, view) if dicom.is_dicom(data) else read_image(data, name, limits)
    low, high = float(image.pixels.min()), float(image.pixels.max())
    if not 0 < high - low < MAX_RANGE:
        raise FileError(
            f"{name}: the image is constant or has no finite values: {low:g} to {high:g}: give the whole image, with "
            "pixels without data as dark as air"
        )
    check_levels(name, image.pixels)
    if invert == "yes":
        return image.inverted("as requested")
    if invert == "auto" and not image.is_polarity_known and is_bone_dark(image.pixels, view):
        return image.inverted("bone was dark")
    return image


def read_file(
    path: Path,
    limits: RadiographLimits = DEFAULT_RADIOGRAPH_LIMITS,
    *,
    view: str | None = None,
    invert: Inversion = "auto",
) -> GrayImage:
    """`read` of a file whose size is checked before its bytes are read; messages name its path."""
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise FileError(f"{path}: {size} bytes, over the limit of {limits.max_bytes}")
    return read(path.read_bytes(), str(path), limits, view=view, invert=invert)
