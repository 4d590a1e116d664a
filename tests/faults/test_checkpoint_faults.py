"""A process killed at each file operation of a checkpoint: the newest verified checkpoint is the old or the new one."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from killed_writers import Operations, kill_at_each_operation

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models.weights import Description
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import Checkpoints, Tensors, TrainingState, local_copy

OPERATIONS: Operations = [
    *(
        (os, name)
        for name in ("mkdir", "open", "fsync", "sendfile", "copy_file_range", "rename", "replace", "unlink", "rmdir")
        if hasattr(os, name)
    ),
    (io, "open"),
    (builtins, "open"),
    (safetensors.torch, "save_file"),
]


def write(url: str) -> None:
    """The checkpoint after the first."""
    save(url, 20)


def save(url: str, step: int) -> None:
    """Publish a small checkpoint and prune all older ones but one, which is what the training loop does."""
    checkpoints = Checkpoints(url)
    state = TrainingState(step, 4 * step, {"val_psnr_db": float(step)})
    networks = {"generator": {"weight": torch.full((3,), float(step))}}
    description = Description(PRESETS["x2ct-gan-tiny"].system, Grid(16, 20.0), chest(Grid(16, 20.0)), Window())
    checkpoints.save(state, Tensors(networks, networks), description)
    checkpoints.prune(1)


def test_a_process_killed_at_any_file_operation_of_a_checkpoint_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    save(str(tmp_path / "base"), 10)
    numbers = kill_at_each_operation("test_checkpoint_faults", tmp_path)
    assert len(numbers) > 60

    newest = []
    for number in numbers:
        checkpoints = Checkpoints(str(tmp_path / str(number)))
        for name, _ in checkpoints.published():
            with local_copy(f"{checkpoints.url}/{name}"):
                pass
        url, rejected = checkpoints.newest()
        assert rejected == []
        newest.append(int(str(url)[-2:]))
        write(str(tmp_path / str(number)))
        assert [summary["step"] for _, summary in checkpoints.published()] == [20]
        shutil.rmtree(tmp_path / str(number))
    # The later the kill, the newer the checkpoint; some kills came before and some after the publication.
    assert newest == sorted(newest)
    assert set(newest) == {10, 20}
