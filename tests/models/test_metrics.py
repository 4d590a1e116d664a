"""Protocols against values computed by hand, and the decibels between them."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from raylift.models.metrics import CVAA, VOLUME, X2CT, cosine_similarity, psnr_db


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    ground_truth = generator.uniform(-1000, 1400, (24, 24, 24)).astype(np.float32)
    return ground_truth + generator.normal(0, 100, ground_truth.shape).astype(np.float32), ground_truth


def test_psnr_of_a_known_error_is_known():
    assert psnr_db(0.01, 1.0) == pytest.approx(20.0)
    assert psnr_db(0.0, 1.0) == float("inf")


def test_the_maximum_of_the_volume_protocol_is_its_window():
    ground_truth = np.full((16, 16, 16), -24.0)
    values = VOLUME.evaluate(ground_truth + 250, ground_truth)
    assert values["mae_hu"] == pytest.approx(250)
    assert values["mse"] == pytest.approx(0.01)
    assert values["psnr_db"] == pytest.approx(20.0)


def test_x2cts_maximum_adds_4_29_db_to_the_same_error(pair):
    volume, x2ct = (protocol.evaluate(*pair) for protocol in (VOLUME, X2CT))
    assert x2ct["psnr_3d_db"] - volume["psnr_db"] == pytest.approx(20 * np.log10(4095 / 2500), abs=0.01)


def test_x2ct_equals_the_published_arithmetic(pair):
    prediction, ground_truth = (((volume + 1024) / 2500).clip(0, 1).astype(np.float64) for volume in pair)
    integers = [(volume * 2500).astype(np.int32).astype(np.float64) for volume in (prediction, ground_truth)]
    expected, similarity = [], []
    for axis in range(3):
        for index in range(24):
            error = np.mean((integers[0].take(index, axis) - integers[1].take(index, axis)) ** 2)
            expected.append(20 * np.log10(4095 / np.sqrt(error)))
            similarity.append(
                structural_similarity(ground_truth.take(index, axis), prediction.take(index, axis), data_range=1.0)
            )
    values = X2CT.evaluate(*pair)
    assert values["psnr_slices_db"] == pytest.approx(np.mean(expected))
    assert values["ssim_slices"] == pytest.approx(np.mean(similarity))


def test_a_slice_without_error_counts_100_db_in_x2ct():
    ground_truth = np.zeros((8, 8, 8))
    prediction = ground_truth.copy()
    prediction[0] = 100.0
    values = X2CT.evaluate(prediction, ground_truth)
    # Seven of eight slices along D are exact; along H and W every slice has the same error.
    one = 20 * np.log10(4095 / 100)
    other = 20 * np.log10(4095 / np.sqrt(100**2 / 8))
    assert values["psnr_slices_db"] == pytest.approx(np.mean([(one + 7 * 100) / 8, other, other]), abs=0.01)


def test_cvaa_has_a_wider_window(pair):
    values = CVAA.evaluate(*pair)
    inside = [volume.clip(-1000, 4096).astype(np.float64) for volume in pair]
    assert values["mse"] == pytest.approx(np.mean((inside[0] - inside[1]) ** 2) / 5096**2)


@pytest.mark.parametrize("protocol", [VOLUME, X2CT, CVAA], ids=["volume", "x2ct", "cvaa"])
def test_a_volume_compared_with_itself_is_perfect(protocol, pair):
    values = protocol.evaluate(pair[1], pair[1])
    assert values["mae_hu"] == 0
    assert values["cosine_similarity"] == pytest.approx(1.0)
    assert all(value == pytest.approx(1.0) for key, value in values.items() if key.startswith("ssim"))


def test_ssim_is_undefined_where_no_window_is_inside_the_field_of_view(pair, recwarn):
    prediction, ground_truth = pair
    ground_truth[4:] = np.nan
    values = VOLUME.evaluate(prediction, ground_truth)
    assert np.isnan(values["ssim"])
    assert values["psnr_db"] == pytest.approx(psnr_db(values["mse"], 1.0))
    assert not recwarn.list


def test_errors_outside_the_window_do_not_count():
    ground_truth = np.full((16, 16, 16), 2000.0)
    assert VOLUME.evaluate(ground_truth + 900, ground_truth)["mae_hu"] == 0


def test_cosine_is_not_centered():
    assert cosine_similarity(np.array([[[1.0, 1.0]]]), np.array([[[2.0, 2.0]]])) == pytest.approx(1.0)
    assert cosine_similarity(np.zeros((1, 1, 2)), np.ones((1, 1, 2))) == 0.0
