"""Comparison of organs against hand-computed cases, brute force and the phantom."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.morphology import skeletonize

from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.models import segmentation_metrics

SPACING_MM = 5.0
WORST = {"lung_dice": 0.0, "lung_surface_dice": 0.0, "lung_hd95_mm": math.inf, "lung_assd_mm": math.inf}


@pytest.fixture(scope="module")
def chest():
    return thorax(3, Grid(64, SPACING_MM))[0].astype(np.float32)


def compare(found, true):
    return segmentation_metrics.compare(found, true, (SPACING_MM,) * 3)


def test_equal_volumes_have_the_best_value_of_every_metric(chest):
    metrics = compare(chest, chest)
    # Both lungs of an adult at full inspiration have three to eight liters.
    assert 3000 < metrics.pop("lung_volume_ml") < 8000
    for name, value in metrics.items():
        assert value == (1.0 if name.endswith("dice") else 0.0), name


def test_a_volume_without_organs_has_the_worst_value(chest):
    metrics = compare(np.full_like(chest, 40.0), chest)
    assert {name: metrics[name] for name in WORST} == WORST
    for name in ("right_lung_dice", "left_lung_dice", "trachea_dice", "vessel_cldice", "bone_dice", "mediastinum_dice"):
        assert metrics[name] == 0.0, name
    lung_ml = compare(chest, chest)["lung_volume_ml"]
    assert (metrics["lung_volume_ml"], metrics["lung_volume_error_ml"]) == (0.0, -lung_ml)


def test_biases_are_of_the_tissues_of_the_ground_truth(chest):
    organs = segmentation_metrics.Anatomy.of(chest.astype(np.int16), SPACING_MM)
    shifted = chest + 20
    shifted[organs.lung] += 30
    shifted[organs.bone] -= 120
    metrics = compare(shifted, chest)
    assert metrics["lung_bias_hu"] == pytest.approx(50)
    assert metrics["soft_tissue_bias_hu"] == pytest.approx(20)
    assert metrics["bone_bias_hu"] == pytest.approx(-100)
    nothing = compare(chest, np.full_like(chest, -1000.0))
    assert math.isnan(nothing["bone_bias_hu"])


def test_one_lost_lung_lowers_the_dice_of_its_side_alone(chest):
    lost = chest.copy()
    lost[:, :, :32] = np.where(lost[:, :, :32] < -400, 40, lost[:, :, :32])
    metrics = compare(lost, chest)
    assert metrics["right_lung_dice"] == 0.0
    assert metrics["left_lung_dice"] > 0.95
    assert metrics["mediastinum_dice"] < 0.6


def test_distances_between_parallel_planes_are_their_distance_in_mm():
    masks = np.zeros((2, 20, 12, 12), dtype=bool)
    masks[0, 4] = masks[1, 7] = True
    for thickness_mm, overlap in ((1.5, 1.0), (2.0, 0.0)):
        metrics = segmentation_metrics.surface_metrics("lung", *masks, (thickness_mm, 1.0, 1.0))
        assert metrics == {
            "lung_surface_dice": overlap,
            "lung_hd95_mm": pytest.approx(3 * thickness_mm),
            "lung_assd_mm": pytest.approx(3 * thickness_mm),
        }


def test_distances_agree_with_brute_force_on_voxels_that_are_no_cubes():
    z, y, x = np.indices((24, 24, 24))
    masks = [
        ((z - 12) / 8) ** 2 + ((y - 12) / 6) ** 2 + ((x - 11) / 7) ** 2 < 1,
        ((z - 13) / 7) ** 2 + ((y - 11) / 8) ** 2 + ((x - 12) / 6) ** 2 < 1,
    ]
    spacing_mm = (3.0, 1.0, 1.5)
    first, second = (np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing_mm for mask in masks)
    between = cdist(first, second)
    there, back = between.min(axis=1), between.min(axis=0)
    metrics = segmentation_metrics.surface_metrics("lung", *masks, spacing_mm)
    assert metrics["lung_hd95_mm"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert metrics["lung_assd_mm"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)


def test_cldice_is_the_harmonic_mean_of_precision_and_sensitivity_of_centerlines():
    true = np.zeros((9, 9, 40), dtype=bool)
    true[3:6, 3:6, :30] = True
    found = true.copy()
    found[:, :, 15:] = False
    # Half of the true centerline is found, and all of the centerline found is true.
    assert segmentation_metrics.cldice(found, true) == pytest.approx(2 * 0.5 / 1.5, abs=0.03)
    thicker = ndimage.binary_dilation(true)
    assert segmentation_metrics.cldice(thicker, true) > 0.95 > segmentation_metrics.dice(thicker, true)
    nothing = np.zeros_like(true)
    assert (segmentation_metrics.cldice(nothing, nothing), segmentation_metrics.cldice(nothing, true)) == (1.0, 0.0)
    assert (segmentation_metrics.dice(nothing, nothing), segmentation_metrics.dice(true, nothing)) == (1.0, 0.0)


def test_a_mask_that_thinning_removes_is_its_own_centerline():
    cube, half = np.zeros((2, 8, 8, 8), dtype=bool)
    cube[2:4, 2:4, 2:4] = True
    half[2:4, 2:4, 2] = True
    assert not skeletonize(cube).any()
    assert segmentation_metrics.cldice(cube, cube) == 1.0
    assert segmentation_metrics.cldice(cube, half) == pytest.approx(2 * 0.5 / 1.5)
    assert segmentation_metrics.cldice(cube, np.roll(cube, 4, axis=0)) == 0.0
