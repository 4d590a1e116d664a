"""Whether an image shows a chest, on phantoms and real radiographs, and on what is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from radiograph_samples import REAL, disturbed

from raylift.datasets.geometry import GEOMETRIES, Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.chest import is_chest
from raylift.datasets.radiographs.decoding import read

GRID = Grid(32, 10.0)
Y, X = np.mgrid[0:1:200j, 0:1:200j]


def text() -> np.ndarray:
    image = Image.new("L", (200, 200))
    for line in range(10):
        ImageDraw.Draw(image).text((5, 20 * line), "Dear Sir or Madam, Dear Sir or Madam", fill=255)
    return np.asarray(image)


OTHERS = {
    "noise": np.random.default_rng(0).random((200, 200)),
    "a gradient down": Y,
    "a gradient across": X,
    "a diagonal gradient": X + Y,
    "text": text(),
    "a knee": (abs(X - 0.5) < 0.2) * 0.4 + (abs(X - 0.5) < 0.1) * 0.5 + (np.hypot((X - 0.5) * 2, Y - 0.5) < 0.1) * 0.3,
}


@pytest.mark.parametrize("view", ["frontal", "lateral"])
def test_phantoms_on_which_no_limit_was_chosen_are_chests(view: str) -> None:
    for seed in range(20, 26):
        for geometry in GEOMETRIES.values():
            image = dict(
                zip(("frontal", "lateral"), render_drrs(thorax(seed, GRID)[0], GRID, geometry(GRID)), strict=True)
            )[view]
            for what, other in [("as it is", image), *disturbed(image)]:
                assert is_chest(other.astype(np.float32), view), (seed, what)


@pytest.mark.parametrize("name", REAL)
def test_real_radiographs_are_chests(name: str, real_data: Path) -> None:
    view = name.rpartition("_")[2]
    image = read((real_data / "xray" / f"{name}.jpg").read_bytes(), name, view=view).pixels
    for what, other in [("as it is", image), *disturbed(image[::4, ::4])]:
        assert is_chest(other.astype(np.float32), view), what


@pytest.mark.parametrize("view", ["frontal", "lateral"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_chest_is_detected(what: str, view: str) -> None:
    assert not is_chest(OTHERS[what].astype(np.float32), view)


def test_exchanged_views_and_negatives_are_no_chests_of_the_view() -> None:
    frontal, lateral = render_drrs(thorax(20, GRID)[0], GRID, GEOMETRIES["chest"](GRID))
    assert not is_chest(frontal, "lateral")
    assert not is_chest(lateral, "frontal")
    assert not is_chest(frontal.max() - frontal, "frontal")
    assert is_chest(lateral, "oblique30")


@pytest.mark.parametrize("case", ["cc0_normal", "eurorad_12325_d0", "rad_covid15"])
def test_radiographs_side_by_side_are_not_one_chest(case: str, real_data: Path) -> None:
    frontal, lateral = (
        np.asarray(Image.open(real_data / "xray" / f"{case}_{view}.jpg").convert("L").resize((side, 400)), np.float32)
        for view, side in (("frontal", 380), ("lateral", 300))
    )
    assert is_chest(frontal, "frontal")
    for images in ((frontal, lateral), (lateral, frontal), (frontal, frontal)):
        for view in ("frontal", "lateral"):
            assert not is_chest(np.hstack(images), view)
