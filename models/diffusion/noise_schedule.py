"""The equations of a diffusion model: how data become noise, and what a network is asked to tell.

With a_t the cumulative product of 1 - beta (Ho et al. 2020; Liu et al. write alpha_t for it), x_0 the data and
e ~ N(0, 1),

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e.

A network tells e (`epsilon`), x_0 (`sample`) or sqrt(a_t) e - sqrt(1 - a_t) x_0 (`v`, Salimans and Ho 2022); each of
them gives the data by one step. For epsilon that is

    x_0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t).

DiffuX2CT as we could read it has 1 - a_t in place of the second root, which does not undo the first equation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from raylift.datasets.errors import ConfigError

ScheduleName = Literal["linear", "cosine"]
PredictionName = Literal["epsilon", "sample", "v"]

LEAST_NOISE, LEAST_SIGNAL = 1e-9, 1e-12
"""The smallest 1 - a_t and the smallest a_t that single precision computes with."""


@dataclass(frozen=True)
class DiffusionConfig:
    """A noise schedule, and what the network tells."""

    schedule: ScheduleName = "linear"
    """linear: beta from `beta_first` to `beta_last`; cosine: Nichol and Dhariwal 2021."""
    timesteps: int = 1000
    beta_first: float = 1e-6
    beta_last: float = 1e-2
    prediction: PredictionName = "epsilon"

    def __post_init__(self) -> None:
        if self.timesteps < 1 or not 0 < self.beta_first <= self.beta_last < 1:
            raise ConfigError(f"{self}: give one timestep or more, and 0 < beta_first <= beta_last < 1")
        levels = self.levels()
        noise, signal = 1 - levels[0], levels[-1]
        if noise < LEAST_NOISE or signal < LEAST_SIGNAL:
            raise ConfigError(
                f"{self.schedule} schedule: noise begins with {noise:g} and signal ends with {signal:g}, too little to "
                f"compute with: raise beta_first until the one is {LEAST_NOISE:g}, and lower beta_last or timesteps "
                f"until the other is {LEAST_SIGNAL:g}"
            )

    def levels(self) -> list[float]:
        """a_t for t from 0 (nearly the data) to `timesteps` - 1 (nearly noise)."""
        if self.schedule == "linear":
            beta = np.linspace(self.beta_first, self.beta_last, self.timesteps)
        else:
            # Equation 17, with its offset of 0.008 and its largest beta of 0.999.
            times = np.arange(self.timesteps + 1) / self.timesteps
            signal = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
        levels: list[float] = np.cumprod(1 - beta).tolist()
        return levels


class Diffusion:
    """The process of a configuration; it has no weights and lives on whatever device its tensors are on."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.levels = config.levels()

    def draw_times(self, like: Float[Tensor, "n c d h w"]) -> Int[Tensor, " n"]:
        """A timestep for each item, all equally likely, from torch's global generator."""
        return torch.randint(self.config.timesteps, (len(like),), device=like.device)

    def noisy(
        self, data: Float[Tensor, "n c d h w"], noise: Float[Tensor, "n c d h w"], times: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c d h w"]:
        """x_t."""
        signal, spread = self._roots(times)
        return signal * data + spread * noise

    def target(
        self, data: Float[Tensor, "n c d h w"], noise: Float[Tensor, "n c d h w"], times: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c d h w"]:
        """What the network should tell."""
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "sample":
            return data
        signal, spread = self._roots(times)
        return signal * noise - spread * data

    def one_step(
        self, told: Float[Tensor, "n c d h w"], noisy: Float[Tensor, "n c d h w"], times: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c d h w"]:
        """The data, from what the network tells of x_t."""
        signal, spread = self._roots(times)
        if self.config.prediction == "epsilon":
            return (noisy - spread * told) / signal
        if self.config.prediction == "sample":
            return told
        return signal * noisy - spread * told

    def _roots(self, times: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n 1 1 1 1"], Float[Tensor, "n 1 1 1 1"]]:
        """sqrt(a_t) and sqrt(1 - a_t); the roots are taken in double precision, where a_t near 1 keeps its digits."""
        level = torch.tensor(self.levels, dtype=torch.float64, device=times.device)[times].reshape(-1, 1, 1, 1, 1)
        return level.sqrt().float(), (1 - level).sqrt().float()
