"""Processes on this machine, or Ray tasks on a cluster, that make the samples of an archive."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

import torch

from raylift.datasets.errors import ConfigError, WorkersLostError
from raylift.datasets.ingest.pipeline import Workers

LOST = (
    "a worker was killed, as happens when memory runs out: lower --workers. Published samples are kept; the same "
    "command adds the rest"
)


@contextmanager
def ingest_workers(count: int) -> Iterator[Workers | None]:
    """Workers for a context: processes, or Ray tasks on the cluster of RAY_ADDRESS; None for a single one.

    Raises:
        ConfigError: the count is not positive.
        ClusterTooSmallError: the cluster has fewer CPUs.
        WorkersLostError: a worker was killed.
    """
    if count < 1:
        raise ConfigError(f"{count} workers: give 1 or more")
    if count == 1:
        yield None
    elif os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        with _tasks(count) as workers:
            yield workers
    else:
        with _processes(count) as workers:
            yield workers


@contextmanager
def _processes(count: int) -> Iterator[Workers]:
    # A process with one thread imports what this one has imported, and the workers are its forks: the import takes
    # seconds, and processes that are forked from one with threads may block.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(name for name in sys.modules if name.startswith("raylift.datasets."))])
    forkserver.ensure_running()
    threads = max(1, (os.cpu_count() or 1) // count)
    with ProcessPoolExecutor(count, context, _start, (threads,)) as pool:
        try:
            yield Workers(count, pool.submit)
        except BrokenProcessPool as error:
            raise WorkersLostError(LOST) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _tasks(count: int) -> Iterator[Workers]:
    # Takes a second to import, which processes need not.
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from raylift.platform import cluster

    cluster.connect()
    cluster.require_resources(count, 0, f"an ingest by {count} workers", "--workers")
    # The bundles bound the number of tasks that run at the same time.
    group = placement_group([{"CPU": 1}] * count)
    task: Any = ray.remote(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group))(_call)
    try:
        yield Workers(count, lambda function, *arguments: task.remote(function, *arguments).future())
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise WorkersLostError(LOST) from error
    finally:
        remove_placement_group(group)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command itself ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the command was killed, which closes no pipe that a worker waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
