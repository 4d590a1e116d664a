"""Geometry `x2ct` against plastimatch, with which X2CT-GAN's radiographs were made.

`plastimatch.npz` holds images of plastimatch 1.9.4 (Debian) of the phantom below; `python
tests/datasets/test_plastimatch.py` rewrites it where plastimatch is installed.
"""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, map_coordinates

from raylift.datasets.geometry import FRONTAL, LATERAL, Grid, x2ct
from raylift.datasets.intensity import normalize
from raylift.datasets.projector import render_drrs

STORED = Path(__file__).with_name("plastimatch.npz")
GRID = Grid(40, 8.0)
GEOMETRY = x2ct(GRID)
ALGORITHMS = ("uniform", "exact")
"""uniform: samples at equal distances, interpolated linearly, as raylift's are. exact: the default and X2CT-GAN's, in
which voxels are boxes of constant attenuation."""
NORMALS = {"frontal": (0, 1, 0), "lateral": (1, 0, 0)}
"""From the isocenter to the source, in patient coordinates."""


def phantom() -> np.ndarray:
    """A thorax without any symmetry: HU in volume order, lungs of -850 and -700 HU, soft edges."""
    d, h, w = np.meshgrid(*[(np.arange(GRID.size) - (GRID.size - 1) / 2) / (GRID.size / 2)] * 3, indexing="ij")
    hu = np.full(GRID.shape, -1000, np.int16)
    hu[(w / 0.8) ** 2 + (h / 0.55) ** 2 + (d / 0.85) ** 4 < 1] = 40
    hu[((w + 0.38) / 0.26) ** 2 + (h / 0.4) ** 2 + ((d + 0.1) / 0.6) ** 2 < 1] = -850
    hu[((w - 0.4) / 0.24) ** 2 + (h / 0.38) ** 2 + ((d + 0.15) / 0.5) ** 2 < 1] = -700
    hu[(w - 0.15) ** 2 + (h + 0.15) ** 2 + (d - 0.1) ** 2 < 0.22**2] = 60
    hu[w**2 + (h - 0.38) ** 2 < 0.12**2] = 700
    hu[((w - 0.55) ** 2 + (h + 0.2) ** 2 + (d + 0.5) ** 2) < 0.12**2] = 1200
    return gaussian_filter(hu, 1.0)


def by_plastimatch(executable: str, algorithm: str, folder: Path) -> np.ndarray:
    """The images of both views as X2CT-GAN's code keeps them: the frontal one flipped, the lateral one as it is."""
    volume = sitk.GetImageFromArray(phantom()[::-1].astype(np.float32))
    volume.SetSpacing((GRID.spacing_mm,) * 3)
    volume.SetOrigin([-(n - 1) / 2 * GRID.spacing_mm for n in volume.GetSize()])
    sitk.WriteImage(volume, str(folder / "volume.mha"))
    px, side = GEOMETRY.detector_px, GEOMETRY.detector_px * GEOMETRY.detector_pitch_mm
    command = f"{executable} drr -i {algorithm} --sad 541 --sid 949 -r '{px} {px}' -z '{side} {side}' -t pfm"
    images = []
    for name, normal in NORMALS.items():
        files = f"-I {folder}/volume.mha -O {folder}/{algorithm}-{name}-"
        subprocess.run(f"{command} -n '{' '.join(map(str, normal))}' {files}", shell=True, check=True)
        (path,) = folder.glob(f"{algorithm}-{name}-*.pfm")
        _, size, scale, pixels = path.read_bytes().split(b"\n", 3)
        assert float(scale) < 0, "little-endian"
        columns, rows = map(int, size.split())
        images.append(np.frombuffer(pixels, "<f4").reshape(rows, columns))
    return np.stack([images[0][:, ::-1], images[1]])


def by_hand(name: str, samples: int = 1000) -> np.ndarray:
    """Plastimatch's arithmetic: attenuation, source, detector and samples along each ray, in one view.

    The result has the columns of `by_plastimatch`: to the patient's left in the frontal, to the back in the lateral.
    """
    hu = phantom().astype(float)
    attenuation = np.where(hu > -800, 1 + hu / 1000, 0.0)
    normal = np.array(NORMALS[name], float)
    column = np.array([1.0, 0, 0]) if name == "frontal" else np.array([0, 1.0, 0])
    down = np.array([0, 0, -1.0])
    px, pitch = GEOMETRY.detector_px, 500.0 / GEOMETRY.detector_px
    offset = (np.arange(px) - (px - 1) / 2) * pitch
    source = 541.0 * normal
    pixels = source - 949.0 * normal + offset[:, None, None] * down + offset[None, :, None] * column
    along = (np.arange(samples) + 0.5) / samples
    points = source + along[:, None, None, None] * (pixels - source)
    # Patient coordinates (left, posterior, superior) to indices (down, back, left).
    center = (GRID.size - 1) / 2
    indices = [-points[..., 2], points[..., 1], points[..., 0]]
    values = map_coordinates(attenuation, [i / GRID.spacing_mm + center for i in indices], order=1, cval=0.0)
    return values.sum(axis=0) / samples * np.linalg.norm(pixels - source, axis=-1)


def with_x2cts_columns(views: np.ndarray) -> np.ndarray:
    """DRRs of geometry `x2ct` with X2CT-GAN's columns: those of azimuth 270 run the other way."""
    return np.stack([views[0], views[1][:, ::-1]])


def distance(images: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 distance after each is divided by its maximum."""
    one, other = images / images.max(), reference / reference.max()
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.fixture(scope="module")
def ours() -> np.ndarray:
    return with_x2cts_columns(render_drrs(phantom(), GRID, GEOMETRY))


@pytest.mark.parametrize(("algorithm", "limit"), [("uniform", 0.002), ("exact", 0.02)])
def test_both_views_of_geometry_x2ct_are_plastimatchs_images(algorithm, limit, ours):
    with np.load(STORED) as stored:
        for view, reference in zip(ours, stored[algorithm], strict=True):
            assert distance(view, reference) < limit


def test_both_views_of_geometry_x2ct_are_its_arithmetic_written_out(ours):
    with np.load(STORED) as stored:
        for view, name, reference in zip(ours, NORMALS, stored["uniform"], strict=True):
            written_out = by_hand(name)
            assert distance(view, written_out) < 0.002
            assert distance(written_out, reference) < 0.002


def test_the_other_side_and_linear_attenuation_are_further_from_plastimatchs_images():
    with np.load(STORED) as stored:
        frontal, lateral = stored["uniform"]
    other = render_drrs(phantom(), GRID, replace(GEOMETRY, views=(FRONTAL, LATERAL)))
    assert distance(other[1], lateral) > 0.03
    linear = render_drrs(phantom(), GRID, replace(GEOMETRY, attenuation="linear"))
    assert distance(linear[0], frontal) > 0.03


def test_normalized_by_the_maximum_the_images_are_plastimatchs_in_8_bits(ours):
    with np.load(STORED) as stored:
        for view, reference in zip(ours, stored["uniform"], strict=True):
            # Divided by the maximum, times 255, as uint8: what X2CT-GAN's code stores.
            stored_there = (reference / reference.max() * 255).astype(np.uint8)
            difference = np.rint(normalize(view, "maximum") * 255) - stored_there
            assert np.abs(difference).mean() < 0.5
            assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plastimatch_gives_the_stored_images(algorithm, plastimatch, tmp_path):
    images = by_plastimatch(plastimatch, algorithm, tmp_path)
    with np.load(STORED) as stored:
        np.testing.assert_allclose(images, stored[algorithm], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        images = {algorithm: by_plastimatch("plastimatch", algorithm, Path(temporary)) for algorithm in ALGORITHMS}
    np.savez_compressed(STORED, **images)
