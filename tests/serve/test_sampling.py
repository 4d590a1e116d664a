"""Diffusion models: mean and standard deviation over samples, by command, by request and on the page."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from fastapi.openapi.models import OpenAPI
from fastapi.testclient import TestClient
from service_clients import client_of, real_backend

from raylift.datasets.errors import ConfigError
from raylift.datasets.radiographs.decoding import read
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.platform import cli
from raylift.serve.page.std_map import StdMap
from raylift.serve.reconstructor import Reconstructor
from raylift.serve.served_model import ReconstructionSettings

URL = "/v1/reconstructions"


def inputs(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(3).random((count, 2, 32, 32), dtype=np.float32))


def singles(folder: Path, given: np.ndarray, count: int, steps: int = 0, first: int = 0) -> np.ndarray:
    """One sample for each of several seeds, each computed separately."""
    reconstructors = [
        Reconstructor.load(str(folder), consistency_steps=steps, sampling=SamplingFlags(steps=2, seed=first + k))
        for k in range(count)
    ]
    return np.stack([one.reconstruct([given])[0].hu for one in reconstructors]).astype(np.float64)


def volume(data: bytes, folder: Path) -> sitk.Image:
    path = folder / "opened.nii.gz"
    path.write_bytes(data)
    return sitk.ReadImage(str(path))


@pytest.mark.parametrize("steps", [0, 2], ids=["no fit", "fit"])
def test_several_samples_give_mean_and_standard_deviation_of_the_single_ones(
    diffusion_folder: Path, radiographs: dict[str, bytes], steps: int
) -> None:
    several = Reconstructor.load(str(diffusion_folder), consistency_steps=steps, sampling=SamplingFlags(steps=2))
    given = several.prepare({view: read(data, view, invert="no").pixels for view, data in radiographs.items()})
    (result,) = several.reconstruct([given], [ReconstructionSettings(3)])
    alone = singles(diffusion_folder, given, 3, steps)
    assert np.abs(result.hu - alone.mean(axis=0)).max() <= 1
    assert result.std is not None
    # The single samples are rounded to whole HU.
    assert np.abs(result.std - alone.std(axis=0, ddof=1)).max() <= 2
    assert result.std.mean() > 10
    assert bool(result.residuals) == (steps > 0)


def test_the_requests_of_one_batch_have_their_own_number_of_samples(diffusion: Reconstructor) -> None:
    given = inputs(3)
    settings = [ReconstructionSettings(count) for count in (1, 3, 2)]
    together = diffusion.reconstruct(given, settings)
    alone = [diffusion.reconstruct([one], [its])[0] for one, its in zip(given, settings, strict=True)]
    assert [one.std is None for one in together] == [True, False, False]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.subtract(one.hu, other.hu, dtype=np.int32)).max() <= 1
    assert np.abs(np.subtract(together[1].std, alone[1].std, dtype=np.int32)).max() <= 1


def test_a_deterministic_model_refuses_several_samples(reconstructor: Reconstructor) -> None:
    with pytest.raises(ConfigError, match="is deterministic"):
        reconstructor.reconstruct(inputs(1), [ReconstructionSettings(2)])


@pytest.fixture
def pair(radiographs: dict[str, bytes], tmp_path: Path) -> list[str]:
    """Options for both synthetic radiographs."""
    options = ["--invert", "no"]
    for view, data in radiographs.items():
        (tmp_path / f"{view}.png").write_bytes(data)
        options += [f"--{view}", str(tmp_path / f"{view}.png")]
    return options


def test_the_command_writes_mean_and_standard_deviation_in_the_same_geometry(
    diffusion_folder: Path,
    diffusion: Reconstructor,
    radiographs: dict[str, bytes],
    pair: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--samples", "2", "--seed", "7", "--sampler", "dpm_solver", "--steps", "2"]
    output = tmp_path / "ct.nii.gz"
    assert cli.main(["reconstruct", str(diffusion_folder), "-o", str(output), *pair, *options]) == 0
    mean, deviation = (sitk.ReadImage(str(tmp_path / name)) for name in ("ct.nii.gz", "ct-std.nii.gz"))
    for quantity in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mean, quantity)() == getattr(deviation, quantity)()
    given = diffusion.prepare({view: read(data, view, invert="no").pixels for view, data in radiographs.items()})
    alone = singles(diffusion_folder, given, 2, first=7)
    assert np.abs(sitk.GetArrayFromImage(mean)[::-1] - alone.mean(axis=0)).max() <= 1
    assert np.abs(sitk.GetArrayFromImage(deviation)[::-1] - alone.std(axis=0, ddof=1)).max() <= 2
    assert f"{tmp_path / 'ct-std.nii.gz'}: standard deviation over 2 samples" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_every_sampler_can_be_chosen(diffusion_folder: Path, pair: list[str], tmp_path: Path, sampler: str) -> None:
    options = ["--sampler", sampler, "--steps", "3"]
    output = tmp_path / "ct.nii.gz"
    assert cli.main(["reconstruct", str(diffusion_folder), "-o", str(output), *pair, *options]) == 0
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(output))).std() > 10
    assert not (tmp_path / "ct-std.nii.gz").exists()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("model_folder", ["--steps", "4"], "leave out --steps"),
        ("model_folder", ["--samples", "2"], "leave out --samples"),
        ("diffusion_folder", ["--samples", "0"], "0 samples: give 1 or more"),
        ("diffusion_folder", ["--steps", "0"], "0 sampling steps: use 1 or more"),
    ],
)
def test_unsupported_options_are_refused_and_nothing_is_written(
    model: str,
    options: list[str],
    message: str,
    pair: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    output = tmp_path / "ct.nii.gz"
    command = ["reconstruct", str(request.getfixturevalue(model)), "-o", str(output), *pair, *options]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.fixture
def client(diffusion: Reconstructor) -> TestClient:
    """The API with a diffusion network and up to three samples."""
    return client_of(real_backend(diffusion, max_samples=3, max_steps=5, max_consistency_steps=4))


def test_a_request_returns_the_mean_and_with_return_std_a_zip_of_both(
    client: TestClient, diffusion: Reconstructor, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    given = diffusion.prepare({view: read(data, view, invert="no").pixels for view, data in radiographs.items()})
    (expected,) = diffusion.reconstruct([given], [ReconstructionSettings(3)])
    fields = {"invert": "no", "samples": "3"}
    plain = client.post(URL, files=radiographs, data=fields)
    assert plain.headers["content-type"] == "application/gzip"
    mean = sitk.GetArrayFromImage(volume(plain.content, tmp_path))[::-1]
    np.testing.assert_array_equal(mean, expected.hu)

    both = client.post(URL, files=radiographs, data=fields | {"return_std": "true"})
    assert client.post(URL, files=radiographs, data=fields | {"return_std": "true"}).content == both.content
    assert both.headers["content-type"] == "application/zip"
    assert both.headers["content-disposition"].endswith('.zip"')
    with zipfile.ZipFile(io.BytesIO(both.content)) as archive:
        names = archive.namelist()
        assert [name.removesuffix(".nii.gz")[-4:] == "-std" for name in names] == [False, True]
        again, deviation = (sitk.GetArrayFromImage(volume(archive.read(name), tmp_path))[::-1] for name in names)
    np.testing.assert_array_equal(again, mean)
    np.testing.assert_array_equal(deviation, expected.std)
    single = client.post(URL, files=radiographs, data={"invert": "no"})
    assert single.content != plain.content


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": "4"}, "field samples is '4': input should be less than or equal to 3"),
        ({"samples": "1e3"}, "field samples is '1e3': input should be a valid integer"),
        ({"samples": "0"}, "field samples is '0': input should be greater than or equal to 1"),
        ({"return_std": "true"}, "return_std requires samples to be 2 or more"),
        ({"samples": "2", "return_std": "yes"}, "field return_std is 'yes': input should be 'true' or 'false'"),
        ({"seed": "-1"}, "field seed is '-1': input should be greater than or equal to 0"),
        ({"seed": str(2**32)}, "input should be less than or equal to 4294967295"),
        ({"steps": "6"}, "field steps is '6': input should be less than or equal to 5"),
        ({"consistency_steps": "5"}, "field consistency_steps is '5': input should be less than or equal to 4"),
        ({"sampler": "ddim"}, "unknown field sampler"),
    ],
)
def test_invalid_numbers_of_samples_are_refused(
    client: TestClient, radiographs: dict[str, bytes], fields: dict[str, str], message: str
) -> None:
    response = client.post(URL, files=radiographs, data=fields)
    assert response.status_code == 422
    assert message in response.json()["detail"]


def test_the_model_info_and_openapi_description_include_the_sampling(client: TestClient) -> None:
    model = client.get("/v1/model").json()
    assert model["sampler"] == "dpm_solver"
    assert model["parameters"] == {
        "samples": {"default": 1, "min": 1, "max": 3},
        "seed": {"default": 0, "min": 0, "max": 2**32 - 1},
        "steps": {"default": 2, "min": 1, "max": 5},
        "consistency_steps": {"default": 0, "min": 0, "max": 4},
    }
    schema = client.get("/openapi.json").json()
    OpenAPI.model_validate(schema)
    route = schema["paths"][URL]["post"]
    form = schema["components"]["schemas"]["ReconstructionForm"]["properties"]
    assert (form["samples"]["maximum"], form["return_std"]["enum"]) == (3, ["true", "false"])
    assert {"application/gzip", "application/x-nrrd"} < set(route["responses"]["200"]["content"])
    assert "number of samples, 1 to 3" in client.get("/docs").text


def test_the_brightest_color_is_the_99_5th_percentile_rounded_up(diffusion: Reconstructor) -> None:
    (result,) = diffusion.reconstruct(inputs(1), [ReconstructionSettings(3)])
    assert result.std is not None
    std_map = StdMap.of(result.std)
    top = std_map.max_hu
    assert top % 40 == 0
    assert (result.std > top - 40).mean() > 0.001
    assert (result.std > top).mean() <= 0.005
    assert StdMap.of(np.zeros((8, 8, 8), np.int16)).max_hu == 40
    image = std_map.slice_image("coronal", 16)
    assert image.shape == (448, 448, 3)
    # Brighter where the samples differ more; the letters are at the edges.
    gray = image[56:-56, 56:-56].astype(float).mean(axis=2)
    scale = 448 // 32
    blocks = gray.reshape(gray.shape[0] // scale, scale, gray.shape[1] // scale, scale).mean(axis=(1, 3))
    first = 56 // scale
    inside = result.std[first : first + len(blocks), 16, first : first + len(blocks)]
    assert np.corrcoef(blocks.ravel(), inside.ravel())[0, 1] > 0.5
