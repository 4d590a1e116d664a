"""The way of the flag `--consistency-steps` through service and page."""

import asyncio
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import SimpleITK as sitk

from raylift.datasets.radiographs.decoding import RadiographLimits, read
from raylift.serve.backend import Backend
from raylift.serve.page import layout
from raylift.serve.page.events import Actions
from raylift.serve.reconstructor import Reconstruction, Reconstructor


@pytest.fixture
def fitting(model_folder: Path) -> Reconstructor:
    return Reconstructor.load(str(model_folder), consistency_steps=3)


def backend(reconstructor: Reconstructor, steps: int) -> Backend:
    async def answer(prepared: np.ndarray, samples: int) -> Reconstruction:
        return reconstructor.reconstruct([prepared], [samples])[0]

    async def ready() -> bool:
        return True

    return Backend(reconstructor.description, reconstructor.sha256, answer, ready, steps)


def test_a_service_that_was_told_to_fit_answers_with_the_fitted_volume_and_its_residuals(
    fitting_url: str, fitting: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    answer = httpx.post(
        f"{fitting_url}/v1/reconstructions",
        files=radiographs,
        data={"invert": "no"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200
    (expected,) = fitting.reconstruct(
        [fitting.prepare({view: read(data, view, invert="no") for view, data in radiographs.items()})]
    )
    (tmp_path / "volume.nii.gz").write_bytes(answer.content)
    hu = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "volume.nii.gz")))[::-1]
    assert np.abs(np.subtract(hu, expected.hu, dtype=np.int32)).max() <= 1
    for place, name in enumerate(("x-raylift-residual-before", "x-raylift-residual-after")):
        told = dict(part.split("=") for part in answer.headers[name].split(", "))
        assert list(told) == ["frontal", "lateral"]
        for view, value in told.items():
            assert float(value) == pytest.approx(expected.residuals[view][place], abs=2e-4)


def test_the_page_tells_the_residuals_of_a_volume_that_was_fitted(
    fitting: Reconstructor, reconstructor: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    values: list[object] = []
    for view, data in radiographs.items():
        (tmp_path / f"{view}.png").write_bytes(data)
        values += [str(tmp_path / f"{view}.png"), "no", False]

    def facts(one: Reconstructor, steps: int) -> str:
        shown = asyncio.run(Actions(backend(one, steps), RadiographLimits()).reconstruct(*values))
        return str(shown[2])

    fit = r"Data-consistency fit; reprojection residual before -> after: "
    assert re.search(fit + r"frontal \d\.\d{3} -> \d\.\d{3}, lateral \d\.\d{3} -> ", facts(fitting, 3))
    assert "residual" not in facts(reconstructor, 0)


def test_the_page_says_below_whether_its_model_fits(fitting: Reconstructor) -> None:
    assert "Data-consistency fit: up to 3 steps" in layout._about(backend(fitting, 3))
    assert "fit" not in layout._about(backend(fitting, 0))
