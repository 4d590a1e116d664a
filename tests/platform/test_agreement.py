"""Agreement of two measurements, against published figures and figures computed by hand."""

import math

import numpy as np
import pytest

from raylift.platform.evaluation.agreement import agreement, icc

SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
"""Table 2 of Shrout and Fleiss (1979); table 4 gives ICC(2,1) = 0.29."""


def test_icc_is_that_of_shrout_and_fleiss():
    assert icc(np.array(SHROUT_FLEISS, dtype=np.float64)) == pytest.approx(0.2898, abs=5e-5)


def test_icc_is_one_for_equal_raters_falls_with_an_offset_and_is_undefined_for_equal_subjects():
    true = np.array([1.0, 2.0, 3.0])
    assert icc(np.stack([true, true], axis=1)) == 1
    # Mean squares: subjects 2, raters 1.5, residual 0, hence 2 / (2 + 2 * 1.5 / 3).
    assert icc(np.stack([true, true + 1], axis=1)) == pytest.approx(2 / 3)
    assert math.isnan(icc(np.ones((3, 2))))


def test_every_figure_of_four_subjects_is_that_of_a_hand():
    found = agreement(np.array([1.0, 3.0, 2.0, 6.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found.count, found.bias, found.mean_absolute_error) == (4, 0.5, 1.0)
    assert found.pearson == pytest.approx(7 / math.sqrt(14 * 5))
    assert found.spearman == pytest.approx(0.8)
    # Differences 0, 1, -1, 2 have a sample variance of 5/3.
    half_width = 1.96 * math.sqrt(5 / 3)
    assert (found.lower, found.upper) == (pytest.approx(0.5 - half_width), pytest.approx(0.5 + half_width))
    assert "Pearson 0.837, Spearman 0.800" in found.text()


def test_what_one_subject_does_not_define_is_null_in_json():
    values = agreement(np.array([2.0]), np.array([1.0])).to_json()
    assert (values["bias"], values["mean_absolute_error"]) == (1.0, 1.0)
    assert {name for name, value in values.items() if value is None} == {"pearson", "spearman", "icc", "lower", "upper"}


def test_equal_values_have_no_correlation():
    assert math.isnan(agreement(np.zeros(3), np.array([1.0, 2.0, 3.0])).pearson)
