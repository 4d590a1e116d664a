"""One, three and six views from an archive to a served model."""

import io
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import httpx
import numpy as np
import pytest
import SimpleITK as sitk
from fastapi.testclient import TestClient
from page_visit import Visit
from PIL import Image
from playwright.sync_api import BrowserContext, expect
from ray import serve
from samples import thorax_image, write_image
from service_clients import api_of

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, LATERAL, View
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.orientation import orient
from raylift.models.zoo import SYSTEMS
from raylift.platform import cli, model_store
from raylift.serve import deployment
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.page import example
from raylift.serve.page.events import Actions
from raylift.serve.reconstructor import HUVolume, Reconstructor
from raylift.serve.served_model import ServedModel
from raylift.serve.settings import ServeSettings
from raylift.serve.view_text import edge_letters, guidance, in_words, requirement, title

VIEWS = "frontal,lateral,oblique30=30deg,Back-left=135deg,right=270deg,cranial=0deg/30deg"
NAMES = tuple(word.partition("=")[0] for word in VIEWS.split(","))
SELECTIONS = {1: ["oblique30"], 3: ["cranial", "frontal", "oblique30"], 6: ["all"]}
NO_INVERSION = {"invert": (None, "no")}
"""A field without a file: a form of it alone is multipart too."""
LIMITS = RadiographLimits(max_bytes=200_000)


@pytest.fixture(scope="module")
def archive_of_six_views(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six CT files at 32^3, in all three splits."""
    scans, url = tmp_path_factory.mktemp("scans"), str(tmp_path_factory.mktemp("six") / "archive")
    for k in range(6):
        write_image(thorax_image((40, 30, 40), (9 + k / 10,) * 3), scans / f"person-{k}.nii.gz")
    made = ["ingest", str(scans), "--archive", url, "--size", "32", "--spacing-mm", "10", "--views", VIEWS]
    assert cli.main([*made, "--split-fractions", "0.6", "0.2", "0.2"]) == 0
    assert [view.name for view in Archive(url).manifest.geometry.views] == list(NAMES)
    return url


@pytest.fixture(scope="module", params=SELECTIONS)
def exported(
    request: pytest.FixtureRequest,
    archive_of_six_views: str,
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    """A model that a search trained for two steps, evaluated and exported, and the names of its views."""
    folder = tmp_path_factory.mktemp(f"views{request.param}")
    space, selected = folder / "space.yaml", SELECTIONS[request.param]
    space.write_text("space: {system.fusion.kind: {choice: [average]}}")
    options = {
        "--data.archive": [archive_of_six_views],
        "--output": [str(folder / "search")],
        "--preset": ["x2ct-gan-tiny"],
        "--trials": ["1"],
        "--system.views": selected,
        "--system.lifting.along": ["rays"],
        "--cluster.workers": ["1"],
        "--train.steps": ["2"],
        "--train.batch-size": ["2"],
        "--train.validate-every": ["2"],
        "--train.validation-samples": ["1"],
    }
    words = [word for name, values in options.items() for word in (name, *values)]
    assert cli.main(["tune", str(space), *words]) == 0
    run = json.loads((folder / "search" / "trials.json").read_text())["trials"][0]["checkpoint"]
    report = ["--archive", archive_of_six_views, "--output", str(folder / "report"), "--protocols", "reprojection"]
    assert cli.main(["evaluate", run, *report, "--consistency-steps", "1"]) == 0
    assert cli.main(["export", run, str(folder / "model")]) == 0
    names = list(NAMES) if selected == ["all"] else selected
    values = json.loads((folder / "report" / "metrics.json").read_text())["mean"]["model"]["reprojection"]
    assert {f"residual_{name}" for name in names} <= set(values)
    return folder / "model", names


@pytest.mark.parametrize("count", SELECTIONS)
def test_an_archive_of_ct_has_a_radiograph_for_each_named_view(count: int, tmp_path: Path) -> None:
    scan, url = tmp_path / "scan.nii.gz", str(tmp_path / "archive")
    write_image(thorax_image((40, 30, 40), (9.0,) * 3), scan)
    views = ",".join(VIEWS.split(",")[:count])
    assert (
        cli.main(["ingest", str(scan), "--archive", url, "--size", "16", "--spacing-mm", "20", "--views", views]) == 0
    )
    archive = Archive(url)
    images = archive.read_array(archive.entries()[0], "radiographs")
    assert images.shape == (count, 16, 16)
    assert len({image.tobytes() for image in images}) == count


@pytest.mark.parametrize("count", SELECTIONS)
def test_an_archive_of_phantoms_has_a_radiograph_for_each_named_view(count: int, tmp_path: Path) -> None:
    url, views = str(tmp_path / "archive"), ",".join(VIEWS.split(",")[:count])
    words = ["--archive", url, "--count", "1", "--size", "16", "--spacing-mm", "20", "--views", views]
    assert cli.main(["phantom", *words]) == 0
    archive = Archive(url)
    images = archive.read_array(archive.entries()[0], "radiographs")
    assert images.shape == (count, 16, 16)
    assert len({image.tobytes() for image in images}) == count


@pytest.mark.parametrize("count", SELECTIONS)
def test_a_preset_is_trained_on_the_selected_views(
    count: int, archive_of_six_views: str, ray_cluster: None, tmp_path: Path
) -> None:
    run, selected = str(tmp_path / "run"), SELECTIONS[count]
    options = "--cluster.workers 1 --train.steps 1 --train.batch-size 1 --train.validate-every 1"
    words = ["--data.archive", archive_of_six_views, "--output", run, "--system.views", *selected, *options.split()]
    assert cli.main(["train", "unrolled-tiny", *words, "--train.validation-samples", "1"]) == 0
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    views = model_store.description_of(checkpoint).geometry.views
    assert [view.name for view in views] == (list(NAMES) if selected == ["all"] else selected)


def test_a_model_card_names_every_view(exported: tuple[Path, list[str]]) -> None:
    folder, names = exported
    card = (folder / "README.md").read_text()
    assert all(f"--view {name}={name}.png" in card for name in names)
    assert ("One view does not" if len(names) == 1 else f"{len(names)} views do not") in card


def test_reconstruct_takes_a_file_for_each_view_in_any_order(
    exported: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, names = exported
    files = {}
    for name, data in example.files(Reconstructor.load(str(folder)).description).items():
        files[name] = tmp_path / f"{name}.png"
        files[name].write_bytes(data)
    assert list(files) == names

    def volume(output: str, *options: str) -> np.ndarray:
        path = tmp_path / f"{output}.nii.gz"
        assert cli.main(["reconstruct", str(folder), "-o", str(path), *options]) == 0, capsys.readouterr().err
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))

    options = {name: ["--view", f"{name}={path}"] for name, path in files.items()}
    plain = volume("plain", *chain(*options.values()))
    options |= {name: [f"--{name}", str(files[name])] for name in ("frontal", "lateral") if name in files}
    assert np.array_equal(volume("reversed", *chain(*reversed(options.values()))), plain)
    flipped = tmp_path / "flipped.png"
    Image.fromarray(np.asarray(Image.open(files[names[0]]))[::-1]).save(flipped)
    others = list(chain(*(options[name] for name in names[1:])))
    assert not np.array_equal(volume("flipped", "--view", f"{names[0]}={flipped}", *others), plain)
    capsys.readouterr()
    assert cli.main(["reconstruct", str(folder), "-o", str(tmp_path / "a.nii.gz"), *others]) == 2
    assert f"this model requires {in_words(names)}, got {in_words(names[1:]) or 'none'}" in capsys.readouterr().err


async def never(*_: object) -> HUVolume:
    raise AssertionError


async def ready() -> bool:
    return True


@pytest.fixture(scope="module")
def api(exported: tuple[Path, list[str]]) -> Iterator[httpx.Client]:
    """The model on Ray Serve, on the cluster that trained it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = ServeSettings(str(exported[0]), port=port, cpus_per_replica=0.1, consistency_steps=1)
    url = deployment.start(settings, deployment.applications(settings), threading.Event())
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client
    serve.shutdown()


def test_the_service_on_ray_serve_has_a_file_for_each_view(
    exported: tuple[Path, list[str]], api: httpx.Client, tmp_path: Path
) -> None:
    folder, names = exported
    files = example.files(Reconstructor.load(str(folder)).description)
    assert api.get("/v1/model").json()["views"] == names
    assert all(f"-F {name}=@{name}.png" in api.get("/docs").text for name in names)

    response = api.post("/v1/reconstructions", files=files)
    assert response.status_code == 200, response.text
    residuals = dict(word.split("=") for word in response.headers["X-Raylift-Residual-After"].split(", "))
    assert list(residuals) == [name.lower() for name in names]
    path = tmp_path / "api.nii.gz"
    path.write_bytes(response.content)
    assert sitk.ReadImage(str(path)).GetSize() == (32, 32, 32)

    missing = api.post("/v1/reconstructions", files={name: files[name] for name in names[1:]} | NO_INVERSION)
    assert (missing.status_code, missing.json()["detail"]) == (
        422,
        f"this model requires {in_words(names)}; missing: {names[0]}",
    )
    unknown = api.post("/v1/reconstructions", files=files | {"side": b"x"})
    assert unknown.status_code == 422
    assert all(name in unknown.json()["detail"] for name in ("unknown field side", *names, f"flip_{names[0]}"))

    flipped = {f"flip_{names[0]}": "true"}
    assert api.post("/v1/reconstructions", files=files, data=flipped).content != response.content


def test_the_page_has_an_upload_a_preview_and_a_comparison_for_each_view(
    exported: tuple[Path, list[str]], api: httpx.Client
) -> None:
    folder, names = exported
    ids = {component["props"].get("elem_id") for component in api.get("/config").json()["components"]}
    assert {f"{name}-{part}" for name in names for part in ("file", "preview", "flip")} <= ids
    backend = Backend(ServedModel(Reconstructor.load(str(folder)).description, "0" * 64), never, ready)
    images = Actions(backend, ImageDecoder(backend.description, LIMITS))._images(
        np.zeros((len(names), 32, 32), np.float32), np.zeros((32, 32, 32), np.int16)
    )
    assert [*images] == names


def test_the_page_reconstructs_a_volume_from_an_upload_for_each_view(
    exported: tuple[Path, list[str]], api: httpx.Client, browser: BrowserContext, tmp_path: Path
) -> None:
    folder, names = exported
    visit = Visit(browser, str(api.base_url).rstrip("/"))
    for name, data in example.files(Reconstructor.load(str(folder)).description).items():
        file = tmp_path / f"{name}.png"
        file.write_bytes(data)
        visit.at(f"{name}-file").locator("input[type=file]").set_input_files(file)
        expect(visit.at(f"{name}-preview").locator("img")).to_be_visible()
    visit.reconstruct()
    for name in names:
        radiograph, preview = visit.image(f"{name}-comparison .radiograph"), visit.image(f"{name}-preview")
        np.testing.assert_array_equal(radiograph[:150], preview[:150])
    visit.check()


def test_only_lateral_views_may_be_flipped_automatically(exported: tuple[Path, list[str]]) -> None:
    folder, names = exported
    description = Reconstructor.load(str(folder)).description
    api = TestClient(
        api_of(Backend(ServedModel(description, "0" * 64), never, ready), ImageDecoder(description, LIMITS))
    )
    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    (form,) = (schema for schema in schemas.values() if f"flip_{names[0]}" in schema.get("properties", {}))
    defaults = {name: form["properties"][f"flip_{name}"]["default"] for name in names}
    assert defaults == {name: "auto" if name in ("lateral", "right") else "false" for name in names}
    assert set(form["required"]) == set(names)


def test_an_oblique_view_is_never_flipped(radiographs: dict[str, bytes]) -> None:
    image = np.asarray(Image.open(io.BytesIO(radiographs["lateral"]))).astype(np.float32)
    for shown in (image, np.ascontiguousarray(image[:, ::-1])):
        assert np.array_equal(orient(shown, View("oblique", 60.0), "auto").image, shown)
        assert np.array_equal(orient(shown, View("tilted", 90.0, 20.0), "auto").image, shown)


@pytest.mark.parametrize("text", ["frontal", "=a.png", "frontal="])
def test_a_view_without_a_name_or_a_file_is_refused(
    text: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reconstruct", str(model_folder), "-o", str(tmp_path / "a.nii.gz"), "--view", text]) == 2
    assert f"--view {text}: write the name of a view and its file" in capsys.readouterr().err


def test_a_view_with_two_files_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--view", "frontal=a.png", "--frontal", "b.png"]
    assert cli.main(["reconstruct", str(model_folder), "-o", str(tmp_path / "a.nii.gz"), *given]) == 2
    assert "a view was given two files: frontal, frontal" in capsys.readouterr().err


def test_views_are_listed_in_words() -> None:
    oblique = View("oblique30", 30.0, 10.0)
    assert [in_words(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [edge_letters(view) for view in (FRONTAL, LATERAL, View("ap", 180.0), View("right", 270.0), oblique)] == [
        "RL", "AP", "LR", "PA", "",
    ]  # fmt: skip
    assert title(LATERAL) == "Lateral"
    assert title(oblique) == "Oblique30 (azimuth 30°, elevation 10°)"
    assert guidance(View("right", -90.0)) == "the patient facing the right edge"
    assert requirement(FRONTAL) == "The patient's right must be at the left edge."
    assert "used as it is" in requirement(oblique)


def test_an_oblique_view_needs_a_lifting_along_rays(
    archive_of_six_views: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "x2ct-gan-tiny", "--data.archive", archive_of_six_views, "--output", str(tmp_path / "run")]
    assert cli.main([*words, "--system.views", "all"]) == 2
    assert "use system.lifting.along rays" in capsys.readouterr().err
    assert cli.main([*words, "--system.views", "frontal", "axial"]) == 2
    assert f"has the views {', '.join(NAMES)}, not axial" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_estimates_memory_for_the_views_of_the_archive(
    archive_of_six_views: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "x2ct-gan-tiny", "--dry-run", "--data.archive", archive_of_six_views]
    assert cli.main([*words, "--system.views", "all", "--system.lifting.along", "rays"]) == 0
    printed = capsys.readouterr().out
    assert all(f"- {name}\n" in printed for name in NAMES)
    assert "total per worker" in printed


@pytest.mark.parametrize("name", [name for name, entry in SYSTEMS.items() if entry.full.any_views])
def test_a_system_that_takes_any_views_is_built_for_three(name: str, archive_of_six_views: str) -> None:
    manifest = Archive(archive_of_six_views).manifest
    system = SYSTEMS[name].tiny
    views = ("cranial", "lateral", "oblique30")
    if hasattr(system, "base"):
        base = replace(system.base, views=views, lifting=replace(system.base.lifting, along="rays"))
        system = replace(system, base=base)
    elif hasattr(system, "lifting"):
        system = replace(system, views=views, lifting=replace(system.lifting, along="rays"))
    else:
        system = replace(system, views=views)
    system.reconstruction_network(manifest.grid, manifest.geometry)
    with pytest.raises(ConfigError):
        replace(manifest.geometry, views=manifest.geometry.views * 2)
