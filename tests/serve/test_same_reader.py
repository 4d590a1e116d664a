"""The command, the API, the page and the archive have the same pixels of the same file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from radiograph_samples import dicom, encoded
from service_clients import api_of

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.weights import Description
from raylift.platform import cli
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.page.events import Actions, ViewInput
from raylift.serve.reconstructor import HUVolume, Reconstructor
from raylift.serve.served_model import ReconstructionSettings, ServedModel

PX = 96


def pixels() -> dict[str, np.ndarray]:
    """A frontal and a lateral of a phantom, 12 bits."""
    grid = Grid(64, 5.0)
    images = render_drrs(thorax(4, grid)[0], grid, chest(grid))
    return {
        view: (normalize(image) * 4000).astype("<u2")
        for view, image in zip(("frontal", "lateral"), images, strict=True)
    }


def tagged(orientation: dict[str, list[str]], turned: Callable[[np.ndarray], np.ndarray]) -> dict[str, bytes]:
    return {
        view: dicom(np.ascontiguousarray(turned(image)), PatientOrientation=orientation[view])
        for view, image in pixels().items()
    }


FILES: dict[str, Callable[[], dict[str, bytes]]] = {
    "plain": lambda: {view: dicom(image) for view, image in pixels().items()},
    "PNG": lambda: {
        view: encoded(Image.fromarray(image.astype(np.uint16) * 16), "PNG") for view, image in pixels().items()
    },
    "dark bone": lambda: {
        view: dicom((4000 - image).astype("<u2"), PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=4000)
        for view, image in pixels().items()
    },
    "window off the data": lambda: {
        view: dicom(image, WindowCenter=60_000, WindowWidth=100) for view, image in pixels().items()
    },
    "overlay bits": lambda: {
        view: dicom(image | np.uint16(0x8000) * (image > 3900), BitsStored=12, HighBit=11)
        for view, image in pixels().items()
    },
    "pixels of 2 to 1": lambda: {
        view: dicom((image[::2] // 2 + image[1::2] // 2).astype("<u2"), PixelSpacing=[0.8, 0.4])
        for view, image in pixels().items()
    },
    "flipped by tag": lambda: tagged({"frontal": ["R", "F"], "lateral": ["A", "F"]}, lambda one: one[:, ::-1]),
    "lying by tag": lambda: tagged({"frontal": ["F", "R"], "lateral": ["F", "A"]}, np.rot90),
}


@pytest.fixture
def recorded(description: Description) -> tuple[Backend, list[np.ndarray]]:
    """A backend that keeps the network inputs."""
    inputs: list[np.ndarray] = []

    async def reconstruct(radiographs: np.ndarray, _: ReconstructionSettings) -> HUVolume:
        inputs.append(radiographs)
        return HUVolume(np.zeros((32, 32, 32), np.int16))

    async def ready() -> bool:
        return True

    return Backend(ServedModel(description, "0" * 64), reconstruct, ready), inputs


@pytest.mark.parametrize("kind", FILES)
def test_one_file_is_one_network_input_wherever_it_is_read(
    kind: str,
    recorded: tuple[Backend, list[np.ndarray]],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend, inputs = recorded
    files = FILES[kind]()
    suffix = ".png" if kind == "PNG" else ".dcm"
    paths = {view: tmp_path / "files" / f"{view}{suffix}" for view in files}
    (tmp_path / "files").mkdir()
    for view, path in paths.items():
        path.write_bytes(files[view])

    decoder = ImageDecoder(backend.description, RadiographLimits())
    api = TestClient(api_of(backend, decoder))
    response = api.post("/v1/reconstructions", files={view: (f"{view}{suffix}", data) for view, data in files.items()})
    assert response.status_code == 200, response.text
    notes = json.loads(response.headers.get("X-Raylift-Notes", "{}"))
    assert set(notes) == (set() if kind in ("plain", "PNG") else {"frontal", "lateral"})

    actions = Actions(backend, decoder)
    flip = bool(asyncio.run(actions.suggest_flip("lateral", None, str(paths["lateral"]), "auto")).value)
    controls = [ViewInput(str(paths[view]), "auto", flip and view == "lateral") for view in ("frontal", "lateral")]
    inputs.append(
        np.stack(
            [
                asyncio.run(actions._load(view, upload)).image
                for view, upload in zip(("frontal", "lateral"), controls, strict=True)
            ]
        )
    )
    for view, one in zip(("frontal", "lateral"), controls, strict=True):
        shown = asyncio.run(actions.preview(view, *one))[1]
        assert shown.visible == (view in notes)
        assert all(note in shown.value for note in notes.get(view, ()))

    class Recording(Reconstructor):
        def reconstruct(self, radiographs: list[np.ndarray], settings: Any = None) -> list[HUVolume]:
            inputs.extend(radiographs)
            return super().reconstruct(radiographs, settings)

    monkeypatch.setattr("raylift.serve.reconstructor.Reconstructor", Recording)
    command = ["reconstruct", str(model_folder), "-o", str(tmp_path / "volume.nii.gz")]
    assert cli.main([*command, *(word for view, path in paths.items() for word in (f"--{view}", str(path)))]) == 0
    printed = capsys.readouterr().out
    assert all(f"{view}: {'; '.join(some)}\n" in printed for view, some in notes.items())

    url = str(tmp_path / "archive")
    assert (
        cli.main(["ingest-xray", str(tmp_path / "files"), "--archive", url, "--size", "32", "--spacing-mm", "10"]) == 0
    )
    archive = Archive(url)
    (entry,) = archive.entries()
    inputs.append(archive.read_array(entry, "radiographs"))
    assert {view: one["notes"] for view, one in entry.record.items() if "notes" in one} == notes

    assert len(inputs) == 4
    assert all(np.array_equal(one, inputs[0]) for one in inputs)
    plain = {view: (image / 4000).astype(np.float32) for view, image in pixels().items()}
    expected = Reconstructor.load(str(model_folder)).prepare(plain)
    for one, image in zip(inputs[0], expected, strict=True):
        assert np.corrcoef(one.ravel(), image.ravel())[0, 1] > 0.995


@pytest.mark.parametrize(
    "tags", [{"BodyPartExamined": "HAND"}, {"Rows": 63}, {"PatientOrientation": ["L", "P"]}, {"NumberOfFrames": 2}]
)
def test_a_file_that_is_refused_is_refused_everywhere_in_the_same_words(
    tags: dict[str, Any],
    recorded: tuple[Backend, list[np.ndarray]],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = pixels()
    files = {"frontal": dicom(images["frontal"], **tags), "lateral": dicom(images["lateral"])}
    paths = {view: tmp_path / f"{view}.dcm" for view in files}
    for view, path in paths.items():
        path.write_bytes(files[view])
    decoder = ImageDecoder(recorded[0].description, RadiographLimits())
    response = TestClient(api_of(recorded[0], decoder)).post("/v1/reconstructions", files=files)
    assert response.status_code == 415
    words = response.json()["detail"].removeprefix("frontal: ")

    actions = Actions(recorded[0], decoder)
    problem = asyncio.run(actions.preview("frontal", str(paths["frontal"]), "auto", False))[1].value
    assert words in problem
    command = ["reconstruct", str(model_folder), "-o", str(tmp_path / "volume.nii.gz")]
    assert cli.main([*command, *(word for view, path in paths.items() for word in (f"--{view}", str(path)))]) == 2
    assert f"{paths['frontal']}: {words}" in capsys.readouterr().err
    assert cli.main(["ingest-xray", *map(str, paths.values()), "--archive", str(tmp_path / "archive")]) == 1
    assert f"refused: {paths['frontal']}: {words}" in capsys.readouterr().out
    assert not asyncio.run(recorded[0].ready()) or recorded[1] == []
