"""Reprojections of volumes equal the radiographs of batches and are differentiable."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raylift.datasets.geometry import Grid, View, chest
from raylift.datasets.intensity import WATER_PER_MM, Window, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.models.drr import Reprojection, normalized
from raylift.models.losses import cross_entropy, total_variation
from raylift.models.objectives.reprojection import ReprojectionLoss

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
BOTH = ("frontal", "lateral")


@pytest.mark.parametrize("pixels", [8, 31, 64])
def test_normalized_tensors_equal_normalized_arrays(pixels):
    images = np.random.default_rng(pixels).normal(3.0, 1.0, (2, 3, pixels, pixels)).astype(np.float32)
    wanted = np.stack([[normalize(image) for image in views] for views in images])
    seen = normalized(torch.from_numpy(images))
    np.testing.assert_allclose(seen.images.numpy(), wanted, atol=1e-6)
    low, high = (np.percentile(images[1, 2], q, method=m) for q, m in ((0.5, "higher"), (99.5, "lower")))
    np.testing.assert_allclose(seen.range_mm[1, 2] * WATER_PER_MM, [low, high], rtol=1e-6)


def test_a_constant_image_becomes_zeros():
    assert not normalized(torch.full((1, 1, 8, 8), 3.0)).images.any()


def test_normalization_removes_scale_and_offset():
    images = torch.rand(1, 2, 16, 16)
    torch.testing.assert_close(normalized(images).images, normalized(7 * images + 2).images, atol=1e-5, rtol=0)


def test_the_gradient_of_normalization_equals_finite_differences():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalized(x).images, images)
    assert torch.autograd.gradcheck(lambda x: normalized(x).range_mm, images)


def test_reprojections_of_the_ground_truth_are_the_radiographs_of_its_batch():
    hu, _ = thorax(3, GRID)
    wanted = torch.stack([torch.from_numpy(normalize(image)) for image in render_drrs(hu, GRID, GEOMETRY)])
    window = Window()
    volume = window.to_unit(torch.from_numpy(hu.astype(np.float32)))[None, None]
    seen = Reprojection(GRID, GEOMETRY, window, BOTH)(volume)
    # The same HU, up to the clipping of the window.
    torch.testing.assert_close(seen.images[0], wanted, atol=5e-3, rtol=0)
    # In another window the same values are other HU.
    other = Reprojection(GRID, GEOMETRY, Window(-1000.0, 4096.0), BOTH)(volume)
    assert (other.range_mm[0, :, 1] > 1.5 * seen.range_mm[0, :, 1]).all()


def test_rotated_views_areprojections_from_the_rotated_poses():
    hu, _ = thorax(3, GRID)
    volume = Window().to_unit(torch.from_numpy(hu.astype(np.float32)))[None, None]
    torch.manual_seed(7)
    turned = Reprojection(GRID, GEOMETRY, Window(), BOTH).rotated(volume, 30.0)
    torch.manual_seed(7)
    angles = (torch.randn(2) * 30.0).tolist()
    views = [View(view.name, azimuth_deg=view.azimuth_deg + a) for view, a in zip(GEOMETRY.views, angles, strict=True)]
    plain = Reprojection(GRID, replace(GEOMETRY, views=tuple(views)), Window(), BOTH)(volume)
    # Sampled at planes of another distance.
    torch.testing.assert_close(turned.images, plain.images, atol=0.03, rtol=0)
    assert not torch.allclose(turned.images, Reprojection(GRID, GEOMETRY, Window(), BOTH)(volume).images, atol=0.1)


def test_a_volume_gets_a_gradient_from_every_view():
    volume = torch.rand(1, 1, 32, 32, 32, requires_grad=True)
    images = Reprojection(GRID, GEOMETRY, Window(), BOTH)(volume).images
    for view in range(2):
        (gradient,) = torch.autograd.grad(images[:, view].square().sum(), volume, retain_graph=True)
        assert float((gradient != 0).float().mean()) > 0.8


def test_thickness_error_is_the_error_of_the_range_relative_to_the_expected_width():
    weights = ReprojectionLoss(min_thickness_mm=(0.0,), max_thickness_mm=(200.0,))
    assert weights.thickness_error(torch.tensor([[[0.0, 200.0]]])) == 0
    assert weights.thickness_error(torch.tensor([[[20.0, 160.0]]])) == pytest.approx((0.1**2 + 0.2**2) / 2)


def test_total_variation_of_a_step_is_its_height_times_its_area():
    volume = torch.zeros(1, 1, 4, 4, 4)
    volume[:, :, 2:] = 3.0
    # One of three neighbors along D differs by 3, none along H or W.
    assert total_variation(volume) == pytest.approx(1.0)
    assert total_variation(torch.ones(1, 1, 4, 4, 4)) == 0


def test_cross_entropy_of_a_zero_logit_is_log_2_and_smoothing_moves_the_minimum():
    assert cross_entropy(torch.zeros(3), real=True) == pytest.approx(np.log(2))
    assert cross_entropy(torch.zeros(3), real=False) == pytest.approx(np.log(2))
    scores = torch.linspace(-6, 6, 1201).unsqueeze(1)
    losses = torch.stack([cross_entropy(score, real=True, smoothing=0.1) for score in scores])
    assert torch.sigmoid(scores[losses.argmin()]) == pytest.approx(0.9, abs=0.01)
