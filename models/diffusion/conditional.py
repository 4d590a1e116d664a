"""Networks that sample volumes from a conditional diffusion model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from raylift.models.diffusion.denoiser import Denoiser
from raylift.models.diffusion.diffusion_network import DiffusionNetwork, SamplingConfig
from raylift.models.diffusion.noise_schedule import NoiseScheduler, NoiseSchedulerConfig
from raylift.models.diffusion.samplers import SAMPLERS, Noise, initial_data, timestep_schedule

Condition = list[Float[Tensor, "n k _ _ _"]]
Data = Float[Tensor, "n c s s s"]


class ConditionalDiffusion(DiffusionNetwork):
    """A denoiser, its noise schedule, and the conversion between volumes and the data that are denoised.

    The condition is computed once for each sample.

    Attributes:
        denoiser: the network that is evaluated at every step.
        clip_sample_range: estimates of x_0 are clipped to [-clip_sample_range, clip_sample_range] during sampling,
            never during training.
        sample_shape: channels and voxels per side of the data.
    """

    denoiser: Denoiser

    def __init__(
        self,
        scheduler: NoiseSchedulerConfig,
        sampling: SamplingConfig,
        clip_sample_range: float,
        sample_shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.scheduler = NoiseScheduler(scheduler)
        self.sampling, self.clip_sample_range, self.sample_shape = sampling, clip_sample_range, sample_shape

    @abstractmethod
    def condition(self, radiographs: Float[Tensor, "n views rows columns"]) -> Condition:
        """The condition volumes of the denoiser, finest first."""

    @abstractmethod
    def encode(self, volume: Float[Tensor, "n 1 d h w"], condition: Condition) -> tuple[Data, dict[str, Tensor]]:
        """The data x_0 of volumes in [0, 1], and by name the weighted losses of the network that computes them."""

    @abstractmethod
    def decode(self, data: Data, condition: Condition) -> Float[Tensor, "n 1 d h w"]:
        """Data as volumes in [0, 1]."""

    def predict(self, noisy: Data, timesteps: Int[Tensor, " n"], condition: Condition) -> Data:
        """The denoiser's prediction, of the scheduler's prediction type, in fp32."""
        output: Tensor = self.denoiser(noisy, timesteps, condition)
        return self.scheduler.precondition(output.float(), noisy, timesteps)

    @torch.no_grad()
    def sample(
        self,
        radiographs: Float[Tensor, "n views rows columns"],
        sampling: SamplingConfig,
        on_step: Callable[[], None] | None = None,
    ) -> Float[Tensor, "n 1 d h w"]:
        """Gaussian noise, then `sampling.steps` denoising steps under the same condition.

        A schedule that does not end at pure noise takes one evaluation more: see `initial_data`.
        """
        condition = self.condition(radiographs)
        channels, size = self.sample_shape
        like = torch.empty(len(radiographs), channels, size, size, size, device=radiographs.device)
        noise = Noise(sampling.seed, like)

        def predict_x0(noisy: Tensor, timestep: int) -> Tensor:
            if on_step:
                on_step()
            timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
            prediction = self.predict(noisy, timesteps, condition)
            x0 = self.scheduler.predict_x0(prediction, noisy, timesteps)
            return x0.clip(-self.clip_sample_range, self.clip_sample_range)

        alphas_cumprod = self.scheduler.alphas_cumprod
        start = initial_data(predict_x0, noise(), alphas_cumprod)
        schedule = timestep_schedule(alphas_cumprod, sampling.steps)
        return self.decode(SAMPLERS[sampling.sampler](predict_x0, start, schedule, noise), condition)
