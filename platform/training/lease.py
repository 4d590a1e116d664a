"""The lease of a run or a search: one process at a time works on it, on a folder or an object store.

`<run>/.lease-<number>.json` names the process and the time of its last heartbeat. A lease is taken by creating the next
number, which a store grants to one writer, so no file of another process is ever replaced.
"""

from __future__ import annotations

import os
import platform as machine
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import AlteredFileError, ConfigError, RayliftError

BEAT_S, STALE_S = 10.0, 60.0
"""Seconds between heartbeats, and after the last one until another process may take the lease over."""
RELEASE_S = 10.0
"""How long a process that ends waits for the removal of its lease; a store that does not respond may take longer."""
PREFIX = ".lease-"


class LeaseLostError(RayliftError, RuntimeError):
    """Another process has taken over the run or the search of this one."""


def this_process() -> dict[str, Any]:
    """Host, process namespace, id and start of this process, for a record."""
    return {"host": machine.node(), "namespace": _namespace(), "pid": os.getpid(), "started": _started(os.getpid())}


def has_ended(process: dict[str, Any]) -> bool:
    """Whether a recorded process is known to have ended, which is known of this namespace's only.

    Containers and copies of a virtual machine may have one host name; they differ in their namespace or boot.
    """
    return is_here(process) and _started(process["pid"]) != process["started"]


def is_here(process: dict[str, Any]) -> bool:
    """Whether a recorded process is of this boot and namespace, so that its id means the same here."""
    return process.get("namespace") == _namespace()


def _namespace() -> str:
    """Where process ids are unique: the boot of this machine and its namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot, which no change of the clock moves; None without it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses, which may contain spaces; the start is the 22nd.
    return int(status.rpartition(")")[2].split()[19])


@contextmanager
def acquire(url: str, take_over: bool = False) -> Iterator[None]:
    """Acquire and hold the lease of a run or a search within this context, with a heartbeat.

    The lease of a process of this machine that has ended is taken at once.

    Args:
        url: its folder.
        take_over: whether a lease without a recent heartbeat is taken, after two heartbeats' time without one.

    Raises:
        ConfigError: another process holds it; names its host and the age of its heartbeat.
        LeaseLostError: another process took it over meanwhile. The main thread stops what it does.
    """
    folder = Folder(url)
    number = _take(folder, take_over)
    stop, lost = threading.Event(), threading.Event()
    main_thread = threading.main_thread()
    in_main_thread = threading.current_thread() is main_thread

    def beat() -> None:
        while not stop.wait(BEAT_S):
            try:
                if _numbers(folder)[-1:] != [number]:
                    lost.set()
                    if in_main_thread:
                        signal.pthread_kill(main_thread.ident or 0, signal.SIGINT)
                    break
                folder.write(_name(number), _content())
            except OSError as error:
                print(f"raylift: the heartbeat of {url} was not written: {error}", flush=True)
        try:
            folder.remove(_name(number))
        except OSError as error:
            print(f"raylift: the lease of {url} was not removed: {error}", flush=True)

    thread = threading.Thread(target=beat, daemon=True, name="raylift-lease")
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise LeaseLostError(f"{url} was taken over by another process: this one stops") from None
        raise
    finally:
        stop.set()
        thread.join(RELEASE_S)


def describe(folder: Folder) -> str:
    """The holder of a run's or search's lease: running or lost, process, host and heartbeat; empty if there is none."""
    try:
        lease = folder.read_hashed(_name(_numbers(folder)[-1]))
    except (IndexError, FileNotFoundError):
        return ""
    state = "lost" if has_ended(lease["process"]) or abs(_age_s(lease)) > STALE_S else "running"
    return f"{state}: {_owner(lease)}"


def _take(folder: Folder, take_over: bool) -> int:
    """Create the next lease and remove earlier ones; returns its number."""
    numbers = _numbers(folder)
    if numbers:
        _require_free(folder, numbers[-1], take_over)
    number = numbers[-1] + 1 if numbers else 1
    try:
        folder.create(_name(number), _content())
    except FileExistsError as error:
        raise ConfigError(f"another process resumes {folder.url} at the same time: choose another folder") from error
    for earlier in numbers:
        folder.remove(_name(earlier))
    return number


def _require_free(folder: Folder, number: int, take_over: bool) -> None:
    try:
        lease = folder.read_hashed(_name(number))
    except FileNotFoundError:
        return  # released meanwhile
    except AlteredFileError as error:
        raise ConfigError(f"{error}: remove it if no process is at work there") from error
    if has_ended(lease["process"]):
        return
    owner = _owner(lease)
    if abs(_age_s(lease)) <= STALE_S:
        raise ConfigError(f"{folder.url} is in use by {owner}: stop it first, or choose another folder")
    if not take_over:
        raise ConfigError(f"{folder.url} was in use by {owner}: if it has ended, add --take-over")
    if _has_heartbeat(folder, number):
        raise ConfigError(
            f"{folder.url} is in use by {owner}, whose clock differs and whose heartbeats go on: stop it first"
        )
    print(f"raylift: {folder.url} is taken over from {owner}", flush=True)


def _age_s(lease: dict[str, Any]) -> float:
    """Seconds since the last heartbeat by the clocks of both machines; negative if the owner's is ahead."""
    return time.time() - float(lease["time"])


def _owner(lease: dict[str, Any]) -> str:
    age_s, process = _age_s(lease), lease["process"]
    dated = f"{age_s:.0f} s old" if age_s >= 0 else f"dated {-age_s:.0f} s ahead of the clock here"
    return f"process {process['pid']} on {process['host']}, whose last heartbeat is {dated}"


def _has_heartbeat(folder: Folder, number: int) -> bool:
    """Whether a lease is renewed while this process waits for two heartbeats, whatever the owner's clock shows."""
    before = folder.read(_name(number))
    time.sleep(2 * BEAT_S)
    return folder.exists(_name(number)) and folder.read(_name(number)) != before


def _numbers(folder: Folder) -> list[int]:
    names = [name for name in folder.names() if name.startswith(PREFIX) and name.endswith(".json")]
    return sorted(int(name.removeprefix(PREFIX).removesuffix(".json")) for name in names)


def _name(number: int) -> str:
    return f"{PREFIX}{number:06d}.json"


def _content() -> bytes:
    return hashed_json.encode({"process": this_process(), "time": time.time()})
