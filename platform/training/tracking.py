"""Logs of a run: running means, TensorBoard events, and lines for the terminal and Ray Tune."""

from __future__ import annotations

import resource
from collections import defaultdict
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
import torch.distributed as dist
from jaxtyping import Float
from ray.train.v2._internal.execution.context import get_train_context
from tensorboardX import SummaryWriter
from torch import Tensor

from raylift.datasets import process_folder
from raylift.datasets.archive.store import Folder, is_local, join
from raylift.platform.monitor import format_metrics


class RunningMeans:
    """Means of named values since the last reduction, over all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: float | Tensor) -> None:
        """Add a value; tensors stay on their device until the reduction."""
        self._sums[name] = self._sums[name] + value
        self._counts[name] += 1

    def reduce(self) -> dict[str, float]:
        """Return the means over all ranks and reset. Every rank must call it with the same names."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        if dist.is_initialized():
            packed = torch.tensor(list(means.values()), dtype=torch.float64)
            if dist.get_backend() == "nccl":
                packed = packed.cuda()
            dist.all_reduce(packed)
            means = dict(zip(means, (packed / dist.get_world_size()).tolist(), strict=True))
        self._sums.clear()
        self._counts.clear()
        return means


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory of this process until now, on a GPU or else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TensorBoard:
    """Event files in `<run>/tensorboard`; on an object store they are copied there at each validation.

    The folder is created with the first entry: a run that failed before its first step has none.
    """

    def __init__(self, run_url: str, history: list[dict[str, float]]) -> None:
        self._remote = None if is_local(run_url) else Folder(join(run_url, "tensorboard"))
        self._resources = ExitStack()
        local = self._resources.enter_context(process_folder.make("event-files")) if self._remote else None
        self._folder = local or Path(join(run_url, "tensorboard"))
        self._last_step = int(history[-1]["step"]) if history else 0

    @cached_property
    def _writer(self) -> SummaryWriter:
        # Events after the step that a run resumes from belong to the interrupted attempt.
        return SummaryWriter(str(self._folder), purge_step=self._last_step + 1 if self._last_step else None)

    def scalars(self, entry: dict[str, float]) -> None:
        """Write every value of a log entry at its step."""
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(entry["step"]))

    def validation(self, step: int, metrics: dict[str, float], slices: Float[np.ndarray, "h w"] | None) -> None:
        """Write metrics and a slice: ground truth left, reconstruction right."""
        self.scalars({"step": float(step), **metrics})
        if slices is not None:
            self._writer.add_image("coronal ground truth and reconstruction", slices[None].clip(0.0, 1.0), step)
        self._writer.flush()
        if self._remote:
            for path in self._folder.iterdir():
                self._remote.put(path, path.name)

    def close(self) -> None:
        """Flush and close; the local copy of remote files is removed."""
        if "_writer" in vars(self):
            self._writer.close()
        self._resources.close()


class Reporter:
    """Rank 0's lines to the driver, and validations to Ray Tune in a trial."""

    def __init__(self, messages: Any, steps: int, to_tune: bool = False) -> None:
        self._messages, self._steps, self._to_tune = messages, steps, to_tune
        self._pending: Any = None

    def log(self, step: int, entry: dict[str, float]) -> None:
        """Send a log entry: epoch, losses, throughput, share of the time in which a step waits for data, time left."""
        losses = "  ".join(f"{name} {value:.4g}" for name, value in entry.items() if name.endswith("/loss"))
        waiting = entry["data_time_s"] / entry["step_time_s"]
        left = timedelta(seconds=round((self._steps - step) * entry["step_time_s"]))
        speed = f"{entry['samples_per_s']:.3g} samples/s, {waiting:.0%} waiting for data"
        self._send(step, f"epoch {entry['epoch']:.1f}  {losses}  {speed}, {left} left")

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """Send a validation. Every rank must call it, because a report is a barrier in Ray."""
        self._send(step, f"validation: {format_metrics(metrics)}")
        self.report_to_tune(step, metrics)

    def report_to_tune(self, step: int, metrics: dict[str, float]) -> None:
        """Report a validation to Ray Tune in a trial. Every rank must call it."""
        if self._to_tune:
            ray.train.report({**metrics, "step": step})

    def note(self, text: str) -> None:
        """Send a line without a step."""
        self._send(None, text)

    def stop_requested(self) -> bool:
        """Whether the driver requested the end of the run, on rank 0; it waits for nothing."""
        if self._messages is None or dist.get_rank() != 0:
            return False
        if self._pending is None:
            self._pending = self._messages.stop_requested.remote()
        if not ray.wait([self._pending], timeout=0)[0]:
            return False
        requested, self._pending = self._pending, None
        with suppress(ray.exceptions.RayActorError):
            return bool(ray.get(requested))
        return False

    def is_preempted(self) -> bool:
        """Whether Ray has announced to this worker that a node of the run will be preempted."""
        with suppress(RuntimeError):  # outside of Ray Train
            return get_train_context().preemption_context.preemption_info is not None
        return False

    def confirm_stop(self, step: int) -> None:
        """Report that a checkpoint of that step is published and the workers end."""
        if self._messages is not None and dist.get_rank() == 0:
            self._messages.confirm_stop.remote(step)

    def warn(self, text: str) -> None:
        """Send a line of any rank; in a trial, which has no driver that shows it, write it to the worker's log."""
        if self._messages is None:
            print(text, flush=True)
        else:
            self._messages.put.remote((None, self._steps, f"worker {dist.get_rank()}: {text}"))

    def _send(self, step: int | None, text: str) -> None:
        if self._messages is not None and dist.get_rank() == 0:
            self._messages.put.remote((step, self._steps, text))
