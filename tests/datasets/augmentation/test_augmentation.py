"""Pairs made on the fly: what is left alone equals what an archive holds, and randomness follows from the position."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from raylift.datasets.augmentation.acquisition import (
    AcquisitionParameters,
    RadiographAugmentation,
    simulate_acquisition,
)
from raylift.datasets.augmentation.augmentation import Augmentation, GeometryJitter, augment, normalize_batch
from raylift.datasets.augmentation.deformation import VolumeAugmentation, deform, deform_labels
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest, parallel
from raylift.datasets.intensity import HU_MIN, hu_to_attenuation, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project
from raylift.datasets.segmentation import Label

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
NONE = Augmentation(
    volume=VolumeAugmentation(probability=0),
    geometry=GeometryJitter(probability=0),
    radiograph=RadiographAugmentation(probability=0),
)
FULL = Augmentation(
    volume=VolumeAugmentation(probability=1),
    geometry=GeometryJitter(probability=1),
    radiograph=RadiographAugmentation(probability=1),
)


@pytest.fixture(scope="module")
def source():
    return torch.from_numpy(thorax(3, Grid(48, 8.0))[0]).float()[None, None]


def drrs(hu: torch.Tensor) -> np.ndarray:
    attenuation = hu_to_attenuation(hu)
    images = torch.cat([project(attenuation, GRID.spacing_mm, GEOMETRY, view) for view in GEOMETRY.views], dim=1)
    return np.stack([normalize(image.numpy()) for image in images[0]])


def test_without_any_change_the_radiographs_are_those_of_an_archive():
    hu = torch.from_numpy(thorax(3, GRID)[0]).float()[None, None]
    volume, views = augment(hu, GRID.spacing_mm, GRID, [NONE.sample(0, 0, 0, GEOMETRY)])
    torch.testing.assert_close(volume, hu, atol=1e-2, rtol=0)
    expected = drrs(hu)
    assert np.linalg.norm(views[0].numpy() - expected) / np.linalg.norm(expected) < 5e-3


def test_a_sample_depends_on_seed_epoch_and_position_alone_whatever_the_batch(source):
    together = augment(source.expand(3, -1, -1, -1, -1), 8.0, GRID, [FULL.sample(1, 0, k, GEOMETRY) for k in range(3)])
    for k in range(3):
        alone = augment(source, 8.0, GRID, [FULL.sample(1, 0, k, GEOMETRY)])
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], other[k], atol=0.02, rtol=1e-4)
    again = augment(source, 8.0, GRID, [FULL.sample(1, 0, 0, GEOMETRY)])
    torch.testing.assert_close(again[0][0], together[0][0], atol=0.02, rtol=1e-4)
    for other in (FULL.sample(2, 0, 0, GEOMETRY), FULL.sample(1, 1, 0, GEOMETRY), FULL.sample(1, 0, 9, GEOMETRY)):
        assert not torch.allclose(augment(source, 8.0, GRID, [other])[1][0], together[1][0])


def test_volumes_stay_in_range_and_radiographs_in_the_unit_interval(source):
    parameters = [FULL.sample(5, 0, k, GEOMETRY) for k in range(6)]
    volume, views = augment(source.expand(6, -1, -1, -1, -1), 8.0, GRID, parameters)
    assert volume.shape == (6, 1, 32, 32, 32)
    assert views.shape == (6, 2, 32, 32)
    assert volume.min() >= HU_MIN
    assert torch.isfinite(views).all()
    assert views.min() >= 0
    assert views.max() <= 1
    # A chest remains: lung and soft tissue.
    assert (((volume > -950) & (volume < -500)).flatten(1).float().mean(dim=1) > 0.02).all()


def test_a_shift_moves_the_body_by_its_vector(source):
    parameters = NONE.sample(0, 0, 0, GEOMETRY)
    moved = replace(parameters, deformation=replace(parameters.deformation, shift_mm=np.array([0.0, 0.0, 20.0])))
    before, _ = augment(source, 8.0, GRID, [parameters])
    after, _ = augment(source, 8.0, GRID, [moved])
    # The result at w takes the source at w + 20 mm, two voxels of 10 mm to the left of the patient.
    torch.testing.assert_close(after[..., :-2], before[..., 2:], atol=1.0, rtol=0)


def test_labels_move_with_their_volume():
    hu, labels = (torch.from_numpy(array)[None, None] for array in thorax(3, GRID))
    hu = hu.float()
    same = NONE.sample(0, 0, 0, GEOMETRY).deformation
    assert torch.equal(deform_labels(labels, 10.0, GRID, [same]), labels)
    moved = FULL.sample(0, 0, 1, GEOMETRY).deformation
    lung = deform_labels(labels, 10.0, GRID, [moved]) == Label.LUNG
    inside = deform(hu, 10.0, GRID, [replace(moved, tissue=np.array([1.0, 0.0, 1.0]))])[lung]
    # Boundary voxels contain both tissues.
    assert ((inside < -400).float().mean()) > 0.85
    assert (hu[lung] < -400).float().mean() < 0.85


def test_no_voxel_inside_the_deformed_mask_is_mixed_with_the_volume_beyond_it():
    labels = torch.full((1, 1, 32, 32, 32), Label.OUTSIDE_FIELD_OF_VIEW, dtype=torch.uint8)
    labels[..., 6:26] = Label.OTHER
    hu = torch.where(labels == Label.OUTSIDE_FIELD_OF_VIEW, HU_MIN, 40.0)
    moved = replace(FULL.sample(0, 0, 1, GEOMETRY).deformation, tissue=np.array([1.0, 0.0, 1.0]))
    volume = deform(hu, 10.0, GRID, [moved])
    inside = deform_labels(labels, 10.0, GRID, [moved]) != Label.OUTSIDE_FIELD_OF_VIEW
    # A share of 0.001 of the mask is 1 HU of 1064.
    torch.testing.assert_close(volume[inside], torch.full_like(volume[inside], 40.0), atol=1.1, rtol=0)
    assert torch.equal(inside, volume > 38.9)
    assert inside.float().mean() > 0.4


def test_beyond_the_source_its_outermost_voxels_continue():
    hu = torch.full((1, 1, 32, 32, 32), 40.0)
    parameters = FULL.sample(0, 0, 1, GEOMETRY).deformation
    result = deform(hu, 10.0, GRID, [replace(parameters, tissue=np.array([1.0, 0.0, 1.0]))])
    torch.testing.assert_close(result, hu)


@pytest.mark.parametrize(
    "changed",
    [
        {"beam_hardening": np.full(2, 0.5)},
        {"scatter": np.full((2, 4, 4), 0.3)},
        {"photons": np.full(2, 1e4)},
        {"electronic_noise": np.full(2, 0.01)},
        {"blur_px": np.full(2, 1.0)},
        {"gamma": np.full(2, 0.6)},
        {"sigmoid": np.full(2, 5.0)},
        {"sharpening": np.full(2, 1.0)},
        {"gain": np.tile(np.linspace(-0.2, 0.2, 4), (2, 4, 1))},
        {"clipping": np.full((2, 2), 0.04)},
        {"bits": np.full(2, 15.0)},
        {"overlay": np.where(np.arange(32) < 4, 0.0, np.nan).astype(np.float32) * np.ones((2, 32, 1), np.float32)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_effect_changes_the_image_and_leaves_it_recognizable(changed):
    hu = torch.from_numpy(thorax(3, GRID)[0]).float()[None, None]
    soft = torch.cat([project(hu_to_attenuation(hu), 10.0, GEOMETRY, view) for view in GEOMETRY.views], dim=1)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 2, 32, 32)).astype(np.float32)
    none = replace(AcquisitionParameters.none(2, 32), noise=noise)
    plain = normalize_batch(simulate_acquisition(soft, 0.1 * soft, [none]))
    image = normalize_batch(simulate_acquisition(soft, 0.1 * soft, [replace(none, **changed)]))
    difference = (image - plain).abs().mean()
    assert 1e-4 < difference < 0.3
    assert np.corrcoef(image.flatten(), plain.flatten())[0, 1] > 0.8


def test_every_acquisition_parameter_has_a_case_above():
    covered = {
        "beam_hardening",
        "scatter",
        "photons",
        "electronic_noise",
        "blur_px",
        "gamma",
        "sigmoid",
        "sharpening",
        "gain",
        "clipping",
        "bits",
    }
    assert {field.name for field in fields(AcquisitionParameters)} == covered | {"overlay", "noise"}


def test_normalizing_a_batch_is_normalizing_each_image():
    images = torch.rand(3, 2, 64, 64) ** 2
    expected = np.stack([[normalize(image.numpy()) for image in views] for views in images])
    np.testing.assert_allclose(normalize_batch(images).numpy(), expected, atol=1e-6)
    by_maximum = np.stack([[normalize(image.numpy(), "maximum") for image in views] for views in images])
    np.testing.assert_allclose(normalize_batch(images, "maximum").numpy(), by_maximum, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        lambda: VolumeAugmentation(scale=(1.2, 0.8)),
        lambda: VolumeAugmentation(elastic_mm=-1),
        lambda: VolumeAugmentation(probability=2),
        lambda: RadiographAugmentation(photons=(0, 1)),
        lambda: RadiographAugmentation(blur_px=-1),
        lambda: RadiographAugmentation(markers=1.5),
        lambda: GeometryJitter(angle_deg=-1),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError):
        settings()


def test_parallel_beams_are_refused_with_the_remedy(source):
    with pytest.raises(ConfigError, match="cone beams only"):
        augment(source, 8.0, GRID, [NONE.sample(0, 0, 0, parallel(GRID))])
