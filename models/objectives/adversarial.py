"""Conditional GANs: a generator that must fit the truth and fool a discriminator, and that discriminator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from raylift.datasets.stream import Batch
from raylift.models.losses import least_squares, orthogonal_projection_l1, voxel_mse
from raylift.models.objectives.turns import Carried, Objective, Player, Turn


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weights of the terms that compare a volume with the truth, and of the adversarial one.

    The defaults are X2CT-GAN's. An adversarial weight of 0 trains without a discriminator.
    """

    adversarial: float = 0.1
    voxel: float = 10.0
    projection: float = 10.0


class GeneratorPlayer(Player):
    """The generator's turn: fit the volume and its projections, and pass for real."""

    def __init__(self, network: nn.Module, discriminator: nn.Module | None, weights: ReconstructionLoss) -> None:
        super().__init__(network)
        self.weights = weights
        self._others = (discriminator,)

    def forward(self, batch: Batch, carried: Carried) -> Turn:  # noqa: ARG002
        """Carries the volume over to the discriminator, so that the generator runs once a batch."""
        volume = self.network(batch.views)
        voxel = voxel_mse(volume, batch.volume)
        projection = orthogonal_projection_l1(volume, batch.volume)
        loss = self.weights.voxel * voxel + self.weights.projection * projection
        logs = {"voxel_mse": voxel.detach(), "projection_l1": projection.detach()}
        (discriminator,) = self._others
        if discriminator is not None:
            adversarial = least_squares(discriminator(volume, batch.views), real=True)
            loss = loss + self.weights.adversarial * adversarial
            logs["adversarial"] = adversarial.detach()
        return loss, logs, {"reconstruction": volume.detach()}


class DiscriminatorPlayer(Player):
    """The discriminator's turn: call the truth real and the carried reconstruction made."""

    def __init__(self, network: nn.Module, weights: ReconstructionLoss) -> None:
        super().__init__(network)
        self.weights = weights

    def forward(self, batch: Batch, carried: Carried) -> Turn:
        """Scaled by the adversarial weight, as published."""
        real = least_squares(self.network(batch.volume, batch.views), real=True)
        made = least_squares(self.network(carried["reconstruction"], batch.views), real=False)
        loss = self.weights.adversarial * (real + made)
        return loss, {"real": real.detach(), "made": made.detach()}, {}


def reconstruction_objective(
    generator: nn.Module, discriminator: nn.Module | None, weights: ReconstructionLoss
) -> Objective:
    """Generator, then discriminator, each on the same batch; the generator alone without an adversarial weight."""
    if weights.adversarial == 0 or discriminator is None:
        return Objective({"generator": GeneratorPlayer(generator, None, weights)})
    return Objective(
        {
            "generator": GeneratorPlayer(generator, discriminator, weights),
            "discriminator": DiscriminatorPlayer(discriminator, weights),
        }
    )
