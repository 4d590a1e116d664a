"""Augmented runs with streamed phantoms have the same samples after a kill, and with another number of workers."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.torch

from raylift.datasets.augmentation.augmentation import Augmentation
from raylift.models.zoo import SYSTEMS
from raylift.platform.config import RunConfig
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import Checkpoints

LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def augmented(tiny) -> RunConfig:
    """Two workers, eight steps, a checkpoint at the fourth; a regression, whose losses do not amplify rounding."""
    data = replace(tiny.data, augmentation=Augmentation(enabled=True), phantoms_per_epoch=6)
    train = replace(tiny.train, steps=8, validate_every=4, log_every=1)
    return replace(tiny, system=SYSTEMS["unrolled"].tiny, data=data, train=train)


@pytest.fixture(scope="module")
def whole(augmented, ray_cluster, tmp_path_factory) -> Path:
    url = tmp_path_factory.mktemp("augmented") / "whole"
    runs.fit(runs.create(augmented, str(url)), str(url))
    return url


def losses(url: Path) -> np.ndarray:
    history = json.loads((url / LAST / "state.json").read_text())["history"]
    return np.array([entry["generator/loss"] for entry in history if "generator/loss" in entry])


def training_workers() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended, and may be a zombie
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


def test_a_run_whose_worker_is_killed_ends_with_the_weights_of_the_whole_one(augmented, whole, tmp_path, capsys):
    url = tmp_path / "killed"
    run = runs.create(augmented, str(url))
    thread = threading.Thread(target=runs.fit, args=(run, str(url)))
    thread.start()
    killed, deadline = None, time.monotonic() + 240
    while thread.is_alive() and killed is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if Checkpoints(str(url)).published() and (workers := training_workers()):
            killed = workers[-1]
            os.kill(killed, signal.SIGKILL)
    thread.join(300)
    assert killed is not None, "no worker was killed"
    assert "starting again from the newest checkpoint" in capsys.readouterr().out
    one, other = (safetensors.torch.load_file(folder / LAST / "model/model.safetensors") for folder in (whole, url))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    np.testing.assert_array_equal(losses(whole), losses(url))


def test_one_worker_has_the_samples_of_two_from_the_start_and_after_resuming(augmented, whole, tmp_path):
    alone = replace(augmented, cluster=replace(augmented.cluster, workers=1))
    runs.fit(runs.create(alone, str(tmp_path / "alone")), str(tmp_path / "alone"))
    shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / LAST)
    runs.fit(alone, str(tmp_path / "resumed"))
    other = replace(alone, data=replace(alone.data, augmentation=Augmentation()))
    runs.fit(runs.create(other, str(tmp_path / "other")), str(tmp_path / "other"))
    expected = losses(whole)
    assert len(expected) == 8
    for name in ("alone", "resumed"):
        np.testing.assert_allclose(losses(tmp_path / name), expected, rtol=1e-4)
    assert np.abs(losses(tmp_path / "other") / expected - 1).max() > 0.02, "other samples have the same losses"
