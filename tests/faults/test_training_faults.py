"""A worker killed with SIGKILL, and an archive that grows, during training change no weight."""

import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import psutil
import safetensors.torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.models import weights
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import Checkpoints

GRID = Grid(32, 10.0)


def training_workers() -> list[int]:
    """Process ids of this session's Ray Train workers."""
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("RayTrainWorker" in word for word in process.cmdline())
    ]


def test_a_worker_killed_while_the_archive_grows_is_replaced_and_the_run_ends_in_the_same_weights(
    finished_run, tiny, archive32, ray_cluster, tmp_path
):
    url, archive = str(tmp_path / "killed"), str(shutil.copytree(archive32, tmp_path / "archive"))
    run = runs.create(replace(tiny, data=replace(tiny.data, archive=archive)), url)
    outcome = {}

    def fit() -> None:
        outcome["metrics"] = runs.fit(run, url)

    thread = threading.Thread(target=fit)
    thread.start()
    killed = None
    deadline = time.monotonic() + 240
    while thread.is_alive() and killed is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if Checkpoints(url).published():
            workers = training_workers()
            if workers:
                # The replaced worker opens the archive when it has another generation.
                if Archive(archive).manifest.generation == run.data.generation:
                    ingest_phantoms(archive, GRID, chest(GRID), count=1, seed=1000)
                killed = workers[-1]
                os.kill(killed, signal.SIGKILL)
    thread.join(300)
    assert killed is not None, "no worker was killed"
    assert not psutil.pid_exists(killed)
    assert "val_psnr_db" in outcome["metrics"]
    assert Archive(archive).manifest.generation == run.data.generation + 1
    provenance = weights.load(tmp_path / "killed/checkpoints/step-00000008").description.provenance
    assert provenance["archive_generation"] == run.data.generation
    name = "checkpoints/step-00000008/model/model.safetensors"
    uninterrupted, resumed = (safetensors.torch.load_file(f"{folder}/{name}") for folder in (finished_run, url))
    assert all(bool((uninterrupted[key] == resumed[key]).all()) for key in uninterrupted)
