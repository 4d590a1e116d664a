"""All networks' optimizer steps on a batch in plain torch, in the precisions and layouts that benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from raylift.datasets.batch import Batch
from raylift.models.objectives.objective import Objective, frozen
from raylift.models.system_config import SystemConfig


def random_batch(system: SystemConfig, size: int, batch: int, device: torch.device) -> Batch:
    """A batch of random numbers with every input of a system: volume, radiographs, labels and unpaired CT."""
    volume = torch.rand(batch, 1, size, size, size, device=device)
    views = torch.rand(batch, len(system.views), size, size, device=device)
    return Batch(volume, views, labels=(4 * volume).byte(), unpaired=volume)


def stepper(objective: Objective, device: torch.device, kind: str) -> Callable[[Batch], dict[str, float]]:
    """A function that takes one step on a batch and returns each network's loss.

    Args:
        objective: the objective, whose networks move to the device.
        device: the device of the step.
        kind: "fp32" or "bf16" (autocast), and any of "channels-last" and "compiled" after it.
    """
    options = kind.split()
    loss_modules = {name: loss_module.to(device) for name, loss_module in objective.loss_modules.items()}
    for loss_module in loss_modules.values():
        if "channels-last" in options:
            channels_last(loss_module.network)
        if "compiled" in options:
            loss_module.network.compile()
    optimizers = {
        name: torch.optim.Adam(loss_module.parameters(), lr=2e-4, betas=(0.5, 0.99))
        for name, loss_module in loss_modules.items()
    }

    def step(batch: Batch) -> dict[str, float]:
        earlier: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        for name, loss_module in loss_modules.items():
            others = [network for other, network in objective.networks().items() if other != name]
            optimizers[name].zero_grad()
            with frozen(others):
                with torch.autocast(device.type, torch.bfloat16) if "bf16" in options else nullcontext():
                    losses[name], _, outputs = loss_module(batch, earlier)
                losses[name].backward()
            optimizers[name].step()
            earlier |= outputs
        # Reading the losses waits for the device.
        return {name: loss.item() for name, loss in losses.items()}

    return step


def channels_last(network: nn.Module) -> None:
    """Convert the weights of all convolutions to channels-last, and with them the outputs."""
    formats: dict[int, Any] = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in network.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.to(memory_format=formats[parameter.dim()])
