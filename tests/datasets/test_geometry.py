import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import (
    FRONTAL,
    GEOMETRIES,
    LATERAL,
    Geometry,
    Grid,
    View,
    chest,
    fit_detector,
    parallel,
    x2ct,
)
from raylift.datasets.serialization import from_plain, to_plain

LEFT, BACK, UP = np.eye(3)


def test_a_frontal_is_pa_with_the_patients_right_on_the_left() -> None:
    column, row, ray = FRONTAL.axes()
    assert (column == LEFT).all()
    assert (row == -UP).all()
    assert (ray == -BACK).all(), "rays enter at the back and leave at the front"


def test_a_lateral_has_anterior_on_the_left_and_the_left_side_at_the_detector() -> None:
    column, row, ray = LATERAL.axes()
    assert (column == BACK).all()
    assert (row == -UP).all()
    assert (ray == LEFT).all()


def test_elevation_tips_the_tube_towards_the_head() -> None:
    source = -View("tilted", elevation_deg=30).axes()[2]
    assert source == pytest.approx(0.5 * UP + np.sqrt(0.75) * BACK)


def test_roll_turns_the_detector_and_leaves_the_ray() -> None:
    column, row, ray = View("rolled", roll_deg=90).axes()
    assert (ray == FRONTAL.axes()[2]).all()
    assert (column == FRONTAL.axes()[1]).all()
    assert (row == -FRONTAL.axes()[0]).all()


angles = st.floats(-360, 360)


@given(angles, angles, angles)
def test_axes_are_orthonormal_and_never_flipped(azimuth: float, elevation: float, roll: float) -> None:
    axes = View("any", azimuth, elevation, roll).axes()
    assert axes @ axes.T == pytest.approx(np.eye(3), abs=1e-9)
    assert np.linalg.det(axes) == pytest.approx(np.linalg.det(FRONTAL.axes()))


@pytest.mark.parametrize("azimuth", range(-360, 361, 90))
@pytest.mark.parametrize("elevation", [-90, 0, 90])
@pytest.mark.parametrize("roll", [0, 180, 270])
def test_quarter_turns_are_exact(azimuth: float, elevation: float, roll: float) -> None:
    axes = View("quarter", azimuth, elevation, roll).axes()
    assert set(np.abs(axes).ravel()) == {0.0, 1.0}


def test_the_named_geometries_have_the_distances_of_their_sources() -> None:
    grid = Grid(128, 2.5)
    stand, published, flat = chest(grid), x2ct(grid), parallel(grid)
    assert (stand.source_isocenter_mm, stand.source_detector_mm) == (1650, 1800)
    assert (published.source_isocenter_mm, published.source_detector_mm) == (541, 949)
    assert published.detector_px * published.detector_pitch_mm == 500
    seen_mm = 500 / published.magnification
    assert seen_mm == pytest.approx(285, abs=0.5)
    assert flat.magnification == 1
    assert flat.detector_pitch_mm == grid.spacing_mm


@pytest.mark.parametrize("name", ["chest", "parallel"])
@pytest.mark.parametrize("grid", [Grid(128, 2.5), Grid(96, 3.0)])
def test_a_covering_detector_just_holds_the_central_plane(name: str, grid: Grid) -> None:
    geometry = GEOMETRIES[name](grid)
    edge_mm = geometry.detector_px * geometry.detector_pitch_mm
    assert edge_mm / geometry.magnification == pytest.approx(grid.extent_mm)


def test_a_geometry_survives_json() -> None:
    views = (FRONTAL, View("oblique", 30.5, 5, 2, (1.0, -2.0, 3.5)))
    geometry = Geometry("cone", 1000, 1500, 256, 1.5, views)
    assert from_plain(Geometry, json.loads(json.dumps(to_plain(geometry))), "x") == geometry


def test_a_view_is_found_by_name_or_the_names_there_are_are_listed() -> None:
    geometry = chest(Grid())
    assert geometry.view("lateral") is LATERAL
    with pytest.raises(ConfigError, match=r"no view 'axial' .* frontal, lateral"):
        geometry.view("axial")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_isocenter_mm": 0.0}, "source-isocenter distance 0"),
        ({"source_isocenter_mm": 1900.0}, "source-isocenter distance 1900"),
        ({"source_isocenter_mm": float("nan")}, "source-isocenter distance nan"),
        ({"detector_px": 0}, "detector of 0 px"),
        ({"detector_pitch_mm": 0.0}, "at 0.0 mm"),
        ({"detector_pitch_mm": float("nan")}, "at nan mm"),
        ({"views": ()}, "without views"),
        ({"views": (FRONTAL, FRONTAL)}, "share a name: frontal, frontal"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    sound = {"beam": "cone", "source_isocenter_mm": 1650.0, "source_detector_mm": 1800.0, "detector_px": 8}
    with pytest.raises(ConfigError, match=message):
        Geometry(**{**sound, "detector_pitch_mm": 1.0, **change})


@pytest.mark.parametrize(("size", "spacing_mm"), [(7, 1), (1025, 1), (64, 0), (64, -1), (64, 100), (64, float("nan"))])
def test_a_grid_outside_the_bounds_is_refused(size: int, spacing_mm: float) -> None:
    with pytest.raises(ConfigError, match=r"grid size|voxel spacing"):
        Grid(size, spacing_mm)


def test_covering_keeps_everything_but_the_pitch() -> None:
    geometry = Geometry("cone", 1000, 1500, 200, 1.0, (LATERAL,))
    covered = fit_detector(Grid(100, 2.0), geometry)
    assert covered.detector_pitch_mm == pytest.approx(1.5)
    assert (covered.source_isocenter_mm, covered.detector_px, covered.views) == (1000, 200, (LATERAL,))
