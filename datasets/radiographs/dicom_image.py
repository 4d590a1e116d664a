"""A DICOM radiograph as a bone-bright image with square pixels: the header's rules in their order.

Stored values; palette or modality LUT; padding and shutter, which are dark; VOI LUT or display window; photometric
interpretation; pixel spacing. Every rule that changed the image adds a note that names its attribute and value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pydicom
from jaxtyping import Bool, Float32
from pydicom.pixels.processing import apply_color_lut, apply_windowing
from pydicom.uid import ExplicitVRBigEndian

from raylift.datasets import dicom, dicom_frame
from raylift.datasets.dicom_frame import Stored
from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.dicom_view import view_of, why_no_radiograph
from raylift.datasets.radiographs.gray_image import (
    GrayImage,
    RadiographLimits,
    check_size,
    one_line,
    square_pixels,
    to_gray,
)
from raylift.datasets.radiographs.shutter import inside_shutter
from raylift.datasets.sources import pseudonym

COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
MIN_WINDOW_SHARE = 0.1
"""Fraction of the range of pixel values in which a display window or VOI LUT must keep different values apart."""
SAMPLED_VALUES = 256
"""Values at which that share is measured."""
WINDOW_TAGS = (
    "PhotometricInterpretation", "BitsStored", "PixelRepresentation", "VOILUTFunction",
)  # fmt: skip
"""Elements of a display window next to its center and width, without the rescale, which came before."""
CONTRADICTIONS = (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE"))
"""Pairs of PhotometricInterpretation and PresentationLUTShape of which some viewers follow one and some the other."""
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")
"""Height and width of a pixel, by precedence."""


def read_dicom(data: bytes, name: str, limits: RadiographLimits, view: str | None) -> GrayImage:
    """The radiograph of a DICOM file, bone bright, in the orientation in which it is stored.

    Args:
        data: content of the file.
        name: name of the file in messages.
        limits: largest image accepted.
        view: "frontal", "lateral" or another one; a note is added where the header has another view than these two.

    Raises:
        FileError: not a chest radiograph, damaged, over the limits, or with contradicting tags.
    """
    try:
        dataset = dicom.parse(data, name)
        _check_header(dataset, name, limits)
        notes = _other_view(dataset, view)
        values, container = dicom_frame.decode(dataset, name, notes)
        return _image(dataset, values, container, name, limits, notes)
    except FileError:
        raise
    except Exception as error:
        # On a damaged file or an invalid value pydicom raises any exception.
        raise FileError(f"{name}: the DICOM header cannot be read: {one_line(error)}") from error


def _other_view(dataset: pydicom.Dataset, view: str | None) -> list[str]:
    """A note if the header names another view than the given one."""
    tagged, reason = view_of(dataset)
    if view not in ("frontal", "lateral") or tagged == view or not (tagged or reason):
        return []
    return [f"{reason or f'the header names a {tagged} view'}, and it is given as the {view} one: check the views"]


def _check_header(dataset: pydicom.Dataset, name: str, limits: RadiographLimits) -> None:
    """Refuse what is no radiograph before its pixels are decoded; PhotometricInterpretation becomes upper case."""
    reason = why_no_radiograph(dataset)
    if reason:
        raise FileError(f"{name}: {reason}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise FileError(f"{name}: NumberOfFrames {frames}: a radiograph has one: save the frame as a file of its own")
    if not (dataset.get("Rows") and dataset.get("Columns")):
        raise FileError(f"{name}: no Rows and Columns: it is not an image, or its end is missing: copy it again")
    check_size(name, int(dataset.Rows), int(dataset.Columns), limits)
    photometric = str(dataset.get("PhotometricInterpretation") or "").strip().upper()
    if photometric:
        # The decoders compare it in upper case.
        dataset.PhotometricInterpretation = photometric
    if photometric not in ("", "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", *COLORS):
        raise FileError(
            f"{name}: PhotometricInterpretation {photometric[:40]} is not supported: store the image as MONOCHROME2"
        )


def _image(
    dataset: pydicom.Dataset, stored: Stored, container: Stored, name: str, limits: RadiographLimits, notes: list[str]
) -> GrayImage:
    photometric = dataset.PhotometricInterpretation
    if photometric in COLORS:
        pixels, note = to_gray(stored, f"{name}: PhotometricInterpretation {photometric}")
        notes.append(note)
    elif photometric == "PALETTE COLOR":
        pixels, _ = to_gray(apply_color_lut(stored, dataset), f"{name}: PhotometricInterpretation {photometric}")
        notes.append("gray palette applied (PhotometricInterpretation PALETTE COLOR)")
    else:
        if stored.ndim != 2:
            raise FileError(
                f"{name}: PhotometricInterpretation {photometric} with SamplesPerPixel {stored.shape[2]}: correct "
                "one of these tags"
            )
        pixels = _modality_values(dataset, stored, name, notes)
    is_outside, crop = _outside(dataset, stored, container, notes)
    pixels, is_outside = pixels[crop], is_outside[crop]
    exposed = pixels[~is_outside]
    if exposed.size < limits.min_side**2:
        raise FileError(f"{name}: PixelPaddingValue and shutter leave {exposed.size} pixels: correct these tags")
    if photometric.startswith("MONOCHROME"):
        pixels = _display_values(dataset, pixels, exposed, notes)
    pixels = np.asarray(pixels, dtype=np.float32)
    exposed = pixels[~is_outside]
    low, high = float(exposed.min()), float(exposed.max())
    # PresentationLUTShape repeats the photometric interpretation, so that applying both would invert twice.
    if photometric == "MONOCHROME1":
        pixels = high + low - pixels
        notes.append("inverted (PhotometricInterpretation MONOCHROME1)")
    image = np.where(is_outside, np.float32(low), pixels).astype(np.float32)
    image = _square(dataset, image, name, limits, notes)
    orientation = _patient_orientation(dataset, notes)
    background = _square(dataset, is_outside.astype(np.float32), name, limits, []) > 0.5 if is_outside.any() else None
    reason = _unknown_polarity(dataset, photometric)
    if reason:
        notes.append(f"{reason}: whether bone is bright was detected in the image")
    patient = str(dataset.get("PatientID") or "").strip()
    return GrayImage(image, tuple(notes), orientation, background, not reason, pseudonym(patient) if patient else "")


def _unknown_polarity(dataset: pydicom.Dataset, photometric: str) -> str:
    """The reason why the header does not determine whether bone is bright, or nothing."""
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    if (photometric, shape) in CONTRADICTIONS:
        return f"PresentationLUTShape {shape} contradicts PhotometricInterpretation {photometric}"
    intent = str(dataset.get("PresentationIntentType") or "").strip().upper()
    return f"PresentationIntentType {intent}" if intent == "FOR PROCESSING" else ""


def _modality_values(dataset: pydicom.Dataset, stored: Stored, name: str, notes: list[str]) -> Any:
    """Stored values through RescaleSlope and RescaleIntercept, or the modality LUT."""
    if dataset.get("ModalityLUTSequence"):
        try:
            values = _looked_up(stored, dataset.ModalityLUTSequence[0], dataset)
        except Exception as error:
            # An invalid table may raise any exception.
            raise FileError(f"{name}: ModalityLUTSequence: {one_line(error)}: correct or remove it") from error
        notes.append("ModalityLUTSequence applied")
        return values
    # Both are required, and one alone is followed.
    rescale = {tag: dataset.get(tag) for tag in ("RescaleSlope", "RescaleIntercept")}
    slope, intercept = (
        _number(usual if value is None or value == "" else value)
        for value, usual in zip(rescale.values(), (1, 0), strict=True)
    )
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        stated = " and ".join(f"{tag} {value}" for tag, value in rescale.items())
        raise FileError(f"{name}: {stated}: correct or remove them")
    if (slope, intercept) == (1.0, 0.0):
        return stored
    notes.append(f"rescaled (RescaleSlope {slope:g}, RescaleIntercept {intercept:g})")
    return stored.astype(np.float64) * slope + intercept


def _looked_up(values: Any, table: pydicom.Dataset, dataset: pydicom.Dataset) -> Any:
    """Values through an item of a modality or VOI LUT sequence, which has words (US, SS) or bytes (OW).

    pydicom's function takes indices of 8 bits where the entries have 8 bits.
    """
    count, first, _ = (int(value) for value in table.LUTDescriptor)
    count = count or 2**16
    if first >= 2**15 and dataset.PixelRepresentation:
        # Written as US in place of SS.
        first -= 2**16
    entries = table.LUTData
    if isinstance(entries, bytes):
        is_big_endian = dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
        # An odd number of entries of 8 bits is padded with one byte.
        size = "u1" if len(entries) <= count + 1 else ">u2" if is_big_endian else "<u2"
        entries = np.frombuffer(entries, size)[:count]
    entries = np.atleast_1d(np.asarray(entries))
    if len(entries) != count:
        raise ValueError(f"LUTData has {len(entries)} entries, LUTDescriptor {count}")
    return entries[np.clip(np.rint(values) - first, 0, count - 1).astype(np.int64)]


def _outside(
    dataset: pydicom.Dataset, stored: Stored, container: Stored, notes: list[str]
) -> tuple[Bool[np.ndarray, "rows columns"], tuple[slice, slice]]:
    """Pixels of padding and behind a shutter or collimator, and the rectangle that these leave."""
    is_inside, crop = inside_shutter(dataset, stored.shape[:2], notes)
    is_outside = ~is_inside
    value = dataset.get("PixelPaddingValue")
    if value is not None and stored.ndim == 2:
        allocated = container.view(f"{'i' if dataset.PixelRepresentation else 'u'}{container.dtype.itemsize}")
        pixels = dicom.StoredPixels(stored.astype(np.int64), allocated.astype(np.int64), int(dataset.BitsStored))
        mask = dicom.is_padding(dataset, pixels)
        # Padding may touch a shutter in place of the border.
        at_border = dicom.connected_to_border(mask | is_outside)
        padding = (at_border | dicom.padding_region(mask, pixels.allocated)) & ~is_outside
        share = float(padding[crop].mean())
        if share:
            is_outside |= padding
            notes.append(f"{share:.1%} padding set to the darkest value (PixelPaddingValue {value})")
    return is_outside, crop


def _display_values(dataset: pydicom.Dataset, pixels: Any, exposed: Any, notes: list[str]) -> Any:
    """The first VOI LUT or display window that keeps at least `MIN_WINDOW_SHARE` of the range of values apart."""
    low, high = np.percentile(exposed, (0.5, 99.5))
    samples = np.unique(np.linspace(low, high, SAMPLED_VALUES).astype(exposed.dtype))
    for label, apply, within in _display_functions(dataset):
        try:
            apply(samples)  # Its error names the function of the header, unlike that of `within`.
            # A center or width that is no number makes all values NaN.
            kept = np.nan_to_num(within(samples).astype(np.float64))
            share = float((np.diff(kept) != 0).mean()) if len(kept) > 1 else 1.0
            if share >= MIN_WINDOW_SHARE:
                image = apply(pixels)
                notes.append(f"{label} applied")
                return image
        except Exception as error:
            # An invalid window or table may raise any exception; percentiles follow in any case.
            notes.append(f"{label} ignored: {one_line(error)}")
        else:
            notes.append(f"{label} ignored: it keeps {share:.0%} of the pixels' range {low:g} to {high:g}")
    return pixels


def _display_functions(dataset: pydicom.Dataset) -> list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]]:
    """Every VOI LUT and display window of a header: its name, itself, and the same with constants outside its width.

    A sigmoid changes outside its width too, where it keeps next to no contrast. They act on the modality values alone.
    """
    rules: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = []

    def window(center: Any, width: Any, **changed: str) -> Callable[[Any], Any]:
        part = pydicom.Dataset()
        part.WindowCenter, part.WindowWidth = _number(center), _number(width)
        for name in WINDOW_TAGS:
            if name in changed:
                setattr(part, name, changed[name])  # A new element: those of the dataset are shared.
            elif name in dataset and not dataset[name].is_empty:
                part[name] = dataset[name]
        return lambda values: apply_windowing(values, part)

    for k, item in enumerate(dataset.get("VOILUTSequence") or ()):
        table = partial(_looked_up, table=item, dataset=dataset)
        rules.append((f"VOILUTSequence {k + 1}", table, table))
    function = dataset.get("VOILUTFunction") or "LINEAR"
    centers, widths = (_multiple(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    for center, width in zip(centers, widths, strict=False):
        label = f"display window (WindowCenter {center}, WindowWidth {width}, VOILUTFunction {function})"
        rules.append((label, window(center, width), window(center, width, VOILUTFunction="LINEAR_EXACT")))
    return rules


def _number(value: Any) -> float:
    """The number of an element, also with a decimal comma; NaN for other text."""
    try:
        return float(str(value).replace(",", "."))
    except ValueError:
        return float("nan")


def _multiple(value: Any) -> list[Any]:
    """The values of an element, none if it is absent or empty."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]


def _joined(values: list[Any]) -> str:
    """Values of an element as DICOM writes them."""
    return "\\".join(map(str, values))


def _square(
    dataset: pydicom.Dataset, image: Float32[np.ndarray, "_ _"], name: str, limits: RadiographLimits, notes: list[str]
) -> Float32[np.ndarray, "_ _"]:
    """The image with square pixels, by the first spacing of the header that is one."""
    for tag in SPACINGS:
        values = _multiple(dataset.get(tag))
        if not values:
            continue
        if len(values) != 2 or not all(0 < _number(value) < 1e6 for value in values):
            notes.append(f"{tag} {_joined(values)} ignored: it is not two positive numbers")
            continue
        height, width = map(_number, values)
        return square_pixels(image, height / width, f"{tag} {_joined(values)}", name, limits, notes)
    return image


def _patient_orientation(dataset: pydicom.Dataset, notes: list[str]) -> tuple[str, str] | None:
    """Directions of the patient along rows and columns, from PatientOrientation."""
    values = [str(value).strip().upper() for value in _multiple(dataset.get("PatientOrientation"))]
    if not any(values):
        return None
    if len(values) != 2 or not all(value and set(value) <= set("RLAPHF") for value in values):
        notes.append(f"PatientOrientation {_joined(values)} ignored: it is not two directions out of R, L, A, P, H, F")
        return None
    return values[0], values[1]
