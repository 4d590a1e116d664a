"""Samples that several processes or Ray tasks make: the same archive, in the same order, with bounded memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import ray
from samples import thorax_hu, thorax_image, write_image

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import WorkersLostError
from raylift.datasets.ingest.pipeline import Workers, map_in_order
from raylift.platform import cli, cluster
from raylift.platform.ingest_workers import ingest_workers


def write_scans(folder, count=3):
    """CT files of which one is a copy, and one more that cannot be read."""
    folder.mkdir()
    for number in range(count):
        image = thorax_image(
            (40, 30, 40), (9.0, 9.0, 9.0), hu=lambda x, y, z, mark=number: thorax_hu(x, y, z) + (np.abs(z) < 20) * mark
        )
        write_image(image, folder / f"p{number}.nii.gz")
    (folder / "p1-copy.nii.gz").write_bytes((folder / "p1.nii.gz").read_bytes())
    (folder / "p1-torn.nii.gz").write_bytes((folder / "p1.nii.gz").read_bytes()[:1000])


def ingest(folder, url, workers, capsys):
    """The printed lines without the archive's URL, and its entries and arrays."""
    arguments = ["ingest", str(folder), "--archive", str(url), "--size", "32", "--spacing-mm", "12"]
    arguments += ["--left-out", str(folder.parent / "refused.csv")]
    assert cli.main([*arguments, "--samples-per-shard", "2", "--workers", str(workers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    refusal, summary = lines[-2], lines[-1].removeprefix(f"{url}: ")
    entries = Archive(str(url)).entries()
    described = [(e.id, e.subject, e.source, e.source_sha256, e.split, e.index, e.sha256, e.record) for e in entries]
    return refusal, summary, described


def test_an_archive_made_by_two_processes_is_that_of_one_bit_for_bit(tmp_path, capsys):
    write_scans(tmp_path / "ct")
    one = ingest(tmp_path / "ct", tmp_path / "one", 1, capsys)
    assert "p1-torn.nii.gz" in one[0]
    reasons = (tmp_path / "refused.csv").read_text().splitlines()
    assert reasons[0] == "file,reason"
    assert f"refused: {reasons[1].replace(',', ': ', 1)}" == one[0]
    assert one[1].startswith("3 added")
    assert "1 already present, 1 refused" in one[1]
    assert ingest(tmp_path / "ct", tmp_path / "two", 2, capsys) == one


def test_an_archive_made_by_ray_tasks_is_that_of_one_process(tmp_path, capsys, ray_cluster, monkeypatch):
    write_scans(tmp_path / "ct", count=2)
    one = ingest(tmp_path / "ct", tmp_path / "one", 1, capsys)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    assert ingest(tmp_path / "ct", tmp_path / "two", 2, capsys) == one
    with pytest.raises(cluster.ClusterTooSmallError, match="an ingest by 50 workers needs 50 CPUs"), ingest_workers(50):
        pass


def test_phantoms_made_by_two_processes_are_those_of_one(tmp_path, capsys):
    for workers in (1, 2):
        options = ["--count", "3", "--size", "16", "--spacing-mm", "24", "--pneumothorax-fraction", "0.5"]
        url = str(tmp_path / str(workers))
        assert cli.main(["phantom", "--archive", url, *options, "--workers", str(workers)]) == 0
    one, two = ([(e.id, e.record, e.sha256) for e in Archive(str(tmp_path / name)).entries()] for name in "12")
    assert len(one) == 3
    assert one == two


def end_this_process(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_command_in_a_sentence():
    with pytest.raises(WorkersLostError, match="a worker was killed"), ingest_workers(2) as workers:
        list(map_in_order(end_this_process, [1, 2], workers))


def test_workers_end_when_the_command_is_killed(tmp_path):
    command = [sys.executable, "-m", "raylift", "phantom", "--archive", str(tmp_path / "a"), "--count", "500"]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.DEVNULL) as killed:
        parent, workers, deadline = psutil.Process(killed.pid), [], time.monotonic() + 120
        while len(workers) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
            workers = [worker for server in parent.children() for worker in server.children()]
        time.sleep(3)
        processes = parent.children(recursive=True)
        killed.kill()
    assert len(workers) == 2
    assert set(workers) < set(processes)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_workers_are_forks_of_a_process_that_has_imported_what_they_need():
    # In a new process, whose workers have not started yet.
    code = """
import os
from raylift.datasets.ingest import ct
from raylift.platform.ingest_workers import ingest_workers
with ingest_workers(2) as workers:
    parents = {future.result() for future in [workers.submit(os.getppid) for _ in range(8)]}
    modules = workers.submit(eval, "__import__('sys').modules.keys() & {'raylift.datasets.ingest.ct', 'ray'}")
    print(len(parents - {os.getpid()}), *modules.result())
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.split() == ["1", "raylift.datasets.ingest.ct"]


def test_no_worker_is_an_error(tmp_path, capsys):
    assert cli.main(["phantom", "--archive", str(tmp_path / "a"), "--workers", "0"]) == 2
    assert "0 workers: give 1 or more" in capsys.readouterr().err


def test_results_are_in_order_and_at_most_two_for_each_worker_wait(tmp_path):
    started, release = [], threading.Event()

    def square(number):
        started.append(number)
        if number == 0:
            release.wait(10)
        return number**2

    with ThreadPoolExecutor(2) as pool:
        results = map_in_order(square, iter(range(30)), Workers(2, pool.submit))
        first = threading.Timer(0.5, release.set)
        first.start()
        assert next(results) == 0
        assert len(started) <= 4
        assert [0, *results] == [number**2 for number in range(30)]
