"""Bounds on the page's uploads."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, UploadFile
from fastapi.testclient import TestClient

from raylift.serve.page import upload_quota
from raylift.serve.page.upload_quota import UploadQuota


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
    monkeypatch.setattr(upload_quota, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3601))
    assert api.post("/gradio_api/upload", files={"file": bytes(10_000)}).status_code == 200


def test_a_refused_upload_counts_for_no_quota_and_the_oldest_one_gives_the_time_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = client(tmp_path, 10**9, 25_000)
    # FastAPI refuses a form without the file.
    assert api.post("/gradio_api/upload", files={"other": bytes(20_000)}).status_code == 422
    assert api.post("/gradio_api/upload", files={"file": bytes(20_000)}).status_code == 200
    monkeypatch.setattr(upload_quota, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3000))
    refused = api.post("/gradio_api/upload", files={"file": bytes(20_000)})
    assert refused.status_code == 429
    assert 590 <= int(refused.headers["retry-after"]) <= 600


def test_uploads_beyond_the_size_of_the_folder_get_503(tmp_path: Path) -> None:
    api = client(tmp_path, 25_000, 10**9)
    responses = [api.post("/gradio_api/upload", files={"file": bytes(10_000)}) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 503]
    assert responses[2].headers["retry-after"] == "3600"
    next(tmp_path.iterdir()).unlink()
    assert api.post("/gradio_api/upload", files={"file": bytes(10_000)}).status_code == 200


def test_an_upload_of_unknown_size_is_refused(tmp_path: Path) -> None:
    assert client(tmp_path, 10**9, 10**9).post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
