from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from raylift.datasets import segmentation
from raylift.datasets.geometry import Grid
from raylift.datasets.phantom import bones, vessels
from raylift.datasets.phantom.person import SIDES, Person
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.phantom.tissue import Tissue
from raylift.datasets.segmentation import Label

COARSE, FINE = Grid(64, 5.0), Grid(128, 2.5)


@cache
def phantom(seed: int, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    return thorax(seed, grid)


def at(grid: Grid, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of the voxel nearest to each point (x, y, z) in patient coordinates."""
    x, y, z = np.rint(np.atleast_2d(points).T * [[1], [1], [-1]] / grid.spacing_mm + (grid.size - 1) / 2).astype(int)
    return z, y, x


def lung_dice(hu: np.ndarray, labels: np.ndarray, grid: Grid) -> float:
    found, true = segmentation.lungs(hu, grid.spacing_mm), np.isin(labels, (Label.LUNG, Label.VESSEL))
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def test_the_same_seed_gives_the_same_volume_bit_for_bit() -> None:
    hu, labels = phantom(4, COARSE)
    again_hu, again_labels = thorax(4, COARSE)
    assert np.array_equal(hu, again_hu)
    assert np.array_equal(labels, again_labels)


def test_one_seed_is_one_body_at_two_voxel_sizes() -> None:
    (coarse, labels), fine = phantom(4, COARSE), phantom(4, FINE)[0]
    averaged = fine.astype(float).reshape(64, 2, 64, 2, 64, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(coarse.ravel(), averaged.ravel())[0, 1] > 0.995
    assert np.abs(coarse - averaged).mean() < 15
    # Deep in the lung even the slow change of density agrees.
    deep = ndimage.binary_erosion(labels == Label.LUNG, iterations=2)
    assert np.median(np.abs(coarse - averaged)[deep]) < 2
    # Another person at the same voxel size is much farther away.
    assert np.abs(coarse - phantom(5, COARSE)[0]).mean() > 100


def test_different_seeds_are_different_people() -> None:
    people = [Person.sample(seed) for seed in range(40)]
    assert len({person.female for person in people}) == 2
    for name, spread in (("width", 0.15), ("fat_mm", 10), ("dome_level", 0.08), ("heart", 0.15), ("kyphosis_mm", 20)):
        values = [getattr(person, name) for person in people]
        assert max(values) - min(values) > spread, name
    contrast = [Tissue.sample(seed).blood > 100 for seed in range(40)]
    assert 5 < sum(contrast) < 35


@pytest.mark.parametrize("seed", range(6))
def test_a_volume_holds_int16_hu_between_air_and_dense_bone(seed: int) -> None:
    hu, labels = phantom(seed, COARSE)
    assert (hu.dtype, labels.dtype, hu.shape, labels.shape) == (np.int16, np.uint8, COARSE.shape, COARSE.shape)
    assert hu.min() == -1024
    assert 300 < hu.max() < 1400
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert -890 < np.median(hu[labels == Label.LUNG]) < -780
    assert np.median(hu[labels == Label.BONE]) > 150


@pytest.mark.parametrize("seed", range(6))
def test_threshold_segmentation_finds_the_labeled_lungs(seed: int) -> None:
    assert lung_dice(*phantom(seed, COARSE), COARSE) > 0.95


@pytest.mark.parametrize("seed", [4, 5])
def test_threshold_segmentation_finds_the_labeled_lungs_at_fine_voxels(seed: int) -> None:
    assert lung_dice(*phantom(seed, FINE), FINE) > 0.96


@pytest.mark.parametrize("seed", range(6))
def test_lungs_hold_two_and_a_half_to_seven_liters_and_the_heart_takes_from_the_left(seed: int) -> None:
    _, labels = phantom(seed, COARSE)
    lung = np.isin(labels, (Label.LUNG, Label.VESSEL))
    liters = lung.sum() * COARSE.spacing_mm**3 / 1e6
    assert 2.5 < liters < 7
    components, _ = ndimage.label(ndimage.binary_erosion(lung))
    sizes = np.bincount(components.ravel())[1:]
    assert (sizes > 0.2 * sizes.sum()).sum() == 2, "the lungs are not two"
    center = [ndimage.center_of_mass(components == 1 + index)[2] for index in np.argsort(sizes)[-2:]]
    smaller, larger = center
    assert larger < smaller, "the right lung, at low W, should be the larger"


def test_twelve_pairs_of_ribs_stand_out_as_bone_with_soft_gaps_between_them() -> None:
    seed = 4
    person, (hu, labels) = Person.sample(seed), phantom(seed, FINE)
    for side in SIDES:
        ribs = [bones.rib(person, number, side) for number in range(1, 13)]
        for number, rib in enumerate(ribs, start=1):
            on_rib = labels[at(FINE, (rib.start + rib.end) / 2)]
            assert (on_rib == Label.BONE).mean() > 0.9, f"rib {number}, side {side}"
        # Below the armpit the ribs are crossed one by one on the way down the side of the chest.
        lateral = [rib.start[np.argmax(side * rib.start[:, 0])] for rib in ribs[3:10]]
        for upper, lower in pairwise(lateral):
            way = np.linspace(upper, lower, 15)
            assert labels[at(FINE, way)].min() == Label.OTHER
            assert hu[at(FINE, way)].min() < 150


def test_ribs_fall_forwards_and_the_last_two_end_in_the_flank() -> None:
    person = Person.sample(4)
    for side in SIDES:
        for number in range(1, 13):
            rib = bones.rib(person, number, side)
            assert rib.end[-1, 2] < rib.start[0, 2] - 10
            reaches_front = rib.end[-1, 1] < person.cage(rib.end[-1, 2])[1]
            assert reaches_front == (number <= 10)


@pytest.mark.parametrize("seed", range(6))
def test_heart_and_aorta_lie_to_the_left_and_the_liver_to_the_right(seed: int) -> None:
    person, (hu, labels) = Person.sample(seed), phantom(seed, COARSE)
    z = -(np.arange(COARSE.size) - (COARSE.size - 1) / 2) * COARSE.spacing_mm
    beside_heart = (z > person.dome_z[0] + 8) & (z < vessels.heart_center(person)[2] + 15)
    lung = np.isin(labels[beside_heart], (Label.LUNG, Label.VESSEL))
    assert lung[:, :, :32].sum() > 1.1 * lung[:, :, 32:].sum(), "the heart does not lie to the left"

    courses = vessels.aorta(person)
    descending = (courses.start[:, 2] < person.carina_z - 20) & (courses.start[:, 2] > person.dome_z[0] + 10)
    course = courses.start[descending & (courses.start[:, 1] > person.spine_y - 40)]
    assert len(course) > 5
    mirrored = course * [-1, 1, 1] + [2 * person.spine(course[:, 2])[0].mean(), 0, 0]
    assert np.median(hu[at(COARSE, course)]) > 0
    assert hu[at(COARSE, mirrored)].mean() < hu[at(COARSE, course)].mean() - 100

    low = min(person.dome_z) - 45
    right = np.array([[x, person.spine_y - 50, low] for x in range(-90, -40, 5)])
    assert np.abs(hu[at(COARSE, right)] - Tissue.sample(seed).liver).max() < 15
    assert hu[at(COARSE, right * [-1, 1, 1])].mean() < hu[at(COARSE, right)].mean() - 10


def test_a_tree_reaches_every_target_and_its_trunk_feeds_them_all() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(0, 20, (60, 3))
    start, end, fed = vessels.branching(np.array([0.0, 0.0, 100.0]), targets)
    is_tip = ~(end[:, None] == start[None]).all(axis=2).any(axis=1)
    from_root = (start == [0, 0, 100]).all(axis=1)
    assert 1 < is_tip.sum() < 60
    assert fed[from_root].sum() == is_tip.sum()
    assert (fed[is_tip] == 1).all()
    # Straightening moves forks, not tips.
    assert np.array_equal(end[is_tip], targets[is_tip])
    assert not np.array_equal(end[~is_tip], targets[~is_tip])
