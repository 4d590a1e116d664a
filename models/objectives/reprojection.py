"""Training from radiographs alone: the reprojections of a volume must agree with them, and be
classified as real.

Reprojections are digitally reconstructed radiographs (DRRs) of the reconstructed volume. `Batch.ground_truth` and
`Batch.labels` are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.models.drr import Reprojection
from raylift.models.losses import cross_entropy, total_variation
from raylift.models.objectives.objective import LossModule, Objective, Outputs, StepOutput
from raylift.models.parts.discriminators import ViewDiscriminator
from raylift.models.volume_network import VolumeNetwork


@dataclass(frozen=True)
class ReprojectionLoss:
    """Weights of the terms; 0 leaves a term out. The defaults are u-X2CTGAN's."""

    reprojection_weight: float = 1.0
    """Mean squared error between normalized reprojections and radiographs, averaged over the views."""
    thickness_weight: float = 1.0
    """Weight of the squared error of the reprojections' range, relative to the expected range; part of the projection
    term. Normalized radiographs have neither scale nor offset: without this term the volume's scale is undetermined,
    and total variation shrinks it to zero."""
    min_thickness_mm: tuple[float, ...] = (30.0, 0.0)
    max_thickness_mm: tuple[float, ...] = (270.0, 345.0)
    """The expected range of each view: millimeters of water at the percentiles of normalization. Radiographs do not
    contain it; these are rounded means of adults in a cube of 320 mm (48 to 272 and 0 to 347 over 38 phantoms, 14 to
    271 and 0 to 342 over six CT scans)."""
    total_variation_weight: float = 0.1
    """Weight of the volume's total variation."""
    adversarial_weight: float = 1.0
    """Cross-entropy of the discriminator's scores of reprojections."""
    rotation_std_deg: float = 0.0
    """Above 0, reprojections from views rotated about the patient's long axis by N(0, this) are further inputs of the
    discriminator: a volume must be plausible from other directions too. For an unconditional discriminator only."""
    balanced: bool = True
    """Whether the weights above are divided by the detached value of their term and normalized to a sum of one at every
    step. The total loss is then nearly constant: monitor the terms."""

    def __post_init__(self) -> None:
        weights = (
            "reprojection_weight",
            "thickness_weight",
            "total_variation_weight",
            "adversarial_weight",
            "rotation_std_deg",
        )
        negative = [name for name in weights if getattr(self, name) < 0]
        if negative:
            raise ConfigError(f"below 0: {', '.join(f'system.loss.{name}' for name in negative)}")
        pairs = zip(self.min_thickness_mm, self.max_thickness_mm, strict=False)
        if len(self.min_thickness_mm) != len(self.max_thickness_mm) or any(not 0 <= low < high for low, high in pairs):
            raise ConfigError(
                f"system.loss.min_thickness_mm {self.min_thickness_mm} and max_thickness_mm {self.max_thickness_mm}: "
                "give as many of each, "
                "from 0 up, the second larger"
            )
        if not self.reprojection_weight:
            raise ConfigError(
                "system.loss.reprojection_weight is 0, and no other term uses the radiographs: give it a weight"
            )

    def thickness_error(self, range_mm: Float[Tensor, "n views 2"]) -> Float[Tensor, ""]:
        """Mean squared error of ranges, relative to the width of the expected range."""
        expected = torch.stack(
            [range_mm.new_tensor(self.min_thickness_mm), range_mm.new_tensor(self.max_thickness_mm)], dim=-1
        )
        return ((range_mm - expected) / expected.diff(dim=-1)).square().mean()

    def weighted(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the terms, each times its weight."""
        shares = {
            "projection": self.reprojection_weight,
            "total_variation": self.total_variation_weight,
            "adversarial": self.adversarial_weight,
        }
        weights = torch.stack([value.new_tensor(shares[name]) for name, value in terms.items()])
        values = torch.stack(list(terms.values()))
        if self.balanced:
            weights = weights / (values.detach() + 1e-8)
            weights = weights / weights.sum()
        return (weights * values).sum()


class ReprojectionLossModule(LossModule):
    """The loss of the generator: agreement of reprojections with the radiographs, smoothness, adversarial term."""

    def __init__(
        self,
        network: VolumeNetwork,
        discriminator: ViewDiscriminator | None,
        reprojection: Reprojection,
        weights: ReprojectionLoss,
    ) -> None:
        super().__init__(network)
        self.weights, self.reprojection = weights, reprojection
        self._others = (discriminator,)

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:  # noqa: ARG002
        """The loss; the discriminator gets the reprojections too, so that the generator runs once for each batch."""
        volume: Tensor = self.network(batch.radiographs)
        reprojected = self.reprojection(volume)
        agreement = F.mse_loss(reprojected.images, batch.radiographs)
        thickness = self.weights.thickness_error(reprojected.range_mm)
        terms = {"projection": agreement + self.weights.thickness_weight * thickness}
        if self.weights.total_variation_weight:
            terms["total_variation"] = total_variation(volume)
        fake = reprojected.images
        (discriminator,) = self._others
        if discriminator is not None:
            if self.weights.rotation_std_deg:
                fake = torch.cat([fake, self.reprojection.rotated(volume, self.weights.rotation_std_deg).images], dim=1)
            terms["adversarial"] = cross_entropy(discriminator(batch.radiographs, fake), real=True)
        logs = {name: value.detach() for name, value in terms.items()}
        logs |= {"agreement": agreement.detach(), "thickness": thickness.detach()}
        return self.weights.weighted(terms), logs, {"reprojections": fake.detach()}


class ViewDiscriminatorLossModule(LossModule):
    """The loss of the discriminator: given radiographs are real, the generator's reprojections are fake."""

    def __init__(self, network: ViewDiscriminator, smoothing: float = 0.0, every: int = 1) -> None:
        super().__init__(network)
        self.smoothing, self.every = smoothing, every

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:
        """The mean of both cross-entropies; the target of real ones is 1 - smoothing."""
        real = cross_entropy(self.network(batch.radiographs), real=True, smoothing=self.smoothing)
        fake = cross_entropy(self.network(batch.radiographs, earlier["reprojections"]), real=False)
        return (real + fake) / 2, {"real": real.detach(), "fake": fake.detach()}, {}


def reprojection_objective(
    generator: VolumeNetwork,
    discriminator: ViewDiscriminator | None,
    reprojection: Reprojection,
    weights: ReprojectionLoss,
) -> Objective:
    """Generator, then discriminator, on the same batch; without a discriminator the generator alone."""
    loss_modules: dict[str, LossModule] = {
        "generator": ReprojectionLossModule(generator, discriminator, reprojection, weights),
    }
    if discriminator is not None:
        loss_modules["discriminator"] = ViewDiscriminatorLossModule(discriminator)
    return Objective(loss_modules)
