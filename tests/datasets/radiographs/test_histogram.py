from __future__ import annotations

import numpy as np
import pytest
from radiograph_samples import chest

from raylift.datasets.geometry import Grid
from raylift.datasets.geometry import chest as chest_stand
from raylift.datasets.intensity import normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.histogram import AIR, LEVELS, match_histogram, mean_quantiles, quantiles

GRID = Grid(64, 5.0)


@pytest.fixture(scope="module")
def projections() -> list[np.ndarray]:
    """Frontal projections of some people, normalized."""
    return [normalize(render_drrs(thorax(seed, GRID)[0], GRID, chest_stand(GRID))[0]) for seed in range(6)]


@pytest.mark.parametrize("curve", [0.4, 0.7, 1.6])
def test_a_tone_curve_is_undone(projections: list[np.ndarray], curve: float) -> None:
    """Matched, a projection and its hard or soft print are nearly one image."""
    wanted = mean_quantiles(projections)
    for image in projections:
        printed = normalize(image**curve)
        before = np.abs(printed - image).mean()
        after = np.abs(match_histogram(printed, wanted) - match_histogram(image, wanted)).mean()
        assert after < 0.1 * before


def test_a_matched_image_has_the_quantiles_of_the_reference(projections: list[np.ndarray]) -> None:
    wanted = mean_quantiles(projections)
    assert len(wanted) == LEVELS
    np.testing.assert_allclose(quantiles(match_histogram(projections[0] ** 2, wanted)), wanted, atol=0.03)


def test_order_is_kept_and_air_stays_air(projections: list[np.ndarray]) -> None:
    image = projections[1] ** 2
    result = match_histogram(image, mean_quantiles(projections))
    assert (np.diff(result.ravel()[np.argsort(image.ravel(), kind="stable")]) >= 0).all()
    assert np.array_equal(result[image <= AIR], image[image <= AIR])
    assert (result.min(), result.max(), result.dtype) == (0, 1, np.float32)


def test_a_large_even_region_moves_to_the_middle_of_its_share() -> None:
    image = normalize(chest(64, 64))
    even = np.where(image > 0.4, np.float32(0.7), image)
    even[0, :30] = 1
    wanted = tuple(np.linspace(AIR, 1, LEVELS))
    share = [(even[even > AIR] < 0.7).mean(), (even[even > AIR] <= 0.7).mean()]
    low, high = np.quantile(wanted, share)
    assert match_histogram(even, wanted)[even == np.float32(0.7)][0] == pytest.approx((low + high) / 2, abs=0.03)


def test_an_image_of_air_alone_stays_as_it_is() -> None:
    image = np.zeros((8, 8), np.float32)
    assert np.array_equal(match_histogram(image, tuple(np.linspace(AIR, 1, LEVELS))), image)
