"""`--consistency-steps` in the service and on the page."""

import asyncio
import io
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from service_clients import real_backend

from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.page import layout
from raylift.serve.page.events import Actions
from raylift.serve.reconstructor import Reconstructor


@pytest.fixture
def fitting(model_folder: Path) -> Reconstructor:
    return Reconstructor.load(str(model_folder), consistency_steps=3)


def backend(reconstructor: Reconstructor, steps: int) -> Backend:
    return real_backend(reconstructor, consistency_steps=steps, max_consistency_steps=steps)


def test_a_service_with_a_fit_returns_the_fitted_volume_and_its_residuals(
    fitting_url: str, fitting: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    response = httpx.post(
        f"{fitting_url}/v1/reconstructions",
        files=radiographs,
        data={"invert": "no"},
        timeout=60,
        trust_env=False,
    )
    assert response.status_code == 200
    (expected,) = fitting.reconstruct(
        [fitting.prepare({view: read(data, view, invert="no").pixels for view, data in radiographs.items()})]
    )
    (tmp_path / "volume.nii.gz").write_bytes(response.content)
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "volume.nii.gz")))[::-1]
    assert np.abs(np.subtract(hu, expected.hu, dtype=np.int32)).max() <= 1
    for place, name in enumerate(("x-raylift-residual-before", "x-raylift-residual-after")):
        header = dict(part.split("=") for part in response.headers[name].split(", "))
        assert list(header) == ["frontal", "lateral"]
        for view, value in header.items():
            assert float(value) == pytest.approx(expected.residuals[view][place], abs=2e-4)


def test_the_page_shows_the_residuals_of_a_fitted_volume(
    fitting: Reconstructor, reconstructor: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    values: list[object] = []
    for view, data in radiographs.items():
        (tmp_path / f"{view}.png").write_bytes(data)
        values += [str(tmp_path / f"{view}.png"), "no", False]

    def facts(one: Reconstructor, steps: int) -> str:
        decoder = ImageDecoder(one.description, RadiographLimits())
        outputs = asyncio.run(Actions(backend(one, steps), decoder).reconstruct(None, *values))
        return str(outputs[5])

    fit = r"Reprojection residual before -> after the data-consistency fit: "
    assert re.search(fit + r"frontal \d\.\d{3} -> \d\.\d{3}, lateral \d\.\d{3} -> ", facts(fitting, 3))
    assert "residual" not in facts(reconstructor, 0)


def test_the_page_states_the_steps_of_the_fit(fitting: Reconstructor) -> None:
    assert "Data-consistency fit: up to 3 steps" in layout._about(backend(fitting, 3))
    assert "fit" not in layout._about(backend(fitting, 0))


def test_a_note_on_a_file_is_not_styled_as_an_error(
    reconstructor: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    dark_bone = np.asarray(Image.open(io.BytesIO(radiographs["frontal"])))
    inverted, text = tmp_path / "inverted.png", tmp_path / "text.png"
    Image.fromarray(dark_bone.max() - dark_bone).save(inverted)
    text.write_text("no image")
    actions = Actions(backend(reconstructor, 0), ImageDecoder(reconstructor.description, RadiographLimits()))
    for path, words, style in ((inverted, "inverted (bone was dark)", "note"), (text, "not an image", "problem")):
        _, message, _ = asyncio.run(actions.preview("frontal", str(path), "auto", False))
        assert words in message.value
        assert message.elem_classes == [style]
