"""Volumes from radiographs: prediction, data consistency, and the mean and standard deviation over samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Window
from raylift.models import consistency
from raylift.models.diffusion.diffusion_network import DiffusionNetwork, SamplingConfig

Residuals = dict[str, tuple[float, float]]
"""By view, the relative L2 distance of reprojection and radiograph before and after the data-consistency fit."""


@dataclass(frozen=True)
class Step:
    """A step of a reconstruction that begins."""

    stage: Literal["forward", "fit"]
    """An evaluation of the network, or a step of the data-consistency fit."""
    number: int
    """Among those of all samples, from 1; what a fit leaves out where it ends early is skipped."""
    total: int


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Reconstruction:
    """Volumes of one set of radiographs in the window's [0, 1], each the mean over samples."""

    predicted: Float[Tensor, "1 d h w"]
    """Output of the network."""
    fitted: Float[Tensor, "1 d h w"] | None
    """After a data-consistency fit of each sample; None without a fit."""
    std: Float[Tensor, "1 d h w"] | None
    """Standard deviation over samples of the fitted volumes or, without a fit, of the predicted ones; None for one."""
    residuals: Residuals = field(default_factory=dict)
    """Mean over samples; empty without a fit."""
    prediction_time_s: float = 0.0
    """Time of the network for the batch that this item was part of, over all samples, without the fit."""
    fit_time_s: float = 0.0
    """Time of the data-consistency fit for that batch, over all samples."""

    @property
    def volume(self) -> Float[Tensor, "1 d h w"]:
        """The fitted volume if there is one, else the predicted one."""
        return self.predicted if self.fitted is None else self.fitted


def predict(
    network: nn.Module,
    radiographs: Float[Tensor, "n views rows columns"],
    sampling: SamplingConfig | None,
    k: int = 0,
    on_step: Callable[[], None] | None = None,
) -> Float[Tensor, "n 1 d h w"]:
    """The volumes that a network predicts from radiographs, in fp32: with sampling settings its k-th sample.

    The k-th sample has the seed `sampling.seed + k` and is clipped to the window's [0, 1], so that the mean of several
    samples is the mean of the volumes that each seed gives alone. `on_step` is called before each evaluation of the
    network; what it raises ends the prediction.
    """
    if sampling is None:
        if on_step:
            on_step()
        prediction: Tensor = network(radiographs)
        return prediction.float()
    assert isinstance(network, DiffusionNetwork)
    return network.sample(radiographs, replace(sampling, seed=sampling.seed + k), on_step).float().clip(0.0, 1.0)


class RunningStatistics:
    """Mean and standard deviation of volumes that are added one by one (Welford 1962)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, volume: Float[Tensor, "*shape"]) -> None:
        """Update the statistics with one volume."""
        self._count += 1
        delta = volume - self._mean
        self._mean = self._mean + delta / self._count
        self._squares = self._squares + delta * (volume - self._mean)

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """The mean of all volumes so far."""
        return self._mean

    @property
    def std(self) -> Float[Tensor, "*shape"] | None:
        """The square root of the unbiased variance over volumes, voxel by voxel; None for a single one."""
        return (self._squares / (self._count - 1)).sqrt() if self._count > 1 else None


@torch.no_grad()
def reconstruct(
    network: nn.Module,
    radiographs: Float[Tensor, "n views rows columns"],
    window: Window,
    grid: Grid,
    geometry: Geometry,
    *,
    sampling: SamplingConfig | None = None,
    samples: Sequence[int] = (),
    consistency_steps: int = 0,
    on_step: OnStep | None = None,
) -> list[Reconstruction]:
    """Reconstruct a batch of radiographs.

    Args:
        network: maps radiographs to volumes.
        radiographs: in [0, 1], bone bright, in the order of the geometry's views.
        window: the HU range of [0, 1].
        grid: voxels of the volumes.
        geometry: of the radiographs.
        sampling: settings of a diffusion network; None for a deterministic one.
        samples: number of samples for each item, with consecutive seeds; one each by default.
        consistency_steps: steps of `consistency.fit`, which each sample gets by itself; 0: no fit.
        on_step: is called before each step; what it raises ends the reconstruction.
    """
    counts = list(samples) or [1] * len(radiographs)
    predicted, fitted = [RunningStatistics() for _ in counts], [RunningStatistics() for _ in counts]
    residuals: list[list[Residuals]] = [[] for _ in counts]
    prediction_time_s = fit_time_s = 0.0
    evaluations = sampling.steps if sampling else 1
    in_sample = evaluations + consistency_steps
    total = max(counts) * in_sample
    for k in range(max(counts)):
        items = [item for item, count in enumerate(counts) if count > k]
        started = time.perf_counter()
        volumes = predict(
            network, radiographs[items], sampling, k, _numbered(on_step, "forward", k * in_sample, evaluations, total)
        )
        prediction_time_s += time.perf_counter() - started
        for item, volume in zip(items, volumes, strict=True):
            predicted[item].add(volume)
        if consistency_steps:
            started = time.perf_counter()
            begin_step = _numbered(on_step, "fit", k * in_sample + evaluations, consistency_steps, total)
            fit = consistency.fit(
                volumes, radiographs[items], window, grid, geometry, consistency_steps, on_step=begin_step
            )
            fit_time_s += time.perf_counter() - started
            for item, volume, by_view in zip(items, fit.volume, fit.by_view(geometry), strict=True):
                fitted[item].add(volume)
                residuals[item].append(by_view)
    return [
        Reconstruction(
            prediction.mean,
            consistent.mean if consistency_steps else None,
            (consistent if consistency_steps else prediction).std,
            consistency.mean_residuals(by_sample),
            prediction_time_s,
            fit_time_s,
        )
        for prediction, consistent, by_sample in zip(predicted, fitted, residuals, strict=True)
    ]


def _numbered(
    on_step: OnStep | None, stage: Literal["forward", "fit"], before: int, count: int, total: int
) -> Callable[[], None] | None:
    """A function that calls `on_step` with the next of `count` steps, after those before."""
    if on_step is None:
        return None
    begun = 0

    def begin() -> None:
        nonlocal begun
        # A schedule that does not end at pure noise takes one evaluation more.
        begun = min(begun + 1, count)
        on_step(Step(stage, before + begun, total))

    return begin
