"""A process killed at each file operation of a checkpoint: the newest verified checkpoint is the old or the new one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models.weights import Description
from raylift.platform.presets import PRESETS
from raylift.platform.training.checkpoint import Checkpoints, Tensors, TrainingState, local_copy

TESTS = Path(__file__).parents[1]
KILLED_WRITERS = """
import builtins, io, os, shutil, signal, sys
from pathlib import Path
import safetensors.torch
sys.path.insert(0, sys.argv[3])
from test_checkpoint_faults import save

def exits_at(fatal):
    count = 0
    def point():
        nonlocal count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    def die_before(owner, name):
        real = getattr(owner, name)
        def act(*args, **options):
            point()
            return real(*args, **options)
        setattr(owner, name, act)
    for name in ("mkdir", "open", "fsync", "sendfile", "copy_file_range", "rename", "replace", "unlink", "rmdir"):
        if hasattr(os, name):
            die_before(os, name)
    for owner in (io, builtins):
        die_before(owner, "open")
    die_before(safetensors.torch, "save_file")

root, base = Path(sys.argv[1]), Path(sys.argv[2])
for fatal in range(1, 10_000):
    shutil.copytree(base, root / str(fatal))
    child = os.fork()
    if child == 0:
        exits_at(fatal)
        save(str(root / str(fatal)), 20)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(fatal, status, flush=True)
    if os.WIFEXITED(status):
        break
"""


def save(url: str, step: int) -> None:
    """Publish a small checkpoint and prune all older ones but one, which is what the training loop does."""
    checkpoints = Checkpoints(url)
    state = TrainingState(step, 4 * step, {"val_psnr_db": float(step)})
    players = {name: {"weight": torch.full((3,), float(step))} for name in ("generator",)}
    description = Description(PRESETS["x2ct-gan-tiny"].system, Grid(16, 20.0), chest(Grid(16, 20.0)), Window())
    checkpoints.save(state, Tensors(players, players), description)
    checkpoints.prune(1)


def test_a_process_killed_at_any_file_operation_of_a_checkpoint_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    save(str(tmp_path / "base"), 10)
    command = [sys.executable, "-c", KILLED_WRITERS, tmp_path, tmp_path / "base", Path(__file__).parent]
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    outcomes = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert outcomes, run.stderr
    assert outcomes[-1][1] == 0, "the last one was not killed"
    assert [fatal for fatal, status in outcomes if status == 9] == list(range(1, len(outcomes)))
    assert len(outcomes) > 60

    newest = []
    for fatal, _ in outcomes:
        checkpoints = Checkpoints(str(tmp_path / str(fatal)))
        for name, _ in checkpoints.published():
            with local_copy(f"{checkpoints.url}/{name}"):
                pass
        url, rejected = checkpoints.newest()
        assert rejected == []
        newest.append(int(str(url)[-2:]))
        save(str(tmp_path / str(fatal)), 20)
        assert [summary["step"] for _, summary in checkpoints.published()] == [20]
        shutil.rmtree(tmp_path / str(fatal))
    # The later the kill, the newer the checkpoint; some kills came before and some after the publication.
    assert newest == sorted(newest)
    assert set(newest) == {10, 20}
