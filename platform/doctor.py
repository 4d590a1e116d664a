"""Checks of the installation and the machine, with a remedy for each failure."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as machine
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import raylift

PACKAGES = ("torch", "ray", "deepspeed", "optuna", "zarr", "fsspec", "s3fs", "gradio", "SimpleITK", "pydicom")
UPLOAD_LIMIT_MIB = 512


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    status: Literal["ok", "note", "FAIL"]
    name: str
    text: str
    remedy: str = ""


def run_checks() -> list[Check]:
    """Run all checks: versions, hardware, Ray, object store, stale locks, checkout."""
    return [*_versions(), *_machine(), *_ray(), *_store(), *_leftovers(), *_checkout()]


def _versions() -> Iterator[Check]:
    yield Check("ok", "raylift", f"{raylift.__version__} at {Path(raylift.__file__).parent}")
    minor = tuple(map(int, machine.python_version_tuple()[:2]))
    supported = (3, 11) <= minor < (3, 14)
    yield Check(
        "ok" if supported else "FAIL",
        "python",
        machine.python_version(),
        "" if supported else "use Python 3.11, 3.12 or 3.13",
    )
    for name in PACKAGES:
        try:
            yield Check("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check("FAIL", name, "not installed", f"pip install -c constraints.txt {name}")


def _machine() -> Iterator[Check]:
    import psutil

    cores, memory = os.cpu_count() or 1, psutil.virtual_memory()
    yield Check("ok", "cpu", f"{cores} cores, {machine.machine()}")
    enough = memory.available > 4 * 2**30
    yield Check(
        "ok" if enough else "note",
        "memory",
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        "" if enough else "the demo needs 4 GiB: end other programs, or lower train.batch_size",
    )
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
            yield Check("ok", "gpu", names)
        else:
            yield Check("note", "gpu", "none: presets named slim and tiny train on the CPU")
    shm = Path("/dev/shm")  # noqa: S108 - only its size is read
    if shm.exists():
        free = shutil.disk_usage(shm).free / 2**30
        enough = free > 0.5
        yield Check(
            "ok" if enough else "note",
            "shared memory",
            f"{free:.1f} GiB free",
            "" if enough else "Ray keeps its objects there: enlarge it, in a container with --shm-size=2g",
        )


def _ray() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Check("note", "ray cluster", "RAY_ADDRESS is not set: commands start Ray on this machine")
    else:
        yield Check("ok", "ray cluster", f"RAY_ADDRESS is {address}")
        if os.environ.get("RAY_AUTH_MODE") != "token":
            yield Check(
                "note",
                "ray token",
                "RAY_AUTH_MODE is not set",
                "export RAY_AUTH_MODE=token if the cluster responds with 401",
            )
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if token.is_file() and token.stat().st_mode & 0o077:
        yield Check("FAIL", "ray token", f"{token} can be read by others", f"chmod 600 {token}")


def _store() -> Iterator[Check]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        yield Check(
            "note",
            "object store",
            "AWS_ENDPOINT_URL_S3 is not set: s3:// refers to Amazon S3; local folders work without it",
        )
        return
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    try:
        urlopen(endpoint, timeout=5).close()  # noqa: S310 - the operator's own setting
    except HTTPError:
        pass  # a response, though an error
    except (URLError, OSError, ValueError) as error:
        yield Check("FAIL", "object store", f"{endpoint} does not respond: {error}", "start it or correct the variable")
        return
    yield Check("ok", "object store", f"{endpoint} responds")


def _leftovers() -> Iterator[Check]:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    for lock in sorted(folder.rglob("lock")) if folder.is_dir() else ():
        yield Check(
            "note", "stale lock", str(lock), f"if no build is running: rm {lock}; builds wait for it without end"
        )


def _checkout() -> Iterator[Check]:
    root = Path(raylift.__file__).parent.parent
    if not (root / "pyproject.toml").is_file():
        return
    size = sum(
        path.stat().st_size
        for top in ("raylift", "datasets", "models", "platform", "serve", "tune_spaces")
        for path in (root / top).rglob("*")
        if path.is_file()
    )
    mib = size / 2**20
    yield Check(
        "ok" if mib < UPLOAD_LIMIT_MIB else "FAIL",
        "job upload",
        f"{mib:.1f} MiB of code, of the {UPLOAD_LIMIT_MIB} MiB that ray job submit accepts",
    )
