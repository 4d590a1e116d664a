"""Geometries and views as text: what is accepted, and the sentence with which the rest is refused."""

from pathlib import Path

import pytest

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, GEOMETRIES, LATERAL, MAX_VIEWS, Geometry, Grid, View, chest
from raylift.datasets.geometry_options import geometry_of, parse_views, read_geometry
from raylift.platform import cli

GRID = Grid(16, 20.0)
EIGHT = tuple(f"v{k}={k * 20}deg" for k in range(MAX_VIEWS))

OWN = """
beam: cone
source_isocenter_mm: 1000
source_detector_mm: 1500
detector: full_coverage
views:
  - {name: frontal}
  - {name: steep, azimuth_deg: 30, elevation_deg: 10, roll_deg: -5, offset_mm: [1, 2.5, -3]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "geometry.yaml"
    path.write_text(text)
    return path


def test_views_are_known_names_or_names_with_angles() -> None:
    assert parse_views("frontal, lateral,oblique30=30deg,Cranial-1=0deg/30deg,back_left=-135.5") == (
        FRONTAL,
        LATERAL,
        View("oblique30", 30.0),
        View("Cranial-1", 0.0, 30.0),
        View("back_left", -135.5),
    )


def test_eight_views_are_the_most() -> None:
    assert len(parse_views(",".join(EIGHT))) == MAX_VIEWS
    with pytest.raises(ConfigError, match="9 views: give 8 or fewer"):
        parse_views(",".join((*EIGHT, "frontal")))


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("", "a geometry without views"),
        (" ", "a geometry without views"),
        ("oblique", "no view 'oblique': use frontal or lateral, or give an angle, as in oblique=30deg"),
        ("frontal,,lateral", "no view ''"),
        ("frontal,lateral,frontal", "two views share a name: frontal, lateral, frontal"),
        ("a=10deg,A=20deg", "two views share a name: a, A"),
        ("left side=90deg", "'left side' is not a name for a view: use a letter"),
        ("30=30deg", "'30' is not a name for a view"),
        ("../a=30deg", "is not a name for a view"),
        ("=30deg", "'' is not a name for a view"),
        ("a=thirty", "'thirty' in view 'a=thirty' is not an angle"),
        ("a=nan", "'nan' in view 'a=nan' is not an angle"),
        ("a=1e3deg", "is not an angle"),
        ("a=30rad", "is not an angle"),
        ("a=", "'' in view 'a=' is not an angle"),
        ("a=30deg/", "'' in view 'a=30deg/' is not an angle"),
        ("a=1/2/3", "'2/3' in view"),
        ("invert=3deg", "a view cannot be named 'invert'"),
        ("flip_frontal=3deg", "a view cannot be named 'flip_frontal'"),
        ("all=3deg", "a view cannot be named 'all'"),
    ],
)
def test_views_that_mean_nothing_are_refused_with_a_sentence(text: str, reported: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_views(text)
    assert reported in str(refusal.value)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_by_name_is_the_function_of_that_name(name: str) -> None:
    assert geometry_of(name, GRID) == GEOMETRIES[name](GRID)


def test_a_geometry_by_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown geometry 'abdomen': use chest, x2ct, parallel, or a YAML file"):
        geometry_of("abdomen", GRID)


def test_a_geometry_file_states_beam_distances_detector_and_views(tmp_path: Path) -> None:
    steep = View("steep", 30.0, 10.0, -5.0, (1.0, 2.5, -3.0))
    expected = Geometry("cone", 1000.0, 1500.0, 16, 320.0 * 1.5 / 16, (FRONTAL, steep))
    assert geometry_of(str(written(tmp_path, OWN)), GRID) == expected


def test_a_detector_has_the_size_and_pitch_of_the_file(tmp_path: Path) -> None:
    own = OWN.replace("full_coverage", "{px: 24, pitch_mm: 17.5}")
    geometry = read_geometry(written(tmp_path, own), GRID)
    assert (geometry.detector_px, geometry.detector_pitch_mm) == (24, 17.5)
    covering = read_geometry(written(tmp_path, OWN.replace("full_coverage", "{px: 24}")), GRID)
    assert (covering.detector_px, covering.detector_pitch_mm) == (24, 20.0)


def test_a_parallel_beam_needs_no_distances(tmp_path: Path) -> None:
    text = "beam: parallel\nviews: [{name: frontal}, {name: lateral, azimuth_deg: 90}]"
    assert read_geometry(written(tmp_path, text), GRID) == GEOMETRIES["parallel"](GRID)


@pytest.mark.parametrize(
    ("old", "new", "reported"),
    [
        ("source_isocenter_mm: 1000\n", "", "a cone beam needs source_isocenter_mm and source_detector_mm"),
        (
            "source_isocenter_mm: 1000",
            "source_isocenter_mm: 2000",
            "source-isocenter distance 2000.0 mm must lie in (0, 1500.0]",
        ),
        (
            "detector: full_coverage",
            "detector: wide",
            "detector is 'wide': write full_coverage, or the keys px and pitch_mm",
        ),
        ("detector: full_coverage", "detector: {px: 0}", "a detector of 0 px"),
        ("detector: full_coverage", "detector: {pixels: 3}", "extra fields found (pixels)"),
        ("beam: cone", "beam: fan", "expected one of cone, parallel, not 'fan'"),
        ("azimuth_deg: 30", "azimuth: 30", "extra fields found (azimuth)"),
        ("azimuth_deg: 30", "azimuth_deg: east", "expected float @"),
        ("azimuth_deg: 30", "azimuth_deg: .nan", "view 'steep' has an angle or offset that is not a finite number"),
        ("name: steep", "name: frontal", "two views share a name: frontal, frontal"),
        ("name: steep", "name: a/b", "'a/b' is not a name for a view"),
        ("[1, 2.5, -3]", "[1, 2.5]", "views[1].offset_mm"),
        ("views:", "view:", "a geometry file has the keys views, beam"),
        (OWN, "[1", "is not YAML"),
        (OWN, "chest", "a geometry file has the keys views, beam"),
        (OWN, "#" * 70_000, "over the limit of 65536 for a geometry file"),
        (OWN, "beam: parallel\nviews: []", "a geometry without views"),
        (OWN, "beam: parallel\nviews: 3", "expected a list, not 3"),
        (OWN, "views: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_describes_no_geometry_is_refused_by_name(
    tmp_path: Path, old: str, new: str, reported: str
) -> None:
    path = written(tmp_path, OWN.replace(old, new))
    with pytest.raises(ConfigError) as refusal:
        read_geometry(path, GRID)
    assert reported in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        geometry_of(str(tmp_path / "none.yaml"), GRID)


def test_phantoms_are_projected_in_the_views_of_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "archive")
    made = ["phantom", "--archive", url, "--count", "1", "--size", "16", "--spacing-mm", "20"]
    assert cli.main([*made, "--views", "frontal,oblique30=30deg,cranial=0deg/30deg"]) == 0
    archive = Archive(url)
    views = (FRONTAL, View("oblique30", 30.0), View("cranial", 0.0, 30.0))
    assert archive.manifest.geometry.views == views
    (entry,) = archive.entries()
    images = archive.read(entry).radiographs
    assert images.shape == (3, 16, 16)
    assert len({image.tobytes() for image in images}) == 3
    # An archive keeps its views, by default and by the same flag, and takes no others.
    assert cli.main([*made[:4], "2"]) == 0
    assert Archive(url).manifest.geometry.views == views
    assert cli.main([*made, "--views", "frontal"]) == 2
    assert "use the archive's own, or another URL" in capsys.readouterr().err


def test_phantoms_are_projected_in_the_geometry_of_a_file(tmp_path: Path) -> None:
    url, path = str(tmp_path / "archive"), written(tmp_path, OWN)
    made = ["phantom", "--archive", url, "--count", "1", "--size", "16", "--spacing-mm", "20"]
    assert cli.main([*made, "--geometry", str(path), "--views", "lateral"]) == 0
    geometry = Archive(url).manifest.geometry
    assert geometry.views == (LATERAL,)
    assert (geometry.source_isocenter_mm, geometry.detector_pitch_mm) == (1000.0, 30.0)
    assert geometry.magnification > chest(GRID).magnification


def test_a_name_of_the_geometrys_own_views_is_that_view() -> None:
    lateral = GEOMETRIES["x2ct"](GRID).view("lateral")
    assert lateral.azimuth_deg == 270
    assert parse_views("lateral,up=0/30", GEOMETRIES["x2ct"](GRID).views) == (lateral, View("up", 0.0, 30.0))
    assert parse_views("lateral") == (LATERAL,)


def test_a_file_may_name_the_attenuation(tmp_path: Path) -> None:
    text = "beam: parallel\nattenuation: plastimatch\nviews: [{name: frontal}]"
    assert read_geometry(written(tmp_path, text), GRID).attenuation == "plastimatch"
    with pytest.raises(ConfigError, match="attenuation"):
        read_geometry(written(tmp_path, text.replace("plastimatch", "cubic")), GRID)
