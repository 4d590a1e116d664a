"""Samplers: from Gaussian noise to data in a few denoising steps, three algorithms with one signature.

A sampler visits a descending sequence of timesteps and needs an estimate of x_0 at each. It depends neither on the
prediction type nor on the condition. In the equations, a and s are abar_t at the current and at the next timestep (1
after the last), x the noisy data, and log(a / (1 - a)) / 2 is half the log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.choices import KeyOf

Data = Float[Tensor, "n c d h w"]
PredictX0 = Callable[[Data, int], Data]
"""An estimate of x_0 from noisy data and their timestep."""
Schedule = Sequence[tuple[int, float, float]]
"""For each step the timestep, a and s."""

TERMINAL_SIGNAL = 1e-4


class Noise:
    """White noise that depends on a seed and on the number of calls before, the same for every item of a batch.

    The generator runs on the CPU, so that a seed gives the same noise on every device.
    """

    def __init__(self, seed: int, like: Data) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._like = like

    def __call__(self) -> Data:
        """The next noise."""
        noise = torch.randn(1, *self._like.shape[1:], generator=self._generator, device="cpu")
        return noise.to(self._like).expand(self._like.shape)


def initial_data(predict_x0: PredictX0, noise: Data, alphas_cumprod: Sequence[float]) -> Data:
    """The noisy data at the last timestep T, where sampling starts.

    A network was trained there on sqrt(abar_T) x_0 + sqrt(1 - abar_T) epsilon. Where abar_T is above 1e-4, so that 1 %
    of the data's amplitude is left, pure noise lies off that distribution (Lin et al. 2024), and the estimate of x_0
    from pure noise takes the place of x_0.
    """
    last = alphas_cumprod[-1]
    if last <= TERMINAL_SIGNAL:
        return noise
    estimate = predict_x0(noise, len(alphas_cumprod) - 1)
    return math.sqrt(last) * estimate + math.sqrt(1 - last) * noise


def timestep_schedule(alphas_cumprod: Sequence[float], count: int) -> Schedule:
    """Timesteps from the last to the first, uniformly spaced in log signal-to-noise ratio.

    There are `count` timesteps, or as many as `alphas_cumprod` has. With two or more the first timestep is among them:
    the step from there to the data is tiny, so the order of a sampler matters for all the others.
    """
    count = min(count, len(alphas_cumprod))
    ratios = np.array([_half_log_snr(abar) for abar in alphas_cumprod])
    timesteps = [len(alphas_cumprod) - 1]
    for k, ratio in enumerate(np.linspace(ratios[-1], ratios[0], count)[1:], start=1):
        # The nearest timestep that is below the previous one and leaves enough timesteps for the rest.
        timesteps.append(int(np.abs(ratios - ratio).argmin().clip(count - 1 - k, timesteps[-1] - 1)))
    following = [*(alphas_cumprod[t] for t in timesteps[1:]), 1.0]
    return [(t, alphas_cumprod[t], s) for t, s in zip(timesteps, following, strict=True)]


def ddpm(predict_x0: PredictX0, start: Data, schedule: Schedule, noise: Noise) -> Data:
    """DDPM (Ho et al. 2020), equation 7, over any subsequence of timesteps: the posterior's mean and its noise."""
    x = start
    for t, a, s in schedule:
        beta = 1 - a / s
        x = math.sqrt(s) * beta / (1 - a) * predict_x0(x, t) + math.sqrt(a / s) * (1 - s) / (1 - a) * x
        if s < 1:
            x = x + math.sqrt(beta * (1 - s) / (1 - a)) * noise()
    return x


def ddim(predict_x0: PredictX0, start: Data, schedule: Schedule, noise: Noise) -> Data:  # noqa: ARG001
    """DDIM (Song et al. 2021), equation 12 with eta 0: the implied noise is kept at the next noise level."""
    x = start
    for t, a, s in schedule:
        x0 = predict_x0(x, t)
        x = math.sqrt(s) * x0 + math.sqrt((1 - s) / (1 - a)) * (x - math.sqrt(a) * x0)
    return x


def dpm_solver(predict_x0: PredictX0, start: Data, schedule: Schedule, noise: Noise) -> Data:  # noqa: ARG001
    """DPM-Solver++ 2M (Lu et al. 2022), algorithm 2: each step extrapolates from this estimate and the previous one.

    The first step has no previous estimate and the last one ends at infinite signal-to-noise ratio: both are of first
    order.
    """
    x, previous, h_previous = start, start, 0.0
    for t, a, s in schedule:
        x0 = predict_x0(x, t)
        if s == 1:
            return x0
        h = _half_log_snr(s) - _half_log_snr(a)
        extrapolated = x0 if h_previous == 0 else x0 + h / (2 * h_previous) * (x0 - previous)
        x = math.sqrt((1 - s) / (1 - a)) * x - math.sqrt(s) * math.expm1(-h) * extrapolated
        previous, h_previous = x0, h
    return x


Sampler = Callable[[PredictX0, Data, Schedule, Noise], Data]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver}
SamplerName = KeyOf[str, SAMPLERS]


def _half_log_snr(abar: float) -> float:
    return 0.5 * math.log(abar / (1 - abar))
