"""Loss functions, without weights: those belong to the configurations of objectives."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.geometry import FRONTAL, LATERAL, Geometry, View
from raylift.datasets.projector import project_pose


def least_squares(scores: Float[Tensor, "*patches"], real: bool) -> Float[Tensor, ""]:
    """LSGAN: the mean squared distance of scores from 1 (real) or 0 (fake)."""
    return F.mse_loss(scores, torch.full_like(scores, float(real)))


def cross_entropy(scores: Float[Tensor, "*patches"], real: bool, smoothing: float = 0.0) -> Float[Tensor, ""]:
    """Binary cross-entropy of logits with target 1 - `smoothing` (real) or 0 (fake)."""
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, (1.0 - smoothing) * real))


def total_variation(volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbors along D, H and W, summed over the axes."""
    return torch.stack([volume.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).sum()


def voxel_mse(prediction: Float[Tensor, "n 1 d h w"], target: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean squared error over voxels."""
    return F.mse_loss(prediction, target)


def voxel_l1(prediction: Float[Tensor, "n 1 d h w"], target: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """Mean absolute error over voxels."""
    return F.l1_loss(prediction, target)


def masked_mse(
    prediction: Float[Tensor, "n 1 d h w"], target: Float[Tensor, "n 1 d h w"], mask: Bool[Tensor, "n 1 d h w"]
) -> Float[Tensor, ""]:
    """Mean squared error over the voxels of the mask; 0 for an empty mask."""
    squared = (prediction - target).square() * mask
    return squared.sum() / mask.sum().clamp_min(1)


def orthogonal_projection_l1(
    prediction: Float[Tensor, "n 1 d h w"], target: Float[Tensor, "n 1 d h w"]
) -> Float[Tensor, ""]:
    """Mean absolute error between mean projections along D, H and W (X2CT-GAN, equation 3), averaged over the axes."""
    errors = [F.l1_loss(prediction.mean(dim=axis), target.mean(dim=axis)) for axis in (2, 3, 4)]
    return torch.stack(errors).mean()


def ssim_loss(prediction: Float[Tensor, "n 1 d h w"], target: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, ""]:
    """1 minus the mean SSIM in 3-D with a Gaussian of 1.5 voxels and a data range of 1, as protocol `volume` has it.

    Source: Wang et al. 2004, with K1 0.01 and K2 0.03; windows that leave the volume are not counted.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        x, y = prediction.float(), target.float()
        moments = torch.cat([x, y, x * x, y * y, x * y], dim=1)
        for axis in (2, 3, 4):
            # A product with a banded matrix: convolutions of a single channel are slow on a CPU.
            size = moments.shape[axis]
            column, row = torch.arange(size, device=x.device), torch.arange(5, size - 5, device=x.device)
            offset = column - row[:, None]
            taps = torch.exp(-offset.square() / (2 * 1.5**2)) * (offset.abs() <= 5)
            moments = (moments.movedim(axis, -1) @ (taps / taps.sum(dim=1, keepdim=True)).T).movedim(-1, axis)
        mean_x, mean_y, xx, yy, xy = moments.unbind(1)
        c1, c2 = 0.01**2, 0.03**2
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        variance = (xx - mean_x**2) + (yy - mean_y**2)
        structure = (2 * (xy - mean_x * mean_y) + c2) / (variance + c2)
        return 1 - (luminance * structure).mean()


CONE_UNITS = 128.0
"""Edge of the volume in the units of X-Recon's projector, at any resolution."""
CONE_STEP = 1.75
"""Distance between the samples of X-Recon's projector, in units: a ray's sum is its integral divided by this."""
CONE_VIEWS = (View("axial", elevation_deg=-90.0), LATERAL, FRONTAL)
"""The source of the axial pose is at the feet, as in X-Recon's code."""


def cone_projection_l1(
    prediction: Float[Tensor, "n 1 s s s"],
    target: Float[Tensor, "n 1 s s s"],
    jitter_deg: float = 10.0,
    jitter_voxels: float = 8.0,
) -> Float[Tensor, ""]:
    """Mean absolute error between cone-beam projections in three jittered poses, axial, sagittal and coronal.

    Every call samples one rotation about the three axes by N(0, `jitter_deg`) and one translation by
    N(0, `jitter_voxels`), in units of 1/128 of the volume's edge, from torch's global generator, and applies both to
    all three poses. The source is 300 units from the center and 700 from the detector, which has 374 units per side
    (X-Recon's constants). A ray's value is the sum of samples 1.75 units apart.
    """
    size = prediction.shape[-1]
    detector_px = min(size, 128)
    geometry = Geometry("cone", 300.0, 700.0, detector_px, 0.73 * 512 / detector_px)
    errors = []
    # In fp32: bf16 is too coarse for coordinates and for sums of a hundred samples.
    with torch.autocast(prediction.device.type, enabled=False):
        both = torch.cat([prediction.float(), target.float()])
        # Sampled on the CPU, so that a seed gives the same poses on every device.
        rotation, translation = (torch.randn(3, device="cpu").to(both.device) * s for s in (jitter_deg, jitter_voxels))
        for view in CONE_VIEWS:
            axes = torch.as_tensor(view.axes(), dtype=both.dtype, device=both.device) @ _rotation(rotation.deg2rad())
            drrs = project_pose(both, CONE_UNITS / size, geometry, axes, translation) / CONE_STEP
            predicted, expected = drrs.chunk(2)
            errors.append(F.l1_loss(predicted, expected))
    return torch.stack(errors).mean()


def _rotation(angles: Float[Tensor, " 3"]) -> Float[Tensor, "3 3"]:
    """The rotation about x, then y, then z, in radians."""
    one, zero = torch.ones_like(angles[0]), torch.zeros_like(angles[0])
    (sx, sy, sz), (cx, cy, cz) = angles.sin(), angles.cos()
    x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx]).reshape(3, 3)
    y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy]).reshape(3, 3)
    z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one]).reshape(3, 3)
    return z @ y @ x
