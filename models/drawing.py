"""Networks that draw a volume instead of computing it: the same radiographs and seed give the same volume, always."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.models.objectives.turns import VolumeNetwork

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
