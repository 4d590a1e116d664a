"""Errors of known size in the radiographs of a CT: pose, distances, exposure, tone, collimation, orientation.

They measure how a model that has the nominal geometry as input degrades. Each error changes one thing of an otherwise
unperturbed acquisition, and is simulated by the functions that augmentation uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from torch import Tensor

from raylift.datasets.augmentation.acquisition import FIELD_POINTS, AcquisitionParameters, simulate_acquisition
from raylift.datasets.augmentation.augmentation import line_integrals
from raylift.datasets.geometry import Geometry, Grid, View
from raylift.datasets.projector import require_source_outside


@dataclass(frozen=True)
class Exposure:
    """How the radiographs of one CT are acquired and displayed."""

    geometries: tuple[Geometry, ...]
    """A geometry of a single view for each view."""
    acquisition: AcquisitionParameters
    flipped: bool = False
    """Whether views from the front or back are flipped left to right."""

    @classmethod
    def nominal(cls, geometry: Geometry) -> Exposure:
        """Noise-free and in the nominal geometry."""
        geometries = tuple(replace(geometry, views=(view,)) for view in geometry.views)
        return cls(geometries, AcquisitionParameters.none(len(geometries), geometry.detector_px))

    def with_views(self, change: Callable[[View, int], View]) -> Exposure:
        """Each view changed by a function of the view and its index."""
        geometries = (
            replace(geometry, views=(change(geometry.views[0], k),)) for k, geometry in enumerate(self.geometries)
        )
        return replace(self, geometries=tuple(geometries))

    def with_acquisition(self, **changed: np.ndarray) -> Exposure:
        """Other parameters of the acquisition."""
        return replace(self, acquisition=replace(self.acquisition, **changed))


Change = Callable[[Exposure, float, np.random.Generator], Exposure]
"""The exposure with an error of that strength."""


def _rotate(exposure: Exposure, degrees: float, rng: np.random.Generator) -> Exposure:
    signs = rng.choice((-1.0, 1.0), len(exposure.geometries))
    return exposure.with_views(lambda view, k: replace(view, azimuth_deg=view.azimuth_deg + degrees * signs[k]))


def _move_source(exposure: Exposure, percent: float, rng: np.random.Generator) -> Exposure:  # noqa: ARG001
    def moved(pose: Geometry) -> Geometry:
        further = percent / 100 * pose.source_detector_mm
        return replace(
            pose,
            source_isocenter_mm=pose.source_isocenter_mm + further,
            source_detector_mm=pose.source_detector_mm + further,
        )

    return replace(exposure, geometries=tuple(moved(geometry) for geometry in exposure.geometries))


def _move_patient(exposure: Exposure, mm: float, rng: np.random.Generator) -> Exposure:
    signs = rng.choice((-1.0, 1.0), len(exposure.geometries))

    def moved(view: View, k: int) -> View:
        x, y, z = (np.array(view.offset_mm) + mm * signs[k] * view.axes()[0]).tolist()
        return replace(view, offset_mm=(x, y, z))

    return exposure.with_views(moved)


def _add_noise(exposure: Exposure, photons: float, rng: np.random.Generator) -> Exposure:
    noise = rng.standard_normal(exposure.acquisition.noise.shape).astype(np.float32)
    return exposure.with_acquisition(noise=noise, photons=np.full(len(exposure.geometries), photons))


def _add_scatter(exposure: Exposure, strength: float, rng: np.random.Generator) -> Exposure:
    return exposure.with_acquisition(
        scatter=strength * rng.uniform(0, 1, (len(exposure.geometries), FIELD_POINTS, FIELD_POINTS))
    )


def _change_tone(exposure: Exposure, gamma: float, rng: np.random.Generator) -> Exposure:  # noqa: ARG001
    return exposure.with_acquisition(gamma=np.full(len(exposure.geometries), gamma))


def _collimate(exposure: Exposure, percent: float, rng: np.random.Generator) -> Exposure:  # noqa: ARG001
    overlay = np.zeros_like(exposure.acquisition.overlay)
    size = overlay.shape[-1]
    border = round(size * percent / 100)
    overlay[:, border : size - border, border : size - border] = np.nan
    return exposure.with_acquisition(overlay=overlay)


def _flip(exposure: Exposure, strength: float, rng: np.random.Generator) -> Exposure:  # noqa: ARG001
    return replace(exposure, flipped=bool(strength))


def _none(exposure: Exposure, strength: float, rng: np.random.Generator) -> Exposure:  # noqa: ARG001
    return exposure


@dataclass(frozen=True)
class PerturbationKind:
    """One kind of error."""

    title: str
    """With its unit, for the axis of a curve."""
    label: str
    """Format of a row's label from the strength."""
    strengths: tuple[float, ...]
    """In the order of a curve, with the neutral one in its place."""
    change: Change
    neutral: float = 0.0
    """The strength that changes nothing."""
    ticks: tuple[str, ...] = ()
    """Names of the strengths in a curve; by default their numbers."""

    def tick(self, strength: float) -> str:
        """The name of a strength in a curve."""
        return dict(zip(self.strengths, self.ticks, strict=False)).get(strength, f"{strength:g}")


KINDS: dict[str, PerturbationKind] = {
    "angle": PerturbationKind("view angle, degrees", "view angle {:g}°", (0, 1, 2, 5, 10), _rotate),
    "distance": PerturbationKind("source distance, %", "source distance {:+g} %", (-10, -5, 0, 5, 10), _move_source),
    "centering": PerturbationKind("off-center, mm", "off-center {:g} mm", (0, 5, 10), _move_patient),
    "noise": PerturbationKind(
        "photons per pixel",
        "{:,.0f} photons per pixel",
        (np.inf, 1e6, 1e5, 1e4),
        _add_noise,
        np.inf,
        ("no noise", "10⁶", "10⁵", "10⁴"),
    ),
    "scatter": PerturbationKind(
        "scatter-to-primary ratio", "scatter-to-primary ratio {:g}", (0, 0.15, 0.3, 0.6), _add_scatter
    ),
    "gamma": PerturbationKind("gamma", "gamma {:g}", (0.7, 0.85, 1, 1.2, 1.4), _change_tone, 1.0),
    "collimation": PerturbationKind(
        "collimation, % of each side", "collimation {:g} % of each side", (0, 5, 10, 15), _collimate
    ),
    "flip": PerturbationKind("left-right flip", "left-right flip", (0, 1), _flip, ticks=("no", "yes")),
    "missing": PerturbationKind("missing lateral", "missing lateral", (0, 1), _none, ticks=("no", "yes")),
}
"""Kinds by name. `missing` changes no radiograph: lateral ones are not given to the model."""


@dataclass(frozen=True)
class Perturbation:
    """An error of one kind and size."""

    kind: str
    strength: float

    @property
    def label(self) -> str:
        """What it is, for people."""
        return KINDS[self.kind].label.format(self.strength)

    def exposure(self, geometry: Geometry, seed: tuple[int, ...]) -> Exposure:
        """The erroneous exposure; random signs, noise and fields depend on the seed alone, not on the strength."""
        return KINDS[self.kind].change(Exposure.nominal(geometry), self.strength, np.random.default_rng(seed))


UNPERTURBED = Perturbation("angle", KINDS["angle"].neutral)
PERTURBATIONS = tuple(
    Perturbation(name, strength)
    for name, kind in KINDS.items()
    for strength in kind.strengths
    if strength != kind.neutral
)


class RadiographSimulator:
    """Radiographs of one CT under any exposure; the projection in the nominal geometry is computed once.

    Args:
        hu: the CT in HU.
        grid: its voxels.
        geometry: the nominal geometry, whose views are those of the radiographs.

    Raises:
        ConfigError: the beam is parallel, or the source is inside the volume.
    """

    def __init__(self, hu: Shaped[np.ndarray, "d h w"], grid: Grid, geometry: Geometry) -> None:
        self._hu = torch.from_numpy(hu.astype(np.float32))[None, None]
        self._grid = grid
        self._nominal = Exposure.nominal(geometry)
        self._projected = self._project(self._nominal.geometries)

    def expose(self, exposure: Exposure) -> Float32[np.ndarray, "views rows columns"]:
        """Bone-bright images in [0, 1], not yet normalized.

        Raises:
            ConfigError: the source is inside the volume.
        """
        same = exposure.geometries == self._nominal.geometries
        soft, bone = self._projected if same else self._project(exposure.geometries)
        images: np.ndarray = simulate_acquisition(soft, bone, [exposure.acquisition])[0].numpy()
        if exposure.flipped:
            flipped = [shows_both_sides(geometry.views[0]) for geometry in exposure.geometries]
            images[flipped] = images[flipped][..., ::-1]
        return images

    def _project(self, geometries: tuple[Geometry, ...]) -> tuple[Tensor, Tensor]:
        for geometry in geometries:
            require_source_outside(self._grid.shape, self._grid.spacing_mm, geometry, geometry.views[0])
        return line_integrals(self._hu, self._grid, [geometries])


def shows_both_sides(view: View) -> bool:
    """Whether the columns of a view run between the patient's left and right rather than front and back."""
    return bool(abs(view.axes()[0][0]) > np.sqrt(0.5))
