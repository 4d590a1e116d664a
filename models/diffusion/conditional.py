"""Volumes drawn by a diffusion under a condition: what such networks share, whatever they denoise."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raylift.models.diffusion.denoiser import Denoiser
from raylift.models.diffusion.noise_schedule import Diffusion, DiffusionConfig
from raylift.models.diffusion.samplers import SAMPLERS, Noise, steps_through
from raylift.models.generative import Draw, DrawingNetwork

Condition = list[Float[Tensor, "n k _ _ _"]]
Data = Float[Tensor, "n c s s s"]


class ConditionalDiffusion(DrawingNetwork):
    """Data that are denoised under a condition made once a draw, and volumes that stand for such data.

    Attributes:
        denoiser: the network that is asked at every step.
        limit: estimates of the data are clipped to [-limit, limit] while sampling, never in training.
        shape: channels and voxels a side of the data.
    """

    denoiser: Denoiser

    def __init__(self, diffusion: DiffusionConfig, settings: Draw, limit: float, shape: tuple[int, int]) -> None:
        super().__init__()
        self.diffusion = Diffusion(diffusion)
        self.settings, self.limit, self.shape = settings, limit, shape

    @abstractmethod
    def condition(self, radiographs: Float[Tensor, "n views rows columns"]) -> Condition:
        """What the denoiser is given beside the noisy data, finest first."""

    @abstractmethod
    def learn(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:
        """The data that stand for volumes in [0, 1], and weighted losses of whatever makes them, by their names."""

    @abstractmethod
    def volume(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:
        """Data as volumes in [0, 1]."""

    def tell(self, noisy: Data, times: Int[Tensor, " n"], condition: Condition) -> Data:
        """What the diffusion asks for, in fp32."""
        told: Tensor = self.denoiser(noisy, times, condition)
        return told.float()

    @torch.no_grad()
    def draw(self, radiographs: Float[Tensor, "n views rows columns"], settings: Draw) -> Float[Tensor, "n 1 d h w"]:
        """Noise, then as many estimates as the settings have steps, each under the same condition."""
        condition = self.condition(radiographs)
        channels, size = self.shape
        like = torch.empty(len(radiographs), channels, size, size, size, device=radiographs.device)
        noise = Noise(settings.seed, like)

        def estimate(noisy: Tensor, time: int) -> Tensor:
            times = torch.full((len(noisy),), time, device=noisy.device)
            data = self.diffusion.one_step(self.tell(noisy, times, condition), noisy, times)
            return data.clip(-self.limit, self.limit)

        steps = steps_through(self.diffusion.levels, settings.steps)
        return self.volume(SAMPLERS[settings.sampler](estimate, noise(), steps, noise), condition)
