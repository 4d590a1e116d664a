"""Pneumothorax of a phantom: air in one pleural cavity, in front of and around a lung that collapses to its hilum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

from raylift.datasets.phantom.person import Person
from raylift.datasets.phantom.shapes import Raster

Volume = Float32[np.ndarray, "d h w"]
LARGEST_COLLAPSE = 0.8
WIDEST_GAP_MM, SMOOTH_MM = 400.0, 5.0
"""Upper limit of the search for the width of the gap, and sigma that smooths the distance deep in the lung."""


@dataclass(frozen=True)
class Pneumothorax:
    """Air in one pleural cavity."""

    side: Literal["right", "left"]
    collapse: float
    """Fraction of the pleural cavity that is air, from 0 to 0.8."""

    def __post_init__(self) -> None:
        if not 0 <= self.collapse <= LARGEST_COLLAPSE:
            raise ValueError(f"a collapse of {self.collapse}: give 0 to {LARGEST_COLLAPSE}")

    @classmethod
    def sample(cls, seed: int, fraction: float = 1.0) -> Pneumothorax | None:
        """The pneumothorax of that seed, on either side with any collapse; `fraction` of seeds have one."""
        rng = np.random.default_rng([seed, 10])
        pneumothorax = cls("right" if rng.random() < 0.5 else "left", rng.uniform(0, LARGEST_COLLAPSE))
        return pneumothorax if rng.random() < fraction else None

    def of_side(self, person: Person, raster: Raster) -> Volume:
        """1 on the side of the pneumothorax, else 0."""
        spine_x = person.spine(raster.z)[0].astype(np.float32)
        across = raster.x - spine_x if self.side == "left" else spine_x - raster.x
        return np.broadcast_to(across > 0, raster.grid.shape).astype(np.float32)

    def lung(self, person: Person, raster: Raster, cavity: Volume) -> Volume:
        """Signed distance from the surface of both lungs, in mm.

        The patient is supine, so the lung falls backwards: the gap grows to the front, and closes at the hilum.

        Args:
            person: the anatomy.
            raster: the voxels.
            cavity: signed distance from the inner surface of both pleural cavities.
        """
        side = self.of_side(person, raster)
        whole = float((raster.coverage(cavity) * side).sum())
        spacing = raster.grid.spacing_mm
        inside = (0.5 - ndimage.distance_transform_edt(cavity < 0).astype(np.float32)) * np.float32(spacing)
        depth = ndimage.gaussian_filter(np.where(cavity < -spacing, inside, cavity), SMOOTH_MM / spacing)
        lung = np.where(cavity < -spacing, np.minimum(depth, -spacing), cavity)
        sign = 1 if self.side == "left" else -1
        spine_y = float(person.spine(person.carina_z)[1])
        front = np.clip((spine_y - raster.y) / (150 * person.depth), 0, 1)
        hilum = raster.ellipsoid((sign * 28 * person.width, spine_y - 45, person.carina_z - 25), (30, 30, 45))
        # A small one is in front alone.
        back = 0.7 * (1 - self.collapse / LARGEST_COLLAPSE) ** 2.5
        gap = side * np.clip((front - back) / (1 - back) + 0.2 * self.collapse, 0, 1) * np.clip(hilum / 40, 0, 1)
        low, high = 0.0, WIDEST_GAP_MM
        for _ in range(30):
            middle = (low + high) / 2
            aerated = float((raster.coverage(lung + np.float32(middle) * gap) * side).sum())
            low, high = (middle, high) if aerated > (1 - self.collapse) * whole else (low, middle)
        return np.asarray(lung + np.float32(high) * gap)
