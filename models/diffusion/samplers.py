"""From noise to data in a few steps: three samplers with one signature.

A sampler walks down the timesteps it is given and asks at each for an estimate of the data, so it knows neither what
the network tells nor what it is conditioned on. Below, a and s are a_t at the step and at the next one (1 after the
last), x the noisy data and x_0 the estimate; log(a / (1 - a)) / 2 is half the log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.models.generative import SamplerName

Data = Float[Tensor, "n c d h w"]
Estimate = Callable[[Data, int], Data]
"""The data, estimated from noisy data and their timestep."""
Steps = Sequence[tuple[int, float, float]]
"""For each step the timestep, a and s."""


class Noise:
    """White noise that depends on a seed and on how often it was asked, the same for every item of a batch.

    It is drawn on the CPU, so that a seed means the same on every device.
    """

    def __init__(self, seed: int, like: Data) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._like = like

    def __call__(self) -> Data:
        """The next noise."""
        one = torch.randn(1, *self._like.shape[1:], generator=self._generator, device="cpu")
        return one.to(self._like).expand(self._like.shape)


def steps_through(levels: Sequence[float], count: int) -> Steps:
    """Timesteps from the last of `levels` to the first, equally far apart in log signal-to-noise ratio.

    There are `count` of them, or as many as there are levels. The first timestep is among them if there are two or
    more: from there the step to the data is tiny, and the order of a sampler counts for all the others.
    """
    count = min(count, len(levels))
    ratios = np.array([_half_log_snr(level) for level in levels])
    times = [len(levels) - 1]
    for k, ratio in enumerate(np.linspace(ratios[-1], ratios[0], count)[1:], start=1):
        # The nearest one that is neither taken nor needed by those to come.
        times.append(int(np.abs(ratios - ratio).argmin().clip(count - 1 - k, times[-1] - 1)))
    following = [*(levels[t] for t in times[1:]), 1.0]
    return [(t, levels[t], after) for t, after in zip(times, following, strict=True)]


def ancestral(estimate: Estimate, start: Data, steps: Steps, noise: Noise) -> Data:
    """DDPM (Ho et al. 2020), equation 7, over any subsequence of timesteps: the posterior's mean and its noise."""
    x = start
    for t, a, s in steps:
        beta = 1 - a / s
        x = math.sqrt(s) * beta / (1 - a) * estimate(x, t) + math.sqrt(a / s) * (1 - s) / (1 - a) * x
        if s < 1:
            x = x + math.sqrt(beta * (1 - s) / (1 - a)) * noise()
    return x


def ddim(estimate: Estimate, start: Data, steps: Steps, noise: Noise) -> Data:  # noqa: ARG001
    """DDIM (Song et al. 2021), equation 12 with eta 0: the implied noise is kept and the level lowered."""
    x = start
    for t, a, s in steps:
        data = estimate(x, t)
        x = math.sqrt(s) * data + math.sqrt((1 - s) / (1 - a)) * (x - math.sqrt(a) * data)
    return x


def multistep(estimate: Estimate, start: Data, steps: Steps, noise: Noise) -> Data:  # noqa: ARG001
    """DPM-Solver++ 2M (Lu et al. 2022), algorithm 2: each step extrapolates from this estimate and the one before.

    The first step and the last are of first order, where there is nothing before and no level to extrapolate to.
    """
    x, before, h_before = start, start, 0.0
    for t, a, s in steps:
        data = estimate(x, t)
        if s == 1:
            return data
        h = _half_log_snr(s) - _half_log_snr(a)
        aim = data if h_before == 0 else data + h / (2 * h_before) * (data - before)
        x = math.sqrt((1 - s) / (1 - a)) * x - math.sqrt(s) * math.expm1(-h) * aim
        before, h_before = data, h
    return x


Sampler = Callable[[Estimate, Data, Steps, Noise], Data]
SAMPLERS: dict[SamplerName, Sampler] = {"ancestral": ancestral, "ddim": ddim, "multistep": multistep}


def _half_log_snr(level: float) -> float:
    return 0.5 * math.log(level / (1 - level))
