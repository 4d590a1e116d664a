"""Networks that draw a volume instead of computing it: the same radiographs and seed give the same volume, always."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.errors import ConfigError
from raylift.models.objectives.objective import VolumeNetwork

SamplerName = Literal["ancestral", "ddim", "multistep"]


@dataclass(frozen=True)
class Draw:
    """How a volume is drawn."""

    sampler: SamplerName = "multistep"
    """ancestral: DDPM, noise at each step; ddim: no noise but the first; multistep: DPM-Solver++ of second order."""
    steps: int = 16
    """Evaluations of the denoiser."""
    seed: int = 0
    """Of the noise, the same for every item of a batch."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"{self.steps} sampling steps: use 1 or more")


class DrawingNetwork(VolumeNetwork):
    """A generative network; called as any other it draws as its settings say.

    Attributes:
        settings: how `forward` draws; may be replaced after loading.
    """

    settings: Draw

    @abstractmethod
    def draw(self, radiographs: Float[Tensor, "n views rows columns"], settings: Draw) -> Float[Tensor, "n 1 d h w"]:
        """One volume in the window's [0, 1] for each set of radiographs.

        What is drawn for an item depends on its radiographs and the settings alone, not on the rest of its batch.
        """

    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """A single draw."""
        return [self.draw(radiographs, self.settings)]


@dataclass(frozen=True)
class DrawFlags:
    """What is asked of a model that draws its volume; what is left out is as the model's own settings say."""

    sampler: SamplerName | None = None
    """How a drawing model goes from noise to a volume; otherwise as its settings say."""
    steps: int | None = None
    """Evaluations of a drawing model's denoiser; otherwise as its settings say."""
    seed: int | None = None
    """Of a drawing model's noise; otherwise as its settings say."""

    def settled(self, network: nn.Module, samples: int = 1) -> Draw | None:
        """How that network will draw, or None for one that computes its volume.

        Args:
            network: any that takes radiographs.
            samples: how many volumes are wanted of the same radiographs.

        Raises:
            ConfigError: fewer than one sample or step, or something was asked of a network that does not draw.
        """
        if samples < 1:
            raise ConfigError(f"{samples} samples: give 1 or more")
        asked = {name: value for name, value in vars(self).items() if value is not None}
        if isinstance(network, DrawingNetwork):
            return replace(network.settings, **asked)
        flags = [f"--{name}" for name in (*asked, *(["samples"] if samples > 1 else []))]
        if flags:
            raise ConfigError(
                "this model computes its volume and draws nothing, so it has no use for "
                f"{', '.join(flags)}: leave these out"
            )
        return None


def volume(
    network: nn.Module, radiographs: Float[Tensor, "n views rows columns"], settings: Draw | None, k: int = 0
) -> Float[Tensor, "n 1 d h w"]:
    """What a network makes of radiographs in fp32: without settings its computed volume, else its k-th draw.

    The k-th draw has the seed `settings.seed + k` and is clipped to the window's [0, 1], so that the mean of several
    is the mean of the volumes that each seed gives alone.
    """
    if settings is None:
        made: Tensor = network(radiographs)
        return made.float()
    assert isinstance(network, DrawingNetwork)
    return network.draw(radiographs, replace(settings, seed=settings.seed + k)).float().clip(0.0, 1.0)


class Spread:
    """Mean and standard deviation of volumes that come one after another (Welford 1962)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, volume: Float[Tensor, "*shape"]) -> None:
        """Take one in."""
        self._count += 1
        before = volume - self._mean
        self._mean = self._mean + before / self._count
        self._squares = self._squares + before * (volume - self._mean)

    @property
    def mean(self) -> Float[Tensor, "*shape"]:
        """Of all volumes so far."""
        return self._mean

    @property
    def deviation(self) -> Float[Tensor, "*shape"] | None:
        """The square root of the unbiased variance over volumes, voxel by voxel; None for a single one."""
        return (self._squares / (self._count - 1)).sqrt() if self._count > 1 else None
