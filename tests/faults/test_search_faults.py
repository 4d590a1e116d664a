"""Searches whose driver, or the driver of one of whose trials, is killed with SIGKILL."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from raylift.platform.tuning import search, study
from raylift.platform.tuning.search import Search, Space
from raylift.platform.tuning.trials import load_table

TRIALS = 4
SPACE = Space({"optimizer.lr": {"log_uniform": [1e-5, 1e-2]}})


@pytest.fixture
def temporary_folder() -> Iterator[Path]:
    """A folder for temporary files with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1200)
def test_a_search_with_median_stopping_that_is_killed_at_half_ends_as_an_unbroken_one(
    tiny, ray_cluster, tmp_path, temporary_folder
):
    run = replace(
        tiny,
        cluster=replace(tiny.cluster, workers=1),
        train=replace(tiny.train, steps=6, validate_every=2, validation_samples=2),
    )
    settings = {"trials": TRIALS, "max_concurrent_trials": 1, "scheduler": "median", "sampler": "random", "seed": 6}
    unbroken, url = str(tmp_path / "unbroken"), tmp_path / "search"
    for folder in (unbroken, str(url)):
        search.create(Search(run, SPACE, **settings), folder)
    expected = search.fit(unbroken)
    states = [trial.state for trial in study.load_trials(unbroken, search.load_search(unbroken))]
    assert states == ["finished"] * 3 + ["stopped early"]

    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["TMPDIR"] = str(temporary_folder)
    command = [sys.executable, "-m", "raylift", "tune", "--resume", str(url)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as broken:
        wait_for_half(url, broken)
        os.killpg(broken.pid, signal.SIGKILL)
    assert not (url / "trials.json").exists(), "the injection came too late"
    before = {path: path.stat().st_mtime_ns for path in url.glob("trials/*/checkpoints/*/model/*.safetensors")}
    begun = {path.name for path in (url / "trials").iterdir()}
    assert TRIALS / 2 < len(begun) < TRIALS
    left = set(temporary_folder.glob("raylift-*"))
    assert left, "the killed search left no temporary folder"

    subprocess.run(command, env=environment, check=True, timeout=400)
    assert not left & set(temporary_folder.glob("raylift-*"))
    kept = [path for path in before if path.exists()]
    assert len(kept) > TRIALS // 2
    assert all(path.stat().st_mtime_ns == before[path] for path in kept), "a trial was repeated"
    assert begun < {path.name for path in (url / "trials").iterdir()}
    table = load_table(str(url))
    assert len(table) == len(list((url / "trials").iterdir())) == TRIALS
    results = [[(trial.settings, trial.best_psnr_db, trial.step) for trial in one] for one in (table, expected)]
    assert results[0] == results[1]
    resumed = [trial.state for trial in study.load_trials(str(url), search.load_search(str(url)))]
    assert resumed == states


def test_a_trial_whose_driver_is_killed_ends_in_a_sentence_and_the_others_continue(tiny, ray_cluster, tmp_path, capsys):
    train = replace(tiny.train, steps=4, validate_every=2, validation_samples=1, log_every=1)
    run = replace(tiny, cluster=replace(tiny.cluster, workers=1), train=train)
    url, killed = str(tmp_path / "search"), []
    search.create(Search(run, SPACE, trials=2, max_concurrent_trials=1, sampler="random", scheduler="none"), url)
    killer = threading.Thread(target=kill_a_driver, args=(tmp_path / "search", killed))
    killer.start()
    table = search.fit(url)
    killer.join()
    assert killed, "no driver was killed"
    lines = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert [bool(trial.error) for trial in table].count(True) == 1
    (line,) = lines
    assert re.fullmatch(r"tune: trial \w+ failed: the process that drives it was lost \(.+\)", line)
    assert {trial.error for trial in table} == {"", line.split("failed: ")[1]}
    table = search.fit(url)
    assert all(trial.error == "" for trial in table)
    assert len(table) == len(list(tmp_path.glob("search/trials/*"))) == 2
    assert Path(url, "trials.json").exists()


def kill_a_driver(url: Path, killed: list[int]) -> None:
    """Kill the driver of the first trial that has trained a step."""
    deadline = time.monotonic() + 200
    while not killed and time.monotonic() < deadline:
        time.sleep(0.1)
        if not list(url.glob("trials/*/tensorboard")):
            continue
        names = {process.pid: process_name(process) for process in psutil.Process().children(recursive=True)}
        drivers = [pid for pid, name in names.items() if name.startswith("ray::ImplicitFunc")]
        for driver in drivers[:1]:
            os.kill(driver, signal.SIGKILL)
            killed.append(driver)


def process_name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_for_half(url: Path, process: subprocess.Popen) -> None:
    """Wait until the third trial has a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the search ended by itself"
        begun = sorted(url.glob("trials/*/run.json"), key=lambda path: path.stat().st_mtime_ns)
        with suppress(IndexError):
            if list(begun[TRIALS // 2].parent.glob("checkpoints/*/checkpoint.json")):
                return
        time.sleep(0.05)
    raise AssertionError("too few trials began")
