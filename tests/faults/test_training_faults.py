"""Faults during training: a worker is killed, the archive grows or is damaged, a disk is full, the loss diverges."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.exceptions
import ray.train
import safetensors.torch
import torch.distributed as dist
from processes import run_ranks
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import CorruptSampleError, StoreError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.models import weights
from raylift.platform.progress import worker_messages
from raylift.platform.training import driver, runs
from raylift.platform.training.checkpoint import Checkpoints, load_state
from raylift.platform.training.divergence import DIVERGED, DivergedLossError, DivergenceMonitor
from raylift.platform.training.loop import PreemptedError, train
from raylift.platform.training.tracking import Reporter

GRID = Grid(32, 10.0)


def training_workers(ancestor: int | None = None) -> list[int]:
    """Ids of the Ray Train workers that descend from a process, by default this one."""
    found = []
    for process in psutil.Process(ancestor).children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:  # it has ended, and may be a zombie
            continue
    return found


def wait_for_no_workers() -> None:
    """Fail if a training worker still runs after thirty seconds."""
    deadline = time.monotonic() + 30
    while training_workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not training_workers(), "workers run on"


def test_a_worker_killed_while_the_archive_grows_is_replaced_and_the_run_ends_with_the_same_weights(
    finished_run, tiny, archive32, ray_cluster, tmp_path, capsys
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
                # The replaced worker opens the archive when it has another snapshot.
                if Archive(archive).manifest.snapshot == run.data.snapshot:
                    ingest_phantoms(archive, GRID, chest(GRID), count=1, seed=1000)
                killed = workers[-1]
                os.kill(killed, signal.SIGKILL)
    thread.join(300)
    assert killed is not None, "no worker was killed"
    assert not psutil.pid_exists(killed)
    assert "val_psnr_db" in outcome["metrics"]
    output = capsys.readouterr().out
    assert re.search(
        r"train: worker \d was lost \(.+\): starting again from the newest checkpoint \(1 of 2\)\n", output
    )
    assert Archive(archive).manifest.snapshot == run.data.snapshot + 1
    provenance = weights.load(tmp_path / "killed/checkpoints/step-00000008").description.provenance
    assert provenance["archive_snapshot"] == run.data.snapshot
    assert same_weights(finished_run, url)


def same_weights(*folders) -> bool:
    """Whether two runs have equal weights after eight steps."""
    name = "checkpoints/step-00000008/model/model.safetensors"
    one, other = (safetensors.torch.load_file(f"{folder}/{name}") for folder in folders)
    return all(bool((one[key] == other[key]).all()) for key in one)


def test_a_stopped_worker_is_replaced_within_the_timeout_and_a_run_ends_after_its_last_restart(
    tiny, ray_cluster, tmp_path, capsys
):
    url = str(tmp_path / "run")
    resources = replace(tiny.cluster, stall_timeout_s=3.0, max_failures=1)
    training = replace(tiny.train, steps=4000, validate_every=1, validation_samples=1)
    run = runs.create(replace(tiny, cluster=resources, train=training), url)
    outcome = {}

    def fit() -> None:
        with pytest.raises(driver.RunFailedError) as failed:
            runs.fit(run, url)
        outcome["error"] = str(failed.value)

    thread = threading.Thread(target=fit)
    thread.start()
    stopped = wait_for_a_worker(url, thread, after_step=0)
    os.kill(stopped, signal.SIGSTOP)
    begun, step = time.monotonic(), Checkpoints(url).published()[-1][1]["step"]
    while psutil.pid_exists(stopped) and time.monotonic() - begun < 60:
        time.sleep(0.1)
    assert not psutil.pid_exists(stopped), "the stopped worker was left behind"
    assert 3 < time.monotonic() - begun < 23
    os.kill(wait_for_a_worker(url, thread, after_step=step), signal.SIGKILL)
    thread.join(120)
    assert re.fullmatch(
        rf"worker \d was lost \(.+\), after 1 restarts \(cluster.max_failures\): resume with --resume {url}; .+",
        outcome["error"],
    )
    assert re.search(
        r"train: worker \d did not respond for [3-9] s \(cluster.stall_timeout_s\): starting again from the newest "
        r"checkpoint \(1 of 1\)\n",
        capsys.readouterr().out,
    )
    wait_for_no_workers()


THREE_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(cluster.address, *raylets, flush=True)
print(*(node.node_id for node in nodes), flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes[raylets.index(int(line))], allow_graceful=False)
cluster.shutdown()
"""


@pytest.fixture
def three_nodes() -> Iterator[subprocess.Popen]:
    """The process of a cluster: a head without CPUs and three nodes of one.

    It prints the cluster's address and the ids of the nodes' raylets, in a second line those of the nodes, and ends the
    node whose raylet it reads.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", THREE_NODES], **pipes) as process:
        yield process


def test_a_lost_node_is_replaced_and_the_run_ends_with_the_same_weights(finished_run, tiny, three_nodes, tmp_path):
    url, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(tiny.to_yaml())
    address, *raylets = three_nodes.stdout.readline().split()
    command = [sys.executable, "-m", "raylift", "train", str(config), "--output", str(url)]
    environment = {**os.environ, "RAY_ADDRESS": address}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not Checkpoints(str(url)).published():
            assert process.poll() is None, "the run ended before a node was lost"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        print(next(raylet for raylet in raylets if training_workers(int(raylet))), file=three_nodes.stdin, flush=True)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.search(r"worker \d was lost \(.+\): starting again from the newest checkpoint \(1 of 2\)\n", output)
    assert same_weights(finished_run, url)


def test_a_run_writes_a_checkpoint_and_leaves_a_node_whose_preemption_is_announced(tiny, three_nodes, tmp_path):
    url, config = tmp_path / "run", tmp_path / "run.yaml"
    train = replace(tiny.train, steps=60, validate_every=60, log_every=1, validation_samples=1)
    config.write_text(replace(tiny, train=train).to_yaml())
    address, *raylets = three_nodes.stdout.readline().split()
    nodes = dict(zip(raylets, three_nodes.stdout.readline().split(), strict=True))
    command = [sys.executable, "-m", "raylift", "train", str(config), "--output", str(url)]
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "step 2:" in line)
        drained = next(raylet for raylet in raylets if training_workers(int(raylet)))
        deadline_ms = int(time.time() + 300) * 1000
        accepted, reason = ray._raylet.GcsClient(address=address).drain_node(
            nodes[drained], DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot price", deadline_ms
        )
        assert accepted, reason
        lines = iter(process.stdout)
        line = next(line for line in lines if "preempted" in line)
        assert line == "train: a node of this run is preempted: starting again from the newest checkpoint\n"
        resumed = next(line for line in lines if "resumed from" in line)
        assert not training_workers(int(drained)), "a worker started on the node again"
        assert psutil.pid_exists(int(drained)), "the node ended before the run left it"
        process.communicate(timeout=120)
    assert process.returncode == 0
    step = int(re.search(r"at step (\d+)$", resumed)[1])
    assert 2 <= step < 60
    assert [summary["step"] for _, summary in Checkpoints(str(url)).published()] == [step, 60]


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([RuntimeError("reset by peer"), PreemptedError()], True),
        ([ray.exceptions.RayActorError(preempted=True)], True),
        ([ray.exceptions.ActorDiedError(), RuntimeError("reset by peer")], False),
    ],
)
def test_the_end_of_a_preempted_node_is_no_failure(failures, expected):
    assert driver.is_preemption(dict(enumerate(failures))) is expected


class EndingTrainer:
    """A trainer whose workers publish the next of some checkpoints, if any is left, and fail."""

    def __init__(self, url: str, checkpoints: list[str], failures: list[Exception]) -> None:
        self.url, self.checkpoints, self.failures, self.attempts = url, checkpoints, failures, 0

    def fit(self) -> Any:
        self.attempts += 1
        if self.checkpoints:
            Checkpoints(self.url).copy(self.checkpoints.pop(0))
        raise ray.train.WorkerGroupError("", dict(enumerate(self.failures)))


def test_preemptions_without_a_newer_checkpoint_count_as_failures(tiny, finished_run, tmp_path):
    finished, notes = Checkpoints(str(finished_run)), []
    trainer = EndingTrainer(str(tmp_path), [finished.at(4), finished.at(8)], [PreemptedError()])
    run = replace(tiny, cluster=replace(tiny.cluster, max_failures=1))
    with pytest.raises(driver.RunFailedError, match=r"preempted again without a newer checkpoint, after 1 restarts"):
        driver._fit_attempts(lambda: trainer, run, str(tmp_path), notes.append, lambda: None)
    assert trainer.attempts == 4
    again = "starting again from the newest checkpoint"
    assert notes == [f"a node of this run is preempted: {again}"] * 2 + [
        f"a node of this run is preempted again without a newer checkpoint: {again} (1 of 1)"
    ]


def test_a_preemption_hides_no_permanent_error_of_another_worker(tiny, tmp_path):
    trainer = EndingTrainer(str(tmp_path), [], [PreemptedError(), CorruptSampleError("sample 3 is damaged")])
    with pytest.raises(CorruptSampleError, match="sample 3"):
        driver._fit_attempts(lambda: trainer, tiny, str(tmp_path), lambda _: None, lambda: None)
    assert trainer.attempts == 1


def test_a_run_without_the_actor_of_its_messages_goes_on_without_lines(tiny, ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "worker_messages", lost_messages)
    url = str(tmp_path / "run")
    metrics = runs.fit(runs.create(tiny, url), url)
    assert "val_psnr_db" in metrics
    assert Checkpoints(url).published()[-1][1]["step"] == tiny.train.steps


@contextmanager
def lost_messages(title: str) -> Iterator[Any]:
    """The queue of messages, whose actor has ended."""
    with worker_messages(title) as messages:
        ray.kill(messages)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(messages.last_step.remote())
        yield messages


def wait_for_a_worker(url: str, thread: threading.Thread, after_step: int) -> int:
    """The process id of a worker of a run that has published a checkpoint after that step."""
    deadline = time.monotonic() + 120
    while thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(summary["step"] > after_step for _, summary in Checkpoints(url).published()):
            return training_workers()[-1]
    raise AssertionError("the run ended or made no checkpoint")


def test_a_corrupt_sample_ends_the_run_once_and_by_name(tiny, archive32, ray_cluster, tmp_path, capsys):
    url, archive = str(tmp_path / "run"), Path(shutil.copytree(archive32, tmp_path / "archive"))
    run = runs.create(replace(tiny, data=replace(tiny.data, archive=str(archive))), url)
    for shard in archive.glob("parts/*/volumes/c/0/0/0/0"):
        shard.write_bytes(b"")
    with pytest.raises(CorruptSampleError, match=r"phantom-1-\d{4}"):
        runs.fit(run, url)
    assert "starting again" not in capsys.readouterr().out
    wait_for_no_workers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_both_signals_interrupt_and_other_handlers_are_back_afterwards(number):
    before = signal.getsignal(number)
    with pytest.raises(driver.Interrupted, match=f"interrupted by {number.name}"), driver.interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_run_ends_after_sigterm_with_a_checkpoint_and_the_command_that_resumes(tiny, ray_cluster, tmp_path):
    url, config = tmp_path / "run", tmp_path / "run.yaml"
    run = replace(tiny, train=replace(tiny.train, steps=2000, log_every=1, validate_every=1000))
    config.write_text(replace(run, cluster=replace(run.cluster, workers=1)).to_yaml())
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "raylift", "train", str(config), "--output", str(url)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            line = next(line for line in process.stdout if "step 3:" in line)
            process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - sent < 15
    losses, speed = r"generator/loss \S+  discriminator/loss \S+", r"[\d.]+ samples/s, \d+% waiting for data"
    assert re.search(rf"step 3: epoch [\d.]+  {losses}  {speed}, \d+:\d\d:\d\d left", line)
    assert process.returncode == 130
    last = errors.splitlines()[-1]
    interrupted = re.fullmatch(
        rf"raylift: interrupted by SIGTERM at step (\d+); resume with raylift train --resume {url} "
        r"\(its newest checkpoint is of step (\d+)\)",
        last,
    )
    assert interrupted, errors
    assert 3 <= int(interrupted[2]) == int(interrupted[1])
    assert "Traceback" not in errors
    newest, rejected = Checkpoints(str(url)).newest()
    assert newest.endswith(f"step-{int(interrupted[2]):08d}")
    assert rejected == []
    wait_for_no_workers()


class StopsAtStep3(Reporter):
    """Requests the end of a run at its third step, on the last rank alone."""

    calls = 0

    def stop_requested(self) -> bool:
        self.calls += 1
        return self.calls == 3 and dist.get_rank() == 1


def stopped_and_resumed(rank, run, url):
    """Train until the third step, between two validations, and then to the end; the first checkpoints' steps."""
    train(run, url, StopsAtStep3(None, 8))
    steps = [summary["step"] for _, summary in Checkpoints(url).published()]
    dist.barrier()
    train(run, url, Reporter(None, 8))
    return steps


def test_a_run_that_wrote_a_checkpoint_at_its_end_resumes_to_the_same_weights(finished_run, tiny, tmp_path):
    url = str(tmp_path / "run")
    assert run_ranks(2, stopped_and_resumed, runs.create(tiny, url), url) == [[3], [3]]
    assert same_weights(finished_run, url)


FILLS_A_DISK = """
import os, pickle, subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from raylift.datasets.archive.store import Folder
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", sys.argv[1]], check=True)
errors = []
for write in (
    lambda: Folder(sys.argv[1]).write("state.json", bytes(200_000)),
    lambda: save_file({"weight": torch.zeros(100_000)}, f"{sys.argv[1]}/weights"),
    lambda: Folder(sys.argv[1]).put(Path(sys.executable), "adam"),
):
    try:
        write()
    except Exception as error:
        errors.append(error)
Path(sys.argv[2]).write_bytes(pickle.dumps(errors))
"""


def test_a_full_disk_ends_the_run_with_a_remedy_and_a_lost_worker_does_not(tmp_path):
    (tmp_path / "disk").mkdir()
    code = [sys.executable, "-c", FILLS_A_DISK, str(tmp_path / "disk"), str(tmp_path / "errors")]
    # A file system of its own, in a namespace that ends with the process.
    filled = subprocess.run(["unshare", "--map-root-user", "--mount", *code], capture_output=True, text=True)
    if "unshare failed" in filled.stderr:
        pytest.skip(f"no file system of its own: {filled.stderr}")
    assert filled.returncode == 0, filled.stderr
    errors = pickle.loads((tmp_path / "errors").read_bytes())
    assert len(errors) == 3, "the disk was not full"
    lost = ray.exceptions.ActorDiedError()
    for error in errors:
        with pytest.raises(driver.RunFailedError, match=r"/runs/a .* cannot be written .*space.*--resume /runs/a"):
            driver.raise_permanent(ray.train.WorkerGroupError("", {0: lost, 1: error}), "/runs/a")
    for error in (lost, StoreError("s3://bucket"), RuntimeError("Connection closed by peer"), OSError(5, "I/O")):
        driver.raise_permanent(ray.train.WorkerGroupError("", {0: error}), "/runs/a")
    assert driver.describe({0: RuntimeError("Connection closed by peer"), 1: lost}).startswith("worker 1 was lost")


def diverging_runs(rank, run, url):
    """Twelve steps, then more of them at a learning rate at which the loss diverges; then the same in a run that stops.

    Returns:
        The steps of the last run's checkpoints before it stopped, and its error.
    """
    train(run, url, Reporter(None, 12))
    stopping = shutil.copytree(url, f"{url}-stopping")
    broken = replace(run, optimizer=replace(run.optimizer, lr=10.0), train=replace(run.train, steps=16))
    train(broken, url, Reporter(None, 16))
    try:
        train(replace(broken, train=replace(broken.train, stop_on_divergence=True)), stopping, Reporter(None, 16))
    except DivergedLossError as error:
        return [summary["step"] for _, summary in Checkpoints(stopping).published()], str(error)
    return None


def test_a_loss_that_diverges_is_recorded_or_stops_the_run_and_the_checkpoint_before_it_is_kept(tiny, tmp_path):
    run = replace(
        tiny,
        cluster=replace(tiny.cluster, workers=1),
        train=replace(tiny.train, steps=12, validate_every=4, validation_samples=1, log_every=1, keep_checkpoints=1),
    )
    url = str(tmp_path / "run")
    ((steps, error),) = run_ranks(1, diverging_runs, run, url)
    history = load_state(tmp_path / "run/checkpoints/step-00000016").history
    began = next(int(entry["step"]) for entry in history if DIVERGED in entry)
    assert 12 < began < 16, "the loss did not diverge"
    assert [summary["step"] for _, summary in Checkpoints(url).published()][-2:] == [12, 16]
    assert f"the training diverges at step {began}: " in error
    assert error.endswith("step-00000012 is kept")
    assert steps[-1] == 12


@pytest.mark.parametrize(
    ("values", "alarms"),
    [
        ([1.0] * 20 + [900.0, 1.0], []),
        ([1.0] * 20 + [1100.0, 1e9, 1e18, 2.0, 5000.0], [20, 24]),
        ([1.0] * 20 + [float("inf")], [20]),
        ([-1.0] * 20 + [-1100.0], [20]),
        # A discriminator's loss that was exactly 0, and the first steps, which have no median yet.
        ([0.0] * 20 + [0.5], []),
        ([1e6, 1.0, 1.0], []),
        # Values that exceed the median never become the usual ones.
        ([1.0] * 20 + [2000.0] * 300 + [1.0, 2000.0], [20, 321]),
    ],
)
def test_a_value_diverges_if_it_exceeds_its_running_median_by_orders_of_magnitude(values, alarms):
    monitor = DivergenceMonitor(1000.0)
    assert [step for step, value in enumerate(values) if monitor.update({"generator/loss": value})] == alarms
