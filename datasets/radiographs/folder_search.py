"""Pairs of radiographs in folders: DICOM files by study, others by words in their paths.

The view of a DICOM file is its ViewPosition if that is a frontal or lateral one. Otherwise it is the word frontal, pa
or ap, or lateral or lat, in its name or in a folder below the searched one. Files whose paths are equal without these
words belong together: `anna_pa.png` and `anna_lat.png`, `7/frontal.jpg` and `7/lateral.jpg`, `frontal/7.png` and
`lateral/7.png`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pydicom

from raylift.datasets.errors import RefusedFile
from raylift.datasets.radiographs.pairing import FoundPairs, PairCandidates, ViewName, select_pairs
from raylift.datasets.scans import dicom_series
from raylift.datasets.sources import pseudonym, walk

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
WORDS: dict[str, ViewName] = {
    "frontal": "frontal", "pa": "frontal", "ap": "frontal", "lateral": "lateral", "lat": "lateral",
}  # fmt: skip
POSITIONS: dict[str, ViewName] = {"PA": "frontal", "AP": "frontal", "LL": "lateral", "RL": "lateral"}
"""DICOM's defined terms of ViewPosition; decubitus and oblique views are not used."""


def find_pairs(paths: Sequence[Path], *, exact: bool = False) -> FoundPairs:
    """All pairs under the given files and folders."""
    groups: dict[tuple[str, ...], PairCandidates] = {}
    refused: list[RefusedFile] = []
    skipped = 0
    for path, searched in walk(paths, refused):
        try:
            header = None if path.suffix.lower() in SUFFIXES else dicom_series.header(path)
        except RefusedFile as error:
            refused.append(error)
            continue
        except Exception as error:
            # One unreadable file must not end the search, and on a damaged one pydicom raises any exception.
            refused.append(RefusedFile(f"{path}: cannot be read: {error!r}"))
            continue
        view, rest = view_from_path(path, paths)
        if header is not None:
            view = POSITIONS.get(str(header.get("ViewPosition") or "").upper(), view)
        if view is None or (header is None and path.suffix.lower() not in SUFFIXES):
            skipped += searched
            if not searched:
                refused.append(RefusedFile(f"{path}: no radiograph of a known view: name it frontal or lateral"))
            continue
        key, group = _of_study(path, header) if header is not None else _of_name(path, rest)
        groups.setdefault(key, group).add(view, path)
    return select_pairs(groups.values(), exact, refused, skipped)


def view_from_path(path: Path, roots: Sequence[Path]) -> tuple[ViewName | None, tuple[str, ...]]:
    """The view named in the path below its root, if it is unique, and that path without view words and suffix."""
    root = next((root for root in roots if path.is_relative_to(root) and path != root), path.parent)
    views, rest = set(), []
    for part in path.relative_to(root).with_suffix("").parts:
        words = re.split(r"([^A-Za-z0-9]+)", part)
        views |= {WORDS[word.lower()] for word in words if word.lower() in WORDS}
        left = "".join(word for word in words if word.lower() not in WORDS)
        rest.append(re.sub(r"([^A-Za-z0-9])[^A-Za-z0-9]+", r"\1", left).strip(" -_."))
    return (views.pop() if len(views) == 1 else None), (str(root), *rest)


def _of_name(path: Path, rest: tuple[str, ...]) -> tuple[tuple[str, ...], PairCandidates]:
    return ("name", *rest), PairCandidates("-".join(filter(None, rest[1:])) or path.parent.name)


def _of_study(path: Path, header: pydicom.Dataset) -> tuple[tuple[str, ...], PairCandidates]:
    study = str(header.get("StudyInstanceUID") or path.parent)
    patient = str(header.get("PatientID") or study)
    return ("study", study), PairCandidates(pseudonym(patient), is_dicom=True)
