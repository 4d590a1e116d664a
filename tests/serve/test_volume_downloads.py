"""The page keeps the NIfTI of a volume, and encodes other formats when they are downloaded."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient
from gradio.route_utils import delete_files_created_by_app
from PIL import Image
from service_clients import client_of, real_backend
from starlette.requests import Request

from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.page import layout, volume_downloads
from raylift.serve.page.events import Actions
from raylift.serve.page.result_files import ResultFiles
from raylift.serve.page.upload_quota import size_of
from raylift.serve.reconstructor import Reconstructor
from raylift.serve.volume_formats import FORMATS

Reconstruct = Callable[..., tuple[np.ndarray, Path, str]]


@pytest.fixture
def backend(reconstructor: Reconstructor) -> Backend:
    return real_backend(reconstructor)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


@pytest.fixture
def reconstruct(backend: Backend, uploads: Path, radiographs: dict[str, bytes], tmp_path: Path) -> Reconstruct:
    """The volume of a click on the page, its stored file and the HTML with the links."""
    values: list[object] = []
    for view, data in radiographs.items():
        (tmp_path / f"{view}.png").write_bytes(data)
        values += [str(tmp_path / f"{view}.png"), "no", False]

    def click(max_stored_bytes: float = np.inf) -> tuple[np.ndarray, Path, str]:
        decoder = ImageDecoder(backend.description, RadiographLimits())
        outputs = asyncio.run(Actions(backend, decoder, max_stored_bytes).reconstruct(None, *values))
        return outputs[2], Path(outputs[-2].value["path"]), outputs[-1]

    return click


@pytest.fixture
def client(backend: Backend, uploads: Path) -> TestClient:
    client = client_of(backend)
    volume_downloads.add_routes(client.app, backend, uploads)
    return client


def encodings(backend: Backend) -> int:
    return int(float(re.search(rb'stage="encoding"\} (\S+)|$', counts(backend)).group(1) or 0))


def counts(backend: Backend) -> bytes:
    lines = backend.metrics.text().splitlines()
    return b"\n".join(line for line in lines if line.startswith(b"raylift_stage_seconds_count"))


def test_a_click_encodes_the_nifti_alone_and_a_second_one_stores_no_image_again(
    reconstruct: Reconstruct, backend: Backend, uploads: Path
) -> None:
    _, stored, _ = reconstruct()
    assert encodings(backend) == 1
    kept = {path: path.stat().st_size for path in uploads.rglob("*") if path.is_file()}
    assert {path.name for path in kept} == {"reconstruction.nii.gz", "image.png", "result.json"}
    other = reconstruct()[1]
    assert other.parent.name != stored.parent.name
    new = {path for path in uploads.rglob("*") if path.is_file()} - {*kept}
    assert new == {other, other.with_name("result.json")}


def test_the_links_give_the_volume_in_each_other_format_and_store_nothing(
    reconstruct: Reconstruct, client: TestClient, backend: Backend, uploads: Path
) -> None:
    hu, _, html = reconstruct()
    size = size_of(uploads)
    links = re.findall(r'<a id="download-(\w+)" href="([^"]+)" download="([^"]+)">Download (\w+)</a>', html)
    assert links.pop()[2] == "reconstruction.html"
    others = list(FORMATS.values())[1:]
    assert [(identifier.upper(), name) for identifier, _, name, _ in links] == [
        (kind.name.upper(), f"reconstruction{kind.suffix}") for kind in others
    ]
    for (_, path, name, _), kind in zip(links, others, strict=True):
        response = client.get(f"/{path}")
        assert (response.status_code, response.headers["content-type"]) == (200, kind.media_type)
        assert response.headers["content-disposition"] == f'attachment; filename="{name}"'
        assert response.content == backend.encode(hu, kind)
    assert size_of(uploads) == size


def test_a_format_that_cannot_be_encoded_leaves_the_volume_and_the_other_links(
    reconstruct: Reconstruct, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylift.serve.volume_formats.CTImageStorage", "not a UID")
    _, stored, html = reconstruct()
    paths = {name: path for path, name in re.findall(r'href="([^"]+)" download="([^"]+)"', html)}
    failing = TestClient(client.app, raise_server_exceptions=False)
    statuses = {name: failing.get(f"/{path}").status_code for name, path in paths.items()}
    assert statuses.pop("reconstruction.zip") == 500
    assert {*statuses.values()} == {200}
    assert stored.is_file()


def test_a_volume_that_was_deleted_and_names_of_no_format_get_404(reconstruct: Reconstruct, client: TestClient) -> None:
    _, stored, _ = reconstruct()
    folder = f"/volumes/{stored.parent.name}"
    assert client.post(f"{folder}/reconstruction.nrrd").status_code == 405
    for path in (f"{folder}/reconstruction.nii.gz", f"{folder}/image.png", "/volumes/../reconstruction.nrrd"):
        assert client.get(path).status_code == 404
    stored.unlink()
    expired = client.get(f"{folder}/reconstruction.nrrd")
    assert (expired.status_code, expired.json()["detail"]) == (404, "the volume has expired: reconstruct it again")


def test_the_report_is_one_file_with_the_images_the_model_and_the_disclaimer(
    reconstruct: Reconstruct, client: TestClient, backend: Backend
) -> None:
    _, stored, _ = reconstruct()
    response = client.get(f"/volumes/{stored.parent.name}/reconstruction.html")
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "must not be used for diagnosis" in response.text
    assert backend.model.sha256 in response.text
    images = [Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r'base64,([^"]+)"', response.text)]
    assert [image.size for image in images] == [(3 * 448, 3 * 448)] + 4 * [(448, 448)]
    # Nothing is loaded from elsewhere, and no script runs.
    assert not re.search(r"<script|https?://", response.text)


def test_gradio_deletes_every_file_of_a_result_when_it_is_older_than_the_retention(
    backend: Backend, uploads: Path, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    values: list[object] = []
    for view, data in radiographs.items():
        (tmp_path / f"{view}.png").write_bytes(data)
        values += [str(tmp_path / f"{view}.png"), "no", False]

    async def click() -> gr.Blocks:
        page = layout.build(backend, ImageDecoder(backend.description, RadiographLimits()))
        (handler,) = (one.fn for one in page.fns.values() if getattr(one.fn, "__name__", "") == "reconstruct")
        await handler(None, *values)
        return page

    page = asyncio.run(click())
    files = page.temp_file_sets[-1]
    assert {str(path) for path in uploads.rglob("*") if path.is_file()} == files
    delete_files_created_by_app(page, age=3600)
    assert len(files) == 6
    delete_files_created_by_app(page, age=0)
    assert not [path for path in uploads.rglob("*") if path.is_file()]


def test_uploads_are_kept_as_long_as_the_result_and_only_its_user_may_open_it(
    backend: Backend, uploads: Path, radiographs: dict[str, bytes]
) -> None:
    actions = Actions(backend, ImageDecoder(backend.description, RadiographLimits()))
    values: list[object] = []
    for view, data in radiographs.items():
        values += [actions.files.write(data, f"{view}.png"), "no", False]
        actions.files.paths.clear()  # the page's uploads are Gradio's
    before = time.time()
    for path in values[::3]:
        os.utime(str(path), (before - 3000, before - 3000))
    alice, bob = (gr.Request(Request({"type": "http", "user": user, "headers": []})) for user in ("alice", "bob"))
    identifier = asyncio.run(actions.reconstruct(alice, *values))[0]
    assert all(os.stat(str(path)).st_mtime >= before - 1 for path in values[::3])

    restored = actions.restore(identifier, alice)
    assert restored is not None
    assert restored[: len(values)] == values
    with pytest.warns(UserWarning, match="expired"):
        assert actions.restore(identifier, bob) is None
    Path(str(values[0])).unlink()
    with pytest.warns(UserWarning, match="expired"):
        assert actions.restore(identifier, alice) is None


def test_paths_may_be_added_while_gradio_iterates_over_them() -> None:
    paths = ResultFiles().paths
    paths.update(str(number) for number in range(100))
    for path in paths:
        paths.add(f"{path} and another")
    assert len(paths) == 200


def test_where_no_space_is_left_a_click_is_refused_and_earlier_volumes_stay(
    reconstruct: Reconstruct, uploads: Path
) -> None:
    _, stored, _ = reconstruct()
    with pytest.raises(gr.Error, match=r"The service has no space for further results: try again later\."):
        reconstruct(size_of(uploads))
    assert stored.is_file()
    assert reconstruct(size_of(uploads) + 1)[1].is_file()
