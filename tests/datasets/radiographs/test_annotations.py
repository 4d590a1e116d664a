from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from radiograph_samples import REAL, chest

from raylift.datasets.radiographs.annotations import remove_annotations
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.preparation import prepare


def radiograph(px: int = 512) -> np.ndarray:
    """A chest with grain, whose brightest pixels are bone."""
    image = Image.fromarray(chest(px, px).astype(np.float32))
    return np.asarray(image) + np.random.default_rng(0).normal(0, 2, (px, px)).astype(np.float32)


def written_on(image: np.ndarray, text: str, place: tuple[float, float], height: float = 0.05) -> np.ndarray:
    """Letters of full brightness, their upper left corner at these shares of width and height."""
    rows, columns = image.shape
    canvas = Image.fromarray(image)
    font = ImageFont.load_default(size=int(height * rows))
    ImageDraw.Draw(canvas).text((place[0] * columns, place[1] * rows), text, fill=float(image.max()) + 20, font=font)
    return np.asarray(canvas)


@pytest.mark.parametrize("px", [160, 512, 1500])
@pytest.mark.parametrize(
    ("text", "place"), [("L", (0.9, 0.05)), ("bedside", (0.02, 0.1)), ("R  AP 12:30", (0.6, 0.02))]
)
def test_letters_near_a_side_are_filled_with_what_surrounds_them(
    px: int, text: str, place: tuple[float, float]
) -> None:
    plain = radiograph(px)
    written = written_on(plain, text, place)
    assert np.abs(written - plain).max() > 100
    clean = remove_annotations(written)
    assert clean.max() < written.max()
    where = written != plain
    assert np.abs(clean - plain)[where].max() < 40, "what is left of a letter's edge"
    assert (clean != written).mean() < 0.08
    assert np.abs(prepare(written, 64) - prepare(plain, 64)).max() < 0.06


def test_a_box_of_text_that_would_set_the_scale_does_not() -> None:
    plain = radiograph()
    boxed = plain.copy()
    boxed[10:50, 10:180] = 2000
    assert np.abs(prepare(boxed, 64) - prepare(plain, 64)).max() < 0.12
    assert prepare(boxed, 64)[30, 32] > 0.5


@pytest.mark.parametrize(
    ("text", "place", "height"), [("T", (0.45, 0.5), 0.05), ("X", (0.02, 0.02), 0.3)], ids=["inside", "large"]
)
def test_what_may_be_metal_or_anatomy_stays(text: str, place: tuple[float, float], height: float) -> None:
    image = written_on(radiograph(), text, place, height)
    assert np.array_equal(remove_annotations(image), image)


def test_bright_tissue_that_ends_at_a_side_stays() -> None:
    image = radiograph()
    image[400:, :60] = image.max()
    assert np.array_equal(remove_annotations(image), image)


def test_an_image_with_thousands_of_marks_is_unchanged_within_five_seconds() -> None:
    image = np.zeros((4000, 4000), np.float32)
    image[::16, ::16] = 1
    began = time.process_time()
    assert np.array_equal(remove_annotations(image), image)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", REAL)
def test_of_real_radiographs_the_letters_go_and_little_else(name: str, real_data: Path) -> None:
    image = read((real_data / "xray" / f"{name}.jpg").read_bytes(), name, invert="no").pixels
    clean = remove_annotations(image)
    changed = clean != image
    # Those of two collections have letters of full white in the upper corners; the third's have none.
    if name.startswith("eurorad"):
        assert changed.mean() < 0.002
    if name in ("cc0_normal_frontal", "rad_covid15_frontal", "rad_covid15_lateral"):
        rows, columns = image.shape
        corners = np.zeros_like(changed)
        corners[: rows // 4, : columns // 4] = corners[: rows // 4, -columns // 4 :] = True
        assert (image[changed & corners] > 250).sum() > 500
        assert (clean[corners] > 250).sum() < 0.05 * (image[corners] > 250).sum()
    assert changed.mean() < 0.02
