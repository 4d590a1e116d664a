"""Pairs of radiographs in folders: DICOM files by study, others by words in their paths.

The view of a DICOM file is that of its header, see `dicom_view`. Otherwise it is the word frontal, pa or ap, or lateral
or lat, in its name or in a folder below the searched one. Files whose paths are equal without these words, and without
CheXpert's `view1`, belong together: `anna_pa.png` and `anna_lat.png`, `7/frontal.jpg` and `7/lateral.jpg`,
`frontal/7.png` and `lateral/7.png`, `study1/view1_frontal.jpg` and `study1/view2_lateral.jpg`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.uid import MediaStorageDirectoryStorage

from raylift.datasets import dicom
from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.dicom_view import NEGATED, described_view, rank, view_of, why_no_radiograph
from raylift.datasets.radiographs.image_file import SIGNATURES
from raylift.datasets.radiographs.pairing import FoundPairs, LeftOut, PairCandidates, ViewName, select_pairs
from raylift.datasets.sources import is_apple_double, pseudonym, walk

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PATH_WORDS: dict[str, ViewName] = {
    "frontal": "frontal", "pa": "frontal", "ap": "frontal", "lateral": "lateral", "lat": "lateral",
}  # fmt: skip
"""Words of a view in paths; fewer than in DICOM headers, because LL or RL may be initials."""
ANY_NAME = tuple(signature for kind in ("PNG", "JPEG", "TIFF") for signature in SIGNATURES[kind])
"""First bytes of files that are read whatever their names."""
NUMBERED = re.compile(r"view\d*", re.IGNORECASE)
"""Numbers of the images of a study in CheXpert."""
STUDY = re.compile(r"study[-_ ]?\d+", re.IGNORECASE)
"""Folders of the studies of a patient in CheXpert."""
MASK = re.compile(
    r"(?:^|[^A-Za-z])(?:mask|masks|seg|segmentation|segmentations|labelmap)(?:[^A-Za-z]|$)", re.IGNORECASE
)
"""Names of files that are segmentations of radiographs."""
OTHER_VIEW_IN_PATH = re.compile(
    r"(?:^|[^a-z])(?:obl|oblique|[a-z]*decub[a-z]*|lordotic|[lr]ld|[lr]po|apical|axial|swimmers)(?:[^a-z]|$)"
    rf"|{NEGATED.pattern}",
    re.IGNORECASE,
)
"""Names of files that are views which are neither frontal nor lateral; LAO and RAO are family names too."""
SIDE = re.compile(
    r"(?:left|right)[-_ ]*(?=lat(?:eral)?(?![a-z]))|(?<=lat)[-_ ]+(?:left|right)(?![a-z])"
    r"|(?<=lateral)[-_ ]+(?:left|right)(?![a-z])",
    re.IGNORECASE,
)
"""The side of a lateral view."""
HEADER_BYTES, MAX_HEADER_BYTES = 2**20, 2**26
"""Bytes that are read of a DICOM file, and the most where private elements put the pixels further back."""
PIXEL_DATA = 0x7FE0_0000
PIXEL_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
"""The tag of PixelData in both byte orders."""


def find_pairs(paths: Sequence[Path], *, skip_ambiguous: bool = False) -> FoundPairs:
    """All pairs under the given files and folders."""
    groups: dict[tuple[str, ...], PairCandidates] = {}
    refused: list[FileError] = []
    left_out: list[LeftOut] = []
    for path, searched in walk(paths, refused):
        if searched and is_apple_double(path):
            left_out.append(LeftOut(path, "an AppleDouble file of macOS"))
            continue
        try:
            is_image = _is_image(path)
            header = None if is_image else _header(path)
        except FileError as error:
            refused.append(error)
            continue
        except Exception as error:
            # One unreadable file must not end the search, and on a damaged one pydicom raises any exception.
            refused.append(FileError(f"{path}: cannot be read: {error!r}"))
            continue
        view, rest, reason = _view(path, paths, header, is_image)
        if view is None:
            if searched:
                left_out.append(LeftOut(path, reason))
            else:
                refused.append(FileError(f"{path}: {reason}"))
            continue
        is_anonymous = header is not None and not (header.get("StudyInstanceUID") or header.get("PatientID"))
        key, group = _of_name(path, rest) if header is None or is_anonymous else _of_study(path, header)
        groups.setdefault(key, group).add(view, path, 0 if header is None else rank(header))
    return select_pairs(groups.values(), skip_ambiguous, refused, len(left_out), left_out)


def _view(
    path: Path, roots: Sequence[Path], header: pydicom.Dataset | None, is_image: bool
) -> tuple[ViewName | None, tuple[str, ...], str]:
    """The view of a file, its path without words of views, and the reason where it has none."""
    view, rest = view_from_path(path, roots)
    if header is not None:
        has_pixels = header.get("Rows") and header.get("Columns")
        reason = why_no_radiograph(header) or ("" if has_pixels else "no pixels: Rows and Columns are absent")
        if reason:
            return None, rest, reason
        tagged, reason = view_of(header)
        if tagged or reason:
            return tagged, rest, reason
        view = view or described_view(header)
    elif not is_image and path.suffix.lower() not in SUFFIXES:
        return None, rest, "not DICOM, PNG, JPEG, TIFF or BMP"
    elif MASK.search("/".join(rest[1:])):
        return None, rest, "a segmentation by its name"
    elif OTHER_VIEW_IN_PATH.search("/".join(path.parts[1 - len(rest) :])):
        return None, rest, "neither frontal nor lateral by its name"
    remedy = "name it as anna_frontal or anna_lateral"
    if header is not None:
        return view, rest, f"no view in ViewPosition, ViewCodeSequence, descriptions or path: set one or {remedy}"
    return view, rest, f"no view in its path, or several: {remedy}"


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(ANY_NAME)


def _header(path: Path) -> pydicom.Dataset | None:
    """The header of a DICOM image up to its pixels; None for other files and for DICOMDIR.

    Raises:
        FileError: see `dicom.parse`. On a damaged file pydicom may raise any exception.
    """
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        if dicom.is_dicom(head) and not any(tag in head for tag in PIXEL_TAGS):
            head += file.read(MAX_HEADER_BYTES - HEADER_BYTES)
    if not dicom.is_dicom(head) or dicom.meta(head).get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None
    return dicom.parse(head, str(path), until=PIXEL_DATA)


def view_from_path(path: Path, roots: Sequence[Path]) -> tuple[ViewName | None, tuple[str, ...]]:
    """The view named in the path below its root, if it is unique, and that path without view words and suffix."""
    root = next((root for root in roots if path.is_relative_to(root) and path != root), path.parent)
    views, rest = set(), []
    for part in path.relative_to(root).with_suffix("").parts:
        # A number behind the view is that of the patient or image: frontal1 and lateral1.
        words = re.split(
            r"([^A-Za-z0-9]+|(?<![A-Za-z0-9])(?:frontal|lateral|pa|ap|lat)(?=\d{1,4}(?![A-Za-z0-9])))",
            SIDE.sub("", part),
            flags=re.IGNORECASE,
        )
        views |= {PATH_WORDS[word.lower()] for word in words if word.lower() in PATH_WORDS}
        left = "".join(word for word in words if word.lower() not in PATH_WORDS and not NUMBERED.fullmatch(word))
        rest.append(re.sub(r"([^A-Za-z0-9])[^A-Za-z0-9]+", r"\1", left).strip(" -_."))
    return (views.pop() if len(views) == 1 else None), (str(root), *rest)


def _of_name(path: Path, rest: tuple[str, ...]) -> tuple[tuple[str, ...], PairCandidates]:
    # The folder of a study is inside that of its patient, whose studies stay in one split.
    study = next((k for k, part in enumerate(rest) if k > 1 and STUDY.fullmatch(part)), len(rest))
    subject = "-".join(filter(None, rest[1:study])) or path.parent.name
    return ("name", *rest), PairCandidates(subject, key=f"{subject} in {path.parent}")


def _of_study(path: Path, header: pydicom.Dataset) -> tuple[tuple[str, ...], PairCandidates]:
    study = str(header.get("StudyInstanceUID") or path.parent)
    patient = str(header.get("PatientID") or study)
    return ("study", study, patient), PairCandidates(pseudonym(patient), is_dicom=True, key=f"study {study}")
