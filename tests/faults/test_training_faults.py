"""A worker killed with SIGKILL during training costs time but changes no weight."""

import os
import signal
import threading
import time

import psutil
import safetensors.torch

from raylift.platform.training import runs
from raylift.platform.training.checkpoint import Checkpoints


def training_workers() -> list[int]:
    """Process ids of this session's Ray Train workers."""
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("RayTrainWorker" in word for word in process.cmdline())
    ]


def test_a_killed_worker_is_replaced_and_the_run_ends_in_the_same_weights(finished_run, tiny, ray_cluster, tmp_path):
    url = str(tmp_path / "killed")
    run = runs.create(tiny, url)
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
                killed = workers[-1]
                os.kill(killed, signal.SIGKILL)
    thread.join(300)
    assert killed is not None, "no worker was killed"
    assert not psutil.pid_exists(killed)
    assert "val_psnr_db" in outcome["metrics"]
    name = "checkpoints/step-00000008/model/model.safetensors"
    uninterrupted, resumed = (safetensors.torch.load_file(f"{folder}/{name}") for folder in (finished_run, url))
    assert all(bool((uninterrupted[key] == resumed[key]).all()) for key in uninterrupted)
