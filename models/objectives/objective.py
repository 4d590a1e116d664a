"""How a batch becomes losses: an objective is the players of a system in the order of their turns.

A player owns one network and is a module whose `forward` takes a batch and gives that network's whole loss, so a turn
is one engine forward and one backward on any ZeRO stage. Networks of other players are used raw and frozen; a player
holds them in a tuple, which keeps them out of its own parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from raylift.datasets.batch import Batch

Logs = dict[str, Tensor]
Carried = dict[str, Tensor]
Turn = tuple[Tensor, Logs, Carried]
"""The loss, detached values to log, and detached tensors that later turns on the same batch may use."""


class VolumeNetwork(nn.Module):
    """A network that takes radiographs and gives volumes."""

    @abstractmethod
    def volumes(self, radiographs: Float[Tensor, "n views rows columns"]) -> list[Float[Tensor, "n 1 d h w"]]:
        """The reconstruction, then auxiliary volumes that only deep supervision looks at."""

    def forward(self, radiographs: Float[Tensor, "n views rows columns"]) -> Float[Tensor, "n 1 d h w"]:
        """Volumes in the window's [0, 1]; values outside can occur and are clipped by whoever needs HU."""
        return self.volumes(radiographs)[0]


class Player(nn.Module):
    """One network and its loss.

    Attributes:
        every: it takes a turn in every so many-th step.
    """

    every: int = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, batch: Batch, carried: Carried) -> Turn:
        """The player's loss on a batch, given what earlier turns carried over."""


@dataclass(frozen=True)
class Objective:
    """The players of a system by name, in the order of their turns; the first one's network makes volumes."""

    players: dict[str, Player]
    notes: tuple[str, ...] = ()
    """What a reader of the log has to know."""
    ema_decay: float = 0.0
    """Of the moving average of the first player's weights, which is what is validated and exported; 0 for none."""

    @property
    def reconstructor(self) -> nn.Module:
        """The network that takes radiographs (n, views, rows, columns) and gives volumes (n, 1, d, h, w)."""
        return next(iter(self.players.values())).network

    def networks(self) -> dict[str, nn.Module]:
        """Every player's network by the player's name."""
        return {name: player.network for name, player in self.players.items()}


@contextmanager
def frozen(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the networks' parameters ask for no gradient."""
    parameters = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
