"""The page keeps the NIfTI of a volume, and encodes other formats when they are downloaded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from fastapi.testclient import TestClient
from service_clients import client_of, real_backend

from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.page import volume_downloads
from raylift.serve.page.events import Actions
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
        outputs = asyncio.run(Actions(backend, decoder, max_stored_bytes).reconstruct(*values))
        return outputs[0], Path(outputs[-2].value["path"]), outputs[-1]

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


def test_a_click_encodes_the_nifti_alone_and_a_second_one_stores_nothing_more(
    reconstruct: Reconstruct, backend: Backend, uploads: Path
) -> None:
    _, stored, _ = reconstruct()
    assert encodings(backend) == 1
    kept = {path: path.stat().st_size for path in uploads.rglob("*") if path.is_file()}
    assert {path.name for path in kept} == {"reconstruction.nii.gz", "image.png"}
    assert reconstruct()[1] == stored
    assert {path: path.stat().st_size for path in uploads.rglob("*") if path.is_file()} == kept


def test_the_links_give_the_volume_in_each_other_format_and_store_nothing(
    reconstruct: Reconstruct, client: TestClient, backend: Backend, uploads: Path
) -> None:
    hu, _, html = reconstruct()
    size = size_of(uploads)
    links = re.findall(r'<a id="download-(\w+)" href="([^"]+)" download="([^"]+)">Download (\w+)</a>', html)
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
    assert statuses == {"reconstruction.nrrd": 200, "reconstruction.zip": 500, "reconstruction.png": 200}
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


def test_where_no_space_is_left_a_click_is_refused_and_earlier_volumes_stay(
    reconstruct: Reconstruct, uploads: Path
) -> None:
    _, stored, _ = reconstruct()
    with pytest.raises(gr.Error, match=r"The service has no space for further results: try again later\."):
        reconstruct(size_of(uploads))
    assert stored.is_file()
    assert reconstruct(size_of(uploads) + 1)[1] == stored
