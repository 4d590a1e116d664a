"""Geometries and views as text: a name, a YAML file, or a list of views such as `frontal,lateral,oblique30=30deg`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import (
    FRONTAL,
    GEOMETRIES,
    LATERAL,
    Geometry,
    Grid,
    View,
    check_view_names,
    fit_detector,
)
from raylift.datasets.intensity import Attenuation
from raylift.datasets.serialization import from_plain

KNOWN_VIEWS = {view.name: view for view in (FRONTAL, LATERAL)}
MAX_BYTES = 2**16
"""Largest size of a geometry file in bytes."""
ANGLE = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?)(?:deg)?")


@dataclass(frozen=True)
class _Detector:
    """A square detector; without a pitch it covers the volume's central plane."""

    px: int | None = None
    pitch_mm: float | None = None


@dataclass(frozen=True)
class _GeometryFile:
    """The keys of a geometry file."""

    views: tuple[View, ...]
    beam: Literal["cone", "parallel"] = "cone"
    source_isocenter_mm: float | None = None
    source_detector_mm: float | None = None
    attenuation: Attenuation = "linear"


def geometry_of(text: str, grid: Grid) -> Geometry:
    """The geometry of that name (chest, x2ct, parallel), or of a YAML file.

    Raises:
        ConfigError: it is neither, or the file does not describe a geometry.
    """
    if text in GEOMETRIES:
        return GEOMETRIES[text](grid)
    if text.endswith((".yaml", ".yml")):
        return read_geometry(Path(text), grid)
    raise ConfigError(f"unknown geometry '{text[:80]}': use {', '.join(GEOMETRIES)}, or a YAML file")


def read_geometry(path: Path, grid: Grid) -> Geometry:
    """The geometry of a YAML file: keys beam, source_isocenter_mm, source_detector_mm, detector, attenuation and views.

    `detector` is `full_coverage` (the default: as many pixels as the grid has voxels per side, covering the volume's
    central plane) or has the keys px and pitch_mm, each of which may be left out. `views` is a list of mappings with
    the keys name, azimuth_deg, elevation_deg, roll_deg and offset_mm.

    Raises:
        ConfigError: it cannot be read, a key is unknown or missing, or a value makes no geometry.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path}: {len(raw)} bytes, over the limit of {MAX_BYTES} for a geometry file")
        data = yaml.safe_load(raw)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split()):.200}") from error
    if not isinstance(data, dict) or "views" not in data:
        raise ConfigError(f"{path}: a geometry file has the keys views, beam, distances and detector")
    detector = _detector(data.pop("detector", "full_coverage"), f"{path}: detector")
    stated = from_plain(_GeometryFile, data, str(path))
    source_isocenter_mm, source_detector_mm = stated.source_isocenter_mm, stated.source_detector_mm
    if stated.beam == "parallel":
        source_isocenter_mm = source_detector_mm = 1.0
    if source_isocenter_mm is None or source_detector_mm is None:
        raise ConfigError(f"{path}: a cone beam needs source_isocenter_mm and source_detector_mm")
    try:
        geometry = Geometry(
            stated.beam,
            source_isocenter_mm,
            source_detector_mm,
            grid.size if detector.px is None else detector.px,
            1.0 if detector.pitch_mm is None else detector.pitch_mm,
            stated.views,
            stated.attenuation,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return geometry if detector.pitch_mm is not None else fit_detector(grid, geometry)


def _detector(stated: Any, where: str) -> _Detector:
    if stated == "full_coverage":
        return _Detector()
    if not isinstance(stated, dict):
        raise ConfigError(f"{where} is {stated!r:.40}: write full_coverage, or the keys px and pitch_mm")
    return from_plain(_Detector, stated, where)


def parse_views(text: str, own: Sequence[View] = ()) -> tuple[View, ...]:
    """Views from text such as `frontal,lateral,oblique30=30deg,cranial=0deg/30deg`.

    Each is the name of one of a geometry's `own` views, `frontal`, `lateral`, or NAME=AZIMUTH or
    NAME=AZIMUTH/ELEVATION, in degrees; `deg` may be left out.

    Raises:
        ConfigError: names what is wrong with which view.
    """
    known = {**KNOWN_VIEWS, **{view.name: view for view in own}}
    views = tuple(_view(word.strip(), known) for word in text.split(",")) if text.strip() else ()
    check_view_names([view.name for view in views])
    return views


def _view(word: str, known: dict[str, View]) -> View:
    name, equals, angles = word.partition("=")
    if not equals:
        if name not in known:
            raise ConfigError(
                f"no view '{word[:40]}': use {' or '.join(known)}, or give an angle, as in "
                f"{name if name.isidentifier() else 'oblique30'}=30deg"
            )
        return known[name]
    azimuth, slash, elevation = angles.partition("/")
    return View(name, _degrees(azimuth, word), _degrees(elevation, word) if slash else 0.0)


def _degrees(text: str, word: str) -> float:
    match = ANGLE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"'{text[:40]}' in view '{word[:60]}' is not an angle: write NAME=30deg, or NAME=0deg/30deg with an "
            "elevation"
        )
    return float(match[1])
