"""A head of a Ray cluster that is killed and started again while a job waits for resources."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from s3_server import free_ports

from raylift.datasets.archive.archive import Archive

RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def head(ports: list[int], cpus: int) -> Iterator[tuple[subprocess.Popen, JobSubmissionClient]]:
    """A head and a client of its jobs; it ends with all its processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = os.pathsep.join([str(Path(RAY).parent), environment.get("PATH", os.defpath)])
    # Sockets below the folder must stay under 108 characters.
    temporary = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    gcs, dashboard, agent, client = ports
    command = [RAY, "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={gcs}", f"--temp-dir={temporary}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-host=127.0.0.1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process, connected(f"http://127.0.0.1:{dashboard}", process)
        finally:
            end(process)
            shutil.rmtree(temporary, ignore_errors=True)


def connected(address: str, process: subprocess.Popen) -> JobSubmissionClient:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the head did not start"
        try:
            return JobSubmissionClient(address)
        except (ConnectionError, RuntimeError):
            time.sleep(0.3)
    raise AssertionError("the head did not start in time")


def end(process: subprocess.Popen) -> None:
    """Kill a process and its descendants."""
    if process.poll() is None:
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            if member.is_running():
                member.send_signal(signal.SIGKILL)
        process.wait()


def wait_for(client: JobSubmissionClient, job: str, status: JobStatus) -> None:
    deadline = time.monotonic() + 120
    while (now := client.get_job_status(job)) != status:
        assert not now.is_terminal(), client.get_job_logs(job)
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_job_that_waits_while_the_head_restarts_is_forgotten_and_runs_once_when_it_is_submitted_again(tmp_path):
    ports, archive = free_ports(4), tmp_path / "archive"
    words = ["python", "-m", "raylift", "phantom", "--archive", str(archive), "--count", "1", "--size", "16"]
    job = {"entrypoint": " ".join(words), "submission_id": "phantoms", "entrypoint_num_cpus": 1}
    with head(ports, cpus=0) as (process, client):
        client.submit_job(**job)
        assert client.get_job_status("phantoms") == JobStatus.PENDING
        with pytest.raises(RuntimeError, match="phantoms already exists"):
            client.submit_job(**job)
        end(process)
        with pytest.raises(ConnectionError):
            JobSubmissionClient(client.get_address())
    assert not archive.exists(), "the job did not wait"
    with head(ports, cpus=1) as (_, client):
        with pytest.raises(RuntimeError, match="phantoms does not exist"):
            client.get_job_status("phantoms")
        assert client.submit_job(**job) == "phantoms"
        wait_for(client, "phantoms", JobStatus.SUCCEEDED)
        with pytest.raises(RuntimeError, match="phantoms already exists"):
            client.submit_job(**job)
    assert len(Archive(str(archive)).entries("train")) == 1
