"""The anatomy of one phantom: build, spine, rib cage and diaphragm, sampled from a seed.

Positions are in patient coordinates in mm (x to the left, y posterior, z superior; the isocenter is the center of the
lungs). Proportions were chosen by visual comparison with CT scans; no number is a measurement of a patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator

from raylift.datasets.phantom.shapes import Numbers, Real, intersection, mm, superellipse

SIDES = (-1, 1)
"""The patient's right and left: the sign of x."""

VERTEBRAE_MM = np.array([16, 16, 17, 19, 20, 20.5, 21, 21.5, 22, 22.5, 23, 24, 25, 26, 28, 31, 33, 35, 36])
"""Height of C5 to L4 including the disc below, for a thoracic spine of `THORACIC_MM`."""
FIRST_THORACIC = 3
THORACIC_MM = float(VERTEBRAE_MM[FIRST_THORACIC : FIRST_THORACIC + 12].sum())
BODY_HALF_WIDTH_MM = np.interp(np.arange(19), [0, 3, 6, 14, 18], [12.5, 14.5, 13.5, 20, 24])
BODY_HALF_DEPTH_MM = np.interp(np.arange(19), [0, 3, 8, 14, 18], [8, 9, 13.5, 15.5, 17])

ANTERIOR_EXPONENT, POSTERIOR_EXPONENT = 2.15, 2.5
"""Superellipse exponents of the rib cage's cross-section anterior and posterior to its widest line; 2 is an ellipse."""

# The inside of rib cage and abdomen by level: 0 at the lung apices, 1 a thoracic spine below.
LEVEL = [-0.6, -0.1, 0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.6]
HALF_WIDTH_MM = [46, 48, 62, 79, 93, 114, 128, 134, 136, 134, 129, 123, 121]
ANTERIOR_TO_SPINE_MM = [62, 62, 69, 79, 88, 105, 127, 142, 151, 152, 149, 145, 142]
POSTERIOR_TO_SPINE_MM = [10, 14, 22, 27, 30, 33, 35, 36, 36, 35, 34, 33, 33]


@dataclass(frozen=True)
class Person:
    """Sampled anatomy; `stature`, `width`, `depth`, `muscle`, `heart`, `rib_size` are relative to an average adult."""

    seed: int
    female: bool
    stature: float
    width: float
    depth: float
    taper: float
    """Increase of the chest's width from top to bottom, as a fraction."""
    barrel: float
    """Decrease of the chest's depth from top to bottom, as a fraction."""
    apex_z: float
    """Height of the lung apices."""
    spine_y: float
    kyphosis_mm: float
    scoliosis_mm: float
    scoliosis_phase: float
    fat_mm: float
    belly_mm: float
    muscle: float
    breast_mm: float
    dome_level: float
    """Level of the right dome of the diaphragm."""
    dome_left_mm: float
    """Height of the right dome above the left one."""
    dome_drop_mm: float
    """Height of the dome above its posterior rim."""
    heart: float
    heart_turn_deg: float
    heart_shift_mm: tuple[float, float]
    aorta_mm: float
    """Radius of the descending aorta."""
    unfolding_mm: float
    """Unfolding of the aortic arch, which increases with age."""
    rib_slope: float
    rib_size: float
    cortex_mm: float
    shoulder_rise_mm: float
    """Elevation of the shoulders by raised arms."""
    gas_mm: float
    """Depth of the gas in the stomach."""

    @classmethod
    def sample(cls, seed: int) -> Person:
        """The anatomy of that seed."""
        rng = np.random.default_rng([seed, 0])

        def between(low: Real, high: Real) -> float:
            # The center of a range is slightly more likely than its ends.
            return float(low + (high - low) * rng.beta(1.3, 1.3))

        female = bool(rng.random() < 0.5)
        heavy = float(rng.beta(1.3, 2.2))
        stature = between(0.90, 1.03) if female else between(0.96, 1.10)
        dome_level = between(0.62, 0.81) - 0.06 * heavy
        # A CT longer than the volume is centered on the lungs, which extend below the dome in the recess.
        apex_z = (dome_level * THORACIC_MM * stature + 75) / 2 + between(-10, 12)
        return cls(
            seed=seed,
            female=female,
            stature=stature,
            width=between(0.83, 0.98) if female else between(0.92, 1.06),
            depth=between(0.89, 1.07) + 0.04 * heavy,
            taper=between(-0.12, 0.12),
            barrel=between(-0.08, 0.14),
            apex_z=float(np.clip(apex_z, 105.0, 140.0)),
            spine_y=between(42, 52) + 6 * heavy,
            kyphosis_mm=between(20, 55),
            scoliosis_mm=between(-9, 9),
            scoliosis_phase=between(0, 2 * np.pi),
            fat_mm=(9 if female else 5) + 22 * heavy,
            belly_mm=30 * heavy,
            muscle=between(0.7, 1.0) if female else between(0.85, 1.3),
            breast_mm=between(2, 12) + 18 * heavy if female else 0.0,
            dome_level=dome_level,
            dome_left_mm=between(-4, 24),
            dome_drop_mm=between(48, 92),
            heart=between(0.80, 1.03) + 0.1 * heavy,
            heart_turn_deg=between(-8, 24) - 14 * heavy,
            heart_shift_mm=(between(-4, 8), between(-5, 5)),
            aorta_mm=between(11.0, 14.5),
            unfolding_mm=between(0, 10),
            rib_slope=between(0.82, 1.12),
            rib_size=between(0.85, 1.15),
            cortex_mm=between(0.9, 1.5),
            shoulder_rise_mm=between(-15, 48),
            gas_mm=between(-6, 18),
        )

    # Heights.

    @property
    def height(self) -> float:
        """Height of T1 to T12."""
        return THORACIC_MM * self.stature

    def level(self, z: Numbers | Real) -> Numbers:
        """Relative height: 0 at the lung apices, 1 a thoracic spine below."""
        return np.asarray((self.apex_z - z) / self.height)

    @cached_property
    def vertebra_tops(self) -> Float[np.ndarray, " n"]:
        """Height z of the upper edge of every vertebra, C5 first, and of the lower edge of the last."""
        edges = np.concatenate([[0.0], np.cumsum(VERTEBRAE_MM)]) * self.stature
        return np.asarray(self.apex_z + 12 + edges[FIRST_THORACIC] - edges)

    @property
    def carina_z(self) -> float:
        """Height of the carina."""
        return self.apex_z - 0.29 * self.height

    @property
    def dome_z(self) -> tuple[float, float]:
        """Tops of the right and the left dome of the diaphragm."""
        right = self.apex_z - self.dome_level * self.height
        return right, right - self.dome_left_mm

    @property
    def sternum_z(self) -> tuple[float, float, float]:
        """Jugular notch, sternal angle, and lower end of the body of the sternum."""
        notch = self.apex_z - 0.13 * self.height
        return notch, notch - 46 * self.stature, notch - 150 * self.stature

    # Spine and rib cage.

    def spine(self, z: Numbers | Real) -> tuple[Numbers, Numbers]:
        """Centers of the vertebral bodies at height z: x and y."""
        level = self.level(z)
        x = self.scoliosis_mm * np.sin(4.5 * level + self.scoliosis_phase)
        above, below = np.maximum(0.5 - level, 0), np.maximum(level - 0.55, 0)
        # The neck is upright again above the shoulders.
        above = above - 0.6 * np.maximum(above - 0.55, 0)
        y = self.spine_y - self.kyphosis_mm * ((above / 0.6) ** 2 + 0.5 * (below / 0.5) ** 2)
        return np.asarray(x), np.asarray(y)

    def beside_spine(self, x: Real, y: Real, z: Real) -> Float[np.ndarray, " 3"]:
        """A point `x` left of and `y` posterior to the center of the spine at height `z`, for an average build."""
        spine_x, spine_y = self.spine(z)
        return mm(float(spine_x) + x * self.width**0.5, float(spine_y) + y * self.depth**0.5, z)

    @cached_property
    def _profiles(self) -> PchipInterpolator:
        table = np.column_stack([HALF_WIDTH_MM, ANTERIOR_TO_SPINE_MM, POSTERIOR_TO_SPINE_MM])
        return PchipInterpolator(LEVEL, table * [self.width, self.depth, 1.0])

    def cage(self, z: Numbers | Real) -> tuple[Numbers, Numbers, Numbers, Numbers, Numbers]:
        """Inner surface of the rib cage at `z`: x and y of its widest line, half width, depths on both sides."""
        level = self.level(z)
        wide, anterior, posterior = np.moveaxis(self._profiles(np.clip(level, LEVEL[0], LEVEL[-1])), -1, 0)
        x, y = self.spine(z)
        bulge = self.belly_mm * np.exp(-(((level - 1.25) / 0.35) ** 2))
        down = np.clip(level, 0, 1) - 0.55
        # The neck is inclined with the spine; the sternum is not.
        front = np.minimum(self.spine_y - anterior * (1 - self.barrel * down) - bulge, y - 48)
        back = y + posterior
        middle = back - 0.44 * (back - front)
        half = wide * (1 + self.taper * down) + 0.4 * bulge
        return x, np.asarray(middle), np.asarray(half), np.asarray(middle - front), np.asarray(back - middle)

    def wall(self, x: Numbers, y: Numbers, z: Numbers) -> Numbers:
        """Signed distance from the inner surface of the rib cage, negative inside, in the precision of `x`."""
        middle_x, middle_y, half, anterior, posterior = (value.astype(x.dtype) for value in self.cage(z))
        dy = y - middle_y
        power = np.where(dy > 0, x.dtype.type(POSTERIOR_EXPONENT), x.dtype.type(ANTERIOR_EXPONENT))
        return superellipse(x - middle_x, dy, half, np.where(dy > 0, posterior, anterior), power)

    def on_wall(self, turn: Numbers, z: Numbers, outwards_mm: Real, side: int) -> Float[np.ndarray, "... 3"]:
        """Points outside the rib cage on one side; the angle `turn` is 0 at the spine and pi at the sternum."""
        middle_x, middle_y, half, anterior, posterior = self.cage(z)
        back = np.cos(turn) > 0
        power = 2 / np.where(back, POSTERIOR_EXPONENT, ANTERIOR_EXPONENT)
        x = middle_x + side * (half + outwards_mm) * np.sin(turn) ** power
        reach = np.where(back, posterior + outwards_mm, -anterior - outwards_mm)
        return np.stack([x, middle_y + reach * np.abs(np.cos(turn)) ** power, z], axis=-1)

    def posterior_wall_y(self, x: float, z: float, outwards_mm: Real) -> float:
        """Y of the posterior rib cage at (x, z); a large negative value if the cage is narrower than x."""
        middle_x, middle_y, half, _, posterior = (float(value) for value in self.cage(z))
        left = 1 - (abs(x - middle_x) / (half + outwards_mm)) ** POSTERIOR_EXPONENT
        return middle_y + (posterior + outwards_mm) * left ** (1 / POSTERIOR_EXPONENT) if left > 0 else -1e3

    # Diaphragm and apices.

    def dome(self, x: Numbers, y: Numbers) -> Numbers:
        """Height z of the diaphragm at (x, y): two domes that descend to the ribs, least towards the heart."""
        tops = []
        for side, top in zip(SIDES, self.dome_z, strict=True):
            across = side * x / (66 * self.width) - 62 / 66
            along = (y - self.spine_y) / self.depth + 58
            tops.append(
                top
                - 0.5 * self.dome_drop_mm * np.maximum(across, 0) ** 2.8
                - 11 * np.maximum(-across, 0) ** 2
                - 0.9 * self.dome_drop_mm * (np.maximum(along, 0) / 88) ** 2.2
                - 0.28 * self.dome_drop_mm * (np.maximum(-along, 0) / 72) ** 2
            )
        # A smooth maximum.
        return intersection(tops[0], tops[1], 14.0)

    def cupola(self, x: Numbers, y: Numbers) -> Numbers:
        """Upper surface of the lungs at (x, y): a dome posterior to each clavicle."""
        _, spine_y = self.spine(self.apex_z)
        across, along = np.abs(np.abs(x) / self.width - 38) / 62, np.abs(y - spine_y + 4) / 60
        return np.asarray(self.apex_z - 32 * across**2.4 - 28 * along**1.9)
