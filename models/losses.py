"""Losses as functions: tensors in, one number out. Weights belong to configurations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def least_squares(scores: Float[Tensor, "*patches"], real: bool) -> Float[Tensor, ""]:
    """LSGAN: the mean squared distance of scores from 1 (real) or 0 (made)."""
    return F.mse_loss(scores, torch.full_like(scores, float(real)))


def voxel_mse(volume: Float[Tensor, "n 1 d h w"], truth: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean squared error over voxels."""
    return F.mse_loss(volume, truth)


def orthogonal_projection_l1(
    volume: Float[Tensor, "n 1 d h w"], truth: Float[Tensor, "n 1 d h w"]
) -> Float[Tensor, ""]:
    """Mean absolute error between mean projections along D, H and W (X2CT-GAN, equation 3), averaged over the axes."""
    errors = [F.l1_loss(volume.mean(dim=axis), truth.mean(dim=axis)) for axis in (2, 3, 4)]
    return torch.stack(errors).mean()
