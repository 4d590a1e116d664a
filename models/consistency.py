"""Data consistency: a few steps after the network, so that a volume's projections agree with the radiographs given.

The scale of a radiograph is unknown, so each projection is compared after the gain and offset that bring it closest.
With m the attenuation, P_v the projector of view v, r_v the radiograph, and m_0 the network's answer, the fit lowers

    sum over v of |g_v P_v m + o_v - r_v|^2 / |r_v|^2  +  strength * mean(((m - m_0) / window)^2),

in which g_v and o_v are the best for the m of that step. By the envelope theorem the gradient through them is zero at
the best, so they are held while m moves, and this is the gradient of the whole. In m the problem is linear: conjugate
gradients with an exact line search need no step size, and because they start from the network's volume, what the
radiographs do not see stays as the network made it. Where the network saw no attenuation none is put: otherwise the
correction is smeared along the rays into the air round the patient. Agreement with the radiographs is no proof of a
better volume: `docs/explanation/data-consistency.md` has figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import WATER_PER_MM, Window, hu_to_attenuation
from raylift.datasets.projector import project

STRENGTH = 1.0
"""Chosen on validation scans: at 1, moving every voxel by 1 % of the window costs what a residual of 1 % does."""
MATCHES = 4
"""How often the saturated pixels are told from the others; they stop changing after two or three times."""

Volume = Float[Tensor, "n 1 d h w"]
Images = Float[Tensor, "n views rows columns"]


@dataclass(frozen=True)
class Fitted:
    """Volumes after the fit, and how far their projections were from the radiographs before and after it."""

    volume: Float[Tensor, "n 1 d h w"]
    """In the window's [0, 1]."""
    residual_before: Float[Tensor, "n views"]
    """The relative L2 distance of each matched projection from its radiograph; 0 is agreement."""
    residual_after: Float[Tensor, "n views"]

    def by_view(self, geometry: Geometry) -> list[dict[str, tuple[float, float]]]:
        """For each sample the residuals before and after, by the names of the geometry's views."""
        return [
            {view.name: (float(b), float(a)) for view, b, a in zip(geometry.views, before, after, strict=True)}
            for before, after in zip(self.residual_before, self.residual_after, strict=True)
        ]


@dataclass(frozen=True)
class _State:
    """A density, and how its projections compare with the radiographs."""

    density: Volume
    gain: Float[Tensor, "n views 1 1"]
    live: Images
    """1 where a pixel counts."""
    error: Images
    """Matched projection less radiograph, 0 where a pixel does not count."""
    residual: Float[Tensor, "n views"]


def fit(
    volume: Float[Tensor, "n 1 d h w"],
    radiographs: Float[Tensor, "n views rows columns"],
    window: Window,
    grid: Grid,
    geometry: Geometry,
    steps: int,
    strength: float = STRENGTH,
) -> Fitted:
    """Move volumes in the window's [0, 1] until their projections agree better with standardized radiographs.

    Each sample is fitted for itself. It stops early where a step would not lower its residual, the root of the sum of
    squares over views; a single view's may rise for the sake of another's. Zero steps return the volume as it is.

    Args:
        volume: what a network made of the radiographs.
        radiographs: in [0, 1], bone bright, in the order of the geometry's views.
        window: the HU range of [0, 1].
        grid: gives the spacing.
        geometry: how the radiographs were taken.
        steps: at most so many.
        strength: what keeps the volume near the network's, without unit; 0 fits the radiographs alone.

    Raises:
        ConfigError: steps or strength are negative, or there is not one radiograph a view.
    """
    require_steps(steps)
    if not strength >= 0:
        raise ConfigError(f"a consistency fit of strength {strength}: give 0 or more")
    if radiographs.shape[1] != len(geometry.views):
        raise ConfigError(f"{radiographs.shape[1]} radiographs for a geometry of {len(geometry.views)} views")
    start, radiographs = volume.detach().float(), radiographs.detach().float()
    origin = hu_to_attenuation(window.to_hu(start))
    low, high = hu_to_attenuation(start.new_tensor([window.low_hu, window.high_hu])).tolist()
    air = origin <= low
    width = WATER_PER_MM * window.width_hu / 1000
    # The term's curvature a voxel, in 1/mm as the density is.
    pull = strength / (origin[0].numel() * width**2)
    weight = 1 / _squares(radiographs).clamp_min(1e-12)

    state = first = _compare(origin, radiographs, grid, geometry)
    going = torch.ones(len(start), dtype=torch.bool, device=start.device)
    slope: Volume | None = None
    direction: Volume | None = None
    for _ in range(steps):
        last = slope
        slope = _spread_back(state, weight, grid, geometry) + pull * (state.density - origin)
        # What a bound would undo at once takes no part, and neither does air.
        undone = ((state.density <= low) & (slope > 0)) | ((state.density >= high) & (slope < 0))
        slope = slope.masked_fill(undone | air, 0.0)
        direction = _conjugate(slope, last, direction)
        length = _best_length(state, direction, slope, weight, pull, grid, geometry)
        trial = _compare((state.density + length * direction).clip(low, high), radiographs, grid, geometry)
        going = going & (trial.residual.square().sum(dim=1) < state.residual.square().sum(dim=1))
        if not bool(going.any()):
            break
        state = _chosen(going, trial, state)
    hu = 1000 * (state.density / WATER_PER_MM - 1)
    # What did not move keeps its HU, which for air may be less than its attenuation says.
    moved = torch.where(state.density == origin, start, window.to_unit(hu))
    return Fitted(moved.to(volume.dtype) if steps else volume, first.residual, state.residual)


def mean_residuals(residuals: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """By view the mean residual before and after the fit; empty where there are none."""
    return {
        view: (fmean(one[view][0] for one in residuals), fmean(one[view][1] for one in residuals))
        for view in (residuals[0] if residuals else {})
    }


@dataclass(frozen=True)
class Agreement:
    """How well projections of volumes agree with radiographs, by view, after the gain and offset that suit each."""

    residual: Float[Tensor, "n views"]
    """Relative L2 distance of the projection from the radiograph; 0 is agreement."""
    psnr_db: Float[Tensor, "n views"]
    """Against the radiograph's own range, 1."""


def agreement(
    volume: Float[Tensor, "n 1 d h w"],
    radiographs: Float[Tensor, "n views rows columns"],
    window: Window,
    grid: Grid,
    geometry: Geometry,
) -> Agreement:
    """How volumes in the window's [0, 1] agree with standardized radiographs; see `fit` for the arguments."""
    state = _compare(hu_to_attenuation(window.to_hu(volume.float())), radiographs.float(), grid, geometry)
    return Agreement(state.residual, -10 * state.error.square().mean(dim=(2, 3)).clamp_min(1e-12).log10())


def require_steps(steps: int) -> None:
    """Raise a ConfigError where steps are negative."""
    if steps < 0:
        raise ConfigError(f"a consistency fit of {steps} steps: give 0 for none, or more")


def match(projections: Images, radiographs: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Gain and offset by view that bring projections closest to radiographs, and 1 for each pixel that counts.

    Standardizing clips a radiograph at its percentiles. So where it is 0 or 1, a projection that is matched to less or
    more agrees with it, and such pixels are left out. Gains are not negative: a projection that shows the opposite of
    its radiograph is matched by a constant, and the fit leaves it alone.
    """
    live = torch.ones_like(radiographs)
    for _ in range(MATCHES):
        count = live.sum(dim=(2, 3), keepdim=True).clamp_min(1.0)
        center, level = ((live * images).sum(dim=(2, 3), keepdim=True) / count for images in (projections, radiographs))
        together = (live * (projections - center) * (radiographs - level)).sum(dim=(2, 3), keepdim=True)
        alone = (live * (projections - center).square()).sum(dim=(2, 3), keepdim=True)
        gain = (together / alone.clamp_min(1e-12)).clamp_min(0.0)
        offset = level - gain * center
        matched = gain * projections + offset
        beyond = ((radiographs <= 0) & (matched <= 0)) | ((radiographs >= 1) & (matched >= 1))
        live = (~beyond).to(radiographs.dtype)
    return gain, offset, live


def _compare(density: Volume, radiographs: Images, grid: Grid, geometry: Geometry) -> _State:
    projections = _project(density, grid, geometry)
    gain, offset, live = match(projections, radiographs)
    error = live * (gain * projections + offset - radiographs)
    size = _squares(radiographs).clamp_min(1e-12)
    return _State(density, gain, live, error, (_squares(error) / size).sqrt()[..., 0, 0])


@torch.no_grad()
def _project(density: Volume, grid: Grid, geometry: Geometry) -> Images:
    return torch.cat([project(density, grid.spacing_mm, geometry, view) for view in geometry.views], dim=1)


def _spread_back(state: _State, weight: Float[Tensor, "n views 1 1"], grid: Grid, geometry: Geometry) -> Volume:
    """Half the gradient of the residuals: the errors through the projector's exact adjoint, a view at a time."""
    pixels = state.gain * weight * state.error
    total = torch.zeros_like(state.density)
    for k, view in enumerate(geometry.views):
        # Projection is linear, so where its gradient is taken does not matter.
        with torch.inference_mode(False), torch.enable_grad():
            point = torch.zeros_like(state.density, requires_grad=True)
            image = project(point, grid.spacing_mm, geometry, view)
            (spread,) = torch.autograd.grad(image, point, pixels[:, k : k + 1])
        total += spread
    return total


def _conjugate(slope: Volume, last: Volume | None, direction: Volume | None) -> Volume:
    """The next direction by Polak and Ribiere's formula, or steepest descent where that does not descend."""
    if last is None or direction is None:
        return -slope
    share = (_dot(slope, slope - last) / _dot(last, last).clamp_min(1e-30)).clamp_min(0.0)
    turned = torch.where(slope == 0, slope, share * direction - slope)
    return torch.where(_dot(turned, slope) < 0, turned, -slope)


def _best_length(
    state: _State,
    direction: Volume,
    slope: Volume,
    weight: Float[Tensor, "n views 1 1"],
    pull: float,
    grid: Grid,
    geometry: Geometry,
) -> Float[Tensor, "n 1 1 1 1"]:
    """How far along a direction the sum of both terms is least, exactly, with gain and offset held."""
    change = state.live * state.gain * _project(direction, grid, geometry)
    curvature = (weight * _squares(change)).sum(dim=1)[..., None, None] + pull * _dot(direction, direction)
    return -_dot(slope, direction) / curvature.clamp_min(1e-30)


def _chosen(where: Bool[Tensor, " n"], first: _State, second: _State) -> _State:
    """Sample by sample the first where it says so, else the second."""

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(where.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return _State(
        pick(first.density, second.density),
        pick(first.gain, second.gain),
        pick(first.live, second.live),
        pick(first.error, second.error),
        pick(first.residual, second.residual),
    )


def _squares(images: Images) -> Float[Tensor, "n views 1 1"]:
    return images.square().sum(dim=(2, 3), keepdim=True)


def _dot(one: Volume, other: Volume) -> Float[Tensor, "n 1 1 1 1"]:
    return (one * other).sum(dim=(1, 2, 3, 4), keepdim=True)
