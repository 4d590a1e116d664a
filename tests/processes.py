"""A group of real processes on this machine joined by gloo, for what needs several ranks but no Ray."""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from s3_server import free_ports


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns on each of `world` ranks; the first error of any rank is raised."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_entry, (world, free_ports(1)[0], folder, function, arguments), nprocs=world, join=False)
        while not context.join(timeout=180):
            pass
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for result in results:
        if "error" in result:
            raise AssertionError(result["error"])
    return [result["value"] for result in results]


def _entry(
    rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        result = {"value": function(rank, *arguments)}
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
