"""Folders of processes: they are removed when their process has ended, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import pytest

from raylift.datasets import process_folder

OWNER = """
import sys
from raylift.datasets import process_folder
with process_folder.make(sys.argv[1]) as folder:
    (folder / "patient.dcm").write_bytes(b"pixels")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("purpose", get_args(process_folder.Purpose))
def test_a_folder_is_removed_when_its_process_was_killed_and_not_before(
    purpose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recent, old, other = (tmp_path / name for name in (f"raylift-{purpose}-a", f"raylift-{purpose}-b", "raylift-data"))
    for folder in (recent, old, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, purpose],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    process_folder.remove_abandoned()
    assert (folder / "patient.dcm").exists()
    assert (recent.exists(), old.exists(), other.exists()) == (True, False, True)
    assert folder.stat().st_mode & 0o777 == 0o700
    owner.kill()
    owner.communicate()
    process_folder.remove_abandoned()
    assert not folder.parent.exists()


def test_a_folder_is_empty_at_first_and_removed_on_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with process_folder.make("volume") as folder:
        assert not list(folder.iterdir())
        (folder / "volume.nii.gz").touch()
        assert [folder.parent] == list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_files_and_links_with_the_name_of_a_folder_do_not_stop_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "raylift-page-old.zip").touch()
    loop = tmp_path / "raylift-page-loop"
    loop.symlink_to(loop)
    with process_folder.make("page") as made:
        assert {path.name for path in tmp_path.iterdir()} == {"raylift-page-old.zip", loop.name, made.parent.name}
