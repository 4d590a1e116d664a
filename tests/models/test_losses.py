"""Losses against values computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.metrics import structural_similarity

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.segmentation import Label
from raylift.models import losses
from raylift.models.losses import (
    cone_projection_l1,
    least_squares,
    masked_mse,
    orthogonal_projection_l1,
    voxel_l1,
    voxel_mse,
)
from raylift.models.objectives.adversarial import ReconstructionLoss
from raylift.models.objectives.objective import frozen
from raylift.models.systems.x2ct import X2CT_GAN

GRID = Grid(32, 10.0)


def batch(size=32, n=2):
    generator = torch.Generator().manual_seed(1)
    cube = torch.rand(n, 1, size, size, size, generator=generator)
    return Batch(cube, torch.rand(n, 2, size, size, generator=generator))


def test_least_squares_is_zero_for_the_target_score_and_one_for_the_other():
    assert least_squares(torch.ones(2, 3), real=True) == 0
    assert least_squares(torch.ones(2, 3), real=False) == 1


def test_voxel_errors_of_a_constant_difference_are_its_absolute_value_and_its_square():
    target = torch.zeros(1, 1, 4, 4, 4)
    assert torch.isclose(voxel_mse(target + 0.5, target), torch.tensor(0.25))
    assert torch.isclose(voxel_l1(target - 0.5, target), torch.tensor(0.5))


def test_a_masked_error_counts_the_voxels_of_the_mask_only():
    target, prediction = torch.zeros(1, 1, 4, 4, 4), torch.full((1, 1, 4, 4, 4), 100.0)
    mask = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    assert masked_mse(prediction, target, mask) == 0
    mask[..., :2] = True
    prediction[..., :2] = 0.5
    assert masked_mse(prediction, target, mask) == 0.25


def test_orthogonal_projections_change_with_shifts_across_their_axis_only():
    target, moved = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    target[0, 0, 0, 0, 0] = moved[0, 0, 3, 0, 0] = 1.0
    # Moved along D: the projection along D is the same; along H and W, two of 16 pixels differ by 1/4 each.
    expected = (0 + 2 * 0.25 / 16 + 2 * 0.25 / 16) / 3
    assert torch.isclose(orthogonal_projection_l1(moved, target), torch.tensor(expected))


def test_x2ct_gans_orthogonal_projections_are_of_absolute_values():
    target, prediction = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    prediction[0, 0, 0, 0, 0], prediction[0, 0, 1, 0, 0] = 1.0, -1.0
    along_h_and_w = 2 * 0.25 / 16 + 2 * 0.25 / 16
    plain = orthogonal_projection_l1(prediction, target)
    assert torch.isclose(plain, torch.tensor((0 + along_h_and_w) / 3))
    loss = X2CT_GAN.full.loss
    terms = loss.reconstruction_terms(prediction, Batch(target, torch.zeros(1, 2, 4, 4), ("x",)))
    # Along D the plain sum is 0; that of absolute values is 2/4 in one of 16 pixels. Along H and W: two of 1/4.
    assert torch.isclose(terms["projection_l1"], torch.tensor((0.5 / 16 + along_h_and_w) / 3))


def test_orthogonal_projections_do_not_depend_on_what_they_average_out():
    target = torch.rand(2, 1, 4, 4, 4)
    assert orthogonal_projection_l1(target, target) == 0


def test_a_cone_projection_sums_samples_along_the_ray():
    # The central ray of a cube of 128 units of value 1 is 128 long: 128 / 1.75 samples. Outside the cube it is 0.
    cube, nothing = torch.ones(1, 1, 16, 16, 16), torch.zeros(1, 1, 16, 16, 16)
    inside = float(cone_projection_l1(cube, nothing, 0.0, 0.0))
    # Of the detector of 374 units the cube's middle plane covers 299: 64 percent of its area, shorter at its rim.
    assert 0.45 * 128 / 1.75 < inside < 0.7 * 128 / 1.75


def test_cone_projections_are_those_of_the_published_constants_written_out_with_the_axial_source_at_the_feet():
    """Samples 1.75 units apart from a source 300 units from the center of 128 units, each interpolated linearly."""
    generator = np.random.default_rng(0)
    size, units = 32, 128 / 32
    volume = np.zeros((size,) * 3)
    # Asymmetric: most of it at the feet, in front, and at the patient's left.
    volume[20:30, 3:14, 18:28] = generator.random((10, 11, 10))
    volume[4:9, 12:20, 5:12] = 0.3

    def mean_value(to_source: np.ndarray, column: np.ndarray, row: np.ndarray) -> float:
        offset = (np.arange(size) - (size - 1) / 2) * 0.73 * 512 / size
        pixels = -400 * to_source + offset[:, None, None] * row + offset[None, :, None] * column
        source = 300 * to_source
        length = np.linalg.norm(pixels - source, axis=-1)
        steps = np.arange(0.0, length.max(), 1.75)
        points = source + (steps[:, None, None] / length)[..., None] * (pixels - source)
        left, posterior, superior = np.moveaxis(points, -1, 0)
        indices = [axis / units + (size - 1) / 2 for axis in (-superior, posterior, left)]
        return float(map_coordinates(volume, indices, order=1, cval=0.0).sum(axis=0).mean())

    left, posterior, superior = np.eye(3)
    poses = [(-left, posterior, superior), (posterior, left, superior)]
    lateral, frontal = (mean_value(*pose) for pose in poses)
    axial = {side: mean_value(sign * superior, left, posterior) for side, sign in (("feet", -1.0), ("head", 1.0))}
    tensor = torch.from_numpy(volume).float()[None, None]
    ours = float(cone_projection_l1(tensor, torch.zeros_like(tensor), 0.0, 0.0))
    assert ours == pytest.approx((axial["feet"] + lateral + frontal) / 3, rel=0.01)
    assert ours != pytest.approx((axial["head"] + lateral + frontal) / 3, rel=0.1)


def test_a_cone_projection_does_not_depend_on_the_resolution():
    blob = torch.zeros(1, 1, 16, 16, 16)
    blob[..., 4:10, 5:12, 6:9] = 1.0
    coarse = cone_projection_l1(blob, torch.zeros_like(blob), 0.0, 0.0)
    fine = torch.nn.functional.interpolate(blob, scale_factor=2, mode="nearest")
    torch.testing.assert_close(cone_projection_l1(fine, torch.zeros_like(fine), 0.0, 0.0), coarse, rtol=0.05, atol=0)


def test_poses_are_sampled_from_the_global_generator_and_are_fixed_without_jitter():
    prediction, target = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)
    torch.manual_seed(0)
    first, second = cone_projection_l1(prediction, target), cone_projection_l1(prediction, target)
    torch.manual_seed(0)
    assert cone_projection_l1(prediction, target) == first
    assert first != second
    assert cone_projection_l1(prediction, target, 0.0, 0.0) == cone_projection_l1(prediction, target, 0.0, 0.0)


def test_poses_are_rotated_and_translated_with_the_given_standard_deviations(monkeypatch):
    poses, project = [], losses.project_pose

    def recorded(volume, spacing_mm, geometry, axes, offset):
        poses.append((axes, offset))
        return project(volume, spacing_mm, geometry, axes, offset)

    monkeypatch.setattr(losses, "project_pose", recorded)
    torch.manual_seed(0)
    for _ in range(900):
        cone_projection_l1(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4))
    axes, offsets = (torch.stack(each).unflatten(0, (900, 3)) for each in zip(*poses, strict=True))
    plain = torch.stack([torch.as_tensor(view.axes(), dtype=torch.float32) for view in losses.CONE_VIEWS])
    # Axial, sagittal and coronal: the rays run along another axis each.
    assert sorted(plain[:, 2].abs().argmax(dim=1).tolist()) == [0, 1, 2]
    rotations = plain.transpose(1, 2) @ axes
    # Six numbers a call: all three poses have the same rotation and translation.
    torch.testing.assert_close(rotations, rotations[:, :1].expand_as(rotations), atol=1e-5, rtol=0)
    torch.testing.assert_close(offsets, offsets[:, :1].expand_as(offsets))
    torch.testing.assert_close(
        rotations @ rotations.transpose(2, 3), torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0
    )
    # To first order the angles are the off-diagonal elements of a rotation.
    angles = torch.stack([rotations[..., 2, 1], rotations[..., 0, 2], rotations[..., 1, 0]]).rad2deg()
    assert angles.std(dim=(1, 2)).tolist() == pytest.approx([10.0] * 3, rel=0.1)
    assert offsets.std(dim=(0, 1)).tolist() == pytest.approx([8.0] * 3, rel=0.1)


def test_a_cone_projection_has_a_gradient_at_every_voxel_inside_the_cone():
    volume = torch.rand(1, 1, 16, 16, 16, requires_grad=True)
    cone_projection_l1(volume, torch.zeros(1, 1, 16, 16, 16), 0.0, 0.0).backward()
    assert (volume.grad > 0).float().mean() > 0.95


def test_the_generators_loss_is_the_weighted_sum_of_its_terms():
    weights = ReconstructionLoss(0.1, 10.0, 2.0, 5.0, 0.1, lung_weight=3.0, ssim_weight=0.4)
    data = replace(batch(), labels=torch.full((2, 1, 32, 32, 32), Label.VESSEL, dtype=torch.uint8))
    objective = replace(X2CT_GAN.tiny, loss=weights).objective(GRID, chest(GRID))
    torch.manual_seed(0)
    loss, logs, _ = objective.loss_modules["generator"](data, {})
    expected = {
        "adversarial": 0.1,
        "voxel_mse": 10,
        "voxel_l1": 2,
        "projection_l1": 5,
        "cone_projection_l1": 0.1,
        "lung_mse": 3,
        "ssim_loss": 0.4,
    }
    assert logs.keys() == expected.keys()
    assert torch.isclose(loss, sum(weight * logs[name] for name, weight in expected.items()))
    # Every voxel is lung here.
    assert torch.isclose(logs["lung_mse"], logs["voxel_mse"])


def test_a_weight_of_zero_leaves_its_term_out_and_the_discriminator_too():
    system = replace(X2CT_GAN.tiny, loss=ReconstructionLoss(0.0, 0.0, 1.0, 0.0))
    objective = system.objective(GRID, chest(GRID))
    assert list(objective.loss_modules) == ["generator"]
    _, logs, _ = objective.loss_modules["generator"](batch(), {})
    assert list(logs) == ["voxel_l1"]


def test_a_lung_loss_without_labels_is_refused_with_the_remedy():
    objective = replace(X2CT_GAN.tiny, loss=ReconstructionLoss(lung_weight=1.0)).objective(GRID, chest(GRID))
    with pytest.raises(ConfigError, match=r"the batch has no labels: .* set system\.loss\.lung_weight to 0"):
        objective.loss_modules["generator"](batch(), {})


def test_vessels_are_lung_and_bone_is_not():
    from raylift.models.objectives.adversarial import lungs

    labels = torch.tensor([Label.OTHER, Label.LUNG, Label.VESSEL, Label.BONE], dtype=torch.uint8).reshape(1, 1, 1, 1, 4)
    found = lungs(Batch(torch.zeros(1, 1, 1, 1, 4), torch.zeros(1, 1, 2, 2), labels=labels))
    assert found.flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("weights", "message"), [({"mse_weight": -1.0}, "below 0: mse_weight"), ({"lung_weight": -0.1}, "lung_weight")]
)
def test_a_negative_weight_is_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        ReconstructionLoss(**weights)


def test_generator_and_discriminator_pass_no_gradient_to_each_other():
    objective = X2CT_GAN.tiny.objective(GRID, chest(GRID))
    generator, discriminator = objective.loss_modules.values()
    data = batch()
    with frozen([discriminator.network]):
        loss, _, outputs = generator(data, {})
        loss.backward()
    assert all(parameter.grad is None for parameter in discriminator.network.parameters())
    assert all(parameter.requires_grad for parameter in discriminator.network.parameters())
    before = [None if p.grad is None else p.grad.clone() for p in generator.network.parameters()]
    with frozen([generator.network]):
        loss, _, _ = discriminator(data, outputs)
        loss.backward()
    after = [p.grad for p in generator.network.parameters()]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(parameter.grad.abs().sum() > 0 for parameter in discriminator.network.parameters())


def test_the_ssim_loss_is_that_of_the_protocol():
    torch.manual_seed(0)
    prediction, target = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16)
    blended = 0.7 * target + 0.3 * prediction
    expected = structural_similarity(
        target[0, 0].numpy(), blended[0, 0].numpy(),
        data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    assert 1 - float(losses.ssim_loss(blended, target)) == pytest.approx(expected, abs=1e-5)
