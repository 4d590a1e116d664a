"""Training objectives: a system is trained by players, each of which makes an optimizer step on each batch.

As in a two-player game, a GAN has two players, the generator and the discriminator; a regression network is a single
player. A player owns one network and is a module whose `forward` computes that network's whole loss for a batch. Its
step is therefore one forward and one backward pass of one engine, on any ZeRO stage. A player may use the networks of
other players, frozen and outside their engines; it holds them in a tuple, which keeps them out of its own parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError

Logs = dict[str, Tensor]
Outputs = dict[str, Tensor]
StepOutput = tuple[Tensor, Logs, Outputs]
"""The loss, detached values to log, and detached tensors that later players may use on the same batch."""


class Player(nn.Module):
    """One network and its loss.

    Attributes:
        every: the interval of its optimizer steps, in training steps.
    """

    every: int = 1

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, batch: Batch, earlier: Outputs) -> StepOutput:
        """The player's loss on a batch, given the outputs of the `earlier` players on it."""


@dataclass(frozen=True)
class Objective:
    """The players of a system by name, in the order of their steps; the first one's network is the reconstructor."""

    players: dict[str, Player]
    notes: tuple[str, ...] = ()
    """Remarks for the log of a run."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average (EMA) of the first player's weights, which is validated and exported; 0
    for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"system.ema_decay is {self.ema_decay}: give a decay in [0, 1)")

    @property
    def reconstructor(self) -> nn.Module:
        """The network from radiographs (n, views, rows, columns) to volumes (n, 1, d, h, w)."""
        return next(iter(self.players.values())).network

    def networks(self) -> dict[str, nn.Module]:
        """Every player's network by the player's name."""
        return {name: player.network for name, player in self.players.items()}


@contextmanager
def frozen(networks: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which the networks' parameters require no gradient."""
    parameters = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
