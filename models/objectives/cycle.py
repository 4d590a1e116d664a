"""CycleGAN between radiographs and volumes: cycle consistency in both domains, and adversarial terms.

```
radiographs -> volume -> radiographs      unpaired volume -> radiographs -> volume
        generator   projection                      projection    generator
```

Unpaired volumes are `Batch.unpaired`, or a documented prior; `Batch.ground_truth` and `Batch.labels` are not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.models.drr import Reprojection
from raylift.models.losses import cross_entropy
from raylift.models.objectives.objective import LossModule, Objective, Outputs, StepOutput
from raylift.models.objectives.reprojection import ViewDiscriminatorLossModule
from raylift.models.parts.discriminators import ViewDiscriminator
from raylift.models.unpaired_prior import PhantomPrior
from raylift.models.volume_network import VolumeNetwork


@dataclass(frozen=True)
class CycleLoss:
    """Weights of the terms. The defaults are those of CycleGAN-B."""

    cycle_weight: float = 15.0
    """Mean absolute error of the cycle, of radiographs and of volumes alike."""
    adversarial_weight: float = 1.0
    """Cross-entropy of the discriminators' scores."""
    smoothing: float = 0.1
    """One-sided label smoothing: the discriminators' target of real ones is 1 - smoothing; the generators' is 1."""
    discriminators_every: int = 2
    """Interval of the discriminators' optimizer steps, in training steps."""

    def __post_init__(self) -> None:
        if (
            self.cycle_weight <= 0
            or self.adversarial_weight < 0
            or not 0 <= self.smoothing < 1
            or self.discriminators_every < 1
        ):
            raise ConfigError(
                f"{self}: the cycle's weight must be positive, the adversarial one not below 0, the smoothing in "
                "[0, 1), and discriminators_every 1 or more"
            )


@dataclass(frozen=True)
class CycleNetworks:
    """The networks of both cycles."""

    generator: VolumeNetwork
    """Radiographs to a volume."""
    projection: nn.Module | None
    """A volume to radiographs; None for the projector."""
    reprojection: Reprojection
    volume_discriminator: nn.Module
    view_discriminator: ViewDiscriminator | None
    """Discriminator of a projection network's radiographs; None for the projector, which has no parameters."""
    prior: PhantomPrior

    def radiographs(self, volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, "n views rows columns"]:
        """Normalized digitally reconstructed radiographs (DRRs) of a volume in the views."""
        if self.projection is None:
            return self.reprojection(volume).images
        drrs: Tensor = self.projection(volume)
        return drrs

    def unpaired_volumes(self, batch: Batch) -> tuple[Float[Tensor, "n 1 d h w"], bool]:
        """Volumes of patients whose radiographs are not in the batch, and whether they are CT instead of the prior."""
        if batch.unpaired is not None:
            return batch.unpaired, True
        return self.prior.volumes(batch.radiographs), False


class VolumeLossModule(LossModule):
    """The loss of the volume generator."""

    def __init__(self, networks: CycleNetworks, weights: CycleLoss) -> None:
        super().__init__(networks.generator)
        self.weights = weights
        self._others = (networks,)

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:  # noqa: ARG002
        """The loss; its outputs are the reconstructions and the unpaired volumes, which later losses use."""
        (networks,) = self._others
        real, are_ct = networks.unpaired_volumes(batch)
        volume: Tensor = self.network(batch.radiographs)
        with torch.no_grad():
            drrs = networks.radiographs(real)
        terms = {
            "cycle_radiographs": F.l1_loss(networks.radiographs(volume), batch.radiographs),
            "cycle_volumes": F.l1_loss(self.network(drrs), real),
        }
        if self.weights.adversarial_weight:
            terms["adversarial"] = cross_entropy(networks.volume_discriminator(volume, batch.radiographs), real=True)
        logs = {name: value.detach() for name, value in terms.items()}
        logs["unpaired_is_ct"] = real.new_tensor(float(are_ct))
        return _weighted(terms, self.weights), logs, {"reconstruction": volume.detach(), "unpaired": real}


class ProjectionLossModule(LossModule):
    """The loss of the projection network."""

    def __init__(self, projection: nn.Module, networks: CycleNetworks, weights: CycleLoss) -> None:
        super().__init__(projection)
        self.weights = weights
        self._others = (networks,)

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:
        """The loss; its radiographs are an output for their discriminator."""
        (networks,) = self._others
        assert networks.view_discriminator is not None
        fake: Tensor = self.network(earlier["unpaired"])
        terms = {
            "cycle_radiographs": F.l1_loss(self.network(earlier["reconstruction"]), batch.radiographs),
            "cycle_volumes": F.l1_loss(networks.generator(fake), earlier["unpaired"]),
        }
        if self.weights.adversarial_weight:
            terms["adversarial"] = cross_entropy(networks.view_discriminator(batch.radiographs, fake), real=True)
        logs = {name: value.detach() for name, value in terms.items()}
        return _weighted(terms, self.weights), logs, {"reprojections": fake.detach()}


class VolumeDiscriminatorLossModule(LossModule):
    """The loss of the volume discriminator: unpaired volumes are real, the reconstruction is fake."""

    def __init__(self, network: nn.Module, weights: CycleLoss) -> None:
        super().__init__(network)
        self.smoothing, self.every = weights.smoothing, weights.discriminators_every

    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:
        """The mean of both cross-entropies."""
        real = cross_entropy(self.network(earlier["unpaired"], batch.radiographs), real=True, smoothing=self.smoothing)
        fake = cross_entropy(self.network(earlier["reconstruction"], batch.radiographs), real=False)
        return (real + fake) / 2, {"real": real.detach(), "fake": fake.detach()}, {}


def cycle_objective(networks: CycleNetworks, weights: CycleLoss) -> Objective:
    """Both generators, then both discriminators; with the projector one of each."""
    loss_modules: dict[str, LossModule] = {"generator": VolumeLossModule(networks, weights)}
    if networks.projection is not None:
        loss_modules["projection"] = ProjectionLossModule(networks.projection, networks, weights)
    if weights.adversarial_weight:
        loss_modules["volume_discriminator"] = VolumeDiscriminatorLossModule(networks.volume_discriminator, weights)
        if networks.view_discriminator is not None:
            loss_modules["view_discriminator"] = ViewDiscriminatorLossModule(
                networks.view_discriminator, weights.smoothing, weights.discriminators_every
            )
    note = (
        "real samples of the volume discriminator are unpaired CT where batches have any, otherwise "
        f"{networks.prior.count} procedural phantoms of seeds that no archive uses"
    )
    return Objective(loss_modules, notes=(note,))


def _weighted(terms: dict[str, Tensor], weights: CycleLoss) -> Tensor:
    weighted = [
        (weights.adversarial_weight if name == "adversarial" else weights.cycle_weight) * terms[name] for name in terms
    ]
    return torch.stack(weighted).sum()
