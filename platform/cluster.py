"""Ray: joining a cluster or starting one here, with the defaults that do not suit us set in this one place."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from raylift.datasets.errors import RayliftError

ENVIRONMENT = {
    # Reports are paced by the controller's poll: 2 s each at the default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Keep the working directory: relative paths and `ray job submit --working-dir` count on it.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The Train tab of the dashboard.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # After the loss of a node, do not wait a minute on reservations that died with it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # Ray warns of more processes than cores, which controllers and drivers that hardly compute always are.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Workers find their own devices; Ray announces that it will stop hiding them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tune's own tables between our lines.
    "RAY_AIR_NEW_OUTPUT": "0",
}
TRIAL_DRIVER = {"CPU": 0.0, "node:__internal_head__": 0.001}
"""What the driver of a search's trial asks for. It must not be a CPU: drivers that hold all CPUs leave none to the
workers they start, and the search stalls without a word. A sliver of the head keeps drivers off nodes that may go."""


class ClusterTooSmall(RayliftError, RuntimeError):
    """What was asked for can never be scheduled on this cluster."""


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (a job has it set), else start Ray on this machine. Does nothing twice.

    What workers print stays in Ray's logs unless `RAYLIFT_RAY_LOGS=1`.
    """
    if ray.is_initialized():
        return
    apply_environment()
    loud = os.environ.get("RAYLIFT_RAY_LOGS") == "1"
    options: dict[str, Any] = {"log_to_driver": loud, "logging_level": "INFO" if loud else "ERROR"}
    variables = {name: os.environ[name] for name in (*ENVIRONMENT, "RAY_ADDRESS") if name in os.environ}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
            ray.init(runtime_env={"env_vars": variables}, **options)
        else:
            # Ray's own helpers look for their cluster on the machine and give up where a second one runs beside it,
            # as the one does that frees what a stopped trial had reserved: tell them which is theirs.
            port = _free_port()
            variables["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]
            with _set("RAY_GCS_SERVER_PORT", str(port)):
                ray.init("local", runtime_env={"env_vars": variables}, **options)
    restrict_token()


def apply_environment() -> None:
    """Set our defaults in this process, where nothing else was chosen."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def capacity(cpus: float, gpus: float) -> int:
    """How many times so much fits into the cluster."""
    there = _resources()
    times = [there.get("CPU", 0.0) / cpus] if cpus else []
    times += [there.get("GPU", 0.0) / gpus] if gpus else []
    return int(min(times, default=0) + 1e-6)


def ray_storage(url: str) -> tuple[str, Any]:
    """Path and pyarrow file system for Ray's own files; None is the local one."""
    if not url.startswith("s3://"):
        return url, None
    from pyarrow import fs

    filesystem = fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        connect_timeout=10,
        request_timeout=60,
        # The default gives up within seconds, and Ray does not retry what its controller fails to write.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=12),
    )
    return url.removeprefix("s3://"), filesystem


def require_resources(cpus: float, gpus: float, what: str) -> None:
    """Refuse at once what would otherwise wait for ever.

    Raises:
        ClusterTooSmall: names what is wanted, what there is, and the settings to change.
    """
    there = _resources()
    for name, wanted, setting in (("CPU", cpus, "cpus-per-worker"), ("GPU", gpus, "gpus-per-worker")):
        if wanted > there.get(name, 0) + 1e-6:
            raise ClusterTooSmall(
                f"{what} needs {wanted:g} {name}s and this cluster has {there.get(name, 0):g}: "
                f"lower --cluster.workers or --cluster.{setting}, or join a larger cluster with RAY_ADDRESS"
            )


def restrict_token() -> None:
    """Ray writes its token readable for everyone on the machine: make it the owner's alone."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if path.is_file() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _resources() -> dict[str, float]:
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return there
