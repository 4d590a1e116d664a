"""Noise schedules: the forward process of a diffusion model and the quantities that its network predicts.

With abar_t the cumulative product of alpha_t = 1 - beta_t (Ho et al. 2020), x_0 the data and epsilon ~ N(0, 1),

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon.

As in diffusers, a network predicts epsilon (`epsilon`), x_0 (`sample`) or
v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0 (`v_prediction`, Salimans and Ho 2022). Each prediction determines an
estimate of x_0; for epsilon it is

    x_0 = (x_t - sqrt(1 - abar_t) epsilon) / sqrt(abar_t).

The published formula of DiffuX2CT has 1 - abar_t in place of the second square root, which does not invert the forward
process.

At the last timesteps of a schedule an error of epsilon is multiplied by sqrt((1 - abar_t) / abar_t) in x_0: 12.3 at the
end of DiffuX2CT's. With `preconditioning` the network's output F is a part of epsilon alone,

    epsilon = sqrt(1 - abar_t) x_t + sqrt(abar_t) F,

as in Karras et al. 2022. F is v then, and the loss of epsilon weights its error by abar_t.
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

BetaSchedule = Literal["linear", "cosine"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]

MIN_NOISE, MIN_SIGNAL = 1e-9, 1e-12
"""The smallest 1 - abar_t and the smallest abar_t that fp32 can represent in these equations."""

Data = Float[Tensor, "n c d h w"]


@dataclass(frozen=True)
class NoiseSchedulerConfig:
    """A noise schedule and the prediction type of the network."""

    beta_schedule: BetaSchedule = "linear"
    """linear: beta from `beta_start` to `beta_end`; cosine: Nichol and Dhariwal 2021."""
    num_train_timesteps: int = 1000
    """Timesteps T of the diffusion."""
    beta_start: float = 1e-6
    """Variance of the noise added at the first timestep, of the linear schedule."""
    beta_end: float = 1e-2
    """Variance of the noise added at the last timestep, of the linear schedule."""
    prediction_type: PredictionType = "epsilon"
    """epsilon: the noise; sample: the data x_0; v_prediction: v."""
    preconditioning: bool = False
    """With prediction type epsilon, whether it is computed from the network's output and x_t; sample and v_prediction
    ignore it."""

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(f"{self}: give one timestep or more, and 0 < beta_start <= beta_end < 1")
        alphas_cumprod = self.alphas_cumprod()
        noise, signal = 1 - alphas_cumprod[0], alphas_cumprod[-1]
        if noise < MIN_NOISE or signal < MIN_SIGNAL:
            raise ConfigError(
                f"{self.beta_schedule} schedule: noise begins with {noise:g} and signal ends with {signal:g}, below "
                f"fp32: raise beta_start until the noise is {MIN_NOISE:g}, and lower beta_end or "
                f"num_train_timesteps until the signal is {MIN_SIGNAL:g}"
            )

    def alphas_cumprod(self) -> list[float]:
        """abar_t for t from 0 (nearly the data) to `num_train_timesteps` - 1 (nearly noise)."""
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        else:
            # Equation 17, with its offset of 0.008 and its largest beta of 0.999.
            times = np.arange(self.num_train_timesteps + 1) / self.num_train_timesteps
            signal = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
        alphas_cumprod: list[float] = np.cumprod(1 - betas).tolist()
        return alphas_cumprod


class NoiseScheduler:
    """The forward process of a configuration; it has no weights and runs on the device of its input tensors."""

    def __init__(self, config: NoiseSchedulerConfig) -> None:
        self.config = config
        self.alphas_cumprod = config.alphas_cumprod()

    def sample_timesteps(self, like: Data) -> Int[Tensor, " n"]:
        """A uniformly distributed timestep for each item, from torch's global generator."""
        return torch.randint(self.config.num_train_timesteps, (len(like),), device=like.device)

    def add_noise(self, data: Data, noise: Data, timesteps: Int[Tensor, " n"]) -> Data:
        """The noisy data x_t at each item's timestep, in the shape of `data`."""
        signal, sigma = self._signal_and_sigma(timesteps)
        return signal * data + sigma * noise

    def target(self, data: Data, noise: Data, timesteps: Int[Tensor, " n"]) -> Data:
        """The training target of the network, by its prediction type."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return data
        signal, sigma = self._signal_and_sigma(timesteps)
        return signal * noise - sigma * data

    def precondition(self, output: Data, noisy: Data, timesteps: Int[Tensor, " n"]) -> Data:
        """The prediction that a network's output at x_t stands for."""
        if not self.config.preconditioning or self.config.prediction_type != "epsilon":
            return output
        signal, sigma = self._signal_and_sigma(timesteps)
        return sigma * noisy + signal * output

    def predict_x0(self, prediction: Data, noisy: Data, timesteps: Int[Tensor, " n"]) -> Data:
        """The estimate of x_0 from the network's prediction at x_t."""
        signal, sigma = self._signal_and_sigma(timesteps)
        if self.config.prediction_type == "epsilon":
            return (noisy - sigma * prediction) / signal
        if self.config.prediction_type == "sample":
            return prediction
        return signal * noisy - sigma * prediction

    def _signal_and_sigma(
        self, timesteps: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n 1 1 1 1"], Float[Tensor, "n 1 1 1 1"]]:
        """sqrt(abar_t) and sqrt(1 - abar_t), in double precision, which keeps the digits of abar_t near 1."""
        table = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=timesteps.device)
        abar = table[timesteps].reshape(-1, 1, 1, 1, 1)
        return abar.sqrt().float(), (1 - abar).sqrt().float()
