"""Estimate of a run's memory, computed on fake tensors, which have shapes and no storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid, View, chest
from raylift.models.objectives.objective import frozen
from raylift.models.parts import blocks
from raylift.models.zoo import parameters
from raylift.platform.config import RunConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a worker: exact for parameters, gradients and Adam; activations are the tensors that autograd saves."""

    parameters: dict[str, int]
    """Trainable parameters by network."""
    weights: int
    gradients: int
    adam: int
    ema: int
    """The exponential moving average (EMA) of the first network's weights."""
    activations: int

    @property
    def total(self) -> int:
        """The sum, without workspaces of the allocator and of convolutions."""
        return self.weights + self.gradients + self.adam + self.ema + self.activations

    def lines(self) -> list[str]:
        """One line for each part."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "Adam": self.adam,
            "EMA": self.ema,
            "activations": self.activations,
            "total per worker": self.total,
        }
        counted = [f"{name}: {count:,} parameters" for name, count in self.parameters.items()]
        return [*counted, *(f"{name}: {size / GIB:.2f} GiB" for name, size in parts.items())]


def estimate(run: RunConfig, geometry: Geometry | None = None) -> MemoryEstimate:
    """Memory of one worker, of which the ZeRO stage divides some parts by the number of workers.

    Args:
        run: the configuration of the run.
        geometry: has the run's views; without it the view `lateral` is the lateral and every other the frontal.
    """
    # Spacing and distances change no tensor's size.
    grid = Grid(run.data.size)
    poses = (
        tuple(geometry.view(name) for name in run.system.views)
        if geometry
        else tuple(View(name, 90.0 * (name == "lateral")) for name in run.system.views)
    )
    geometry = replace(chest(grid), views=poses)
    # The projector's constants are real tensors.
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = run.system.objective(grid, geometry)
        counts = {name: parameters(loss_module.network) for name, loss_module in objective.loss_modules.items()}
        held = sum(
            p.numel() for loss_module in objective.loss_modules.values() for p in loss_module.network.parameters()
        )
        micro = run.train.batch_size // (run.cluster.workers * run.engine.gradient_accumulation_steps)
        size = run.data.size
        labels = torch.zeros(micro, 1, size, size, size, dtype=torch.uint8) if run.system.needs_labels else None
        views = torch.rand(micro, len(run.system.views), size, size)
        volume = torch.rand(micro, 1, size, size, size)
        # Systems supervised by radiographs may use an unpaired volume, from an archive or a prior.
        ground_truth, unpaired = (volume, None) if run.system.supervision == "volumes" else (None, volume)
        batch = Batch(ground_truth, views, labels=labels, unpaired=unpaired)
        precision = torch.autocast("cpu", torch.bfloat16) if run.engine.precision == "bf16" else nullcontext()
        earlier: dict[str, Tensor] = {}
        activations = 0
        for name, loss_module in objective.loss_modules.items():
            others = [network for other, network in objective.networks().items() if other != name]
            with frozen(others), _saved([*loss_module.network.parameters()]) as saved, precision:
                _, _, outputs = loss_module(batch, earlier)
            earlier |= outputs
            activations = max(activations, saved())
        ema = next(iter(counts.values())) if objective.ema_decay else 0
    count, stage, workers = sum(counts.values()), run.engine.zero_stage, run.cluster.workers
    return MemoryEstimate(
        parameters=counts,
        weights=4 * held // (workers if stage >= 3 else 1),
        gradients=4 * count // (workers if stage >= 2 else 1),
        adam=8 * count // (workers if stage >= 1 else 1),
        ema=4 * ema // (workers if stage >= 3 else 1),
        activations=activations,
    )


class _Tally:
    """Bytes by storage of the tensors that autograd saves, without parameters."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._bytes: dict[int, int] = {}
        # References prevent that an address is reused and counted for two tensors.
        self._references: list[Tensor] = []

    @property
    def total(self) -> int:
        """Bytes of all counted tensors."""
        return sum(self._bytes.values())

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._bytes[storage._cdata] = storage.nbytes()
            self._references.append(tensor)
        return tensor


@contextmanager
def _saved(parameters: list[torch.nn.Parameter]) -> Iterator[Callable[[], int]]:
    """Bytes that autograd saves within the context.

    With activation checkpointing these are the inputs of a checkpointed part; the bytes that the largest such part
    saves when it is recomputed are added.
    """
    outer, parts = _Tally(parameters), [0]

    def measured(module: Callable[..., Any], *inputs: Tensor) -> Any:
        inner = _Tally(parameters)
        for tensor in inputs:
            outer.pack(tensor)
        with torch.autograd.graph.saved_tensors_hooks(inner.pack, lambda tensor: tensor):
            output = module(*inputs)
        parts.append(inner.total)
        return output

    checkpointed, blocks.checkpointed = blocks.checkpointed, measured
    try:
        with torch.autograd.graph.saved_tensors_hooks(outer.pack, lambda tensor: tensor):
            yield lambda: outer.total + max(parts)
    finally:
        blocks.checkpointed = checkpointed
