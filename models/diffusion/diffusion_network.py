"""Diffusion networks sample a volume: the same radiographs and seed always give the same volume."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.models.diffusion.samplers import SamplerName
from raylift.models.volume_network import VolumeNetwork


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


class DiffusionNetwork(VolumeNetwork):
    """A network whose volumes are samples.

    Attributes:
        sampling: the settings of `forward`; may be replaced after loading.
    """

    sampling: SamplingConfig

    @abstractmethod
    def sample(
        self,
        radiographs: Float[Tensor, "n views rows columns"],
        sampling: SamplingConfig,
        on_step: Callable[[], None] | None = None,
    ) -> Float[Tensor, "n 1 d h w"]:
        """One volume in the window's [0, 1] for each set of radiographs.

        The sample of an item depends on its radiographs and the settings alone, not on the rest of its batch. `on_step`
        is called before each evaluation of the denoiser; what it raises ends the sampling.
        """

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """A single sample."""
        return [self.sample(radiographs, self.sampling)]


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling settings of a command; those left out keep the values of the model."""

    sampler: SamplerName | None = None
    """The sampler of a diffusion model; the model's own by default."""
    steps: int | None = None
    """Evaluations of a diffusion model's denoiser; the model's own number by default."""
    seed: int | None = None
    """Seed of a diffusion model's noise; the model's own by default."""

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
        if isinstance(network, DiffusionNetwork):
            return replace(network.sampling, **given)
        flags = [f"--{name}" for name in (*given, *(["samples"] if samples > 1 else []))]
        if flags:
            raise ConfigError(f"this model is deterministic: leave out {', '.join(flags)}")
        return None
