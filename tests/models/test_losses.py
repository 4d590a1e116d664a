"""Losses against figures worked out by hand."""

import torch

from raylift.models.losses import least_squares, orthogonal_projection_l1, voxel_mse


def test_least_squares_is_zero_for_the_wanted_score_and_one_for_the_other():
    assert least_squares(torch.ones(2, 3), real=True) == 0
    assert least_squares(torch.ones(2, 3), real=False) == 1


def test_voxel_mse_of_a_constant_difference_is_its_square():
    truth = torch.zeros(1, 1, 4, 4, 4)
    assert torch.isclose(voxel_mse(truth + 0.5, truth), torch.tensor(0.25))


def test_orthogonal_projections_see_a_shift_of_mass_only_across_their_axis():
    truth, moved = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    truth[0, 0, 0, 0, 0] = moved[0, 0, 3, 0, 0] = 1.0
    # Moved along D: the projection along D is the same; along H and W, two of 16 pixels differ by 1/4 each.
    expected = (0 + 2 * 0.25 / 16 + 2 * 0.25 / 16) / 3
    assert torch.isclose(orthogonal_projection_l1(moved, truth), torch.tensor(expected))


def test_orthogonal_projections_do_not_see_what_they_average_away():
    truth = torch.rand(2, 1, 4, 4, 4)
    assert orthogonal_projection_l1(truth, truth) == 0
