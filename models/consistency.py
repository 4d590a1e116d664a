"""Data consistency: optimization steps after the network that make a volume's projections agree with the radiographs.

The scale of a radiograph is unknown, so each projection is compared after the gain and offset of the best fit. With m
the attenuation, P_v the projector of view v, r_v the radiograph and m_0 the network's prediction, the fit minimizes

    sum over v of |g_v P_v m + o_v - r_v|^2 / |r_v|^2  +  strength * mean(((m - m_0) / window)^2),

where g_v and o_v are the optimum for the m of each step. By the envelope theorem the gradient through them is zero at
the optimum, so they are constant in a step, and this is the gradient of the whole. The problem is linear in m:
conjugate gradients with an exact line search need no step size, and start from the network's volume, so that what the
radiographs do not determine stays as predicted. Voxels without attenuation in the network's volume stay without:
otherwise the correction is smeared along the rays into the air around the patient. Agreement with the radiographs does
not prove a better volume: `docs/explanation/data-consistency.md` has results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import WATER_PER_MM, Window, hu_to_attenuation
from raylift.datasets.projector import project, project_views

STRENGTH = 1.0
"""Chosen on validation scans: at 1, a change of every voxel by 1 % of the window costs as much as a residual of 1 %."""
MATCH_ITERATIONS = 4
"""Iterations of finding the saturated pixels, which stop changing after two or three."""

Volume = Float[Tensor, "n 1 d h w"]
Images = Float[Tensor, "n views rows columns"]


@dataclass(frozen=True)
class ConsistencyResult:
    """Volumes after the fit, and the residuals of their projections before and after it."""

    volume: Float[Tensor, "n 1 d h w"]
    """In the window's [0, 1]."""
    residual_before: Float[Tensor, "n views"]
    """The relative L2 distance of each matched projection from its radiograph; 0 is agreement."""
    residual_after: Float[Tensor, "n views"]

    def by_view(self, geometry: Geometry) -> list[dict[str, tuple[float, float]]]:
        """For each sample the residuals before and after, by view name."""
        return [
            {view.name: (float(b), float(a)) for view, b, a in zip(geometry.views, before, after, strict=True)}
            for before, after in zip(self.residual_before, self.residual_after, strict=True)
        ]


@dataclass(frozen=True)
class _State:
    """An attenuation and the comparison of its projections with the radiographs."""

    attenuation: Volume
    gain: Float[Tensor, "n views 1 1"]
    mask: Images
    """1 where a pixel counts."""
    error: Images
    """Matched projection minus radiograph, 0 where a pixel does not count."""
    residual: Float[Tensor, "n views"]


def fit(
    volume: Float[Tensor, "n 1 d h w"],
    radiographs: Float[Tensor, "n views rows columns"],
    window: Window,
    grid: Grid,
    geometry: Geometry,
    steps: int,
    strength: float = STRENGTH,
    on_step: Callable[[], None] | None = None,
) -> ConsistencyResult:
    """Change volumes in the window's [0, 1] so that their projections agree better with normalized radiographs.

    Samples are independent. A sample stops early where a step would not lower its residual, the root of the sum of
    squares over views; the residual of a single view may rise. Zero steps return the volume unchanged.

    Args:
        volume: a network's prediction from the radiographs.
        radiographs: in [0, 1], bone bright, in the order of the geometry's views.
        window: the HU range of [0, 1].
        grid: gives the spacing.
        geometry: how the radiographs were taken.
        steps: their maximum number.
        strength: weight of the distance from the network's volume, without unit; 0 fits the radiographs alone.
        on_step: is called before each step; what it raises ends the fit.

    Raises:
        ConfigError: steps or strength are negative, or the number of radiographs is not that of the views.
    """
    require_steps(steps)
    if not strength >= 0:
        raise ConfigError(f"a data-consistency fit of strength {strength}: give 0 or more")
    if radiographs.shape[1] != len(geometry.views):
        raise ConfigError(f"{radiographs.shape[1]} radiographs for a geometry of {len(geometry.views)} views")
    start, radiographs = volume.detach().float(), radiographs.detach().float()
    origin = hu_to_attenuation(window.to_hu(start), geometry.attenuation)
    window_hu = start.new_tensor([window.low_hu, window.high_hu])
    low, high = hu_to_attenuation(window_hu, geometry.attenuation).tolist()
    air = origin <= low
    width = WATER_PER_MM * window.width_hu / 1000
    # The curvature of the second term, for a voxel and an attenuation in 1/mm.
    regularization = strength / (origin[0].numel() * width**2)
    weight = 1 / _squares(radiographs).clamp_min(1e-12)

    state = initial = _compare(origin, radiographs, grid, geometry)
    active = torch.ones(len(start), dtype=torch.bool, device=start.device)
    gradient: Volume | None = None
    direction: Volume | None = None
    for _ in range(steps):
        if on_step:
            on_step()
        previous_gradient = gradient
        gradient = _half_gradient(state, weight, grid, geometry) + regularization * (state.attenuation - origin)
        # Voxels at a bound whose change would be clipped are excluded, and so is air.
        clipped = ((state.attenuation <= low) & (gradient > 0)) | ((state.attenuation >= high) & (gradient < 0))
        gradient = gradient.masked_fill(clipped | air, 0.0)
        direction = _conjugate(gradient, previous_gradient, direction)
        step = _step_length(state, direction, gradient, weight, regularization, grid, geometry)
        trial = _compare((state.attenuation + step * direction).clip(low, high), radiographs, grid, geometry)
        active = active & (trial.residual.square().sum(dim=1) < state.residual.square().sum(dim=1))
        if not bool(active.any()):
            break
        state = _select(active, trial, state)
    hu = 1000 * (state.attenuation / WATER_PER_MM - 1)
    # Unchanged voxels keep their HU, which for air may be below that of zero attenuation.
    fitted = torch.where(state.attenuation == origin, start, window.to_unit(hu))
    return ConsistencyResult(fitted.to(volume.dtype) if steps else volume, initial.residual, state.residual)


def mean_residuals(residuals: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """The mean residuals before and after the fit by view; empty without residuals."""
    return {
        view: (fmean(residual[view][0] for residual in residuals), fmean(residual[view][1] for residual in residuals))
        for view in (residuals[0] if residuals else {})
    }


@dataclass(frozen=True)
class ReprojectionMetrics:
    """How volumes' projections agree with radiographs, by view, after the best gain and offset of each."""

    residual: Float[Tensor, "n views"]
    """Relative L2 distance of the projection from the radiograph; 0 is agreement."""
    psnr_db: Float[Tensor, "n views"]
    """Data range 1."""


def reprojection_metrics(
    volume: Float[Tensor, "n 1 d h w"],
    radiographs: Float[Tensor, "n views rows columns"],
    window: Window,
    grid: Grid,
    geometry: Geometry,
) -> ReprojectionMetrics:
    """The agreement of volumes in the window's [0, 1] with normalized radiographs; see `fit` for the arguments."""
    attenuation = hu_to_attenuation(window.to_hu(volume.float()), geometry.attenuation)
    state = _compare(attenuation, radiographs.float(), grid, geometry)
    return ReprojectionMetrics(state.residual, -10 * state.error.square().mean(dim=(2, 3)).clamp_min(1e-12).log10())


def require_steps(steps: int) -> None:
    """Raise a ConfigError where steps are negative."""
    if steps < 0:
        raise ConfigError(f"a data-consistency fit of {steps} steps: give 0 for none, or more")


def fit_gain_and_offset(projections: Images, radiographs: Images) -> tuple[Tensor, Tensor, Tensor]:
    """The gain and offset of each view that fit projections to radiographs best, and a mask of the pixels that count.

    Normalization clips a radiograph at its percentiles. Where it is 0 or 1, a matched projection beyond that value
    agrees with it, and such saturated pixels do not count. Gains are not negative: a projection that is negatively
    correlated with its radiograph is matched by a constant, and the fit does not change it.
    """
    mask = torch.ones_like(radiographs)
    for _ in range(MATCH_ITERATIONS):
        count = mask.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)
        projection_mean, radiograph_mean = (
            (mask * images).sum(dim=(2, 3), keepdim=True) / count for images in (projections, radiographs)
        )
        covariance = (mask * (projections - projection_mean) * (radiographs - radiograph_mean)).sum(
            dim=(2, 3), keepdim=True
        )
        variance = (mask * (projections - projection_mean).square()).sum(dim=(2, 3), keepdim=True)
        gain = (covariance / variance.clamp_min(1e-12)).clamp_min(0.0)
        offset = radiograph_mean - gain * projection_mean
        matched = gain * projections + offset
        saturated = ((radiographs <= 0) & (matched <= 0)) | ((radiographs >= 1) & (matched >= 1))
        mask = (~saturated).to(radiographs.dtype)
    return gain, offset, mask


def _compare(attenuation: Volume, radiographs: Images, grid: Grid, geometry: Geometry) -> _State:
    projections = _project(attenuation, grid, geometry)
    gain, offset, mask = fit_gain_and_offset(projections, radiographs)
    error = mask * (gain * projections + offset - radiographs)
    size = _squares(radiographs).clamp_min(1e-12)
    return _State(attenuation, gain, mask, error, (_squares(error) / size).sqrt()[..., 0, 0])


@torch.no_grad()
def _project(attenuation: Volume, grid: Grid, geometry: Geometry) -> Images:
    return project_views(attenuation, grid.spacing_mm, geometry)


def _half_gradient(state: _State, weight: Float[Tensor, "n views 1 1"], grid: Grid, geometry: Geometry) -> Volume:
    """Half the gradient of the squared residuals: the errors under the exact adjoint of the projector, view by view."""
    pixels = state.gain * weight * state.error
    total = torch.zeros_like(state.attenuation)
    for k, view in enumerate(geometry.views):
        # Projection is linear, so its gradient is the same at any point.
        with torch.inference_mode(False), torch.enable_grad():
            point = torch.zeros_like(state.attenuation, requires_grad=True)
            image = project(point, grid.spacing_mm, geometry, view)
            (adjoint,) = torch.autograd.grad(image, point, pixels[:, k : k + 1])
        total += adjoint
    return total


def _conjugate(gradient: Volume, previous_gradient: Volume | None, direction: Volume | None) -> Volume:
    """The next direction by the Polak-Ribiere formula, or steepest descent where that is no descent direction."""
    if previous_gradient is None or direction is None:
        return -gradient
    squared_norm = _dot(previous_gradient, previous_gradient).clamp_min(1e-30)
    beta = (_dot(gradient, gradient - previous_gradient) / squared_norm).clamp_min(0.0)
    conjugate = torch.where(gradient == 0, gradient, beta * direction - gradient)
    return torch.where(_dot(conjugate, gradient) < 0, conjugate, -gradient)


def _step_length(
    state: _State,
    direction: Volume,
    gradient: Volume,
    weight: Float[Tensor, "n views 1 1"],
    regularization: float,
    grid: Grid,
    geometry: Geometry,
) -> Float[Tensor, "n 1 1 1 1"]:
    """The exact line search: the step that minimizes the sum of both terms, with gain and offset constant."""
    change = state.mask * state.gain * _project(direction, grid, geometry)
    curvature = (weight * _squares(change)).sum(dim=1)[..., None, None] + regularization * _dot(direction, direction)
    return -_dot(gradient, direction) / curvature.clamp_min(1e-30)


def _select(where: Bool[Tensor, " n"], first: _State, second: _State) -> _State:
    """For each sample the first state where `where` is true, else the second."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return _State(
        pick(first.attenuation, second.attenuation),
        pick(first.gain, second.gain),
        pick(first.mask, second.mask),
        pick(first.error, second.error),
        pick(first.residual, second.residual),
    )


def _squares(images: Images) -> Float[Tensor, "n views 1 1"]:
    return images.square().sum(dim=(2, 3), keepdim=True)


def _dot(a: Volume, b: Volume) -> Float[Tensor, "n 1 1 1 1"]:
    return (a * b).sum(dim=(1, 2, 3, 4), keepdim=True)
