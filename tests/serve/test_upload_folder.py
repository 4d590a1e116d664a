"""The page's uploads: folders of processes that ended are removed, and their size is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, UploadFile
from fastapi.testclient import TestClient

from raylift.serve.page import upload_folder
from raylift.serve.page.upload_folder import UploadQuota

OWNER = """
import sys
from raylift.serve.page import upload_folder
folder = upload_folder.make()
(folder / "patient.dcm").write_bytes(b"pixels")
print(folder, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_removed_when_its_process_was_killed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recent, old = (tmp_path / f"{upload_folder.PREFIX}{name}" for name in ("recent", "old"))
    recent.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    upload_folder.remove_unowned()
    assert ((folder / "patient.dcm").exists(), recent.exists(), old.exists()) == (True, True, False)
    assert folder.stat().st_mode & 0o777 == 0o700
    owner.kill()
    owner.communicate()
    upload_folder.remove_unowned()
    assert not folder.exists()


def client(folder: Path, max_bytes: int, max_client_bytes: int, retention_s: float = 3600.0) -> TestClient:
    app = FastAPI()

    @app.post("/gradio_api/upload")
    async def upload(file: UploadFile) -> int:
        data = await file.read()
        return (folder / f"{len(list(folder.iterdir()))}.dcm").write_bytes(data)

    quota = {"max_bytes": max_bytes, "max_client_bytes": max_client_bytes, "retention_s": retention_s}
    app.add_middleware(UploadQuota, folder=folder, **quota)
    return TestClient(app)


def test_uploads_beyond_the_quota_of_a_client_get_429_until_the_retention_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = client(tmp_path, 10**9, 25_000)
    statuses = [api.post("/gradio_api/upload", files={"file": bytes(10_000)}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    monkeypatch.setattr(upload_folder, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3601))
    assert api.post("/gradio_api/upload", files={"file": bytes(10_000)}).status_code == 200


def test_a_refused_upload_counts_for_no_quota_and_the_oldest_one_gives_the_time_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = client(tmp_path, 10**9, 25_000)
    # FastAPI refuses a form without the file.
    assert api.post("/gradio_api/upload", files={"other": bytes(20_000)}).status_code == 422
    assert api.post("/gradio_api/upload", files={"file": bytes(20_000)}).status_code == 200
    monkeypatch.setattr(upload_folder, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3000))
    refused = api.post("/gradio_api/upload", files={"file": bytes(20_000)})
    assert refused.status_code == 429
    assert 590 <= int(refused.headers["retry-after"]) <= 600


def test_files_and_links_with_the_name_of_a_folder_do_not_stop_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{upload_folder.PREFIX}old.zip").touch()
    loop = tmp_path / f"{upload_folder.PREFIX}loop"
    loop.symlink_to(loop)
    made = upload_folder.make()
    assert {path.name for path in tmp_path.iterdir()} == {f"{upload_folder.PREFIX}old.zip", loop.name, made.name}


def test_uploads_beyond_the_size_of_the_folder_get_503(tmp_path: Path) -> None:
    api = client(tmp_path, 25_000, 10**9)
    responses = [api.post("/gradio_api/upload", files={"file": bytes(10_000)}) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 503]
    assert responses[2].headers["retry-after"] == "3600"
    next(tmp_path.iterdir()).unlink()
    assert api.post("/gradio_api/upload", files={"file": bytes(10_000)}).status_code == 200


def test_an_upload_of_unknown_size_is_refused(tmp_path: Path) -> None:
    assert client(tmp_path, 10**9, 10**9).post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
