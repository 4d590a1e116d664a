"""Accuracy of the detected patient orientation, also on subjects on which its regions were not chosen."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from radiograph_samples import dicom, disturbed

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import FRONTAL, GEOMETRIES, LATERAL, Grid, View
from raylift.datasets.intensity import normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.orientation import (
    PatientFacingOption,
    detect_patient_facing,
    expected_patient_facing,
    patient_facing_score,
)
from raylift.datasets.radiographs.preparation import load_radiograph, prepare
from raylift.datasets.scans import reader
from raylift.datasets.scans.resample import resample

GRID = Grid(64, 5.0)
RIGHT = View("lateral", azimuth_deg=-90.0)


def laterals(hu: np.ndarray, grid: Grid = GRID) -> list[np.ndarray]:
    """Laterals of a volume in each geometry, facing left."""
    images = []
    for geometry in GEOMETRIES.values():
        image = render_drrs(hu, grid, geometry(grid))[1]
        left = expected_patient_facing(geometry(grid).view("lateral")) == "left"
        images.append(image if left else np.ascontiguousarray(image[:, ::-1]))
    return images


def detections(images: list[np.ndarray]) -> Counter[str]:
    """Counts of right, wrong and no detections on images that face left and on their mirror images."""
    counts: Counter[str] = Counter()
    for image in images:
        for other, ground_truth in ((image, "left"), (image[:, ::-1], "right")):
            found = detect_patient_facing(np.ascontiguousarray(other))
            counts["not" if found is None else "right" if found == ground_truth else "wrong"] += 1
    return counts


def test_phantoms_are_detected_correctly_in_both_orientations() -> None:
    images = [image for seed in range(30) for image in laterals(thorax(seed, GRID)[0])]
    counts = detections(images)
    assert counts["wrong"] == 0
    assert counts["right"] >= 0.99 * counts.total()


def test_augmented_phantoms_are_never_detected_wrongly() -> None:
    images = [
        other for seed in range(30, 36) for image in laterals(thorax(seed, GRID)[0]) for _, other in disturbed(image)
    ]
    counts = detections(images)
    assert counts["wrong"] == 0
    assert counts["right"] >= 0.95 * counts.total()


def test_real_ct_is_detected_correctly_in_both_orientations(real_data: Path) -> None:
    sources = reader.find([real_data / "ct", real_data / "raw" / "dicom_ct_lung_dx_a0002"]).sources
    images = [image for source in sources for image in laterals(resample(reader.read(source), GRID)[0])]
    assert len(images) == 27
    counts = detections(images)
    assert counts["wrong"] == 0
    assert counts["right"] >= 0.9 * counts.total()


@pytest.mark.parametrize("name", ["cc0_normal", "eurorad_12325_d0", "rad_covid15"])
def test_real_laterals_are_detected_through_borders_crops_and_tone_curves(name: str, real_data: Path) -> None:
    manifest = (real_data / "MANIFEST.csv").read_text()
    [line] = [line for line in manifest.splitlines() if f"{name}_lateral" in line]
    assert "facing image left" in line
    image = read((real_data / "xray" / f"{name}_lateral.jpg").read_bytes(), name, view="lateral").pixels
    assert (detect_patient_facing(image), detect_patient_facing(np.ascontiguousarray(image[:, ::-1]))) == (
        "left",
        "right",
    )
    small = prepare(image, 128)
    counts = detections([other for _, other in disturbed(small)])
    assert counts["wrong"] == 0
    assert counts["right"] >= 0.9 * counts.total()


def test_a_flipped_image_has_the_opposite_score() -> None:
    image = laterals(thorax(3, GRID)[0])[0]
    assert patient_facing_score(np.ascontiguousarray(image[:, ::-1])) == pytest.approx(
        -patient_facing_score(image), abs=1e-6
    )


@pytest.mark.parametrize("kind", ["even", "symmetric", "noise"])
def test_an_unclear_orientation_is_not_detected(kind: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((96, 96), dtype=np.float32)
    if kind == "even":
        image = 1 + image / 100
    if kind == "symmetric":
        image = render_drrs(thorax(0, GRID)[0], GRID, GEOMETRIES["chest"](GRID))[1]
        image = image + image[:, ::-1]
    assert detect_patient_facing(image) is None


@pytest.mark.parametrize(
    ("view", "facing"), [(LATERAL, "left"), (RIGHT, "right"), (FRONTAL, None), (View("oblique", 60.0), None)]
)
def test_a_view_projects_the_patient_facing_one_way(view: View, facing: str | None) -> None:
    assert expected_patient_facing(view) == facing


def test_the_other_lateral_view_projects_the_patient_facing_right() -> None:
    geometry = GEOMETRIES["parallel"](GRID)
    hu = thorax(1, GRID)[0]
    image = render_drrs(hu, GRID, type(geometry)(**{**vars(geometry), "views": (RIGHT,)}))[0]
    assert detect_patient_facing(image) == "right"


# --- PatientOrientation ---

LEFT_FACING = ("P", "F")
OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "H": "F", "F": "H"}


def in_file(image: np.ndarray, turns: int, flipped: bool, letters: tuple[str, str]) -> tuple[np.ndarray, list[str]]:
    """An image as another device stores it, rotated and flipped, with its PatientOrientation."""
    row, column = letters
    for _ in range(turns):
        row, column = column, OPPOSITE[row]
    stored = np.rot90(image, turns)
    return (stored[:, ::-1], [OPPOSITE[row], column]) if flipped else (stored, [row, column])


def stored_pixels(view: View) -> np.ndarray:
    geometry = replace(GEOMETRIES["chest"](GRID), views=(view,))
    return (normalize(render_drrs(thorax(2, GRID)[0], GRID, geometry)[0]) * 4000).astype("<u2")


TAGGED: list[tuple[View, tuple[str, str]]] = [
    (FRONTAL, ("L", "F")), (View("frontal", 180.0), ("R", "F")), (LATERAL, ("P", "F")), (RIGHT, ("A", "F")),
    (View("oblique", 30.0), ("L", "F")),
]  # fmt: skip


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("view", "letters"), TAGGED)
def test_an_image_is_rotated_and_flipped_by_its_patient_orientation(
    view: View, letters: tuple[str, str], flipped: bool, turns: int
) -> None:
    expected = stored_pixels(view)
    pixels, tag = in_file(expected, turns, flipped, letters)
    loaded = load_radiograph(dicom(np.ascontiguousarray(pixels), PatientOrientation=tag), view)
    assert np.array_equal(loaded.image, expected)
    assert any("PatientOrientation" in note for note in loaded.notes) == bool(turns or flipped)
    assert not loaded.detected
    assert loaded.is_clear


def test_directions_of_two_letters_are_read_by_their_first() -> None:
    expected = stored_pixels(FRONTAL)
    data = dicom(np.ascontiguousarray(expected[:, ::-1]), PatientOrientation=["RA", "FA"])
    assert np.array_equal(load_radiograph(data, FRONTAL).image, expected)


def test_a_given_facing_overrides_the_tag_of_an_upright_image() -> None:
    expected = stored_pixels(LATERAL)
    for turns in range(4):
        pixels, tag = in_file(expected, turns, False, LEFT_FACING)
        data = dicom(np.ascontiguousarray(pixels), PatientOrientation=tag)
        assert np.array_equal(load_radiograph(data, LATERAL, patient_facing="left").image, expected)
        assert np.array_equal(load_radiograph(data, LATERAL, patient_facing="right").image, expected[:, ::-1])
    # The file has left, the image and the caller have right.
    wrong = dicom(np.ascontiguousarray(expected[:, ::-1]), PatientOrientation=list(LEFT_FACING))
    assert np.array_equal(load_radiograph(wrong, LATERAL, patient_facing="right").image, expected)


@pytest.mark.parametrize(
    ("view", "tag"), [(FRONTAL, ["P", "F"]), (LATERAL, ["L", "F"]), (FRONTAL, ["L", "P"]), (LATERAL, ["A", "P"])]
)
@pytest.mark.parametrize("facing", ["auto", "left"])
def test_the_orientation_of_another_view_is_refused(view: View, tag: list[str], facing: PatientFacingOption) -> None:
    with pytest.raises(FileError, match=rf"{view.name}: PatientOrientation {tag[0]}\\{tag[1]} is not that of a"):
        load_radiograph(dicom(stored_pixels(view), PatientOrientation=tag), view, patient_facing=facing)


def test_an_orientation_that_is_none_is_ignored_and_recorded() -> None:
    pixels = stored_pixels(FRONTAL)
    loaded = load_radiograph(dicom(pixels, PatientOrientation=["LE", "RT"]), FRONTAL)
    assert np.array_equal(loaded.image, pixels)
    assert "PatientOrientation" in loaded.notes[0]
