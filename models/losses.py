"""Losses as functions: tensors in, one number out. Weights belong to configurations."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.geometry import FRONTAL, LATERAL, Geometry, View
from raylift.datasets.projector import project_pose


def least_squares(scores: Float[Tensor, "*patches"], real: bool) -> Float[Tensor, ""]:
    """LSGAN: the mean squared distance of scores from 1 (real) or 0 (made)."""
    return F.mse_loss(scores, torch.full_like(scores, float(real)))


def cross_entropy(scores: Float[Tensor, "*patches"], real: bool, smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Binary cross-entropy of logits against 1 less `smoothing` (real) or 0 (made)."""
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, (1.0 - smoothing) * real))


def total_variation(volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbors along D, H and W, summed over the axes."""
    return torch.stack([volume.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).sum()


def voxel_mse(volume: Float[Tensor, "n 1 d h w"], truth: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean squared error over voxels."""
    return F.mse_loss(volume, truth)


def voxel_l1(volume: Float[Tensor, "n 1 d h w"], truth: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean absolute error over voxels."""
    return F.l1_loss(volume, truth)


def masked_mse(
    volume: Float[Tensor, "n 1 d h w"], truth: Float[Tensor, "n 1 d h w"], mask: Bool[Tensor, "n 1 d h w"]
) -> Float[Tensor, ""]:
    """Mean squared error over the voxels of the mask; 0 where there are none."""
    squared = (volume - truth).square() * mask
    return squared.sum() / mask.sum().clamp_min(1)


def orthogonal_projection_l1(
    volume: Float[Tensor, "n 1 d h w"], truth: Float[Tensor, "n 1 d h w"]
) -> Float[Tensor, ""]:
    """Mean absolute error between mean projections along D, H and W (X2CT-GAN, equation 3), averaged over the axes."""
    errors = [F.l1_loss(volume.mean(dim=axis), truth.mean(dim=axis)) for axis in (2, 3, 4)]
    return torch.stack(errors).mean()


CONE_UNITS = 128.0
"""X-Recon's projector takes a volume of any resolution for a cube of 128 units."""
CONE_STEP = 1.75
"""Units between the samples that X-Recon's projector sums up, so that a ray's sum is its integral over this."""
CONE_VIEWS = (View("axial", elevation_deg=90.0), LATERAL, FRONTAL)


def cone_projection_l1(
    volume: Float[Tensor, "n 1 s s s"],
    truth: Float[Tensor, "n 1 s s s"],
    jitter_deg: float = 10.0,
    jitter_voxels: float = 8.0,
) -> Float[Tensor, ""]:
    """Mean absolute error between cone-beam projections in three poses, axial, sagittal and coronal, each jittered.

    Every call turns each pose about its three axes by N(0, `jitter_deg`) and moves it by N(0, `jitter_voxels`), in
    units of 1/128 of the volume's edge, drawn from torch's global generator. Source 300 units from the center, 700 from
    the detector of 374 units a side (X-Recon's constants). A ray's value is the sum of samples 1.75 units apart.
    """
    size = volume.shape[-1]
    detector_px = min(size, 128)
    geometry = Geometry("cone", 300.0, 700.0, detector_px, 0.73 * 512 / detector_px)
    errors = []
    # Projected as it is, in fp32: positions and sums of a hundred samples need more than bf16 has.
    with torch.autocast(volume.device.type, enabled=False):
        both = torch.cat([volume.float(), truth.float()])
        for view in CONE_VIEWS:
            # Drawn on the CPU, so that a seed means the same on every device.
            turn, move = (torch.randn(3, device="cpu").to(both.device) * s for s in (jitter_deg, jitter_voxels))
            axes = torch.as_tensor(view.axes(), dtype=both.dtype, device=both.device) @ _rotation(turn.deg2rad())
            seen = project_pose(both, CONE_UNITS / size, geometry, axes, move) / CONE_STEP
            made, true = seen.chunk(2)
            errors.append(F.l1_loss(made, true))
    return torch.stack(errors).mean()


def _rotation(angles: Float[Tensor, " 3"]) -> Float[Tensor, "3 3"]:
    """Turns about x, then y, then z, in radians."""
    one, zero = torch.ones_like(angles[0]), torch.zeros_like(angles[0])
    (sx, sy, sz), (cx, cy, cz) = angles.sin(), angles.cos()
    x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx]).reshape(3, 3)
    y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy]).reshape(3, 3)
    z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one]).reshape(3, 3)
    return z @ y @ x
