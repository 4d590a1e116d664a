"""CycleGAN between radiographs and volumes: there and back must lead home, and what is made must pass for real.

```
radiographs -> volume -> radiographs      volume of someone else -> radiographs -> volume
        generator   projection                          projection    generator
```

Volumes of someone else are `Batch.unpaired`, or a stated prior; `Batch.volume` and `Batch.labels` are never read.
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
from raylift.models.objectives.objective import Carried, Objective, Player, Turn, VolumeNetwork
from raylift.models.objectives.reprojection import ViewDiscriminatorPlayer
from raylift.models.parts.discriminators import Discriminator, ViewDiscriminator
from raylift.models.unpaired_prior import DrawnPeople


@dataclass(frozen=True)
class CycleLoss:
    """Weights of the terms. The defaults are those of CycleGAN-B."""

    cycle: float = 15.0
    """Mean absolute error after there and back, of radiographs and of volumes alike."""
    adversarial: float = 1.0
    """Cross-entropy of the discriminators' scores."""
    smoothing: float = 0.1
    """What the discriminators' target for real ones lacks to 1; the generators are asked for 1."""
    discriminators_every: int = 2
    """The discriminators take a turn in each step (1), in every second one (2), and so on."""

    def __post_init__(self) -> None:
        if self.cycle <= 0 or self.adversarial < 0 or not 0 <= self.smoothing < 1 or self.discriminators_every < 1:
            raise ConfigError(
                f"{self}: the cycle's weight must be positive, the adversarial one not below 0, the smoothing in "
                "[0, 1), and discriminators_every 1 or more"
            )


@dataclass(frozen=True)
class CycleNetworks:
    """All that takes part."""

    generator: VolumeNetwork
    """Radiographs to a volume."""
    projection: nn.Module | None
    """A volume to radiographs; without it the projector itself."""
    reprojection: Reprojection
    volume_discriminator: Discriminator
    view_discriminator: ViewDiscriminator | None
    """Of radiographs that the projection makes; the projector itself has nothing to learn from one."""
    prior: DrawnPeople

    def radiographs(self, volume: Float[Tensor, "n 1 d h w"]) -> Float[Tensor, "n views rows columns"]:
        """A volume seen in the views, standardized."""
        if self.projection is None:
            return self.reprojection(volume).images
        seen: Tensor = self.projection(volume)
        return seen

    def unpaired_volumes(self, batch: Batch) -> tuple[Float[Tensor, "n 1 d h w"], bool]:
        """Volumes of people whose radiographs are not in the batch, and whether they are CT."""
        if batch.unpaired is not None:
            return batch.unpaired, True
        return self.prior.volumes(batch.views), False


class VolumePlayer(Player):
    """The turn of the generator of volumes."""

    def __init__(self, networks: CycleNetworks, weights: CycleLoss) -> None:
        super().__init__(networks.generator)
        self.weights = weights
        self._others = (networks,)

    def forward(self, batch: Batch, carried: Carried) -> Turn:  # noqa: ARG002
        """Carries the volumes made and those of others, so that all later turns see the same."""
        (networks,) = self._others
        real, are_ct = networks.unpaired_volumes(batch)
        volume: Tensor = self.network(batch.views)
        with torch.no_grad():
            shown = networks.radiographs(real)
        terms = {
            "cycle_radiographs": F.l1_loss(networks.radiographs(volume), batch.views),
            "cycle_volumes": F.l1_loss(self.network(shown), real),
        }
        if self.weights.adversarial:
            terms["adversarial"] = cross_entropy(networks.volume_discriminator(volume, batch.views), real=True)
        logs = {name: value.detach() for name, value in terms.items()}
        logs["unpaired_is_ct"] = real.new_tensor(float(are_ct))
        return _weighted(terms, self.weights), logs, {"reconstruction": volume.detach(), "unpaired": real}


class ProjectionPlayer(Player):
    """The turn of the generator of radiographs."""

    def __init__(self, projection: nn.Module, networks: CycleNetworks, weights: CycleLoss) -> None:
        super().__init__(projection)
        self.weights = weights
        self._others = (networks,)

    def forward(self, batch: Batch, carried: Carried) -> Turn:
        """Carries the radiographs of others over to their discriminator."""
        (networks,) = self._others
        assert networks.view_discriminator is not None
        shown: Tensor = self.network(carried["unpaired"])
        terms = {
            "cycle_radiographs": F.l1_loss(self.network(carried["reconstruction"]), batch.views),
            "cycle_volumes": F.l1_loss(networks.generator(shown), carried["unpaired"]),
        }
        if self.weights.adversarial:
            terms["adversarial"] = cross_entropy(networks.view_discriminator(batch.views, shown), real=True)
        logs = {name: value.detach() for name, value in terms.items()}
        return _weighted(terms, self.weights), logs, {"reprojections": shown.detach()}


class VolumeDiscriminatorPlayer(Player):
    """The turn of the discriminator of volumes: those of others are real, the reconstruction is made."""

    def __init__(self, network: Discriminator, weights: CycleLoss) -> None:
        super().__init__(network)
        self.smoothing, self.every = weights.smoothing, weights.discriminators_every

    def forward(self, batch: Batch, carried: Carried) -> Turn:
        """The mean of both cross-entropies."""
        real = cross_entropy(self.network(carried["unpaired"], batch.views), real=True, smoothing=self.smoothing)
        made = cross_entropy(self.network(carried["reconstruction"], batch.views), real=False)
        return (real + made) / 2, {"real": real.detach(), "fake": made.detach()}, {}


def cycle_objective(networks: CycleNetworks, weights: CycleLoss) -> Objective:
    """Both generators, then both discriminators; with the projector itself one of each."""
    players: dict[str, Player] = {"generator": VolumePlayer(networks, weights)}
    if networks.projection is not None:
        players["projection"] = ProjectionPlayer(networks.projection, networks, weights)
    if weights.adversarial:
        players["volume_discriminator"] = VolumeDiscriminatorPlayer(networks.volume_discriminator, weights)
        if networks.view_discriminator is not None:
            players["view_discriminator"] = ViewDiscriminatorPlayer(
                networks.view_discriminator, weights.smoothing, weights.discriminators_every
            )
    note = (
        "the volume discriminator sees CT of other people where batches bring any, and otherwise "
        f"{networks.prior.count} procedural thoraces drawn from seeds of their own"
    )
    return Objective(players, notes=(note,))


def _weighted(terms: dict[str, Tensor], weights: CycleLoss) -> Tensor:
    weighted = [(weights.adversarial if name == "adversarial" else weights.cycle) * terms[name] for name in terms]
    return torch.stack(weighted).sum()
