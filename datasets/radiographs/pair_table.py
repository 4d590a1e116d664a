"""Pairs of radiographs listed in a CSV: the user's own, that of Indiana University, or that of MIMIC-CXR.

The user's own has the columns subject, frontal and lateral and optionally patient_facing (left, right or auto).
`indiana_projections.csv` has the columns uid, filename and projection, one row per image: of its 3,851 patients 3,388
have at least one frontal and one lateral image, and 3,194 exactly one of each.
`mimic-cxr-2.0.0-metadata.csv` has the columns dicom_id, subject_id, study_id and ViewPosition; files are named by the
first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from raylift.datasets.csv_file import read_rows
from raylift.datasets.errors import ConfigError, FileError
from raylift.datasets.radiographs.dicom_view import view_in_words
from raylift.datasets.radiographs.orientation import PatientFacingOption
from raylift.datasets.radiographs.pairing import FoundPairs, LeftOut, PairCandidates, ViewName, select_pairs
from raylift.datasets.sources import walk

INDIANA = re.compile(
    r"(?:CXR)?(?P<uid>\d+)(?:_(?P=uid))?_IM-(?P<image>\d+(?:-\d+)+)(?:\.dcm)?(?:\.(?:png|jpe?g|dcm))?", re.IGNORECASE
)
"""The two names of one file: `1_IM-0001-4001.dcm.png` on Kaggle, `CXR1_1_IM-0001-4001.png` at Open-i, which repeats
only uid 1. Some have a third group of digits."""


def read_pairs(table: Path, paths: Sequence[Path], *, skip_ambiguous: bool = False) -> FoundPairs:
    """The pairs of a table. Files are searched in its folder, by relative path under `paths`, and there by file name.

    Raises:
        ConfigError: the table has other columns or an invalid value.
    """
    columns, rows = read_rows(table)
    refused: list[FileError] = []
    files = [path for path, _ in walk(paths, refused)]
    if {"uid", "filename", "projection"} <= set(columns):
        return select_pairs(_by_projection(table, rows, files), skip_ambiguous, refused)
    if {"subject", "frontal", "lateral"} <= set(columns):
        return select_pairs(_by_row(table, rows, [table.parent, *paths], files), skip_ambiguous, refused)
    if {"dicom_id", "subject_id", "study_id", "ViewPosition"} <= set(columns):
        groups, left_out = _by_study(rows, files)
        return select_pairs(groups, skip_ambiguous, refused, len(left_out), left_out)
    raise ConfigError(
        f"{table}: columns {columns}; required are subject, frontal and lateral, or uid, filename and projection, or "
        "dicom_id, subject_id, study_id and ViewPosition"
    )


def image_key(name: str) -> tuple[str, ...]:
    """The identity of an Indiana image under both of its names; any other name is its own key."""
    match = INDIANA.fullmatch(name)
    return (match["uid"], match["image"]) if match else (name,)


def _by_projection(table: Path, rows: Iterable[Mapping[str, str]], files: Iterable[Path]) -> list[PairCandidates]:
    by_key: dict[tuple[str, ...], Path] = {}
    for path in files:
        by_key.setdefault(image_key(path.name), path)
    groups: dict[str, PairCandidates] = {}
    for row in rows:
        view = row["projection"].lower()
        if view not in get_args(ViewName) or not row["uid"]:
            raise ConfigError(f"{table}: uid '{row['uid']}' has projection '{row['projection']}': Frontal or Lateral?")
        group = groups.setdefault(row["uid"], PairCandidates(f"indiana-{row['uid']}"))
        image = by_key.get(image_key(row["filename"]))
        if image is None:
            group.missing.append(row["filename"])
        else:
            group.add("frontal" if view == "frontal" else "lateral", image)
    return list(groups.values())


def _by_study(rows: Iterable[Mapping[str, str]], files: Iterable[Path]) -> tuple[list[PairCandidates], list[LeftOut]]:
    """MIMIC's images by study; images that are not under the searched folders are not counted as missing."""
    by_stem = {path.stem: path for path in files}
    groups: dict[str, PairCandidates] = {}
    left_out = []
    for row in rows:
        path = by_stem.get(row["dicom_id"])
        if path is None:
            continue
        study = row["study_id"]
        group = groups.setdefault(study, PairCandidates(f"mimic-{row['subject_id']}", key=f"study {study}"))
        view = view_in_words(row["ViewPosition"])
        if view is None:
            left_out.append(
                LeftOut(path, f"ViewPosition {row['ViewPosition'] or 'empty'}: neither frontal nor lateral")
            )
        else:
            group.add(view, path)
    return [group for group in groups.values() if group.frontal or group.lateral], left_out


def _by_row(
    table: Path, rows: Iterable[Mapping[str, str]], roots: Sequence[Path], files: Iterable[Path]
) -> list[PairCandidates]:
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_name[path.name].append(path)
    groups = []
    for row in rows:
        patient_facing: PatientFacingOption | None = next(
            (
                choice
                for choice in get_args(PatientFacingOption)
                if choice == (row.get("patient_facing") or "auto").lower()
            ),
            None,
        )
        if patient_facing is None or not row["subject"]:
            raise ConfigError(
                f"{table}: subject '{row['subject']}', patient_facing '{row.get('patient_facing')}': "
                f"name a subject, and as patient_facing one of {', '.join(get_args(PatientFacingOption))} or nothing"
            )
        group = PairCandidates(row["subject"], patient_facing=patient_facing)
        for view in get_args(ViewName):
            image = _file(row[view], roots, by_name)
            if image is not None:
                group.add(view, image)
            elif row[view]:
                group.missing.append(row[view])
        groups.append(group)
    return groups


def _file(name: str, roots: Sequence[Path], by_name: Mapping[str, list[Path]]) -> Path | None:
    """The file with that relative path or, if it is unique, with that name."""
    if not name:
        return None
    for root in roots:
        if (root / name).is_file():
            return root / name
    paths = by_name.get(name, [])
    return paths[0] if len(paths) == 1 else None
