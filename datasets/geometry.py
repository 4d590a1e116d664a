"""The voxel grid, views and X-ray geometry, in millimeters.

Two coordinate systems are used everywhere:

* **Volume order**: tensors are N, C, D, H, W with D from superior to inferior, H from anterior to posterior and
  W from the patient's right to left (orientation code IPL: the directions in which the axes increase).
* **Patient coordinates**: LPS coordinates in mm about the isocenter (x to the left, y posterior, z superior), as
  DICOM and ITK have them. The isocenter is the center of the volume.

Radiographs have the orientation in which they are read: rows from superior to inferior; columns of a frontal image from
the patient's right to left, of a lateral one at azimuth 90 degrees from anterior to posterior (the patient faces the
left edge), at 270 degrees from posterior to anterior.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from raylift.datasets.errors import ConfigError
from raylift.datasets.intensity import Attenuation

MAX_VIEWS = 8
VIEW_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
RESERVED_NAMES = ("all", "invert", "samples", "return_std")
"""No names of views: `all` selects every view, the others are fields of the service's form, as is every `flip_NAME`."""


@dataclass(frozen=True)
class Grid:
    """A cube of isotropic voxels centered on the isocenter."""

    size: int = 128
    spacing_mm: float = 2.5

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 1024:
            raise ConfigError(f"grid size {self.size} is outside 8 to 1024 voxels per side")
        if not 0 < self.spacing_mm < 100:
            raise ConfigError(f"voxel spacing {self.spacing_mm} mm is outside (0, 100)")

    @property
    def extent_mm(self) -> float:
        """Edge of the cube in mm, between outer voxel faces."""
        return self.size * self.spacing_mm

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return (self.size, self.size, self.size)


@dataclass(frozen=True)
class View:
    """One pose of X-ray source and detector about the isocenter.

    Angles rotate source and detector together: `azimuth_deg` about the patient's long axis (0 is a PA frontal, 90 a
    left lateral), `elevation_deg` tilts the source towards the head, `roll_deg` rotates the detector in its plane.
    `offset_mm` translates the point that is imaged at the detector's center, in patient coordinates.
    """

    name: str
    azimuth_deg: float = 0.0
    elevation_deg: float = 0.0
    roll_deg: float = 0.0
    offset_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if not np.isfinite([self.azimuth_deg, self.elevation_deg, self.roll_deg, *self.offset_mm]).all():
            raise ConfigError(f"view '{self.name}' has an angle or offset that is not a finite number")

    @property
    def is_lateral(self) -> bool:
        """Whether it is a left or a right lateral, unrotated otherwise: azimuth 90 or 270 degrees."""
        return self.left_edge in ("anterior side", "posterior side")

    @property
    def left_edge(self) -> str:
        """The side of the patient at the image's left edge; empty for an oblique, tilted or rolled view."""
        columns, rows, _ = self.axes()
        if abs(rows[2]) != 1.0:
            return ""
        sides = {(1, 0): "right side", (-1, 0): "left side", (0, 1): "anterior side", (0, -1): "posterior side"}
        return sides.get((columns[0], columns[1]), "")

    @property
    def pose(self) -> str:
        """The angles in words."""
        angles = {"azimuth": self.azimuth_deg, "elevation": self.elevation_deg, "roll": self.roll_deg}
        return ", ".join(f"{name} {angle:g}°" for name, angle in angles.items() if angle or name == "azimuth")

    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Unit vectors (rows: column direction, row direction, ray direction) in patient coordinates."""
        azimuth, elevation, roll = np.deg2rad([self.azimuth_deg, self.elevation_deg, self.roll_deg])
        # PA frontal: columns run to the patient's left, rows to the feet, rays from posterior to anterior.
        column, row, ray = np.array([1.0, 0, 0]), np.array([0, 0, -1.0]), np.array([0, -1.0, 0])
        row, ray = (
            np.cos(elevation) * row - np.sin(elevation) * ray,
            np.cos(elevation) * ray + np.sin(elevation) * row,
        )
        column, row = np.cos(roll) * column + np.sin(roll) * row, np.cos(roll) * row - np.sin(roll) * column
        rotation = np.array([[np.cos(azimuth), -np.sin(azimuth), 0], [np.sin(azimuth), np.cos(azimuth), 0], [0, 0, 1]])
        axes = np.stack([column, row, ray]) @ rotation.T
        # Right angles must be exact: the projector uses its fast path only for exact axes.
        return np.where(np.abs(axes) < 1e-12, 0.0, np.where(np.abs(np.abs(axes) - 1) < 1e-12, np.sign(axes), axes))


FRONTAL = View("frontal")
LATERAL = View("lateral", azimuth_deg=90.0)


@dataclass(frozen=True)
class Geometry:
    """The X-ray geometry of a set of radiographs: beam, distances, detector, views, and how HU attenuate in DRRs.

    `source_isocenter_mm` (SAD) is the distance from the focal spot to the isocenter, `source_detector_mm` (SDD) to the
    detector. Both are ignored for a parallel beam, where `detector_pitch_mm` is the pitch at the isocenter.
    """

    beam: Literal["cone", "parallel"]
    source_isocenter_mm: float
    source_detector_mm: float
    detector_px: int
    detector_pitch_mm: float
    views: tuple[View, ...] = (FRONTAL, LATERAL)
    attenuation: Attenuation = "linear"
    """HU to attenuation in digitally reconstructed radiographs (DRRs) of CT."""

    def __post_init__(self) -> None:
        if self.beam == "cone" and not 0 < self.source_isocenter_mm <= self.source_detector_mm:
            raise ConfigError(
                f"source-isocenter distance {self.source_isocenter_mm} mm must lie in (0, {self.source_detector_mm}], "
                "the source-detector distance"
            )
        if self.detector_px < 1 or not self.detector_pitch_mm > 0:
            raise ConfigError(f"a detector of {self.detector_px} px at {self.detector_pitch_mm} mm has no area")
        check_view_names([view.name for view in self.views])

    @property
    def magnification(self) -> float:
        """Detector size over object size at the isocenter."""
        return self.source_detector_mm / self.source_isocenter_mm if self.beam == "cone" else 1.0

    def view(self, name: str) -> View:
        """The view with that name, or a ConfigError that lists the names."""
        for view in self.views:
            if view.name == name:
                return view
        raise ConfigError(f"no view '{name}' in this geometry: it has {', '.join(v.name for v in self.views)}")


def check_view_names(names: Sequence[str]) -> None:
    """Check the names of a geometry's views, which are also fields of forms, keys of headers and parts of file names.

    Raises:
        ConfigError: there are none or too many, a name has other characters or a meaning of its own, or one occurs
            twice.
    """
    if not names:
        raise ConfigError("a geometry without views: name one or more")
    if len(names) > MAX_VIEWS:
        raise ConfigError(f"{len(names)} views: give {MAX_VIEWS} or fewer")
    for name in names:
        if not VIEW_NAME.fullmatch(name):
            raise ConfigError(
                f"{name[:40]!r} is not a name for a view: use a letter followed by letters, digits, - and _, "
                "32 characters or fewer"
            )
        if name.lower() in RESERVED_NAMES or name.lower().startswith("flip_"):
            raise ConfigError(f"a view cannot be named '{name}', which has a meaning of its own: choose another name")
    if len({name.lower() for name in names}) != len(names):
        raise ConfigError(f"two views share a name: {', '.join(names)}")


def chest(grid: Grid) -> Geometry:
    """A wall stand: SAD 1650 mm, SDD 1800 mm, a detector that covers the volume's central plane.

    Source: SDD of 1800 to 1830 mm in the headers of the Indiana collection; the axis is half a thorax and an air gap
    in front of the detector.
    """
    return fit_detector(grid, Geometry("cone", 1650.0, 1800.0, grid.size, 1.0))


def x2ct(grid: Grid) -> Geometry:
    """The geometry of X2CT-GAN's training data: SAD 541 mm, SDD 949 mm, a 500 mm detector, plastimatch's attenuation.

    The field of view is 285 mm at the isocenter, so the sides of a 320 mm volume are cropped, as in the original data.
    The source of the lateral is at the patient's left (azimuth 270 degrees).
    """
    views = (FRONTAL, View("lateral", azimuth_deg=270.0))
    return Geometry("cone", 541.0, 949.0, grid.size, 500.0 / grid.size, views, "plastimatch")


def parallel(grid: Grid) -> Geometry:
    """A parallel beam: every pixel is the sum over one line of voxels."""
    return fit_detector(grid, Geometry("parallel", 1.0, 1.0, grid.size, 1.0))


def fit_detector(grid: Grid, geometry: Geometry) -> Geometry:
    """The same geometry with the pitch at which the detector covers the volume's central plane."""
    return replace(geometry, detector_pitch_mm=grid.extent_mm * geometry.magnification / geometry.detector_px)


GEOMETRIES = {"chest": chest, "x2ct": x2ct, "parallel": parallel}
