"""What a field of view truncates is measured, and extended towards what was there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import thorax_hu, thorax_image, turned, write_image
from scipy.special import expit

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import HU_MIN, Window, normalize
from raylift.datasets.projector import render_drrs
from raylift.datasets.scans import reader
from raylift.datasets.scans.reader import Scan
from raylift.datasets.scans.resample import FieldOfView, check_whole_thorax, resample
from raylift.datasets.segmentation import Label
from raylift.models.metrics import psnr_db

CUBE = Grid(64, 6.0)
HALF_MM = 126.0
"""Half the width of the field of view; the body extends 150 mm to either side and 105 mm to the front and back."""


def chest_hu(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The thorax with flat front and back between semicircular flanks, as most slices of chests are, not an ellipse."""
    hu = thorax_hu(x, y, z)
    ellipse = expit((1 - np.hypot(x / 150, y / 105)) * 35)
    chest = expit((105 - np.hypot((np.abs(x) - 45).clip(0), y)) / 3)
    return hu + (40 - hu) * chest * (1 - ellipse)


def stored(image: sitk.Image, folder: Path, beyond: FieldOfView) -> tuple[np.ndarray, dict[str, float]]:
    (source,) = reader.find([write_image(image, folder / "scan.nii.gz")]).sources
    hu, record, _ = resample(reader.read(source), CUBE, beyond_field_of_view=beyond)
    assert record["beyond_field_of_view"] == beyond
    return hu, record["field_of_view_truncation"]


def rectangular() -> sitk.Image:
    return thorax_image((56, 60, 80), hu=chest_hu)


def circular(hu: Callable[..., np.ndarray] = chest_hu) -> sitk.Image:
    image = thorax_image((56, 56, 80), hu=hu)
    voxels = sitk.GetArrayFromImage(image)
    y, x = np.indices(voxels.shape[1:]) - 27.5
    voxels[:, np.hypot(y, x) > 28] = HU_MIN
    result = sitk.GetImageFromArray(voxels)
    result.CopyInformation(image)
    return result


# A circle hardly wider than the body is deep leaves little skin to continue: two voxels less are found.
@pytest.mark.parametrize(("make", "error_hu"), [(rectangular, 250), (circular, 700)])
def test_a_cut_body_is_extended_towards_the_one_that_was_scanned_whole(make, error_hu: float, tmp_path: Path) -> None:
    whole, cuts = stored(thorax_image(hu=chest_hu), tmp_path, "keep")
    assert set(cuts.values()) == {0.0}
    kept, cuts = stored(make(), tmp_path, "keep")
    assert cuts["right"] > 0.9
    assert cuts["left"] > 0.9
    assert cuts["anterior"] == cuts["posterior"] == 0.0
    extended, _ = stored(make(), tmp_path, "extend")
    x = np.abs(np.arange(64) - 31.5) * CUBE.spacing_mm
    beyond = (x > HALF_MM + 6) & (whole > -400)
    assert beyond.sum() > 3000
    assert kept[beyond].max() < -600
    assert np.abs(extended - whole)[beyond].mean() < error_hu
    # No body where there was none, and nothing that was measured is changed.
    assert ((extended > -400) & (whole < -900)).mean() < 0.01
    inside = np.hypot(*np.meshgrid(x, x)) < HALF_MM - 15
    np.testing.assert_array_equal(extended[:, inside], kept[:, inside])
    drrs = [np.stack([normalize(drr) for drr in render_drrs(hu, CUBE, chest(CUBE))]) for hu in (whole, extended, kept)]
    errors = [np.linalg.norm(drr - drrs[0]) for drr in drrs[1:]]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("beyond", ["keep", "extend", "mask"])
@pytest.mark.parametrize("spacing_mm", [4.0, 5.0, 6.0])
def test_lungs_behind_a_chest_wall_that_the_field_of_view_cuts_thin_are_labeled(
    beyond: FieldOfView, spacing_mm: float, tmp_path: Path
) -> None:
    lung_ml = []
    for image in (thorax_image(hu=chest_hu), circular()):
        scan = scan_of(write_image(image, tmp_path / "scan.nii.gz"))
        labels = resample(scan, Grid(64, spacing_mm), beyond_field_of_view=beyond)[2]
        lung_ml.append(np.isin(labels, (Label.LUNG, Label.VESSEL)).sum() * spacing_mm**3 / 1000)
    assert lung_ml[0] > 1900
    assert lung_ml[1] == pytest.approx(lung_ml[0], rel=0.01)


def lower_lungs_near_the_skin_hu(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """A cylinder with lungs from -95 to 95 mm, whose lower halves are 5 mm from a circle of 126 mm at their edges."""
    x, y = np.abs(x), np.abs(y)
    lung = (x > 30) & (x < np.where(z < 0, 99, 50)) & (y < 70) & (np.abs(z) < 95)
    return np.where(lung, -850, np.where(np.hypot(x, y) < 150, 40, -1000))


def test_the_cube_is_centered_on_lungs_behind_a_chest_wall_that_is_cut_thin(tmp_path: Path) -> None:
    scan = scan_of(write_image(circular(lower_lungs_near_the_skin_hu), tmp_path / "scan.nii.gz"))
    record = resample(scan, Grid(40, 5.0))[1]
    assert record["centered_on"] == "lungs"
    assert record["center_lps_mm"][2] == pytest.approx(0, abs=4)
    check_whole_thorax(scan)


@pytest.mark.parametrize("direction", [np.eye(3), turned(z_deg=12)])
def test_a_body_inside_its_field_of_view_stays_as_it_is(direction: np.ndarray, tmp_path: Path) -> None:
    image = thorax_image((90, 76, 80), direction=direction)
    hu, cuts = stored(image, tmp_path, "extend")
    np.testing.assert_array_equal(hu, stored(image, tmp_path, "keep")[0])
    assert set(cuts.values()) == {0.0}


def scan_of(path: Path) -> Scan:
    (source,) = reader.find([path]).sources
    return reader.read(source)


def test_cuts_of_a_real_scan_are_found(real_data: Path) -> None:
    cuts = resample(scan_of(real_data / "ct_more/lidc_idri_0306_2mm.nii.gz"), CUBE)[1]["field_of_view_truncation"]
    assert min(cuts["right"], cuts["left"]) > 0.9
    assert 0.2 < cuts["anterior"] < 0.5
    assert cuts["posterior"] == 0.0


def test_a_real_scan_that_is_made_narrower_is_extended_towards_what_it_was(real_data: Path) -> None:
    scan = scan_of(real_data / "ct/lidc_idri_0007_2mm.nii.gz")
    whole, record, _ = resample(scan, CUBE)
    assert max(record["field_of_view_truncation"].values()) < 0.25
    narrow = replace(scan, image=scan.image[28:-28])
    kept, record, _ = resample(narrow, CUBE)
    assert min(record["field_of_view_truncation"][side] for side in ("right", "left")) > 0.9
    extended = resample(narrow, CUBE, beyond_field_of_view="extend")[0]
    window = Window()
    errors = [
        np.square(window.to_unit(hu.astype(float)) - window.to_unit(whole.astype(float))).mean()
        for hu in (kept, extended)
    ]
    assert psnr_db(errors[1], 1.0) > psnr_db(errors[0], 1.0) + 1.5
