"""Connecting to a Ray cluster or starting a local one, with the defaults of Ray that raylift changes."""

from __future__ import annotations

import os
import random
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir

from raylift.datasets.errors import ConfigError, RayliftError

ENVIRONMENT = {
    # Reports are paced by the controller's poll: 2 s each at the default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Keep the working directory: relative paths and `ray job submit --working-dir` depend on it.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The Train tab of the dashboard.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # After the loss of a node, do not wait a minute for reservations that were lost with it.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    # A worker that stopped responding does not take part in the end of its group.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # Ray warns about more processes than cores; controllers and drivers use hardly any CPU time.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Workers select their own devices; Ray warns that it will stop masking them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Interrupted searches end as runs do.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The inference time of a trial, an objective, is measured after its last validation.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # No tables of Tune between the lines of raylift.
    "RAY_AIR_NEW_OUTPUT": "0",
}
HEAD_NODE = {"node:__internal_head__": 0.001}
TRIAL_DRIVER = {"CPU": 0.0, **HEAD_NODE}
"""Resources of the driver of a trial. It reserves no CPU: drivers that reserved all CPUs would leave none to their
workers, and the search would stall without a message. A small share of the head node keeps drivers off other nodes."""


LONGEST_RAY_FOLDER = 107 - len("/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store")
"""Longest path, in bytes, of the folder of Ray's sessions: 107 is Linux's limit of the path of a socket."""


SHORT_ROOT = Path("/tmp")  # noqa: S108 - Ray's own default without TMPDIR
"""Where Ray's sessions are if TMPDIR is too long."""


CLIENT_PORTS, FIRST_PORT = Path("/proc/sys/net/ipv4/ip_local_port_range"), 20_000
"""Range of the ports that the kernel gives to clients, and the first port above those of Ray's workers."""


START_TIMED_OUT, START_ATTEMPTS = "node timed out during startup", 2
"""Part of Ray's message if it did not start in time, and how often it is started."""


class RayStartError(RayliftError, RuntimeError):
    """Ray did not start on this machine in time."""


class ClusterTooSmallError(RayliftError, RuntimeError):
    """The required resources exceed those of the cluster."""


def connect() -> None:
    """Connect to the cluster of `RAY_ADDRESS` (set in Ray jobs), else start Ray locally. Idempotent.

    The output of workers stays in Ray's logs unless `RAYLIFT_RAY_LOGS=1`.

    Raises:
        RayStartError: Ray did not start in time, twice.
    """
    if ray.is_initialized():
        return
    folder = session_folder()
    apply_environment()
    to_driver = os.environ.get("RAYLIFT_RAY_LOGS") == "1"
    options: dict[str, Any] = {"log_to_driver": to_driver, "logging_level": "INFO" if to_driver else "ERROR"}
    variables = {name: os.environ[name] for name in (*ENVIRONMENT, "RAY_ADDRESS") if name in os.environ}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
            ray.init(runtime_env={"env_vars": variables}, **options)
        else:
            _start(folder, variables, options)
    restrict_token()


def _start(folder: str | None, variables: dict[str, str], options: dict[str, Any]) -> None:
    """Start Ray on this machine, a second time if the first takes too long, which happens on a busy machine."""
    for attempt in range(1, START_ATTEMPTS + 1):
        # Helpers of Ray, such as the one that frees the resources of a stopped trial, search the machine for their
        # cluster and fail if a second one runs on it. The address selects theirs.
        port = free_port()
        variables["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"  # type: ignore[no-untyped-call]
        try:
            with ExitStack() as environment:
                environment.enter_context(environment_variable("RAY_GCS_SERVER_PORT", str(port)))
                if folder:
                    # Python's multiprocessing in Ray's processes has sockets in TMPDIR too.
                    environment.enter_context(environment_variable("TMPDIR", folder))
                ray.init("local", runtime_env={"env_vars": variables}, _temp_dir=folder, **options)
        except Exception as error:
            if START_TIMED_OUT not in str(error):
                raise
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise RayStartError(
                    f"Ray did not start within 30 s, {attempt} times: this machine is busy or has little memory; try "
                    "again later, or join a cluster with RAY_ADDRESS"
                ) from error
            print(f"raylift: Ray did not start within 30 s, retrying ({attempt + 1} of {START_ATTEMPTS})", flush=True)
        else:
            return


def session_folder() -> str | None:
    """The folder of the sessions of a local Ray; None for Ray's default, which is in TMPDIR.

    Commands call it before they write anything.

    Raises:
        ConfigError: the paths of Ray's sockets would be too long, in TMPDIR as in /tmp.
    """
    if ray.is_initialized() or os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
        return None
    default = Path(get_default_ray_temp_dir())  # type: ignore[no-untyped-call]
    if len(os.fsencode(default)) <= LONGEST_RAY_FOLDER:
        return None
    # Each user has a folder of their own, since another user's cannot be written.
    short = SHORT_ROOT / f"ray-{os.getuid()}"
    try:
        short.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=short):
            return str(short)
    except OSError as error:
        raise ConfigError(
            f"{default} is too long for the sockets of Ray, and {short} cannot be used ({error.strerror}): set "
            f"RAY_TMPDIR to a folder whose path has at most {LONGEST_RAY_FOLDER - len('/ray')} bytes"
        ) from error


def apply_environment() -> None:
    """Set raylift's defaults in this process, unless the variable is already set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def capacity(cpus: float, gpus: float) -> int:
    """The number of tasks with these resources that the cluster can run at once."""
    available = _resources()
    counts = [available.get("CPU", 0.0) / cpus] if cpus else []
    counts += [available.get("GPU", 0.0) / gpus] if gpus else []
    return int(min(counts, default=0) + 1e-6)


def ray_storage(url: str) -> tuple[str, Any]:
    """Path and pyarrow file system for Ray's files; None is the local file system."""
    if not url.startswith("s3://"):
        return url, None
    from pyarrow import fs

    filesystem = fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        connect_timeout=10,
        request_timeout=60,
        # The default fails within seconds, and Ray does not retry writes of its controller.
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=12),
    )
    return url.removeprefix("s3://"), filesystem


def require_resources(cpus: float, gpus: float, consumer: str, remedy: str = "") -> None:
    """Check that the cluster has the resources, because Ray would wait for them without end.

    Args:
        cpus: required CPUs.
        gpus: required GPUs.
        consumer: what needs them, for the message.
        remedy: the settings to lower; by default those of a run.

    Raises:
        ClusterTooSmallError: with required and available resources, and the settings to change.
    """
    available = _resources()
    for name, required, setting in (("CPU", cpus, "cpus-per-worker"), ("GPU", gpus, "gpus-per-worker")):
        if required > available.get(name, 0) + 1e-6:
            raise ClusterTooSmallError(
                f"{consumer} needs {required:g} {name}s and this cluster has {available.get(name, 0):g}: "
                f"lower {remedy or f'--cluster.workers or --cluster.{setting}'}, or join a larger cluster with "
                "RAY_ADDRESS"
            )


def restrict_token() -> None:
    """Restrict Ray's token to its owner; Ray writes it readable for all users of the machine."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if path.is_file() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def free_port() -> int:
    """A port on which nothing listens, above those of Ray's workers and outside the range of clients' ports.

    The kernel can give a port of that range to a client before Ray listens on it. Where the range is not known or
    leaves no other port, the kernel chooses one.

    Raises:
        RayStartError: there is none.
    """
    known = CLIENT_PORTS.is_file()
    first, last = map(int, CLIENT_PORTS.read_text(encoding="ascii").split()) if known else (FIRST_PORT, 65_535)
    candidates = [port for port in range(FIRST_PORT, 65_536) if not first <= port <= last]
    if not candidates:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RayStartError(
        f"every port from {FIRST_PORT} on that is not between {first} and {last}, the ports of clients, is in use: end "
        f"other programs, or narrow {CLIENT_PORTS}"
    )


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of this process within a context."""
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if previous is not None:
            os.environ[name] = previous


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources
