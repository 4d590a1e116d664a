"""Generative networks sample a volume: the same radiographs and seed always give the same volume."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.models.volume_network import VolumeNetwork

SamplerName = Literal["ddpm", "ddim", "dpm_solver"]
"""The keys of `SAMPLERS`, written out because mypy cannot make a `Literal` from a dictionary."""


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling."""

    sampler: SamplerName = "dpm_solver"
    """ddpm: ancestral sampling, noise at each step; ddim: deterministic after the first noise; dpm_solver:
    DPM-Solver++ of second order."""
    steps: int = 16
    """Evaluations of the denoiser."""
    seed: int = 0
    """Seed of the noise, which is the same for every item of a batch."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"{self.steps} sampling steps: use 1 or more")


class GenerativeNetwork(VolumeNetwork):
    """A network whose volumes are samples.

    Attributes:
        sampling: the settings of `forward`; may be replaced after loading.
    """

    sampling: SamplingConfig

    @abstractmethod
    def sample(
        self, radiographs: Float[Tensor, "n views rows columns"], sampling: SamplingConfig
    ) -> Float[Tensor, "n 1 d h w"]:
        """One volume in the window's [0, 1] for each set of radiographs.

        The sample of an item depends on its radiographs and the settings alone, not on the rest of its batch.
        """

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """A single sample."""
        return [self.sample(radiographs, self.sampling)]


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling settings of a command; those left out keep the values of the model."""

    sampler: SamplerName | None = None
    """The sampler of a generative model; the model's own by default."""
    steps: int | None = None
    """Evaluations of a generative model's denoiser; the model's own number by default."""
    seed: int | None = None
    """Seed of a generative model's noise; the model's own by default."""

    def resolve(self, network: nn.Module, samples: int = 1) -> SamplingConfig | None:
        """The sampling settings for a network, or None for a deterministic one.

        Args:
            network: any that maps radiographs to volumes.
            samples: number of volumes for the same radiographs.

        Raises:
            ConfigError: fewer than one sample or step, or a setting was given for a deterministic network.
        """
        if samples < 1:
            raise ConfigError(f"{samples} samples: give 1 or more")
        given = {name: value for name, value in vars(self).items() if value is not None}
        if isinstance(network, GenerativeNetwork):
            return replace(network.sampling, **given)
        flags = [f"--{name}" for name in (*given, *(["samples"] if samples > 1 else []))]
        if flags:
            raise ConfigError(f"this model is deterministic, so it has no use for {', '.join(flags)}: leave these out")
        return None


def predict(
    network: nn.Module, radiographs: Float[Tensor, "n views rows columns"], sampling: SamplingConfig | None, k: int = 0
) -> Float[Tensor, "n 1 d h w"]:
    """The volumes that a network predicts from radiographs, in fp32: with sampling settings its k-th sample.

    The k-th sample has the seed `sampling.seed + k` and is clipped to the window's [0, 1], so that the mean of several
    samples is the mean of the volumes that each seed gives alone.
    """
    if sampling is None:
        prediction: Tensor = network(radiographs)
        return prediction.float()
    assert isinstance(network, GenerativeNetwork)
    return network.sample(radiographs, replace(sampling, seed=sampling.seed + k)).float().clip(0.0, 1.0)


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
