"""Training objectives: one loss module for each trained network, each with an optimizer step on each batch.

A regression has one loss module, a GAN has two, for the generator and the discriminator. A loss module owns one
network, and its `forward` returns that network's whole loss on a batch (TorchRL's losses have the same form). A step is
therefore one forward and one backward pass of one engine, on any ZeRO stage. A loss module may use the networks of
others, frozen and outside their engines; it holds them in a tuple, which keeps them out of its own parameters.
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
"""The loss, detached values to log, and detached tensors for the loss modules after it on the same batch."""


class LossModule(nn.Module):
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
        """The network's loss on a batch, given the outputs of the `earlier` loss modules on it."""


@dataclass(frozen=True)
class Objective:
    """Loss modules by name, in the order of their steps; the network of the first one is the reconstruction network."""

    loss_modules: dict[str, LossModule]
    notes: tuple[str, ...] = ()
    """Remarks for the log of a run."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average (EMA) of the first network's weights, which is validated and exported; 0
    for none."""

    masks_field_of_view: bool = False
    """Whether no loss depends on a prediction outside the field of view of CT that were ingested with a mask."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"system.ema_decay is {self.ema_decay}: give a decay in [0, 1)")

    @property
    def reconstruction_network(self) -> nn.Module:
        """The network from radiographs (n, views, rows, columns) to volumes (n, 1, d, h, w)."""
        return next(iter(self.loss_modules.values())).network

    def networks(self) -> dict[str, nn.Module]:
        """Every network by its name."""
        return {name: loss_module.network for name, loss_module in self.loss_modules.items()}


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
