"""Radiographs that tests feed to `raylift.datasets`: one given by a formula, files of every kind, disturbed images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid
from scipy import ndimage

from raylift.datasets.intensity import normalize

REAL = [
    f"{case}_{view}" for case in ("cc0_normal", "eurorad_12325_d0", "rad_covid15") for view in ("frontal", "lateral")
]


def chest(rows: int = 120, columns: int = 100, most: int = 200) -> np.ndarray:
    """A bone-bright image with dark upper corners, unlike its flip image; values 0 to `most`."""
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    body = np.clip(1.6 - 1.6 * (x**2 + 0.5 * (y - 0.5) ** 2), 0, 1)
    lungs = 0.5 * (np.hypot((abs(x) - 0.4) / 0.25, y / 0.6) < 1)
    marker = 0.3 * (np.hypot(x + 0.6, y - 0.7) < 0.1)
    return np.rint(np.clip(body - lungs + marker, 0, 1) * 200) * (most // 200)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def dicom(pixels: np.ndarray | None = None, *, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """A computed radiograph; a tag given as None is left out."""
    pixels = chest(most=4000).astype("<u2") if pixels is None else pixels
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = ComputedRadiographyImageStorage, generate_uid(), "CR"
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = pixels.itemsize * 8, pixels.itemsize * 8, pixels.itemsize * 8 - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless)
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def disturbed(image: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The image as others may have taken, cropped, bordered or processed it; values 0 to 1."""
    image = normalize(image)
    rows, columns = image.shape
    for value in (0, 1):
        yield (
            f"border of {value}",
            np.pad(image, ((rows // 10, rows // 20), (columns // 10,) * 2), constant_values=value),
        )
        yield f"bands of {value}", np.pad(image, ((0, 0), (columns // 6,) * 2), constant_values=value)
    yield "cut", image[rows // 20 : -rows // 20, columns // 20 : -columns // 20]
    yield "soft", image**0.5
    yield "hard", image**2
    yield "moved", np.pad(image, ((0, 0), (columns // 20, 0)), mode="edge")[:, :columns]
    yield "turned", ndimage.rotate(image, 7, reshape=False, order=1)


def scaled(image: np.ndarray) -> np.ndarray:
    """The image with its values mapped to 0 to 1."""
    return (image - image.min()) / np.ptp(image)


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """An item of a sequence of coded concepts."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
