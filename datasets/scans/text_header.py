"""Headers of NRRD and MetaImage files: fields, and the spacing, orientation and rescale that they state.

ITK replaces what such a header does not state by a spacing of 1 mm and axes to the left, posterior and superior, and
ignores units, so both are checked here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float

from raylift.datasets.errors import FileError

LONGEST_HEADER = 2**16
HEADER_END = {
    "NRRD": re.compile(rb"\r?\n\r?\n|\Z"),
    "MetaImage": re.compile(rb"^ElementDataFile *=.*(?:\n|\Z)", re.IGNORECASE | re.MULTILINE),
}
MILLIMETERS = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "\N{MICRO SIGN}m": 0.001}
SPACES = (
    "left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las",
)  # fmt: skip
"""Spaces of NRRD in the patient's axes."""
MATRICES = ("TransformMatrix", "Rotation", "Orientation")
"""Names of MetaImage's direction matrix."""


@dataclass(frozen=True)
class TextHeader:
    """The fields of a NRRD or MetaImage header."""

    path: Path
    kind: str
    """NRRD or MetaImage."""
    fields: dict[str, str]
    """Values by name; names of NRRD in lower case."""
    length: int
    """Bytes up to the voxels that follow it."""

    @property
    def data_file(self) -> str:
        """The separate voxel file; empty if the voxels follow the header."""
        names = ("data file", "datafile", "elementdatafile")
        value = next((value for key, value in self.fields.items() if key.lower() in names), "")
        return "" if value == "LOCAL" else value.removeprefix("./")

    @property
    def encoding(self) -> str:
        """Encoding of the voxels: raw, gzip (also a zlib stream), text, or another one of NRRD."""
        if self.kind == "NRRD":
            stated = self.fields.get("encoding", "").lower()
            return {"gz": "gzip", "txt": "text", "ascii": "text"}.get(stated, stated)
        if self.fields.get("BinaryData", "True").lower() not in ("true", "1"):
            return "text"
        return "gzip" if self.fields.get("CompressedData", "").lower() in ("true", "1") else "raw"

    def skipped(self, key: str) -> int:
        """The number in a field of what is skipped before the voxels; 0 without the field, -1 for all but the last."""
        value = self.fields.get(key, "0")
        if not re.fullmatch(r"-1|\d{1,9}", value):
            raise FileError(f"{self.path}: {key} '{value[:20]}' is not a number of what to skip: correct the header")
        return int(value)


@dataclass(frozen=True)
class HeaderGeometry:
    """Spacing, unit and rescale that a header states, beyond what ITK reads."""

    unit_mm: float = 1.0
    """Millimeters in its unit of length."""
    spacing_mm: tuple[float, ...] | None = None
    """Assumed in place of ITK's spacing."""
    rescale: tuple[float, float] = (1.0, 0.0)
    changes: tuple[str, ...] = ()


def read_header(path: Path) -> TextHeader:
    """The header of a file whose suffix is that of a NRRD or MetaImage.

    Raises:
        FileError: other content, or a header without end.
    """
    kind = "NRRD" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImage"
    with path.open("rb") as file:
        head = file.read(LONGEST_HEADER)
    if not (head.startswith(b"NRRD0") if kind == "NRRD" else re.search(rb"^NDims *=", head, re.MULTILINE)):
        raise FileError(f"{path}: the header cannot be read: not a {kind}, it begins with {head[:8]!r}")
    end = HEADER_END[kind].search(head)
    if end is None or end.end() == LONGEST_HEADER:
        raise FileError(f"{path}: the header cannot be read: no end of it in the first {len(head)} bytes")
    lines = os.fsdecode(head[: end.end()]).splitlines()
    # A NRRD line with := is a pair of key and value, not a field.
    separator = re.compile(r"^([^:]*):(?!=)(.*)" if kind == "NRRD" else "^([^=]*)=(.*)")
    pairs = [match.groups() for line in lines if not line.startswith("#") and (match := separator.match(line))]
    fields: dict[str, str] = {}
    for key, value in pairs:
        name = key.strip().lower() if kind == "NRRD" else key.strip()
        if fields.setdefault(name, value.strip()) != value.strip():
            raise FileError(
                f"{path}: {name} is '{fields[name][:40]}' and again '{value.strip()[:40]}': remove the wrong line"
            )
    return TextHeader(path, kind, fields, end.end())


def check_shape(header: TextHeader) -> None:
    """Refuse encodings that are not read, and fields of another length than the number of dimensions.

    With some of these ITK crashes.
    """
    if header.encoding not in ("raw", "gzip", "text"):
        raise FileError(
            f"{header.path}: encoding '{header.encoding[:20]}' is not supported: store it with encoding gzip or raw"
        )
    dimensions, sizes = ("dimension", "sizes") if header.kind == "NRRD" else ("NDims", "DimSize")
    stated = header.fields.get(dimensions, "")
    if stated not in ("1", "2", "3", "4", "5"):
        raise FileError(f"{header.path}: {dimensions} '{stated[:20]}' is not that of a volume: correct the header")
    lengths = dict.fromkeys((sizes, "ElementSpacing", "ElementSize", "Offset", "Position", "Origin"), int(stated))
    lengths |= dict.fromkeys(MATRICES, int(stated) ** 2)
    for key, length in lengths.items():
        if key in header.fields and len(_numbers(header, key)) != length:
            raise FileError(
                f"{header.path}: {key} '{header.fields[key][:80]}' does not have {length} numbers: correct the header"
            )


def header_geometry(header: TextHeader, assume_spacing_mm: Sequence[float] | None) -> HeaderGeometry:
    """Check that a header states spacing and orientation.

    Args:
        header: the header.
        assume_spacing_mm: spacing along the file's axes where it states none; its axes are then assumed to point to the
            left, posterior and superior.

    Raises:
        FileError: no spacing, no orientation, or contradicting or unsupported ones.
    """
    return (_nrrd if header.kind == "NRRD" else _meta_image)(header, assume_spacing_mm)


def _assumed(header: TextHeader, spacing_mm: Sequence[float] | None, lacks: str, stated: str = "") -> HeaderGeometry:
    """The geometry with the spacing that is stated without a unit, or else with the one given."""
    if spacing_mm is None:
        raise FileError(
            f"{header.path}: the {header.kind} states no {lacks}, so the size of the body is unknown: add it, or pass "
            "--assume-spacing-mm with three values"
        )
    own = _numbers(header, stated) if stated in header.fields else np.zeros(0)
    if is_stated := len(own) == 3 and bool((own > 0).all()):
        spacing_mm = own.tolist()
    shown = " x ".join(f"{value:g}" for value in spacing_mm)
    spacing = f"its {stated} {shown} in mm" if is_stated else f"{shown} mm"
    change = f"no {lacks}: {spacing} and axes to the left, posterior and superior are assumed"
    return HeaderGeometry(spacing_mm=tuple(spacing_mm), changes=(change,))


def _nrrd(header: TextHeader, assume_spacing_mm: Sequence[float] | None) -> HeaderGeometry:
    fields = header.fields
    space = fields.get("space", "").lower()
    if not space and "space directions" not in fields:
        return _assumed(header, assume_spacing_mm, "space and space directions", "spacings")
    if space not in SPACES:
        raise FileError(f"{header.path}: space '{space}' has no known axes in the patient: state it as LPS or RAS")
    if "space directions" not in fields:
        raise FileError(f"{header.path}: a space without space directions: add them")
    directions = fields["space directions"]
    if len(re.findall(r"\([^)]*\)", directions)) != 3:
        raise FileError(
            f"{header.path}: space directions '{directions[:80]}' do not have one vector for each of three axes, so "
            "the size of the body is unknown: correct them"
        )
    return _in_units(header, re.findall(r'"([^"]*)"', fields.get("space units", "")) or ["mm"])


def _meta_image(header: TextHeader, assume_spacing_mm: Sequence[float] | None) -> HeaderGeometry:
    fields = header.fields
    modality = fields.get("Modality", "MET_MOD_CT")
    if modality in ("MET_MOD_MR", "MET_MOD_NM", "MET_MOD_US"):
        raise FileError(f"{header.path}: modality {modality} is not CT")
    matrices = [_numbers(header, key) for key in MATRICES if key in fields]
    for matrix in matrices:
        if len(matrix) == 9 and not np.allclose(np.linalg.norm(matrix.reshape(3, 3), axis=1), 1, atol=1e-3):
            raise FileError(f"{header.path}: the rows of the direction matrix are not of length 1: correct the header")
    changes = _anatomical(header, matrices)
    spacing, size = _numbers(header, "ElementSpacing"), _numbers(header, "ElementSize")
    if not len(spacing) and not len(size):
        return _assumed(header, assume_spacing_mm, "ElementSpacing")
    if not len(spacing):
        changes += ("no ElementSpacing: ElementSize is used",)
    elif len(size) and not np.allclose(size, spacing, rtol=1e-2):
        changes += (f"ElementSize {fields['ElementSize']} differs from ElementSpacing: ElementSpacing is used",)
    if not all(value > 0 for value in (spacing if len(spacing) else size)):
        raise FileError(f"{header.path}: ElementSpacing {fields.get('ElementSpacing')} is not positive: correct it")
    units = _in_units(header, [fields.get("DistanceUnits", "mm")])
    rescale = [_numbers(header, f"ElementToIntensityFunction{name}") for name in ("Slope", "Offset")]
    slope, intercept = (float(v[0]) if len(v) else default for v, default in zip(rescale, (1.0, 0.0), strict=True))
    return replace(units, rescale=(slope, intercept), changes=(*changes, *units.changes))


def _anatomical(header: TextHeader, matrices: Sequence[Float[np.ndarray, " n"]]) -> tuple[str, ...]:
    """Compare AnatomicalOrientation, whose letters name the sides that the axes come from, with the matrix."""
    stated = header.fields.get("AnatomicalOrientation", "???").upper()
    if not re.fullmatch("[RLAPIS]{3}", stated):
        return () if matrices else ("no TransformMatrix: axes to the left, posterior and superior are assumed",)
    if not matrices:
        if stated == "RAI":
            return ()
        raise FileError(f"{header.path}: AnatomicalOrientation {stated} without a TransformMatrix: add the matrix")
    if len(matrices[0]) != 9:
        return ()
    directions = matrices[0].reshape(3, 3).T.ravel().tolist()
    towards = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(directions)
    orientation = towards.translate(str.maketrans("RLAPIS", "LRPASI"))
    if stated == orientation:
        return ()
    return (
        f"AnatomicalOrientation {stated} contradicts the direction matrix, which is {orientation}: the matrix is used",
    )


def _numbers(header: TextHeader, key: str) -> Float[np.ndarray, " n"]:
    try:
        return np.array([float(value) for value in header.fields.get(key, "").split()])
    except ValueError as error:
        raise FileError(f"{header.path}: {key} '{header.fields[key]}' is not a list of numbers: correct it") from error


def _in_units(header: TextHeader, units: Sequence[str]) -> HeaderGeometry:
    """The factor to millimeters, reported unless it is 1."""
    if len(set(units)) != 1 or units[0].lower() not in MILLIMETERS:
        raise FileError(f"{header.path}: units of length {', '.join(units)} are not supported: convert it to mm")
    factor = MILLIMETERS[units[0].lower()]
    changes = (f"lengths in {units[0]} were converted to mm",) if factor != 1 else ()
    return HeaderGeometry(factor, changes=changes)
