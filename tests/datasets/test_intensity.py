import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from raylift.datasets.errors import ConfigError
from raylift.datasets.intensity import WATER_PER_MM, Window, hu_to_attenuation, normalize


def test_attenuation_is_zero_up_to_air_and_linear_from_there() -> None:
    hu = torch.tensor([-3024.0, -1024.0, -1000.0, 0.0, 1000.0, 3071.0])
    expected = WATER_PER_MM * torch.tensor([0, 0, 0, 1, 2, 4.071])
    torch.testing.assert_close(hu_to_attenuation(hu), expected)


def test_plastimatchs_attenuation_is_zero_up_to_minus_800_hu_and_linear_above() -> None:
    hu = torch.tensor([-1024.0, -801.0, -800.0, -799.0, -500.0, 0.0, 1000.0])
    expected = WATER_PER_MM * torch.tensor([0, 0, 0, 0.201, 0.5, 1, 2])
    torch.testing.assert_close(hu_to_attenuation(hu, "plastimatch"), expected)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_window_maps_its_ends_to_0_and_1_and_clips_beyond(make) -> None:
    window = Window(-1000.0, 500.0)
    assert window.to_unit(make([-2000.0, -1000.0, -250.0, 500.0, 3071.0])).tolist() == [0, 0, 0.5, 1, 1]
    assert window.to_hu(make([-1.0, 0.0, 0.5, 1.0, 7.0])).tolist() == [-1000, -1000, -250, 500, 500]


@given(st.floats(-1024, 3071), st.floats(-3000, 0), st.floats(1, 5000))
def test_a_window_brings_hu_inside_it_back(hu: float, low: float, width: float) -> None:
    window = Window(low, low + width)
    clipped = min(max(hu, low), low + width)
    assert window.to_hu(window.to_unit(np.array([hu])))[0] == pytest.approx(clipped, abs=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, -5), (float("nan"), 1), (0, float("nan"))])
def test_an_empty_window_is_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        Window(low, high)


images = arrays.arrays(np.float64, (12, 9), elements=st.floats(0, 1000, width=32))


@given(images, st.floats(0.01, 100), st.floats(-1000, 1000))
def test_normalizing_removes_scale_and_offset(image: np.ndarray, scale: float, offset: float) -> None:
    # Where the percentiles all but coincide, rounding decides.
    low, high = np.percentile(image, 0.5, method="higher"), np.percentile(image, 99.5, method="lower")
    if 0 < high - low < 1e-3:
        return
    assert normalize(image * scale + offset) == pytest.approx(normalize(image), abs=1e-4)


@given(images)
def test_normalized_images_are_float32_in_0_to_1_in_the_same_order(image: np.ndarray) -> None:
    result = normalize(image)
    assert result.dtype == np.float32
    assert result.shape == image.shape
    assert result.min() >= 0
    assert result.max() <= 1
    assert (np.diff(result.ravel()[np.argsort(image.ravel(), kind="stable")]) >= 0).all()


@given(images)
def test_normalizing_twice_is_normalizing_once(image: np.ndarray) -> None:
    once = normalize(image)
    np.testing.assert_array_equal(normalize(once), once)


def test_a_single_saturated_pixel_does_not_darken_the_rest() -> None:
    image = np.tile(np.linspace(0, 1, 100), (100, 1))
    clean = normalize(image)
    image[3, 4] = 1e6
    assert np.abs(normalize(image) - clean)[image < 1e6].max() < 0.02


def test_a_constant_image_becomes_zeros() -> None:
    result = normalize(np.full((8, 8), 7.0))
    assert result.dtype == np.float32
    assert not result.any()


@given(images)
def test_divided_by_its_maximum_an_image_is_in_8_bits_and_twice_is_once(image: np.ndarray) -> None:
    once = normalize(image, "maximum")
    assert once.dtype == np.float32
    if image.max() > 0:
        levels = image / image.max() * 255
        assert np.abs(once * 255 - np.floor(levels))[np.abs(levels - np.rint(levels)) > 1e-3].max(initial=0) < 1e-3
        assert once.max() == 1
    else:
        assert not once.any()
    np.testing.assert_array_equal(normalize(once, "maximum"), once)


def test_an_image_is_normalized_by_its_percentiles_unless_another_way_is_named() -> None:
    image = np.random.default_rng(0).random((16, 16))
    np.testing.assert_array_equal(normalize(image), normalize(image, "percentiles"))
    assert not np.array_equal(normalize(image), normalize(image, "maximum"))
