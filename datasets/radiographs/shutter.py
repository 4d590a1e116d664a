"""Display shutters and collimators of DICOM radiographs: what lies behind them is not part of the image."""

from __future__ import annotations

import numpy as np
import pydicom
from jaxtyping import Bool
from PIL import Image, ImageDraw

Region = Bool[np.ndarray, "rows columns"]


def inside_shutter(
    dataset: pydicom.Dataset, shape: tuple[int, int], notes: list[str]
) -> tuple[Region, tuple[slice, slice]]:
    """The pixels that a shutter or else a collimator leaves, and the rectangle around them.

    One that would leave less than half of the rows or columns, or has invalid numbers, is not used.

    Args:
        dataset: the header.
        shape: rows and columns.
        notes: a note is appended for the one that is used and for one that is not.
    """
    for kind in ("Shutter", "Collimator"):
        if f"{kind}Shape" not in dataset:
            continue
        try:
            shapes = dataset[f"{kind}Shape"].value
            inside = np.ones(shape, dtype=bool)
            for form in [shapes] if isinstance(shapes, str) else shapes or ():
                inside &= _FORMS[form.strip().upper()](dataset, kind, shape)
        except (AttributeError, KeyError, TypeError, ValueError):
            notes.append(f"{kind}Shape {shapes} ignored: its edges, circle or vertices are absent or no numbers")
            continue
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        if 2 * len(rows) < shape[0] or 2 * len(columns) < shape[1]:
            notes.append(f"{kind}Shape ignored: it leaves less than half of the rows or columns")
            continue
        if not inside.all():
            notes.append(f"cropped ({kind}Shape)")
            return inside, (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return np.ones(shape, dtype=bool), (slice(None), slice(None))


def _rectangle(dataset: pydicom.Dataset, kind: str, shape: tuple[int, int]) -> Region:
    top, bottom = (int(dataset[f"{kind}{side}HorizontalEdge"].value) for side in ("Upper", "Lower"))
    left, right = (int(dataset[f"{kind}{side}VerticalEdge"].value) for side in ("Left", "Right"))
    inside = np.zeros(shape, dtype=bool)
    # Edges are row and column numbers from 1 and are themselves covered; some are outside the image.
    inside[max(top, 0) : max(bottom - 1, 0), max(left, 0) : max(right - 1, 0)] = True
    return inside


def _circle(dataset: pydicom.Dataset, kind: str, shape: tuple[int, int]) -> Region:
    row, column = (int(value) for value in dataset[f"CenterOfCircular{kind}"].value)
    radius = int(dataset[f"RadiusOfCircular{kind}"].value)
    y, x = np.ogrid[1 : shape[0] + 1, 1 : shape[1] + 1]
    inside: Region = (y - row) ** 2 + (x - column) ** 2 < radius**2
    return inside


def _polygon(dataset: pydicom.Dataset, kind: str, shape: tuple[int, int]) -> Region:
    numbers = [int(value) - 1 for value in dataset[f"VerticesOfThePolygonal{kind}"].value]
    image = Image.new("1", shape[::-1])
    # Vertices are pairs of row and column.
    ImageDraw.Draw(image).polygon([(x, y) for y, x in zip(numbers[::2], numbers[1::2], strict=True)], fill=1)
    return np.asarray(image, dtype=bool)


_FORMS = {"RECTANGULAR": _rectangle, "CIRCULAR": _circle, "POLYGONAL": _polygon}
