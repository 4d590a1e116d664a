"""Denoising: the training objective of diffusion models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.models.diffusion.conditional import ConditionalDiffusion
from raylift.models.losses import orthogonal_projection_l1
from raylift.models.objectives.objective import LossModule, Objective, Outputs, StepOutput


@dataclass(frozen=True)
class DenoisingLoss:
    """Weights relative to the mean squared error of the network's prediction, whose weight is 1."""

    projection_weight: float = 1.0
    """Weight, divided by the number T of timesteps, of the mean absolute error between mean projections of the data
    and of the predicted x_0 along the three axes. DiffuX2CT's is 1; its norm is not published, X2CT-GAN's is taken,
    without the absolute value: a prediction of 0, as at initialization, would get no gradient."""

    def __post_init__(self) -> None:
        if not self.projection_weight >= 0:
            raise ConfigError(f"system.loss.projection_weight is {self.projection_weight}: give a weight of 0 or more")


class DenoisingLossModule(LossModule):
    """The loss of a conditional diffusion model: add noise at a random timestep, predict, compare with the target.

    Fields of view are not masked: voxels outside are part of the network's noisy input at every step of sampling, so
    it must learn them too.
    """

    def __init__(self, network: ConditionalDiffusion, weights: DenoisingLoss) -> None:
        super().__init__(network)
        self.weights = weights

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:  # noqa: ARG002
        """The loss; timesteps and noise come from torch's global generator."""
        network = self.network
        assert isinstance(network, ConditionalDiffusion)
        scheduler = network.scheduler
        condition = network.condition(batch.radiographs)
        data, losses = network.encode(batch.volume, condition)
        noise, timesteps = torch.randn_like(data), scheduler.sample_timesteps(data)
        noisy = scheduler.add_noise(data, noise, timesteps)
        prediction = network.predict(noisy, timesteps, condition)
        target = scheduler.target(data, noise, timesteps)
        logs: dict[str, Tensor] = {f"{scheduler.config.prediction_type}_mse": F.mse_loss(prediction, target)}
        losses = {**losses, **logs}
        if self.weights.projection_weight:
            x0 = scheduler.predict_x0(prediction, noisy, timesteps)
            logs["projection_l1"] = orthogonal_projection_l1(x0, data)
            weight = self.weights.projection_weight / scheduler.config.num_train_timesteps
            losses["projection"] = weight * logs["projection_l1"]
        detached = {name: value.detach() for name, value in {**losses, **logs}.items() if name != "projection"}
        return torch.stack(list(losses.values())).sum(), detached, {}


def denoising_objective(network: ConditionalDiffusion, weights: DenoisingLoss, ema_decay: float) -> Objective:
    """A single network, the denoiser, with an EMA of its weights."""
    return Objective({"denoiser": DenoisingLossModule(network, weights)}, ema_decay=ema_decay)
