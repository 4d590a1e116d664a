"""The driver of a run: fits it with Ray Train, and starts it again where that can cure the failure."""

from __future__ import annotations

import errno
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from raylift.datasets import process_folder
from raylift.datasets.errors import RayliftError, StoreError
from raylift.datasets.serialization import to_plain
from raylift.platform import cluster
from raylift.platform.config import RunConfig
from raylift.platform.training.checkpoint import Checkpoints
from raylift.platform.training.loop import PreemptedError, train_worker

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Error numbers of a file system that takes no more data."""
DEFECTS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ImportError,
)
"""Errors of a program, which come again after a restart."""


class RunFailedError(RayliftError, RuntimeError):
    """A run that ended because of what a restart cannot cure, or that was restarted too often."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, with a message for the user."""


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """Within this context of the main thread, SIGINT and SIGTERM raise Interrupted. It yields the names of both."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def interrupt(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    except KeyboardInterrupt:
        # Ray replaces the exception of a handler by one of its own.
        raise Interrupted(f"interrupted by {received[-1]}" if received else "interrupted") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Trainer(TorchTrainer):
    """A trainer whose workers can be ended at once. Ray's handler of SIGINT takes many seconds."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def end(self) -> None:
        """End the controller; Ray then ends its workers."""
        if self._controller is not None:
            ray.kill(self._controller)


def fit_with_restarts(
    run: RunConfig, run_url: str, settings: dict[str, Any], callbacks: list[Any], note: Callable[[str], None]
) -> dict[str, Any]:
    """Train with Ray Train from the newest checkpoint, up to `cluster.max_failures` times again.

    Args:
        run: the configuration.
        run_url: the run's folder.
        settings: of `train_worker`, in addition to configuration and folder.
        callbacks: for Ray Train.
        note: prints a line about each restart.

    Returns:
        The last metrics.

    Raises:
        RayliftError: of a worker, where no restart can cure it, or RunFailedError.
        Interrupted: on SIGINT or SIGTERM.
    """
    settings = {"config": to_plain(run), "run_url": run_url, **settings}
    # Workers that a signal stops may still write here.
    with process_folder.make("ray-files") as scratch:
        trainer = partial(_trainer, run, settings, callbacks, str(scratch))
        with interruptible() as received:
            return _fit_attempts(trainer, run, run_url, note, partial(_stop, received, run, settings["messages"]))


def _stop(received: list[str], run: RunConfig, messages: Any) -> None:
    """On SIGTERM, wait until the workers have written a checkpoint, or for `cluster.grace_s`."""
    if received[-1:] != ["SIGTERM"] or messages is None or not run.cluster.grace_s:
        return
    deadline = time.monotonic() + run.cluster.grace_s
    with suppress(ray.exceptions.RayError):
        ray.get(messages.request_stop.remote(), timeout=run.cluster.grace_s)
        while time.monotonic() < deadline and not ray.get(messages.stopped.remote(), timeout=run.cluster.grace_s):
            time.sleep(0.1)


def _fit_attempts(
    new_trainer: Callable[[], _Trainer],
    run: RunConfig,
    run_url: str,
    note: Callable[[str], None],
    stop: Callable[[], None],
) -> dict[str, Any]:
    restarts, preempted_at = 0, -1
    while restarts <= run.cluster.max_failures:
        trainer = new_trainer()
        try:
            with cluster.environment_variable(
                "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(run.cluster.stall_timeout_s)
            ):
                outcome: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            try:
                stop()
            finally:
                trainer.end()
            raise
        except (ray.train.WorkerGroupError, ray.train.PreemptionError) as error:
            if isinstance(error, ray.train.WorkerGroupError):
                raise_permanent(error, run_url)
            if isinstance(error, ray.train.WorkerGroupError) and not is_preemption(error.worker_failures):
                reason = describe(error.worker_failures)
            else:
                reason, step = "a node of this run is preempted", newest_step(run_url)
                if step > preempted_at:
                    preempted_at = step
                    note(f"{reason}: starting again from the newest checkpoint")
                    continue
                reason += " again without a newer checkpoint"
        else:
            return outcome
        restarts += 1
        if restarts <= run.cluster.max_failures:
            note(f"{reason}: starting again from the newest checkpoint ({restarts} of {run.cluster.max_failures})")
    raise RunFailedError(
        f"{reason}, after {run.cluster.max_failures} restarts (cluster.max_failures): resume with --resume {run_url}; "
        "RAYLIFT_RAY_LOGS=1 prints the workers' output"
    )


def newest_step(run_url: str) -> int:
    """The step of a run's newest checkpoint; 0 if there is none, or its store does not respond."""
    with suppress(StoreError):
        return max((int(summary["step"]) for _, summary in Checkpoints(run_url).published()), default=0)
    return 0


def is_preemption(failures: Mapping[int, Exception]) -> bool:
    """Whether workers ended because a node is preempted, which does not count as a failure."""
    return any(isinstance(each, PreemptedError) or getattr(each, "preempted", False) for each in failures.values())


def raise_permanent(error: ray.train.WorkerGroupError, run_url: str) -> None:
    """Raise the first error of a worker that no restart can cure; return if there is none."""
    for failure in error.worker_failures.values():
        if isinstance(failure, RayliftError) and not isinstance(failure, StoreError):
            raise failure from None
        if is_full_disk(failure):
            raise RunFailedError(
                f"{run_url} or the temporary folder cannot be written ({failure}): free space, then resume with "
                f"--resume {run_url}"
            ) from None
        if isinstance(failure, torch.OutOfMemoryError):
            raise RunFailedError(
                f"{_first_line(failure)}: lower train.batch_size, or set engine.precision to bf16 or "
                "engine.zero_stage to 3"
            ) from None
        if isinstance(failure, DEFECTS):
            raise error


def is_full_disk(error: Exception) -> bool:
    """Whether a file system took no more data. Errors of safetensors have no error number."""
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    return number in FULL_DISK or bool({int(code) for code in re.findall(r"os error (\d+)", str(error))} & FULL_DISK)


def describe(failures: Mapping[int, Exception]) -> str:
    """Why workers failed, in a clause. Others fail because one was lost, so a lost one comes first."""
    rank, failure = min(failures.items(), key=lambda item: not type(item[1]).__module__.startswith("ray."))
    if isinstance(failure, WorkerHealthCheckTimeoutError):
        stalled = re.search(r"hanging for (\d+)", str(failure))
        return f"worker {rank} did not respond for {stalled[1] if stalled else '?'} s (cluster.stall_timeout_s)"
    return f"worker {rank} was lost ({exit_detail(failure)})"


def exit_detail(error: Exception) -> str:
    """How a process ended, from Ray's error."""
    detail = re.search(r"(?:exit detail|error message|killed due to)[:\s]+(.*?)(?:\. |\n|$)", str(error))
    return detail[1].strip() if detail else _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(":. ")


def _trainer(run: RunConfig, settings: dict[str, Any], callbacks: list[Any], scratch: str) -> _Trainer:
    workers, gpus = run.cluster.workers, run.cluster.gpus_per_worker
    return _Trainer(
        train_worker,  # type: ignore[arg-type]  # Ray returns the worker's result
        train_loop_config=settings,
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": run.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            # Checkpoints are raylift's own (see `checkpoint`), so Ray's files are temporary, and an object store that
            # is unreachable for a moment cannot make Ray's controller fail. Restarts are those of this module.
            name=f"raylift-{uuid.uuid4().hex[:8]}",
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                max_preemption_failures=0,  # type: ignore[call-arg]  # of the second version of Ray Train alone
            ),
            callbacks=callbacks,
        ),
    )
