"""Conditional GANs: a generator with reconstruction and adversarial losses, and a discriminator."""

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
from raylift.models.objectives.objective import LossModule, Objective, Outputs, StepOutput
from raylift.models.volume_network import VolumeNetwork


@dataclass(frozen=True)
class ReconstructionLoss:
    """Weights of the reconstruction terms and of the adversarial term; 0 leaves a term out.

    The defaults are X2CT-GAN's. With an adversarial weight of 0 there is no discriminator.
    """

    adversarial_weight: float = 0.1
    """LSGAN; the discriminator's loss has the same weight."""
    mse_weight: float = 10.0
    """Mean squared error."""
    l1_weight: float = 0.0
    """Mean absolute error."""
    projection_weight: float = 10.0
    """Mean absolute error of mean projections along the three axes."""
    cone_projection_weight: float = 0.0
    """Mean absolute error of cone-beam projections in three jittered poses (X-Recon)."""
    cone_jitter_deg: float = 10.0
    """Standard deviation of the poses' rotations about each axis."""
    cone_jitter_voxels: float = 8.0
    """Standard deviations of the jitter; a voxel is 1/128 of the volume's edge."""
    ssim_weight: float = 0.0
    """1 minus the SSIM in 3-D."""
    lung_weight: float = 0.0
    """Mean squared error inside the lungs, from the archive's labels (DuoLift-GAN)."""
    deep_supervision_weight: float = 0.0
    """Weight of the sum of the terms above, without adversarial and cone terms, on the decoder's auxiliary volumes."""

    def __post_init__(self) -> None:
        negative = [name for name, value in vars(self).items() if value < 0]
        if negative:
            raise ConfigError(f"loss weights below 0: {', '.join(negative)}")

    def reconstruction_terms(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms on voxels and mean projections that have a weight: unweighted values by their names in logs."""
        terms: dict[str, Tensor] = {}
        if self.mse_weight:
            terms["voxel_mse"] = losses.voxel_mse(prediction, batch.volume)
        if self.l1_weight:
            terms["voxel_l1"] = losses.voxel_l1(prediction, batch.volume)
        if self.ssim_weight:
            terms["ssim_loss"] = losses.ssim_loss(prediction, batch.volume)
        if self.projection_weight:
            # X2CT-GAN's code projects absolute values; this matters where the output is negative.
            terms["projection_l1"] = losses.orthogonal_projection_l1(prediction.abs(), batch.volume.abs())
        if self.lung_weight:
            terms["lung_mse"] = losses.masked_mse(prediction, batch.volume, lungs(batch))
        return terms

    def cone_terms(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The cone-beam term, if it has a weight: its unweighted value by its name in logs."""
        if not self.cone_projection_weight:
            return {}
        jitter = self.cone_jitter_deg, self.cone_jitter_voxels
        return {"cone_projection_l1": losses.cone_projection_l1(prediction, batch.volume, *jitter)}

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms, each times its weight."""
        weights = {
            "voxel_mse": self.mse_weight,
            "voxel_l1": self.l1_weight,
            "ssim_loss": self.ssim_weight,
            "projection_l1": self.projection_weight,
            "cone_projection_l1": self.cone_projection_weight,
            "lung_mse": self.lung_weight,
            "adversarial": self.adversarial_weight,
            "auxiliary": self.deep_supervision_weight,
        }
        if not terms:
            raise ConfigError("all weights of system.loss are 0: give one term a weight")
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def lungs(batch: Batch) -> Bool[Tensor, "n 1 d h w"]:
    """The mask of the lungs from the labels, vessels included.

    Raises:
        ConfigError: the batch has no labels.
    """
    if batch.labels is None:
        raise ConfigError(
            "system.loss.lung_weight needs lung masks, and the batch has no labels: read the archive with labels, "
            "or set system.loss.lung_weight to 0"
        )
    return (batch.labels == Label.LUNG) | (batch.labels == Label.VESSEL)


class GeneratorLossModule(LossModule):
    """The loss of the generator: reconstruction terms and, with a discriminator, the adversarial term.

    Outside the field of view of CT that were ingested with a mask, every term has the ground truth as prediction.
    """

    def __init__(self, network: VolumeNetwork, discriminator: nn.Module | None, weights: ReconstructionLoss) -> None:
        super().__init__(network)
        self.weights = weights
        self._others = (discriminator,)

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:  # noqa: ARG002
        """The loss; the discriminator gets the volume too, so that the generator runs once for each batch."""
        assert isinstance(self.network, VolumeNetwork)
        volume, *auxiliaries = (batch.fill_outside(each) for each in self.network.volumes(batch.radiographs))
        terms = {**self.weights.reconstruction_terms(volume, batch), **self.weights.cone_terms(volume, batch)}
        (discriminator,) = self._others
        if discriminator is not None:
            terms["adversarial"] = least_squares(discriminator(volume, batch.radiographs), real=True)
        if auxiliaries:
            supervised = [self.weights.reconstruction_terms(auxiliary, batch) for auxiliary in auxiliaries]
            terms["auxiliary"] = torch.stack([self.weights.weighted(each) for each in supervised]).mean()
        logs = {name: value.detach() for name, value in terms.items()}
        return self.weights.weighted(terms), logs, {"reconstruction": volume.detach()}


class DiscriminatorLossModule(LossModule):
    """The loss of the discriminator: the CT is real, the reconstruction is fake."""

    def __init__(self, network: nn.Module, weights: ReconstructionLoss) -> None:
        super().__init__(network)
        self.weights = weights

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:
        """The sum of both LSGAN losses, times the adversarial weight, as published."""
        real = least_squares(self.network(batch.volume, batch.radiographs), real=True)
        fake = least_squares(self.network(earlier["reconstruction"], batch.radiographs), real=False)
        loss = self.weights.adversarial_weight * (real + fake)
        return loss, {"real": real.detach(), "fake": fake.detach()}, {}


def reconstruction_objective(
    generator: VolumeNetwork, discriminator: nn.Module | None, weights: ReconstructionLoss
) -> Objective:
    """Generator, then discriminator, on the same batch; without an adversarial weight the generator alone."""
    if weights.adversarial_weight == 0 or discriminator is None:
        return Objective({"generator": GeneratorLossModule(generator, None, weights)}, masks_field_of_view=True)
    return Objective(
        {
            "generator": GeneratorLossModule(generator, discriminator, weights),
            "discriminator": DiscriminatorLossModule(discriminator, weights),
        },
        masks_field_of_view=True,
    )
