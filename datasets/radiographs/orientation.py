"""Patient orientation of radiographs: by PatientOrientation, or in laterals detected or given; matched to the view.

PatientOrientation of a DICOM file determines how the image must be rotated and flipped for a view of any pose. Without
it an image must be upright, and the orientation of a lateral is detected.

In the lower chest the heart lies anterior and lung posterior to it; higher up the retrosternal space is lung and the
spine lies posterior. So anterior to the middle an image is darker above and brighter below than posterior to it. The
two differences are added, row by row between the edges of the body.

The regions and `MIN_SCORE` were chosen on lateral digitally reconstructed radiographs (DRRs) of 24 phantoms and 9 CT
scans in three geometries and on three radiographs, each unchanged, with a border, cropped, shifted, rotated by 7
degrees or with another gamma, where the sign was always right. That is few patients;
`tests/datasets/radiographs/test_orientation.py` measures the error on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import View
from raylift.datasets.intensity import normalize
from raylift.datasets.radiographs.borders import crop_uniform_margin
from raylift.datasets.radiographs.check_result import CheckResult, warnings

PatientFacing = Literal["left", "right"]
"""The edge of the image that the patient faces."""
PatientFacingOption = Literal["auto", "left", "right"]

MIN_SCORE = 0.06
"""Smallest absolute score, as a fraction of the image's range, at which the sign is trusted."""
ROWS = COLUMNS = 32
BODY_THRESHOLD = 0.2
"""Normalized values above it belong to the body."""
RETROSTERNAL = slice(8, 19), slice(4, 11)
HEART = slice(17, 25), slice(9, 15)
"""Rows from the top and columns from the anterior edge of the body, of 32."""
DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}
"""DICOM's letters of PatientOrientation in patient coordinates."""
MIN_ALIGNMENT = 0.6
"""Smallest cosine of a direction in PatientOrientation and the axis of the view that it belongs to."""


@dataclass(frozen=True)
class OrientedRadiograph:
    """A radiograph in the orientation of its view, with what was done to it."""

    image: Float32[np.ndarray, "rows columns"]
    patient_facing: PatientFacing | None = None
    """Where the patient of the file faced; None if the view is not lateral or the orientation was not determined."""
    detected: bool = False
    """Whether `patient_facing` was detected in the image rather than given."""
    flipped: bool = False
    """Whether the image was flipped to match its view."""
    is_clear: bool = True
    """False if detection was requested and the image does not show the orientation clearly; it is not flipped then."""
    checks: tuple[CheckResult, ...] = ()
    """Results of the checks whether the image is a radiograph of a chest in its view; see `input_checks`."""
    patient: str = ""
    """Pseudonym of the PatientID of a DICOM file; empty if unknown. Archives do not store it."""
    notes: tuple[str, ...] = ()
    """What was changed or ignored in reading the file, each with the attribute that was the reason."""

    def record(self) -> dict[str, Any]:
        """What an archive stores of it; empty where nothing was changed and there is no patient orientation."""
        notes: dict[str, Any] = {"notes": list(self.notes)} if self.notes else {}
        if found := warnings(self.checks):
            notes["warnings"] = [str(check) for check in found]
        if self.patient_facing is None:
            return notes
        return notes | {
            "patient_facing": self.patient_facing,
            "patient_facing_detected": self.detected,
            "flipped": self.flipped,
        }


def orient(
    image: Float32[np.ndarray, "rows columns"], view: View, patient_facing: PatientFacingOption | None
) -> OrientedRadiograph:
    """Flip a lateral image whose patient faces the other edge than in DRRs of the view.

    Args:
        image: bone bright, of any size.
        view: the pose whose DRRs the image must match; an image of a view that is not lateral is returned unchanged.
        patient_facing: the edge that the patient faces, `auto` to detect it, or None to leave the image as it is.
    """
    expected = expected_patient_facing(view)
    if expected is None or patient_facing is None:
        return OrientedRadiograph(image)
    detected = patient_facing == "auto"
    facing = detect_patient_facing(image) if patient_facing == "auto" else patient_facing
    if facing is None:
        return OrientedRadiograph(image, is_clear=False)
    flipped = facing != expected
    oriented = np.ascontiguousarray(image[:, ::-1]) if flipped else image
    return OrientedRadiograph(oriented, facing, detected, flipped)


def orient_by_tag(
    image: Float32[np.ndarray, "rows columns"], letters: tuple[str, str], view: View, name: str, *, flip: bool = True
) -> OrientedRadiograph:
    """Rotate and flip an image from its PatientOrientation to the axes of a view.

    Args:
        image: as stored in the file.
        letters: directions of the patient along rows and down columns, as ('L', 'F').
        view: the pose whose DRRs the image must match.
        name: name of the file in messages.
        flip: whether to flip; otherwise the image is only rotated upright.

    Raises:
        FileError: the directions are not those of an image of the view.
    """
    row, column = map(_direction, letters)
    axes, tag = view.axes(), f"PatientOrientation {letters[0]}\\{letters[1]}"
    best, turns, flipped = -1.0, 0, False
    for quarter in range(4):
        # A quarter turn to the left: what ran down the columns runs along the rows.
        for side in (1, -1):
            fit = min(side * float(row @ axes[0]), float(column @ axes[1]))
            if fit > best:
                best, turns, flipped = fit, quarter, side < 0
        row, column = column, -row
    if best < MIN_ALIGNMENT:
        raise FileError(
            f"{name}: {tag} is not that of a {view.name} view: give the radiograph of that view, or correct the tag"
        )
    expected = expected_patient_facing(view)
    other: PatientFacing = "right" if expected == "left" else "left"
    flips = flipped and flip
    notes = [f"rotated by {90 * turns} degrees ({tag})"] * (turns > 0) + [f"flipped ({tag})"] * flips
    turned = np.rot90(image, turns)
    return OrientedRadiograph(
        np.ascontiguousarray(turned[:, ::-1] if flips else turned),
        None if expected is None else other if flipped else expected,
        flipped=flips,
        notes=tuple(notes),
    )


def _direction(letters: str) -> Float[np.ndarray, " 3"]:
    """Unit vector of a direction of one to three letters, of which the first is the principal one."""
    vector = np.sum([np.array(DIRECTIONS[letter]) * 0.5**k for k, letter in enumerate(letters)], axis=0)
    unit: Float[np.ndarray, " 3"] = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return unit


def patient_facing_score(image: Float32[np.ndarray, "rows columns"]) -> float:
    """Score of a bone-bright lateral image: positive if the patient faces left, negative if right, in [-2, 2]."""
    step = max(1, max(image.shape) // 512)
    body = resample_body(crop_uniform_margin(normalize(image[::step, ::step])))
    flipped = body[:, ::-1]
    posterior, anterior = flipped[RETROSTERNAL].mean(), body[RETROSTERNAL].mean()
    return float(posterior - anterior + body[HEART].mean() - flipped[HEART].mean())


def detect_patient_facing(image: Float32[np.ndarray, "rows columns"]) -> PatientFacing | None:
    """The edge that the patient of a lateral image faces, or None where the score is below `MIN_SCORE`."""
    score = patient_facing_score(image)
    if abs(score) < MIN_SCORE:
        return None
    return "left" if score > 0 else "right"


def expected_patient_facing(view: View) -> PatientFacing | None:
    """The edge that the patient faces in DRRs of a view; None if it is not lateral (azimuth 90 or 270 degrees)."""
    if not view.is_lateral:
        return None
    # In patient coordinates y increases posteriorly.
    return "left" if view.axes()[0, 1] > 0 else "right"


def resample_body(image: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "32 32"]:
    """Mean of each of 32 bands of rows, resampled between the body's edges to 32 columns; zeros without a body."""
    resampled = np.zeros((ROWS, COLUMNS))
    edges = np.linspace(0, len(image), ROWS + 1).astype(int)
    for row, (top, bottom) in enumerate(pairwise(edges)):
        band = image[top : max(bottom, top + 1)].mean(axis=0)
        inside = np.flatnonzero(band > BODY_THRESHOLD)
        if len(inside):
            resampled[row] = np.interp(np.linspace(inside[0], inside[-1], COLUMNS), np.arange(len(band)), band)
    return resampled
