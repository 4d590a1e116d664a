"""Conditional GANs: a generator that must fit the truth and fool a discriminator, and that discriminator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.segmentation import Label
from raylift.models import losses
from raylift.models.losses import least_squares
from raylift.models.objectives.objective import Carried, Objective, Player, Turn, VolumeNetwork


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weights of the terms that compare a volume with the truth, and of the adversarial one; 0 leaves a term out.

    The defaults are X2CT-GAN's. An adversarial weight of 0 trains without a discriminator.
    """

    adversarial: float = 0.1
    """LSGAN; the discriminator's loss has the same weight."""
    voxel: float = 10.0
    """Mean squared error."""
    voxel_l1: float = 0.0
    """Mean absolute error."""
    projection: float = 10.0
    """Mean absolute error of mean projections along the three axes."""
    cone_projection: float = 0.0
    """Mean absolute error of cone-beam projections in three jittered poses (X-Recon)."""
    cone_jitter_deg: float = 10.0
    cone_jitter_voxels: float = 8.0
    """Standard deviations of the jitter; a voxel is 1/128 of the volume's edge."""
    lung: float = 0.0
    """Mean squared error inside the lungs (DuoLift-GAN), by the archive's labels."""
    deep_supervision: float = 0.0
    """The weighted sum of the terms above on the decoder's auxiliary volumes, without adversarial and cone terms."""

    def __post_init__(self) -> None:
        negative = [name for name, value in vars(self).items() if value < 0]
        if negative:
            raise ConfigError(f"loss weights below 0: {', '.join(negative)}")

    def fit(self, volume: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms with a weight that compare voxels and mean projections, unweighted, by their names in logs."""
        terms: dict[str, Tensor] = {}
        if self.voxel:
            terms["voxel_mse"] = losses.voxel_mse(volume, batch.volume)
        if self.voxel_l1:
            terms["voxel_l1"] = losses.voxel_l1(volume, batch.volume)
        if self.projection:
            terms["projection_l1"] = losses.orthogonal_projection_l1(volume, batch.volume)
        if self.lung:
            terms["lung_mse"] = losses.masked_mse(volume, batch.volume, lungs(batch))
        return terms

    def cone(self, volume: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The cone-beam term, if it has a weight."""
        if not self.cone_projection:
            return {}
        jitter = self.cone_jitter_deg, self.cone_jitter_voxels
        return {"cone_projection_l1": losses.cone_projection_l1(volume, batch.volume, *jitter)}

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms, each times its weight."""
        weights = {
            "voxel_mse": self.voxel,
            "voxel_l1": self.voxel_l1,
            "projection_l1": self.projection,
            "cone_projection_l1": self.cone_projection,
            "lung_mse": self.lung,
            "adversarial": self.adversarial,
            "auxiliary": self.deep_supervision,
        }
        if not terms:
            raise ConfigError("all loss weights are 0: nothing would be learned")
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def lungs(batch: Batch) -> Bool[Tensor, "n 1 d h w"]:
    """Where the labels say lung, vessels included.

    Raises:
        ConfigError: the batch has no labels.
    """
    if batch.labels is None:
        raise ConfigError(
            "system.loss.lung needs lung masks, and these samples came without labels: read them with labels, "
            "or set system.loss.lung to 0"
        )
    return (batch.labels == Label.LUNG) | (batch.labels == Label.VESSEL)


class GeneratorPlayer(Player):
    """The generator's turn: fit the volume and its projections, and pass for real."""

    def __init__(self, network: VolumeNetwork, discriminator: nn.Module | None, weights: ReconstructionLoss) -> None:
        super().__init__(network)
        self.weights = weights
        self._others = (discriminator,)

    def forward(self, batch: Batch, carried: Carried) -> Turn:  # noqa: ARG002
        """Carries the volume over to the discriminator, so that the generator runs once a batch."""
        assert isinstance(self.network, VolumeNetwork)
        volume, *auxiliaries = self.network.volumes(batch.views)
        terms = {**self.weights.fit(volume, batch), **self.weights.cone(volume, batch)}
        (discriminator,) = self._others
        if discriminator is not None:
            terms["adversarial"] = least_squares(discriminator(volume, batch.views), real=True)
        if auxiliaries:
            each = [self.weights.weighted(self.weights.fit(auxiliary, batch)) for auxiliary in auxiliaries]
            terms["auxiliary"] = torch.stack(each).mean()
        logs = {name: value.detach() for name, value in terms.items()}
        return self.weights.weighted(terms), logs, {"reconstruction": volume.detach()}


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
        return loss, {"real": real.detach(), "fake": made.detach()}, {}


def reconstruction_objective(
    generator: VolumeNetwork, discriminator: nn.Module | None, weights: ReconstructionLoss
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
