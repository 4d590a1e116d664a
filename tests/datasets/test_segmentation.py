from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import thorax_hu
from scipy import ndimage

from raylift.datasets import segmentation
from raylift.datasets.segmentation import Label

SPACING_MM = 4.0


def thorax(shape: tuple[int, int, int] = (80, 70, 90)) -> np.ndarray:
    """The thorax in volume order with a vessel in the right lung and a table behind the back."""
    d, h, w = (((np.arange(n) - (n - 1) / 2) * SPACING_MM) for n in shape)
    hu = thorax_hu(w[None, None], h[None, :, None], -d[:, None, None])
    hu[20:60, 33:36, 26:29] = 30
    hu[:, -4:-2, 5:-5] = 200
    return hu.astype(np.int16)


def lung_by_formula(shape: tuple[int, int, int] = (80, 70, 90)) -> np.ndarray:
    d, h, w = (((np.arange(n) - (n - 1) / 2) * SPACING_MM) for n in shape)
    x, y, z = w[None, None], h[None, :, None], -d[:, None, None]
    right = ((x + 70) / 48) ** 2 + (y / 70) ** 2 + (z / 95) ** 2 < 1
    left = ((x - 70) / 42) ** 2 + (y / 65) ** 2 + ((z - 10) / 85) ** 2 < 1
    return (right | left) & (thorax_hu(x, y, z) < -400)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_the_body_is_the_patient_with_lungs_and_without_the_table() -> None:
    hu = thorax()
    inside = segmentation.body(hu, SPACING_MM)
    assert inside[40, 35, 26], "the lung belongs to the body"
    assert not inside[:, -4:-2].any(), "the table does not"
    assert not inside[:, 0].any()
    columns = np.flatnonzero(inside[40].any(axis=0))
    assert (columns[-1] - columns[0] + 1) * SPACING_MM == pytest.approx(300, abs=12)


def test_the_lungs_are_where_the_formula_has_them_with_their_vessels() -> None:
    hu = thorax()
    found = segmentation.lungs(hu, SPACING_MM)
    assert dice(found, lung_by_formula()) > 0.95
    assert found[40, 34, 27], "the vessel is inside"


def test_air_around_the_body_and_in_small_pockets_is_no_lung() -> None:
    hu = thorax()
    hu[5:8, 35:38, 60:63] = -1000  # 1.7 ml, as gas in the stomach
    found = segmentation.lungs(hu, SPACING_MM)
    assert not found[5:8, 35:38, 60:63].any()
    assert not found[:, 0].any()
    assert not found[:, :, 0].any()


@pytest.mark.parametrize("value", [-1024, -1000, 40, 3071])
def test_a_volume_of_one_value_has_no_lungs_and_no_labels(value: int) -> None:
    hu = np.full((20, 20, 20), value, dtype=np.int16)
    assert not segmentation.lungs(hu, SPACING_MM).any()
    assert not segmentation.labels(hu, SPACING_MM).any()
    body = segmentation.body(hu, SPACING_MM)
    assert body.all() if value > segmentation.BODY_HU else not body.any()


SIDES = {
    "above": np.s_[25:], "below": np.s_[:50], "front": np.s_[:, 15:], "back": np.s_[:, :55],
    "right": np.s_[:, :, 13:], "left": np.s_[:, :, :75],
}  # fmt: skip
"""Cuts through the body, those next to a lung two or three voxels from it."""


@pytest.mark.parametrize("side", SIDES)
def test_a_body_that_a_side_of_the_volume_cuts_is_what_it_was_up_to_that_side(side: str) -> None:
    hu, cut = thorax(), SIDES[side]
    assert np.array_equal(segmentation.body(hu[cut], SPACING_MM), segmentation.body(hu, SPACING_MM)[cut])


@pytest.mark.parametrize("side", [np.s_[:, :, 20:], np.s_[:, :, 30:], np.s_[:, :, :60], np.s_[:, :, 24:66]])
def test_a_lung_that_the_right_or_left_side_of_the_volume_cuts_open_is_found(side: tuple[slice, ...]) -> None:
    hu = thorax()
    body, lung = segmentation.body(hu, SPACING_MM)[side], segmentation.lungs(hu, SPACING_MM)[side]
    assert lung[:, :, [0, -1]].any()
    assert np.array_equal(segmentation.body(hu[side], SPACING_MM), body)
    assert dice(segmentation.lungs(hu[side], SPACING_MM), lung) > 0.99


@pytest.mark.parametrize("flank", [2, 3])
def test_a_thin_flank_at_the_side_of_the_volume_keeps_the_lung_inside(flank: int) -> None:
    hu = np.full((30, 60, 60), -1000, np.int16)
    hu[:, 10:50] = 40
    hu[:, 20:40, flank:30] = -850
    inside = segmentation.body(hu, SPACING_MM)
    assert inside[:, 10:50].all()
    assert segmentation.lungs(hu, SPACING_MM)[:, 20:40, flank:30].all()


def test_vessels_go_on_to_the_slice_that_cuts_a_lung() -> None:
    hu = thorax()[25:]
    found = segmentation.vessels(hu, segmentation.lungs(hu, SPACING_MM))
    assert found[0, 34, 27]
    assert np.array_equal(found[0], found[5])


def test_labels_state_lung_vessel_and_other_and_nothing_else() -> None:
    hu = thorax()
    labels = segmentation.labels(hu, SPACING_MM)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {Label.OTHER, Label.LUNG, Label.VESSEL}
    assert labels[40, 34, 27] == Label.VESSEL
    assert labels[40, 50, 27] == Label.LUNG
    assert labels[40, 35, 45] == Label.OTHER
    assert np.array_equal(labels > 0, segmentation.lungs(hu, SPACING_MM))


def test_the_wall_of_a_lung_is_no_vessel() -> None:
    hu = thorax()
    lung = segmentation.lungs(hu, SPACING_MM)
    vessels = segmentation.vessels(hu, lung)
    assert not vessels[~lung].any()
    # Only the synthetic vessel: 40 x 3 x 3 voxels, and its soft edge.
    assert 200 < vessels.sum() < 600


def test_the_trachea_is_followed_to_where_it_divides() -> None:
    hu = thorax()
    true = np.zeros(hu.shape, dtype=bool)
    true[:40, 33:37, 43:47] = True
    hu[true] = -990
    hu[40:44, 33:37, 38:43] = hu[40:44, 33:37, 47:52] = -990  # bronchi
    inside = segmentation.body(hu, SPACING_MM)
    found = segmentation.trachea((hu < segmentation.LUNG_AIR_HU) & inside, inside, SPACING_MM)
    assert found[true].all()
    assert dice(found, ndimage.binary_dilation(true)) > 0.95


def test_bone_is_dense_inside_the_body_and_the_mediastinum_is_between_the_lungs() -> None:
    hu = np.full((30, 60, 60), -1000, np.int16)
    hu[:, 5:50, 4:56] = 40
    hu[:, 20:40, 8:22] = hu[:, 20:40, 38:52] = -850
    hu[:, 24:28, 28:32] = 227
    hu[:, 54:57, 10:50] = 500  # table
    inside = segmentation.body(hu, SPACING_MM)
    bone = segmentation.bone(hu, inside)
    assert np.array_equal(np.argwhere(bone).min(axis=0), [0, 24, 28])
    assert bone.sum() == 30 * 4 * 4
    between = segmentation.mediastinum(hu, segmentation.lungs(hu, SPACING_MM))
    assert between[:, 20:40, 22:38].sum() == between.sum() == 30 * (20 * 16 - 16)
    assert not segmentation.mediastinum(hu, np.zeros_like(inside)).any()


@pytest.mark.parametrize("spacing_mm", [2.0, 4.0])
def test_real_lungs_have_the_size_of_lungs_at_any_spacing(spacing_mm: float, real_data: Path) -> None:
    image = sitk.DICOMOrient(sitk.ReadImage(str(real_data / "ct" / "lidc_idri_0006_2mm.nii.gz")), "LPI")
    hu = sitk.GetArrayFromImage(image).clip(-1024, 3071).astype(np.int16)
    step = int(spacing_mm / 2)
    lung = segmentation.lungs(hu[::step, ::step, ::step], spacing_mm)
    liters = lung.sum() * spacing_mm**3 / 1e6
    assert 4.0 < liters < 7.5
    half = lung.shape[2] // 2
    for side in (lung[:, :, :half], lung[:, :, half:]):
        assert side.sum() > 0.35 * lung.sum()
