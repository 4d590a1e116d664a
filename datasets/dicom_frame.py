"""Decoding of the stored values of a DICOM radiograph: one frame in any supported transfer syntax.

Every transfer syntax has one decoder: pydicom's, or one of imagecodecs (libjpeg-turbo, CharLS, OpenJPEG). The size in a
compressed frame and the length of an uncompressed one must match the header, and the values must not wrap around under
the header's BitsStored, HighBit and PixelRepresentation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pydicom
from jaxtyping import Bool, Float, Integer, Shaped
from pydicom import uid
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder

from raylift.datasets import jpeg
from raylift.datasets.errors import FileError


def _decode_jpeg(frame: bytes) -> Any:
    pixels = imagecodecs.jpeg8_decode(frame)
    if jpeg.is_cut(frame, jpeg.layout(frame).end, pixels, imagecodecs.jpeg8_decode):
        raise ValueError("the compressed data end before the last pixel")
    return pixels


def _decode_jpegls(frame: bytes) -> Any:
    # Without an end marker CharLS never returns from a frame that is cut.
    return imagecodecs.jpegls_decode(frame + b"\xff\xd9")


Decoder = Callable[[bytes], Any]
DECODERS: dict[str, Decoder | None] = {
    **dict.fromkeys((uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian), None),
    uid.RLELossless: None,
    **dict.fromkeys((uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1), _decode_jpeg),
    **dict.fromkeys((uid.JPEGLSLossless, uid.JPEGLSNearLossless), _decode_jpegls),
    **dict.fromkeys(
        (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
        imagecodecs.jpeg2k_decode,
    ),
}
"""The decoder of a frame by transfer syntax; None for those that pydicom itself decodes."""
KINDS: dict[Decoder | None, str] = {
    _decode_jpeg: "JPEG",
    _decode_jpegls: "JPEG-LS",
    imagecodecs.jpeg2k_decode: "JPEG 2000",
}
"""What each decoder decodes."""
REQUIRED = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation",
)  # fmt: skip
"""Elements without which pixels cannot be decoded, and whose value the others do not determine."""
WRAPPED = 0.25
"""Fraction of the neighbors over which values wrap around that another interpretation of the bits makes more alike."""
FULL_WRAPPED, FULL_LINES = 0.5, 0.2
"""The same share if BitsStored fills the container, where both interpretations are complete, and share of the rows in
which such neighbors are. On 6 radiographs, 18 digitally reconstructed ones and a formula, unchanged, with a border,
cropped, rotated or with another gamma (260 images in 8 and in 16 bits), the shares were 0.925 to 1 and 0.41 to 1
under the wrong PixelRepresentation if the values fill the range or half of it from zero, and the first was 0 to 0.075
under the right one. With bright letters on dark images the first was up to 1, the second up to 0.094. Where few values
exceed half of the range, few wrap: at 60 % of it 6 of 260 unsigned images stated as signed remain below the limits."""
FLAT = 0.25
"""Fraction of the upper or lower half of the range above which one value is background or saturated, not image."""
MAX_PATTERNS = 4
"""Most patterns of unused bits, each in over 1 % of the pixels, that overlays make; parts of the values make more."""
REPEATED = 0.95
"""Correlation of parts of an image from which they are the same image."""
TORN = 6.0
"""Ratio of the roughness along columns and rows at which consecutive rows do not belong together. On 241 images of 4
radiographs and 3 phantoms, unchanged, with a border, cropped, rotated by 7 degrees or with another gamma, the
correlation was at most 0.55 and the ratio 0.94 to 3.24."""

Stored = Integer[np.ndarray, "rows columns *samples"]


def decode(dataset: pydicom.Dataset, name: str, notes: list[str]) -> tuple[Stored, Stored]:
    """The stored values as BitsStored, HighBit and PixelRepresentation define them, and the containers they lie in.

    Args:
        dataset: a parsed file with PixelData.
        name: name of the file in messages.
        notes: a note is appended for bits that are not used.

    Raises:
        FileError: an unsupported transfer syntax, a damaged frame, or one that does not match its header.
    """
    container, shift = decode_containers(dataset, name)
    if int(dataset.get("SamplesPerPixel") or 1) > 1 or container.dtype.kind == "f":
        return container, container
    bits = int(dataset.BitsStored)
    values = _stored_values(container, bits, shift, bool(int(dataset.PixelRepresentation)))
    if str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper().startswith("MONOCHROME"):
        _check_bits(values, container, dataset, shift, name)
    if shift:
        notes.append(f"values taken from bit {shift} up (BitsStored {bits}, HighBit {dataset.HighBit})")
    elif not np.array_equal(values, container):
        notes.append(f"bits above BitsStored {bits} masked")
    if not uid.UID(dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)).is_encapsulated:
        _check_rows(values, name)
    return values, container


def decode_containers(dataset: pydicom.Dataset, name: str) -> tuple[Stored, int]:
    """All bits of a frame in native byte order, and the number of the bit at which the stored values begin.

    Raises:
        FileError: an unsupported transfer syntax, a damaged frame, or one of another size than its header's.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    if syntax not in DECODERS:
        raise FileError(f"{name}: transfer syntax {uid.UID(syntax).name} is not supported: convert the file to RLE")
    if dataset.get("PixelData") is None:
        raise FileError(f"{name}: the DICOM file has no PixelData: it is not an image")
    absent = [tag for tag in REQUIRED if dataset.get(tag) in (None, "")]
    if absent:
        raise FileError(f"{name}: {' and '.join(absent)} absent or empty, so the pixels have no meaning: set them")
    if uid.UID(syntax).is_encapsulated:
        frame = _compressed_frame(dataset, name)
    else:
        _check_length(dataset, name)
    color = int(dataset.get("SamplesPerPixel") or 1) > 1
    options: dict[str, Any] = {} if color else {"correct_unused_bits": False}
    decoder = DECODERS[syntax]
    try:
        if decoder is not None:
            container = decoder(frame)
        else:
            container, _ = get_decoder(syntax).as_array(dataset, **options)
    except Exception as error:
        # On a damaged frame pydicom and the codecs raise any exception.
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise FileError(f"{name}: the pixels cannot be decoded: {text}") from error
    expected = (int(dataset.Rows), int(dataset.Columns), *([int(dataset.SamplesPerPixel)] if color else []))
    if container.shape != expected:
        raise FileError(f"{name}: the frame decodes to {container.shape}, the header has {expected}: correct its tags")
    bits = int(dataset.get("BitsStored") or 0)
    # A compressed frame is right-aligned; in others HighBit gives the place of the values in their containers.
    shift = 0 if decoder is not None else max(0, int(dataset.get("HighBit", bits - 1)) + 1 - bits)
    return container.astype(container.dtype.newbyteorder("=")), shift


def _stored_values(container: Stored, bits: int, shift: int, is_signed: bool) -> Stored:
    """So many bits above the `shift` lowest ones, sign-extended if they are signed."""
    size = container.dtype.itemsize
    left = max(0, 8 * size - bits - shift)
    moved = (container.view(f"u{size}") << left).view(f"{'i' if is_signed else 'u'}{size}")
    return moved >> max(0, 8 * size - bits)


def _check_bits(values: Stored, container: Stored, dataset: pydicom.Dataset, shift: int, name: str) -> None:
    """Refuse a header under which values wrap around: another interpretation then makes these neighbors more alike.

    Overlays in the bits above make them less alike, and have few patterns.
    """
    size = container.dtype.itemsize
    bits = int(dataset.BitsStored) + shift
    unsigned = container.view(f"u{size}")
    # Padding may have any value.
    padding_value = dataset.get("PixelPaddingValue")
    padding = unsigned == int(padding_value or 0) % 2 ** (8 * size)
    exposed = _neighbors(~padding, 1)
    exposed = exposed[:, 1:] & exposed[:, :-1]
    above = unsigned[:: max(1, len(container) // 256)] >> min(bits, 8 * size - 1)
    patterns = (np.unique(above, return_counts=True)[1] > 0.01 * above.size).sum()
    contradicts = bits < 8 * size and patterns > MAX_PATTERNS
    steps = np.abs(_differences(values, 1) * 2**shift)[exposed]
    for kind in "ui" if bits < 8 * size else "":
        others = np.abs(_differences(container.view(f"{kind}{size}"), 1))[exposed]
        wraps = np.abs(others - steps) >= 2 ** (bits - 1)
        contradicts |= bool(wraps.any() and (others < steps)[wraps].mean() > WRAPPED)
    if contradicts or (bits == 8 * size and _has_other_sign(values, ~padding | (padding_value is None))):
        raise FileError(
            f"{name}: BitsStored {dataset.BitsStored}, HighBit {dataset.get('HighBit')} and PixelRepresentation "
            f"{dataset.PixelRepresentation} contradict the pixels, whose values wrap around: correct these tags"
        )


def _has_other_sign(values: Stored, exposed: Bool[np.ndarray, "rows columns"]) -> bool:
    """Whether values that fill their containers wrap around in many rows under PixelRepresentation, and not otherwise.

    Steps to and from a background or saturated letters are as large as wraps, and do not count.
    """
    lines, exposed = _neighbors(values, 1), _neighbors(exposed, 1)
    size, is_signed = values.dtype.itemsize, values.dtype.kind == "i"
    is_upper = lines >= (0 if is_signed else 2 ** (8 * size - 1))
    for half in (is_upper & exposed, ~is_upper & exposed):
        levels, counts = np.unique(lines[half], return_counts=True)
        if len(levels) and counts.max() > FLAT * counts.sum():
            exposed = exposed & (lines != levels[counts.argmax()])
    kinds = "iu" if is_signed else "ui"
    stated, other = (np.abs(np.diff(lines.view(f"{kind}{size}").astype(np.float64), axis=1)) for kind in kinds)
    wraps = (np.abs(other - stated) >= 2 ** (8 * size - 1)) & exposed[:, 1:] & exposed[:, :-1]
    better = wraps & (other < stated)
    return bool(better.sum() > FULL_WRAPPED * wraps.sum() and better.any(axis=1).mean() > FULL_LINES)


def _check_rows(values: Stored, name: str) -> None:
    """Refuse an uncompressed frame whose rows have another length than the header's, so that the image is torn."""
    along, across = _roughness(values, 1), _roughness(values, 0)
    is_torn = min(along, across) > 0 and not 1 / TORN < along / across < TORN
    if is_torn or _is_repeated(values):
        raise FileError(
            f"{name}: {values.shape[0]} rows of {values.shape[1]} columns contradict the pixels, whose rows do not "
            "continue each other: correct Rows, Columns and BitsAllocated"
        )


def _is_repeated(values: Stored) -> bool:
    """Whether the image is the same two to four times from left to right: each of its rows is several ones."""
    lines = _neighbors(values, 1).astype(np.float64)
    for count in (2, 3, 4):
        parts = np.array_split(lines[:, : lines.shape[1] // count * count], count, axis=1)
        # What all columns have in common, as dark bars above and below, is in every part.
        first, second = (part - part.mean(axis=1, keepdims=True) for part in parts[:2])
        if first.std() and second.std() and np.corrcoef(first.ravel(), second.ravel())[0, 1] > REPEATED:
            return True
    return False


def _roughness(values: Stored, axis: int) -> float:
    """Mean absolute difference between neighbors along an axis, without the largest, which are edges of the image."""
    steps = np.abs(_differences(values, axis))
    return float(steps[steps <= np.quantile(steps, 0.95)].mean())


def _differences(values: Stored, axis: int) -> Float[np.ndarray, "_ _"]:
    """Differences between neighbors along an axis, on about 256 lines."""
    return np.diff(_neighbors(values, axis).astype(np.float64), axis=axis)


def _neighbors(values: Shaped[np.ndarray, "rows columns"], axis: int) -> Shaped[np.ndarray, "_ _"]:
    """About 256 whole lines along an axis."""
    step = max(1, values.shape[1 - axis] // 256)
    return values[::step] if axis == 1 else values[:, ::step]


def _check_length(dataset: pydicom.Dataset, name: str) -> None:
    samples = int(dataset.get("SamplesPerPixel") or 1)
    bits = int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.BitsAllocated)
    if str(dataset.get("PhotometricInterpretation")) == "YBR_FULL_422":
        bits = bits * 2 // 3
    expected, stored = -(-bits // 8), len(dataset.PixelData)
    # An odd length is padded with one byte.
    if not expected <= stored <= expected + 1:
        raise FileError(
            f"{name}: the pixels cannot be decoded: {stored} bytes, where {dataset.Rows} x {dataset.Columns} pixels of "
            f"{dataset.BitsAllocated} bits have {expected}: correct Rows, Columns and BitsAllocated, unless "
            "it is truncated"
        )


def _compressed_frame(dataset: pydicom.Dataset, name: str) -> bytes:
    """The compressed frame, whose size is compared with the header before memory is allocated for it."""
    try:
        frames = list(generate_frames(dataset.PixelData, number_of_frames=1))
        kind, coded = _kind_and_shape(frames[0])
    except Exception as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise FileError(f"{name}: the pixels cannot be decoded: the compressed frame is damaged{reason}") from error
    if len(frames) > 1:
        raise FileError(f"{name}: PixelData has {len(frames)} frames: save the radiograph as a file of its own")
    syntax = uid.UID(dataset.file_meta.TransferSyntaxUID)
    if kind and kind != KINDS.get(DECODERS[syntax]):
        raise FileError(f"{name}: the frame is {kind}, the transfer syntax {syntax.name}: correct TransferSyntaxUID")
    expected = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)
    if coded is not None and coded[:2] != expected[:2]:
        raise FileError(
            f"{name}: the compressed frame has {coded[0]} x {coded[1]} pixels, the header "
            f"{expected[0]} x {expected[1]}: correct Rows and Columns"
        )
    if coded is not None and coded[2] != expected[2]:
        raise FileError(
            f"{name}: the compressed frame has {coded[2]} samples per pixel, the header {expected[2]}: correct "
            "SamplesPerPixel"
        )
    return frames[0]


def _kind_and_shape(frame: bytes) -> tuple[str, tuple[int, int, int] | None]:
    """JPEG, JPEG-LS or JPEG 2000 with rows, columns and samples of a frame; no kind and None for other frames."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, at + 8)
        (samples,) = struct.unpack_from(">H", frame, at + 40)
        return "JPEG 2000", (bottom - top, right - left, samples)
    if frame[:2] != b"\xff\xd8":
        return "", None
    stream = jpeg.layout(frame)
    kind = "JPEG-LS" if stream.start_of_frame == jpeg.JPEG_LS else "JPEG"
    return kind, (stream.rows, stream.columns, stream.samples)
