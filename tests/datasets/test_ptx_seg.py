"""PTX-Seg on constructed chests, whose volumes are known, and on phantoms."""

import numpy as np
import pytest

from raylift.datasets import ptx_seg
from raylift.datasets.errors import FileError
from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.pneumothorax import Pneumothorax
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.ptx_seg import Hemithorax, Region
from raylift.datasets.segmentation import Label

SPACING_MM = 2.5
VOXEL_ML = SPACING_MM**3 / 1000
RIGHT = (slice(10, 70), slice(20, 70), slice(15, 45))
LEFT = (slice(10, 70), slice(20, 70), slice(55, 85))


def chest() -> np.ndarray:
    """Two lungs that are boxes of 1,406 ml in a body, with noise."""
    hu = np.full((90, 90, 100), -1000, dtype=np.int16)
    hu[:, 8:82, 6:94] = 40
    hu[RIGHT] = hu[LEFT] = -850
    return hu + np.random.default_rng(0).integers(-8, 8, hu.shape, dtype=np.int16)


def volumes(hu: np.ndarray) -> tuple[float, float]:
    """Pneumothorax of the right and left side, in ml."""
    sides = ptx_seg.measure(ptx_seg.segment(hu, SPACING_MM), VOXEL_ML)
    return sides["right"].pneumothorax_ml, sides["left"].pneumothorax_ml


def with_gas(front: int) -> np.ndarray:
    """Gas in the first `front` rows of the left cavity, then a pleural line of one voxel."""
    hu = chest()
    z, y, x = LEFT
    hu[z, y.start : y.start + front, x] = -1000
    hu[z, y.start + front, x] = -550
    return hu


def test_volumes_are_counts_of_voxels_and_occupancy_is_a_share_of_the_cavity():
    regions = np.repeat(np.arange(5, dtype=np.uint8), [7, 30, 40, 10, 0])
    sides = ptx_seg.measure(regions.reshape(1, 1, -1), 2.0)
    assert sides == {"right": Hemithorax(20.0, 60.0), "left": Hemithorax(0.0, 80.0)}
    assert sides["right"].occupancy_percent == 25.0
    assert Hemithorax(0.0, 0.0).occupancy_percent == 0.0


@pytest.mark.parametrize("front", [4, 12, 25])
def test_gas_before_the_lung_is_measured_up_to_the_pleural_line_on_its_side(front):
    right, left = volumes(with_gas(front))
    assert right == 0
    assert left == pytest.approx(60 * front * 30 * VOXEL_ML, rel=0.05)


def test_a_flipped_chest_has_the_volumes_of_the_other_side():
    hu = with_gas(12)
    assert volumes(hu[:, :, ::-1].copy()) == volumes(hu)[::-1]


def test_a_healthy_chest_has_its_two_lungs_and_no_pneumothorax():
    regions = ptx_seg.segment(chest(), SPACING_MM)
    assert set(np.unique(regions)) == {Region.OTHER, Region.RIGHT_LUNG, Region.LEFT_LUNG}
    for region, place in ((Region.RIGHT_LUNG, RIGHT), (Region.LEFT_LUNG, LEFT)):
        assert (regions[place] == region).all()
        assert (regions == region).sum() == 60 * 50 * 30


def test_emphysema_is_no_pneumothorax():
    hu = chest()
    porous = np.random.default_rng(1).random((60, 50, 30)) < 0.55
    hu[LEFT][porous] = -975
    assert (hu[LEFT] < ptx_seg.CORE_HU).sum() * VOXEL_ML > 700
    assert volumes(hu) == (0, 0)


def test_gas_inside_the_lung_without_contact_to_the_wall_is_no_pneumothorax():
    hu = chest()
    hu[30:45, 38:52, 62:78] = -1000
    assert volumes(hu) == (0, 0)


def test_gas_below_the_diaphragm_is_neither_lung_nor_pneumothorax():
    hu = chest()
    hu[60:88, 20:70, 55:85] = 40
    hu[66:86, 14:40, 50:88] = -1000
    regions = ptx_seg.segment(hu, SPACING_MM)
    assert not regions[64:].any(where=np.arange(100) >= 50)


def test_the_trachea_belongs_to_no_lung():
    hu = chest()
    hu[:50, 40:46, 47:53] = -990
    regions = ptx_seg.segment(hu, SPACING_MM)
    assert not regions[:50, 40:46, 47:53].any()


def test_a_volume_without_lungs_is_refused():
    hu = np.full((40, 40, 40), 40, dtype=np.int16)
    for volume in (hu, np.full_like(hu, -1000)):
        with pytest.raises(FileError, match="no lungs: no air below -400 HU"):
            ptx_seg.segment(volume, SPACING_MM)


@pytest.mark.parametrize(("side", "collapse", "tolerance"), [("right", 0.08, 30.0), ("left", 0.5, 55.0)])
def test_volume_and_occupancy_of_a_phantom_are_found_on_the_affected_side(side, collapse, tolerance):
    hu, labels = thorax(7, Grid(128, SPACING_MM), Pneumothorax(side, collapse))
    noisy = hu + np.random.default_rng(0).normal(0, 20, hu.shape)
    sides = ptx_seg.measure(ptx_seg.segment(noisy.clip(-1024, 3071).astype(np.int16), SPACING_MM), VOXEL_ML)
    found = sides.pop(side)
    assert found.pneumothorax_ml == pytest.approx((labels == Label.PNEUMOTHORAX).sum() * VOXEL_ML, abs=tolerance)
    assert found.occupancy_percent == pytest.approx(100 * collapse, abs=2.0)
    assert [other.pneumothorax_ml for other in sides.values()] == [0.0]
