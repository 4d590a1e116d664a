from pathlib import Path

import numpy as np
import pytest
from gradio.processing_utils import save_file_to_cache
from PIL import Image

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.preparation import prepare
from raylift.models.weights import Description
from raylift.serve.images import (
    ORIENTATION_LETTERS,
    PLANES,
    SIDE_PX,
    Plane,
    reprojections,
    slice_image,
    with_orientation_letters,
)
from raylift.serve.page.result_files import ResultFiles


def box() -> np.ndarray:
    """A bright box at the patient's right, anterior and superior."""
    hu = np.full((32, 32, 32), -1000, np.int16)
    hu[2:8, 2:8, 2:8] = 900
    return hu


@pytest.mark.parametrize("plane", PLANES)
def test_the_letters_match_the_orientation_of_a_slice(plane: Plane) -> None:
    image = slice_image(box(), plane, 5, "wide")
    assert image.shape == (SIDE_PX, SIDE_PX)
    assert (image[40:200, 40:200] > 150).sum() > 1000
    assert (image[200:, 200:] > 150).sum() < 1000
    left, _, upper, _ = ORIENTATION_LETTERS[plane]
    assert {left, upper} < {"R", "A", "S"}


def test_letters_are_at_the_middle_of_their_edges() -> None:
    image = with_orientation_letters(np.zeros((SIDE_PX, SIDE_PX), np.uint8), "RLAP") > 128
    middle = slice(SIDE_PX // 2 - 20, SIDE_PX // 2 + 20)
    edges = [image[middle, :40], image[middle, -40:], image[:40, middle], image[-40:, middle]]
    assert all(edge.any() for edge in edges)
    assert image.sum() == sum(edge.sum() for edge in edges)
    assert not (with_orientation_letters(np.zeros((SIDE_PX, SIDE_PX), np.uint8), "RL") > 128)[:40].any()


def test_a_window_maps_its_hu_range_to_gray() -> None:
    hu = np.linspace(-1024, 1476, 32).astype(np.int16).reshape(1, 1, 32).repeat(32, 0).repeat(32, 1)
    lung, soft = (slice_image(hu, "axial", 0, window)[100] for window in ("lung", "soft tissue"))
    assert (lung == 255).mean() == pytest.approx(1 - (150 + 1024) / 2500, abs=0.05)
    assert (soft == 0).mean() == pytest.approx((-160 + 1024) / 2500, abs=0.05)


def test_an_index_beyond_the_volume_is_clamped_to_the_last_slice() -> None:
    np.testing.assert_array_equal(slice_image(box(), "axial", 99, "wide"), slice_image(box(), "axial", 31, "wide"))


def test_reprojections_of_the_ground_truth_match_its_radiographs(
    description: Description, radiographs: dict[str, bytes]
) -> None:
    grid = Grid(32, 10.0)
    images = reprojections(thorax(7, grid)[0], grid, chest(grid))
    assert [image.shape for image in images] == [(SIDE_PX, SIDE_PX)] * 2
    frontal = prepare(read(radiographs["frontal"], "frontal", invert="no").pixels, 32)
    small = images[0].reshape(32, 14, 32, 14).mean((1, 3)) / 255
    assert np.corrcoef(small.ravel(), frontal.ravel())[0, 1] > 0.99


def test_equal_images_are_one_file_where_gradio_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    files = ResultFiles()
    images = [Path(files.write_image(slice_image(box(), "axial", 5, "wide"))) for _ in range(2)]
    first = images[0]
    assert images == [first, first]
    np.testing.assert_array_equal(np.asarray(Image.open(first)), slice_image(box(), "axial", 5, "wide"))
    # The path under which Gradio serves it is this one, so Gradio deletes it in time.
    assert save_file_to_cache(first, str(tmp_path)) == str(first)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [first]
