"""Checks of radiographs on phantoms and real pairs, and on images that are no chest, of another view, or turned."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from radiograph_samples import REAL, dicom, disturbed, scaled

from raylift.datasets.errors import InputCheckError
from raylift.datasets.geometry import GEOMETRIES, Geometry, Grid, View
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs import input_checks
from raylift.datasets.radiographs.check_result import CheckResult, warnings, worst
from raylift.datasets.radiographs.chest import without_margin
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.input_checks import ALL_VIEWS, LAYOUTS, check_images, check_radiograph, require_ok
from raylift.datasets.radiographs.preparation import load_radiograph, prepare

GRID = Grid(32, 10.0)
CHEST = GEOMETRIES["chest"](GRID)
VIEWS = ("frontal", "lateral")
CASES = ["cc0_normal", "eurorad_12325_d0", "rad_covid15"]
Y, X = np.mgrid[0:1:200j, 0:1:200j]


def text() -> np.ndarray:
    image = Image.new("L", (200, 200))
    for line in range(10):
        ImageDraw.Draw(image).text((5, 20 * line), "Dear Sir or Madam, Dear Sir or Madam", fill=255)
    return np.asarray(image)


def boxes() -> np.ndarray:
    image = Image.new("L", (200, 200), 40)
    for k in range(8):
        ImageDraw.Draw(image).rectangle((20 * k, 15 * k, 20 * k + 50, 15 * k + 60), fill=25 * k + 50)
    return np.asarray(image)


def hand() -> np.ndarray:
    fingers = sum((abs(X - 0.3 - 0.13 * k) < 0.04) & (Y < 0.6) & (0.05 + 0.04 * abs(k - 2) < Y) for k in range(4))
    return (
        0.8 * fingers + 0.9 * ((abs(X - 0.5) < 0.26) & (Y > 0.5) & (Y < 0.75)) + 0.8 * (abs(X - 0.5) < 0.12) * (Y > 0.7)
    )


OTHERS = {
    "noise": np.random.default_rng(0).random((200, 200)),
    "a gradient down": Y,
    "a gradient across": X,
    "a diagonal gradient": X + Y,
    "text": text(),
    "boxes": boxes(),
    "a hand": hand(),
    "a knee": (abs(X - 0.5) < 0.2) * 0.4 + (abs(X - 0.5) < 0.1) * 0.5 + (np.hypot((X - 0.5) * 2, Y - 0.5) < 0.1) * 0.3,
}


def drrs(seed: int, geometry: Geometry = CHEST) -> dict[str, np.ndarray]:
    images = render_drrs(thorax(seed, GRID)[0], GRID, geometry)
    return dict(zip(VIEWS, (scaled(image) for image in images), strict=True))


def found(image: np.ndarray, view: str) -> list[str]:
    """Names of the checks that are not ok."""
    return [result.name for result in warnings(check_radiograph(image.astype(np.float32), view))]


@pytest.mark.parametrize("view", VIEWS)
def test_phantoms_on_which_no_limit_was_chosen_have_no_warning(view: str) -> None:
    for seed in range(50, 56):
        for name in ("chest", "parallel"):
            image = drrs(seed, GEOMETRIES[name](GRID))[view]
            for what, other in [("as it is", image), *disturbed(image)]:
                assert found(other, view) == [], (seed, name, what)


@pytest.mark.parametrize("name", REAL)
def test_real_radiographs_have_no_warning(name: str, real_data: Path) -> None:
    view = name.rpartition("_")[2]
    path = real_data / "xray" / f"{name}.jpg"
    assert worst(load_radiograph(path, View(view, 90.0 if view == "lateral" else 0.0)).checks) == "ok"
    image = read(path.read_bytes(), name, view=view).pixels
    for what, other in disturbed(image[::4, ::4]):
        assert found(other, view) == [], what


@pytest.mark.parametrize("case", CASES)
def test_real_pairs_have_no_warning_on_both_views_and_one_if_a_file_is_given_twice(case: str, real_data: Path) -> None:
    images = [
        prepare(read((real_data / "xray" / f"{case}_{view}.jpg").read_bytes(), case, view=view).pixels, 64)
        for view in VIEWS
    ]
    assert warnings([check_images(VIEWS, images)]) == ()
    for image in images:
        result = check_images(VIEWS, [image, np.ascontiguousarray(image[:, ::-1])])
        assert (result.name, result.level) == ("same image", "stop")
        assert result.value == pytest.approx(1.0)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_chest_has_a_warning(what: str, view: str) -> None:
    assert worst(check_radiograph(OTHERS[what].astype(np.float32), view)) == "stop"


def test_noise_and_areas_of_one_gray_level_are_no_radiographs_of_any_view() -> None:
    for view in (*VIEWS, "oblique30"):
        assert found(OTHERS["noise"], view) == ["noise"]
        assert found(OTHERS["boxes"], view) == ["uniform"]
    (noise,) = check_radiograph(OTHERS["noise"].astype(np.float32), "frontal")
    assert abs(noise.value) < 0.02
    assert (noise.limit, noise.bound) == (0.5, "at least")


@pytest.mark.parametrize("seed", [20, 50])
def test_exchanged_inverted_and_turned_radiographs_are_named_as_such(seed: int) -> None:
    images = drrs(seed)
    for view, other in (VIEWS, VIEWS[::-1]):
        assert found(images[view], view) == []
        assert found(images[other], view) == ["exchanged"]
        assert found(1 - images[other], view) == ["exchanged"]
        assert found(1 - images[view], view) == ["inverted"]
        for turns in (1, 2, 3):
            assert found(np.rot90(images[view], turns), view) == ["rotated"]
    assert found(images["lateral"], "oblique30") == []


def test_a_frontal_radiograph_without_one_lung_or_without_the_abdomen_has_a_warning() -> None:
    image = drrs(50)["frontal"]
    assert found(image[:, 10:], "frontal") != []
    assert found(image[:, :-10], "frontal") != []
    assert found(image[:18], "frontal") == ["width"]
    magnified = drrs(50, GEOMETRIES["x2ct"](GRID))["frontal"]
    assert found(magnified, "frontal") == []
    for part in (magnified[:, 4:], magnified[:, :-4]):
        (result,) = warnings(check_radiograph(part.astype(np.float32), "frontal"))
        assert (result.name, result.level) == ("off center", "caution")


@pytest.mark.parametrize("case", CASES)
def test_radiographs_side_by_side_are_not_one_chest(case: str, real_data: Path) -> None:
    frontal, lateral = (
        np.asarray(Image.open(real_data / "xray" / f"{case}_{view}.jpg").convert("L").resize((side, 400)), np.float32)
        for view, side in (("frontal", 380), ("lateral", 300))
    )
    assert found(frontal, "frontal") == []
    for images in ((frontal, lateral), (lateral, frontal), (frontal, frontal)):
        for view in VIEWS:
            assert found(np.hstack(images), view) == ["width"]


def test_layouts_are_those_of_the_mean_drr_of_ten_phantoms() -> None:
    grid = Grid(64, 5.0)
    regions: dict[str, list[np.ndarray]] = {view: [] for view in VIEWS}
    for seed in range(10):
        for view, image in zip(VIEWS, render_drrs(thorax(seed, grid)[0], grid, GEOMETRIES["chest"](grid)), strict=True):
            pixels = torch.from_numpy(without_margin(image).copy())
            regions[view].append(torch.nn.functional.adaptive_avg_pool2d(pixels[None], 8)[0].numpy())
    for view, parts in regions.items():
        rows = np.rint(9 * np.mean(parts, axis=0)).astype(int)
        assert " ".join("".join(map(str, row)) for row in rows) == LAYOUTS[view]


def test_warnings_are_sentences_with_value_and_limit_and_are_refused_by_name() -> None:
    text = "The radiograph may be rotated."
    results = {"frontal": (CheckResult("rotated", "stop", text, -0.345, -0.1, "at least"),), ALL_VIEWS: ()}
    require_ok({"frontal": (), ALL_VIEWS: ()})
    with pytest.raises(InputCheckError) as raised:
        require_ok(results)
    assert str(raised.value) == f"frontal: stop: {text} (rotated -0.34, at least -0.1)"
    assert input_checks.sentences(results) == [str(raised.value)]
    assert worst(()) == "ok"


def test_dicom_files_of_two_patients_have_a_warning_and_files_without_a_patient_none() -> None:
    images = {view: np.rint(4000 * image).astype("<u2") for view, image in drrs(50).items()}
    poses = {view: View(view, 90.0 if view == "lateral" else 0.0) for view in VIEWS}

    def names(frontal: str, lateral: str) -> list[str]:
        radiographs = {
            view: load_radiograph(dicom(images[view], PatientID=patient), poses[view])
            for view, patient in zip(VIEWS, (frontal, lateral), strict=True)
        }
        assert all("1234" not in radiograph.patient for radiograph in radiographs.values())
        prepared = [prepare(radiograph.image, 32) for radiograph in radiographs.values()]
        return [result.name for result in warnings(input_checks.check(radiographs, prepared)[ALL_VIEWS])]

    assert names("1234", "1234 ") == []
    assert names("1234", "") == names("", "") == []
    assert names("1234", "12345") == ["patients"]


def test_a_pair_of_full_size_is_checked_in_a_tenth_of_a_second() -> None:
    images = {
        view: np.kron(image, np.ones((64, 64), np.float32)).astype(np.float32) for view, image in drrs(50).items()
    }
    best = np.inf
    for _ in range(5):
        began = time.process_time()
        for view, image in images.items():
            check_radiograph(image, view)
        best = min(best, time.process_time() - began)
    assert best < 0.1


@pytest.mark.parametrize("azimuths", [range(0, 180, 23), (0, 180), (0, 10)], ids=["eight", "opposite", "close"])
def test_radiographs_of_other_views_are_not_the_same_image_unless_they_are_identical(azimuths: Iterable[int]) -> None:
    grid = Grid(64, 5.0)
    geometry = GEOMETRIES["chest"](grid)
    views = tuple(replace(geometry.views[0], name=f"at{azimuth}", azimuth_deg=float(azimuth)) for azimuth in azimuths)
    images = render_drrs(thorax(50, grid)[0], grid, replace(geometry, views=views))
    prepared = [prepare(scaled(image), 64) for image in images]
    names = [view.name for view in views]
    assert check_images(names, prepared).level == "ok"
    assert check_images(names, [*prepared[:-1], prepared[0][:, ::-1]]).level == "stop"


def test_the_results_on_a_constant_image_are_numbers() -> None:
    constant = np.zeros((300, 300), np.float32)
    constant[100:110, 100:110] = 1.0
    results = [*check_radiograph(constant, "frontal"), check_images(VIEWS, [constant[:50, :50]] * 2)]
    assert all(np.isfinite(result.value) for result in results)
    assert worst(results) == "stop"
