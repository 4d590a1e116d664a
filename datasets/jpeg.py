"""The markers of a JPEG or JPEG-LS stream: its size, its number of scans and its end, read before it is decoded."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_SCANS = 32
"""Most scans of a stream. Encoders write 1 to 12; each costs a pass over all pixels, however short it is."""
JPEG_LS = 0xF7
START_OF_FRAME = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), JPEG_LS)
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
STANDALONE = (0x01, *range(0xD0, 0xD9))
"""Markers without a length."""
NEXT_MARKER = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")
"""The marker after the entropy-coded data of a scan, in which 0xFF is followed by a smaller byte or a restart."""
PROBE = b"\xaa\x55" * 32
"""Bytes that a decoder reads only if the last scan ends before its last pixel."""


@dataclass(frozen=True)
class Layout:
    """What the markers of a stream state."""

    start_of_frame: int
    """The marker before the size, which names the process."""

    rows: int
    columns: int
    samples: int
    """Samples of a pixel."""
    scans: int
    end: int | None
    """Offset of the end-of-image marker; None if there is none."""


def layout(data: bytes, start: int = 0) -> Layout:
    """The layout of the stream that begins at `start`.

    Raises:
        ValueError: the markers are damaged, or there are over `MAX_SCANS` scans.
    """
    at, scans, end = start + 2, 0, None
    size: tuple[int, int, int, int] | None = None
    while at + 4 <= len(data) or data[at : at + 2] == b"\xff\xd9":
        if data[at] != 0xFF:
            raise ValueError("a JPEG marker is missing")
        marker = data[at + 1]
        if marker == END_OF_IMAGE:
            end = at
            break
        if marker == 0xFF or marker in STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in START_OF_FRAME:
            rows, columns, samples = struct.unpack_from(">HHB", data, at + 5)
            size = marker, rows, columns, samples
        at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
        if marker == START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"over {MAX_SCANS} scans: save it as a baseline JPEG")
            following = NEXT_MARKER.search(data, at)
            at = following.start() if following else len(data)
    if size is None or not scans:
        raise ValueError("the JPEG has no frame or no scan")
    return Layout(*size, scans, end)


def is_cut(data: bytes, end: int | None, pixels: Any, decode: Callable[[bytes], Any]) -> bool:
    """Whether the last scan ends before the last pixel; decoders fill the rest with a constant.

    Bytes inserted before the end-of-image marker then change the pixels, and no others.

    Args:
        data: the stream.
        end: its `Layout.end`.
        pixels: what `decode` returned for it.
        decode: the decoder.
    """
    if end is None:
        return True
    try:
        return not np.array_equal(pixels, decode(data[:end] + PROBE + data[end:]))
    except Exception:
        # The decoder read the inserted bytes, and they are no valid code.
        return True
