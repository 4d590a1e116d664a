"""Pixels of the slices of a DICOM series in HU: each by its own rescale, with padding set to air."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Bool, Num

from raylift.datasets import dicom
from raylift.datasets.errors import FileError
from raylift.datasets.intensity import HU_MIN
from raylift.datasets.scans.volume import border_to_air

NOT_HU = ("ED", "EDW", "HU_MOD", "MGML", "OD", "PCT", "Z_EFF")
"""RescaleType of maps that dual-energy CT reconstructs next to HU."""
WRAPPED_STEP = 1 / 16
"""Median step, in the range of BitsStored, at the edges of values that wrap around; under overlays it is smaller."""
JUMP_HU = 200
"""Median difference of soft tissue to the adjacent slice from which a rescale is wrong, if another one fits."""
MIN_TISSUE = 0.01
"""Fraction of a slice from which its soft tissue is compared."""
LOWEST_HU = -1100
"""Below this a value that the bits above BitsStored change is no CT value."""

Rescale = tuple[float, float]
"""Slope and intercept."""


def rescales(name: str, headers: Mapping[Path, pydicom.Dataset]) -> tuple[list[Rescale], tuple[str, ...]]:
    """The rescale of every slice, and a note where they differ; (1, 0) if no slice has any.

    Raises:
        FileError: some slices lack a rescale that others have, or it is not to HU.
    """
    slopes_and_intercepts: list[Rescale] = []
    for tag in ("RescaleSlope", "RescaleIntercept"):
        lacking = [path.name for path, header in headers.items() if header.get(tag) in (None, "")]
        if 0 < len(lacking) < len(headers):
            shown = ", ".join(lacking[:3]) + (" ..." if len(lacking) > 3 else "")
            raise FileError(
                f"{name}: {len(lacking)} of {len(headers)} slices ({shown}) have no {tag}: add it or split the series"
            )
    for path, header in headers.items():
        slope, intercept = (
            float(default if header.get(tag) in (None, "") else header[tag].value)
            for tag, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        if "ModalityLUTSequence" in header:
            raise FileError(f"{path}: values in a modality lookup table, not in HU: convert the series")
        if str(header.get("RescaleType") or "HU").strip().upper() in NOT_HU:
            raise FileError(f"{path}: RescaleType {header.RescaleType} is not HU: use the series in HU")
        if not slope > 0 or not np.isfinite([slope, intercept]).all():
            raise FileError(f"{path}: RescaleSlope {slope:g} and RescaleIntercept {intercept:g}: correct them")
        slopes_and_intercepts.append((slope, intercept))
    if len(set(slopes_and_intercepts)) == 1:
        return slopes_and_intercepts, ()
    (low_slope, high_slope), (low, high) = (
        (min(values), max(values)) for values in zip(*slopes_and_intercepts, strict=True)
    )
    return slopes_and_intercepts, (
        f"every slice was rescaled by its own values: {_range('slope', low_slope, high_slope)}, "
        f"{_range('intercept', low, high)}",
    )


def _range(name: str, low: float, high: float) -> str:
    return f"{name} {low:g}" if low == high else f"{name}s {low:g} to {high:g}"


def read_slices(
    name: str, paths: Sequence[Path], slopes: Sequence[Rescale]
) -> tuple[Num[np.ndarray, "slices rows columns"], tuple[str, ...]]:
    """Decode all slices to HU, in int16 if every rescale is integral and else in float32, and report changed pixels.

    Raises:
        FileError: a slice that is truncated, damaged or of another size, or values that contradict BitsStored.
    """
    is_integral = all(float(value).is_integer() for rescale in slopes for value in rescale)
    voxels: Num[np.ndarray, "slices rows columns"] | None = None
    padded = masked = 0
    for k, (path, (slope, intercept)) in enumerate(zip(paths, slopes, strict=True)):
        try:
            dataset = dicom.parse(path.read_bytes(), str(path))
            pixels = dicom.stored_pixels(dataset, str(path))
            is_padding = dicom.is_padding(dataset, pixels)
        except FileError:
            raise
        except Exception as error:
            # On a damaged file pydicom and its decoders raise any exception.
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise FileError(f"{path}: the pixels cannot be decoded, the file may be truncated: {text}") from error
        hu = pixels.values * slope + intercept
        # Larger values are none of a scanner, and are refused or set to air as such.
        plane = np.clip(hu, -32768, 32767).astype(np.int16 if is_integral else np.float32)
        padded += border_to_air(plane, is_padding, is_declared=True)
        if not (_has_embedded_overlay(dataset) or np.array_equal(pixels.values, pixels.allocated)):
            exceeding = pixels.exceed_bits_stored
            padded += border_to_air(plane, _padding_above_bits_stored(pixels, exceeding))
            inside = plane != HU_MIN
            is_below = (hu[inside & (pixels.values != pixels.allocated)] < LOWEST_HU).any()
            if is_below or _wrap_around(pixels, inside & exceeding):
                raise FileError(
                    f"{path}: BitsStored {dataset.BitsStored} and PixelRepresentation {dataset.PixelRepresentation} "
                    "contradict the pixels, whose values wrap around: correct these tags"
                )
            masked += int((inside & exceeding).sum())
        if voxels is None:
            voxels = np.empty((len(paths), *plane.shape), dtype=plane.dtype)
        if plane.shape != voxels.shape[1:]:
            raise FileError(f"{name}: slices differ in size: split the series")
        voxels[k] = plane
        if k and (slope, intercept) != slopes[k - 1]:
            _check_continuity(path, voxels[k - 1], plane, pixels.values, slopes[k - 1 : k + 1])
    assert voxels is not None, "a series has slices"
    changes = []
    if padded:
        changes.append(f"{padded} voxels of padding were set to air")
    if masked:
        changes.append(f"the bits above BitsStored of {masked} voxels were ignored")
    return voxels, tuple(changes)


def _check_continuity(
    path: Path,
    before: Num[np.ndarray, "rows columns"],
    plane: Num[np.ndarray, "rows columns"],
    stored: Num[np.ndarray, "rows columns"],
    rescales: Sequence[Rescale],
) -> None:
    """Refuse a slice that continues the soft tissue of the one before it by the rescale of that one alone."""
    (other_slope, other), (slope, intercept) = rescales
    for hu in (before, plane):
        # 0 is also what clipped and filled pixels have.
        tissue = (hu > -200) & (hu < 300) & (hu != 0)
        if tissue.mean() < MIN_TISSUE:
            continue
        own, shared = (
            float(np.median(np.abs(values[tissue] - before[tissue].astype(np.float64))))
            for values in (plane, stored * other_slope + other)
        )
        if own > JUMP_HU and shared < own / 4:
            raise FileError(
                f"{path}: RescaleSlope {slope:g} and RescaleIntercept {intercept:g} put its tissue {own:.0f} HU off "
                f"the slice before it, those of that slice, {other_slope:g} and {other:g}, do not: correct one"
            )


def _padding_above_bits_stored(
    pixels: dicom.StoredPixels, exceeding: Bool[np.ndarray, "rows columns"]
) -> Bool[np.ndarray, "rows columns"]:
    """The exceeding pixels if all of them have one value, as padding has. An overlay lies on different values."""
    is_padding = len(np.unique(pixels.allocated[exceeding])) == 1
    return exceeding if is_padding else np.zeros_like(exceeding)


def _wrap_around(pixels: dicom.StoredPixels, exceeding: Bool[np.ndarray, "rows columns"]) -> bool:
    """Whether the exceeding pixels differ from their neighbors without the bits above BitsStored, too.

    Values that lie under an overlay continue those adjacent to it. Values that need these bits, as metal does, wrap
    around.
    """
    above = pixels.allocated >> pixels.bits
    steps = []
    for values, over, bits in ((pixels.values, exceeding, above), (pixels.values.T, exceeding.T, above.T)):
        edges = (over[1:] | over[:-1]) & (bits[1:] != bits[:-1])
        steps.append(np.abs(np.diff(values, axis=0))[edges])
    at_edges = np.concatenate(steps)
    return bool(at_edges.size and np.median(at_edges) >= WRAPPED_STEP * 2**pixels.bits)


def _has_embedded_overlay(dataset: pydicom.Dataset) -> bool:
    """Whether the header places an overlay in a bit of the pixels, as it was done before 2004."""
    return any(dataset.get((group, 0x0102)) and dataset[group, 0x0102].value for group in range(0x6000, 0x6020, 2))
