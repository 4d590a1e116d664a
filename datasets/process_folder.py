"""Folders in the temporary directory that belong to a process and are removed when it has ended."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

Purpose = Literal[
    "page", "jobs", "decoder", "volume", "checkpoint-files", "model-files", "event-files", "study-files", "ray-files"
]
"""What a folder is for: the page's uploads and results, results of jobs, the decoder's socket, a volume that is
written, files that are copied to or from a store, or those of Ray during a run."""
LOCK, FILES = "lock", "files"
ABANDONED_S = 60.0
"""A folder without a lock file is kept for this long: its process may not have locked it yet."""


@contextmanager
def make(purpose: Purpose) -> Iterator[Path]:
    """A folder that only this user can read, empty at first and removed on exit; removes those of ended processes.

    It is next to its lock file, in a folder in the temporary directory.
    """
    remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=_prefix(purpose)))
    unlocked = folder / "new"
    lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(folder / LOCK)
        files = folder / FILES
        files.mkdir(mode=0o700)
        yield files
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned() -> None:
    """Remove the folders of this user's processes that ended without removing theirs."""
    temporary_folder = Path(tempfile.gettempdir())
    folders = [folder for purpose in get_args(Purpose) for folder in temporary_folder.glob(_prefix(purpose) + "*")]
    for folder in folders:
        # Anybody may make files and links there; a link is not followed.
        with suppress(OSError):
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not _is_in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _prefix(purpose: Purpose) -> str:
    return f"raylift-{purpose}-"


def _is_in_use(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime < ABANDONED_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
