"""Data consistency: optimization steps make a volume agree with its radiographs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, Geometry, Grid, View, chest, parallel, x2ct
from raylift.datasets.intensity import Window, hu_to_attenuation, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project, render_drrs
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.preparation import prepare
from raylift.models.consistency import ConsistencyResult, fit, fit_gain_and_offset, reprojection_metrics

GRID = Grid(32, 10.0)
WINDOW = Window()
OBLIQUE = View("oblique", azimuth_deg=30.0, elevation_deg=10.0, offset_mm=(5.0, 0.0, 0.0))


def pairs(count: int = 2, geometry: Geometry | None = None) -> tuple[Tensor, Tensor]:
    """Synthetic thoraces in the window's [0, 1], and their normalized radiographs."""
    volumes = [np.clip(thorax(seed, GRID)[0], -1024, 1476).astype(np.int16) for seed in range(count)]
    images = [
        np.stack([normalize(image) for image in render_drrs(hu, GRID, geometry or chest(GRID))]) for hu in volumes
    ]
    unit = WINDOW.to_unit(torch.from_numpy(np.stack(volumes)).float())[:, None]
    return unit, torch.from_numpy(np.stack(images))


def wrong(volume: Tensor) -> Tensor:
    """The volume with an attenuation error in its left half and another in its lower half."""
    changed = volume.clone()
    changed[..., 16:] *= 1.15
    changed[:, :, 16:] *= 0.9
    return changed.clip(0.0, 1.0)


def total(residual: Tensor) -> Tensor:
    return residual.square().sum(dim=1).sqrt()


def test_the_residual_falls_to_a_tenth_in_ten_steps_and_so_does_the_error_of_the_volume() -> None:
    ground_truth, images = pairs()
    start = wrong(ground_truth)
    fitted = fit(start, images, WINDOW, GRID, chest(GRID), 10)
    assert (total(fitted.residual_before) > 0.03).all()
    assert (total(fitted.residual_after) < total(fitted.residual_before) / 10).all()
    errors = [(volume - ground_truth).square().mean(dim=(1, 2, 3, 4)) for volume in (start, fitted.volume)]
    assert (errors[1] < 0.8 * errors[0]).all()


def test_projections_of_the_volume_itself_agree_whatever_their_gain_and_offset() -> None:
    ground_truth, images = pairs()
    own = reprojection_metrics(ground_truth, images, WINDOW, GRID, chest(GRID))
    assert (own.residual < 0.01).all()
    assert (own.psnr_db > 40).all()
    scaled = reprojection_metrics(ground_truth, images * 0.6 + 0.2, WINDOW, GRID, chest(GRID))
    assert (scaled.residual < 0.01).all()
    other = reprojection_metrics(ground_truth.flip(0), images, WINDOW, GRID, chest(GRID))
    assert (other.residual > 5 * own.residual).all()
    # PSNR is relative to a range of 1, the residual to the norm of the radiograph.
    errors = other.residual.square() * images.square().mean(dim=(2, 3))
    torch.testing.assert_close(other.psnr_db, -10 * errors.log10())


def test_more_steps_never_leave_a_larger_residual() -> None:
    ground_truth, images = pairs(1)
    after = [
        float(total(fit(wrong(ground_truth), images, WINDOW, GRID, chest(GRID), n).residual_after)) for n in range(9)
    ]
    assert after == sorted(after, reverse=True)
    assert after[0] > 2 * after[1]


def test_no_step_changes_nothing() -> None:
    ground_truth, images = pairs(1)
    start = wrong(ground_truth)
    fitted = fit(start, images, WINDOW, GRID, chest(GRID), 0)
    assert torch.equal(fitted.volume, start)
    assert torch.equal(fitted.residual_after, fitted.residual_before)


def test_a_volume_that_agrees_with_its_radiographs_does_not_change() -> None:
    ground_truth, images = pairs()
    fitted = fit(ground_truth, images, WINDOW, GRID, chest(GRID), 10)
    # Pixels saturated by normalization are no residual.
    assert fitted.residual_before.max() < 1e-5
    assert (fitted.volume - ground_truth).abs().max() < 1e-4


def test_a_sample_is_fitted_independently_of_its_batch() -> None:
    ground_truth, images = pairs(3)
    start = wrong(ground_truth)
    # The first stops at once and the second cannot change; the third is fitted all the same.
    start[0], start[1] = ground_truth[0], 0.0
    together = fit(start, images, WINDOW, GRID, chest(GRID), 6)
    for k in range(3):
        alone = fit(start[k : k + 1], images[k : k + 1], WINDOW, GRID, chest(GRID), 6)
        torch.testing.assert_close(together.volume[k], alone.volume[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.residual_after[k], alone.residual_after[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "geometry",
    [
        replace(chest(GRID), views=(FRONTAL,)),
        replace(chest(GRID), views=(FRONTAL, OBLIQUE)),
        x2ct(GRID),
        parallel(GRID),
    ],
    ids=["one view", "an oblique view", "x2ct", "parallel"],
)
def test_any_number_of_views_in_any_geometry_is_fitted(geometry: Geometry) -> None:
    ground_truth, images = pairs(1, geometry)
    fitted = fit(wrong(ground_truth), images, WINDOW, GRID, geometry, 5)
    assert fitted.residual_after.shape == (1, len(geometry.views))
    assert total(fitted.residual_after) < total(fitted.residual_before) / 4


def test_values_stay_in_the_window_and_air_does_not_change() -> None:
    ground_truth, images = pairs(1)
    start = wrong(ground_truth)
    noisy = (images + 0.3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))).clip(0.0, 1.0)
    fitted = fit(start, noisy, WINDOW, GRID, chest(GRID), 10, strength=0.0)
    assert fitted.volume.min() >= 0
    assert fitted.volume.max() <= 1
    air = hu_to_attenuation(WINDOW.to_hu(start)) == 0
    assert air.float().mean() > 0.2
    assert torch.equal(fitted.volume[air], start[air])
    assert not torch.equal(fitted.volume, start)


def test_a_larger_strength_keeps_the_volume_closer_to_the_networks() -> None:
    ground_truth, images = pairs(1)
    start = wrong(ground_truth)
    fits: list[ConsistencyResult] = [
        fit(start, images, WINDOW, GRID, chest(GRID), 8, strength) for strength in (0.0, 10.0, 1e4)
    ]
    moved = [float((one.volume - start).square().mean()) for one in fits]
    assert moved == sorted(moved, reverse=True)
    assert moved[2] < moved[0] / 100
    left = [float(total(one.residual_after)) for one in fits]
    assert left == sorted(left)


def test_gain_and_offset_of_a_radiograph_do_not_matter() -> None:
    projections = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    gain, offset, mask = fit_gain_and_offset(projections, 0.5 * projections + 0.2)
    torch.testing.assert_close(gain.flatten(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(offset.flatten(), torch.tensor([0.2, 0.2]))
    assert bool((mask == 1).all())


def test_pixels_that_normalization_saturates_do_not_change_the_match() -> None:
    projections = torch.linspace(0, 1, 400).reshape(1, 1, 20, 20)
    gain, offset, mask = fit_gain_and_offset(projections, ((projections - 0.1) / 0.8).clip(0.0, 1.0))
    torch.testing.assert_close(gain.item(), 1.25, atol=2e-3, rtol=0)
    torch.testing.assert_close(offset.item(), -0.125, atol=2e-3, rtol=0)
    assert 0.75 < float(mask.mean()) < 0.85


def test_the_descent_direction_is_the_gradient_through_gain_and_offset_too() -> None:
    # The fit treats gain and offset as constants; the gradient through them must be the same.
    geometry = parallel(Grid(8, 10.0))
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(1, 1, 8, 8, generator=generator, dtype=torch.float64).clip(0.05, 0.95)
    attenuation = torch.rand(1, 1, 8, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    projections = project(attenuation, 10.0, geometry, FRONTAL)
    differentiable = fit_gain_and_offset(projections, image)
    constant = [tensor.detach() for tensor in differentiable]
    gradients = [
        torch.autograd.grad(
            (mask * (gain * projections + offset - image)).square().sum(), attenuation, retain_graph=True
        )[0]
        for gain, offset, mask in (differentiable, constant)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("image", [0.0, 1.0], ids=["black", "white"])
def test_a_constant_radiograph_changes_nothing(image: float) -> None:
    ground_truth, images = pairs(1)
    fitted = fit(wrong(ground_truth), torch.full_like(images, image), WINDOW, GRID, chest(GRID), 4)
    assert torch.equal(fitted.volume, wrong(ground_truth))
    assert bool(fitted.residual_after.isfinite().all())


def test_a_negatively_correlated_projection_changes_nothing() -> None:
    ground_truth, images = pairs(1)
    fitted = fit(wrong(ground_truth), 1 - images, WINDOW, GRID, chest(GRID), 4)
    assert torch.equal(fitted.volume, wrong(ground_truth))
    assert torch.equal(fitted.residual_after, fitted.residual_before)


def test_the_network_of_the_volume_gets_no_gradient_and_keeps_its_weights() -> None:
    ground_truth, images = pairs(1)
    network = torch.nn.Conv3d(1, 1, 1)
    torch.nn.init.constant_(network.weight, 0.9)
    torch.nn.init.constant_(network.bias, 0.0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fitted = fit(network(wrong(ground_truth)), images, WINDOW, GRID, chest(GRID), 3)
    assert total(fitted.residual_after) < total(fitted.residual_before)
    assert not fitted.volume.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_fit_works_without_gradient_mode() -> None:
    ground_truth, images = pairs(1)
    expected = fit(wrong(ground_truth), images, WINDOW, GRID, chest(GRID), 3)
    with torch.no_grad():
        assert torch.equal(fit(wrong(ground_truth), images, WINDOW, GRID, chest(GRID), 3).volume, expected.volume)
    with torch.inference_mode():
        start, given = wrong(ground_truth), images.clone()
        torch.testing.assert_close(fit(start, given, WINDOW, GRID, chest(GRID), 3).volume, expected.volume)


def test_invalid_arguments_are_refused() -> None:
    ground_truth, images = pairs(1)
    with pytest.raises(ConfigError, match="-1 steps"):
        fit(ground_truth, images, WINDOW, GRID, chest(GRID), -1)
    with pytest.raises(ConfigError, match="strength nan"):
        fit(ground_truth, images, WINDOW, GRID, chest(GRID), 1, float("nan"))
    with pytest.raises(ConfigError, match="1 radiographs for a geometry of 2 views"):
        fit(ground_truth, images[:, :1], WINDOW, GRID, chest(GRID), 1)


def test_the_fit_lowers_the_residuals_of_a_real_pair_of_radiographs(real_data: Path) -> None:
    files = {view: real_data / "xray" / f"cc0_normal_{view}.jpg" for view in ("frontal", "lateral")}
    images = [prepare(read(file.read_bytes(), file.name, view=view).pixels, 32) for view, file in files.items()]
    start = pairs(1)[0]
    fitted = fit(start, torch.from_numpy(np.stack(images))[None], WINDOW, GRID, chest(GRID), 10)
    assert (fitted.residual_after < 0.6 * fitted.residual_before).all()
    assert bool(fitted.volume.isfinite().all())
    assert 0 <= fitted.volume.min() < fitted.volume.max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_fit_on_a_gpu_equals_the_fit_on_the_cpu() -> None:
    ground_truth, images = pairs()
    there = fit(wrong(ground_truth).cuda(), images.cuda(), WINDOW, GRID, chest(GRID), 5)
    here = fit(wrong(ground_truth), images, WINDOW, GRID, chest(GRID), 5)
    torch.testing.assert_close(there.volume.cpu(), here.volume, atol=1e-3, rtol=0)
