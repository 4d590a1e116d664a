"""Errors of known size in radiographs: zero changes nothing, and each has the effect that its strength states."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raylift.datasets.augmentation.augmentation import line_integrals, poses_of
from raylift.datasets.augmentation.perturbation import (
    KINDS,
    PERTURBATIONS,
    UNPERTURBED,
    Exposure,
    Perturbation,
    RadiographSimulator,
    shows_both_sides,
)
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid, View, chest, fit_detector, parallel, x2ct
from raylift.datasets.intensity import hu_to_attenuation, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import normalized_drrs, project_batch

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
SEED = (0, 7)


@pytest.fixture(scope="module")
def hu():
    return thorax(3, GRID)[0]


@pytest.fixture(scope="module")
def simulator(hu):
    return RadiographSimulator(hu, GRID, GEOMETRY)


def exposed(simulator, kind, strength, seed=SEED, geometry=GEOMETRY):
    return simulator.expose(Perturbation(kind, strength).exposure(geometry, seed))


def standard(images):
    return np.stack([normalize(image) for image in images])


@pytest.mark.parametrize("kind", KINDS)
def test_the_neutral_strength_of_every_kind_is_the_unperturbed_image_exactly(simulator, kind):
    unperturbed = simulator.expose(UNPERTURBED.exposure(GEOMETRY, SEED))
    np.testing.assert_array_equal(exposed(simulator, kind, KINDS[kind].neutral), unperturbed)


@pytest.mark.parametrize("perturbation", [p for p in PERTURBATIONS if p.kind != "missing"], ids=lambda p: p.label)
def test_every_perturbation_changes_the_image_and_is_equal_for_one_seed(simulator, perturbation):
    unperturbed = simulator.expose(UNPERTURBED.exposure(GEOMETRY, SEED))
    image = simulator.expose(perturbation.exposure(GEOMETRY, SEED))
    np.testing.assert_array_equal(image, simulator.expose(perturbation.exposure(GEOMETRY, SEED)))
    assert 1e-4 < np.abs(image - unperturbed).mean() < 0.5


def test_unperturbed_radiographs_are_those_of_an_archive_up_to_the_projector(hu, simulator):
    images = standard(simulator.expose(UNPERTURBED.exposure(GEOMETRY, SEED)))
    expected = normalized_drrs(hu, GRID, GEOMETRY)
    assert np.linalg.norm(images - expected) / np.linalg.norm(expected) < 5e-3


def test_by_their_maximum_unperturbed_radiographs_keep_the_offset_of_rays_that_all_cross_the_patient(hu):
    geometry, wide = x2ct(GRID), np.maximum(hu, -300)
    attenuation = hu_to_attenuation(torch.from_numpy(wide.astype(np.float32)), "plastimatch")[None, None]
    images = RadiographSimulator(wide, GRID, geometry).expose(UNPERTURBED.exposure(geometry, SEED))
    normalized = np.stack([normalize(image, "maximum") for image in images])
    for view_geometry, image, found in zip(Exposure.nominal(geometry).geometries, images, normalized, strict=True):
        drr = project_batch(attenuation, GRID.spacing_mm, poses_of([view_geometry], attenuation.device))[0, 0].numpy()
        assert drr.min() / drr.max() > 0.1
        np.testing.assert_allclose(image, drr / drr.max(), rtol=1e-5)
        # Rounding may move single values to the next of 8 bits.
        difference = np.abs(found - normalize(drr, "maximum"))
        assert difference.max() < 1.01 / 255
        assert (difference > 0).mean() < 0.01
    expected = normalized_drrs(wide, GRID, geometry, "maximum")
    assert np.linalg.norm(normalized - expected) / np.linalg.norm(expected) < 0.02
    collimated = exposed(RadiographSimulator(wide, GRID, geometry), "collimation", 10.0, geometry=geometry)
    assert collimated[:, 0].max() == 0
    np.testing.assert_array_equal(collimated[:, 3:-3, 3:-3], images[:, 3:-3, 3:-3])


def test_a_wrong_view_angle_is_the_projection_of_that_angle(hu, simulator):
    images = standard(exposed(simulator, "angle", 10.0))
    for k, view in enumerate(GEOMETRY.views):
        errors = {}
        for angle in (-10.0, 0.0, 10.0):
            turned = replace(GEOMETRY, views=(replace(view, azimuth_deg=view.azimuth_deg + angle),))
            drr = normalized_drrs(hu, GRID, turned)[0]
            errors[angle] = np.linalg.norm(images[k] - drr) / np.linalg.norm(drr)
        assert min(errors[-10.0], errors[10.0]) < 0.01
        assert errors[0.0] > 0.05


def test_a_patient_off_center_by_one_pixel_is_the_image_moved_by_one_column():
    far = fit_detector(GRID, Geometry("cone", 1e6, 1.1e6, 32, 1.0))
    hu = np.full(GRID.shape, -1000, np.int16)
    hu[10:20, 12:18, 9:21] = 400
    simulator = RadiographSimulator(hu, GRID, far)
    before = exposed(simulator, "centering", 0.0, geometry=far)
    after = exposed(simulator, "centering", 10.0, geometry=far)
    for k in range(2):
        moved = [np.roll(before[k], step, axis=1) for step in (-1, 1)]
        assert min(np.abs(after[k] - image).max() for image in moved) < 2e-3
        assert np.abs(after[k] - before[k]).max() > 0.5


def test_a_nearer_source_magnifies_by_the_ratio_of_the_distances():
    near = fit_detector(GRID, Geometry("cone", 541.0, 949.0, 64, 1.0))
    hu = np.full(GRID.shape, -1000, np.int16)
    # Voxels about the isocenter; what is imaged is 80 mm wide.
    hu[12:20, 15:17, 12:20] = 400
    widths = {}
    for percent in (-10, 0, 10):
        image = exposed(RadiographSimulator(hu, GRID, near), "distance", percent, geometry=near)[0]
        widths[percent] = image[32].sum() / image[32].max()
        sad, sdd = 541 + 9.49 * percent, 949 + 9.49 * percent
        assert widths[percent] == pytest.approx(80 * sdd / sad / near.detector_pitch_mm, rel=0.03)
    assert widths[-10] > widths[0] > widths[10]


def test_gamma_is_the_power_of_the_image(simulator):
    unperturbed = simulator.expose(UNPERTURBED.exposure(GEOMETRY, SEED))
    np.testing.assert_allclose(exposed(simulator, "gamma", 1.4), unperturbed**1.4, atol=1e-6)


def test_noise_has_the_standard_deviation_of_its_photons():
    hu = np.full(GRID.shape, -1000, np.int16)
    hu[:, 8:24] = 0
    simulator = RadiographSimulator(hu, GRID, GEOMETRY)
    std = {}
    for photons in (1e6, 1e5, 1e4):
        exposure = Perturbation("noise", photons).exposure(GEOMETRY, SEED)
        geometries = Exposure.nominal(GEOMETRY).geometries
        volume = torch.from_numpy(hu.astype(np.float32))[None, None]
        soft, bone = (part[0, 0] for part in line_integrals(volume, GRID, [geometries]))
        assert float(bone.abs().max()) == 0
        noise = exposure.acquisition.noise[0, 0]
        clean = soft.numpy()
        # The image's range is scaled to that of the line integrals divided by their maximum.
        offset = clean.min() / clean.max()
        image = (simulator.expose(exposure)[0] - offset) / (1 - offset)
        transmitted = np.exp(-clean)
        expected = -np.log(np.maximum(transmitted + noise * np.sqrt(transmitted / photons), 1e-6))
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        np.testing.assert_allclose(image, expected, atol=1e-3)
        std[photons] = (image - (clean - clean.min()) / np.ptp(clean)).std()
    assert std[1e4] > std[1e5] > std[1e6]


def test_collimation_darkens_the_stated_share_of_each_side(simulator):
    unperturbed = simulator.expose(UNPERTURBED.exposure(GEOMETRY, SEED))
    image = exposed(simulator, "collimation", 10.0)
    assert image[:, :3].max() == image[:, -3:].max() == image[:, :, :3].max() == image[:, :, -3:].max() == 0
    np.testing.assert_array_equal(image[:, 3:-3, 3:-3], unperturbed[:, 3:-3, 3:-3])


def test_a_flip_changes_the_frontal_alone_and_changes_no_symmetric_patient(hu, simulator):
    unperturbed = simulator.expose(UNPERTURBED.exposure(GEOMETRY, SEED))
    flipped = exposed(simulator, "flip", 1.0)
    np.testing.assert_array_equal(flipped[0], unperturbed[0, :, ::-1])
    np.testing.assert_array_equal(flipped[1], unperturbed[1])
    symmetric = RadiographSimulator(np.maximum(hu, hu[:, :, ::-1]), GRID, GEOMETRY)
    same = symmetric.expose(UNPERTURBED.exposure(GEOMETRY, SEED))
    np.testing.assert_allclose(exposed(symmetric, "flip", 1.0), same, atol=1e-5)
    assert not shows_both_sides(View("oblique", azimuth_deg=60.0))


def test_signs_and_noise_depend_on_the_seed_and_not_on_the_strength():
    weak, strong = (Perturbation("angle", degrees).exposure(GEOMETRY, SEED) for degrees in (1.0, 10.0))
    for one, other, view in zip(weak.geometries, strong.geometries, GEOMETRY.views, strict=True):
        first, second = (pose.views[0].azimuth_deg - view.azimuth_deg for pose in (one, other))
        assert second == pytest.approx(10 * first)
    noise = [Perturbation("noise", photons).exposure(GEOMETRY, SEED).acquisition.noise for photons in (1e6, 1e4)]
    np.testing.assert_array_equal(*noise)
    other = Perturbation("noise", 1e4).exposure(GEOMETRY, (0, 8)).acquisition.noise
    assert not np.array_equal(other, noise[0])


def test_a_source_that_an_error_moves_into_the_patient_and_parallel_beams_are_refused(hu):
    close = fit_detector(GRID, Geometry("cone", 200.0, 900.0, 32, 1.0))
    simulator = RadiographSimulator(hu, GRID, close)
    with pytest.raises(ConfigError, match="use a larger source-isocenter distance"):
        exposed(simulator, "distance", -10, geometry=close)
    with pytest.raises(ConfigError, match="cone beams only"):
        RadiographSimulator(hu, GRID, parallel(GRID))
