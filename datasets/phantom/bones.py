"""The skeleton of a phantom: ribs and costal cartilage, vertebral arches, clavicles and scapulae.

Vertebral bodies and the sternum are defined slice by slice, in `thorax`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from raylift.datasets.phantom.person import (
    BODY_HALF_DEPTH_MM,
    BODY_HALF_WIDTH_MM,
    FIRST_THORACIC,
    POSTERIOR_EXPONENT,
    SIDES,
    VERTEBRAE_MM,
    Person,
)
from raylift.datasets.phantom.shapes import Tubes, mm

RIB_DROP_MM = [38, 58, 74, 85, 93, 98, 100, 97, 90, 76, 46, 22]
"""Vertical distance from the head of each rib to its bony end, at average stature."""
RIB_REACH = [0.78, 0.83, 0.82, 0.80, 0.79, 0.77, 0.74, 0.70, 0.66, 0.61, 0.46, 0.30]
"""Extent of the bony rib from the spine (0) to the sternum (1). The last two are floating ribs."""
WITH_CARTILAGE = range(1, 11)
OUTSIDE_MM = 3.5
"""Distance from the inner surface of the rib cage to the center of a rib."""


def rib(person: Person, number: int, side: int) -> Tubes:
    """Rib 1 to 12 from its head on the spine to its bony end, taller than thick."""
    points, _ = _rib_curve(person, number, side)
    along = np.linspace(0, 1, len(points))
    size = person.rib_size * (0.85 if number > 10 else 1.0)
    thick = size * np.interp(along, [0, 0.12, 0.6, 1], [3.2, 2.8, 2.9, 3.4])
    tall = size * np.interp(along, [0, 0.12, 0.6, 1], [4.0, 4.6, 5.4, 6.4])
    # The first rib lies almost flat.
    return Tubes.along(points, thick, tall, up=(0.9 * side, 0.0, 0.5) if number == 1 else (0.0, 0.0, 1.0))


def _rib_curve(person: Person, number: int, side: int) -> tuple[Float[np.ndarray, "k 3"], float]:
    """Points along a rib, and the angle around the rib cage at its end, in radians from the spine."""
    vertebra = FIRST_THORACIC + number - 1
    z = float(person.vertebra_tops[vertebra])
    x, y = (float(value) for value in person.spine(z))
    half = float(BODY_HALF_WIDTH_MM[vertebra])
    cage_half = float(person.cage(z - 8)[2])
    # Head and neck are off the cage; from its angle, 46 mm lateral to the spine, a rib follows the wall.
    first = float(np.arcsin(min(0.75, 46 / cage_half) ** (POSTERIOR_EXPONENT / 2)))
    share = np.linspace(0, 1, 11)
    turn = first + share * (np.pi * RIB_REACH[number - 1] - first)
    drop = RIB_DROP_MM[number - 1] * person.rib_slope * person.stature
    heights = z - 5 - drop * (0.6 * share + 0.2 * (1 - np.cos(np.pi * share)))
    neck = [[x + side * (half + 1), y + 7, z - 1], [x + side * (half + 14), y + 23, z - 2]]
    return np.concatenate([neck, person.on_wall(turn, heights, OUTSIDE_MM, side)]), float(turn[-1])


def cartilage(person: Person, number: int, side: int) -> Tubes:
    """The costal cartilage of rib 1 to 10: to the sternum, below the seventh to the cartilage above."""
    points, turn = _rib_curve(person, number, side)
    tip = points[-1]
    if number <= 7:
        notch, angle, lower = person.sternum_z
        z = float([notch - 14, angle, *np.linspace(angle - 26, lower + 4, 5)][number - 1])
        x, y, _, anterior, _ = (float(value) for value in person.cage(z))
        goal = mm(x + side * (22 if number == 1 else 14), y - anterior - 5, z)
    else:
        goal = _rib_curve(person, number - 1, side)[0][-1] + mm(-side * 12, -4, -14)
    # The lower ones descend before they ascend.
    middle = (tip + goal) / 2 - mm(0, 0, max(0.0, 0.38 * (goal[2] - tip[2])))
    round_to = (turn + np.pi) / 2 if number <= 7 else turn + 0.12
    on_wall = person.on_wall(np.asarray(round_to), np.asarray(middle[2]), OUTSIDE_MM, side)
    middle[:2] = (middle[:2] + on_wall[:2]) / 2 if number <= 7 else on_wall[:2]
    return Tubes.along([tip, middle, goal], [4.2, 4.4, 4.0], [6.8, 6.2, 5.0])


def vertebral_arches(person: Person) -> Tubes:
    """Pedicles, laminae, articular, transverse and spinous processes of all vertebrae."""
    parts = []
    for index, top in enumerate(person.vertebra_tops[:-1]):
        tall = VERTEBRAE_MM[index] * person.stature
        half, back = BODY_HALF_WIDTH_MM[index], BODY_HALF_DEPTH_MM[index]
        x, y = person.spine(top - 0.4 * tall)
        middle = mm(float(x), float(y), top)
        arch = middle + mm(0, back + 19, -0.62 * tall)
        wide = np.interp(index, [0, 3, 9, 14, 18], [25, 33, 31, 26, 36])
        for side in SIDES:
            foot = middle + mm(side * 0.6 * half, back - 3, -0.3 * tall)
            pillar = middle + mm(side * 0.85 * half, back + 9, -0.36 * tall)
            parts += [
                Tubes.along([foot, pillar], 3.4, 4.6, up=(0.0, 1.0, 0.0)),
                Tubes.along([pillar, arch], 2.8, 7.0),
                Tubes.along([pillar, middle + mm(side * wide, back + 17, -0.32 * tall)], [4.4, 3.8]),
                Tubes.along([pillar + mm(0, 1, 0.36 * tall), pillar + mm(0, 2, -0.5 * tall)], 3.8),
            ]
        # Spinous processes overlap in the middle of the thorax and are horizontal at both ends.
        fall = np.deg2rad(np.interp(index, [0, 3, 5, 9, 14, 18], [10, 20, 42, 58, 18, 8]))
        long = np.interp(index, [0, 3, 9, 14, 18], [18, 27, 30, 25, 27])
        tip = arch + long * mm(0, np.cos(fall), -np.sin(fall))
        parts.append(
            Tubes.along([arch, tip], [2.6, 2.8], [7.0, 5.5], up=(0.0, float(np.sin(fall)), float(np.cos(fall))))
        )
    return Tubes.concatenate(parts)


def clavicle(person: Person, side: int) -> Tubes:
    """A clavicle: an S-shaped curve from the manubrium to the shoulder."""
    notch = person.sternum_z[0]
    x, y, _, anterior, _ = (float(value) for value in person.cage(notch))
    inner = mm(x + side * 17, y - anterior - 8, notch + 1)
    outer = mm(side * 150 * person.width, _neck_y(person) - 24, notch + 22 + person.shoulder_rise_mm)
    points = [
        inner,
        inner + 0.3 * (outer - inner) + mm(0, -9, -1),
        inner + 0.65 * (outer - inner) + mm(0, 12, 2),
        outer,
    ]
    return Tubes.along(points, [8.0, 5.4, 5.0, 5.5], [8.5, 5.8, 6.0, 7.5], up=(0.0, 1.0, 0.0))


def scapula(person: Person, side: int) -> Tubes:
    """A scapula with its borders, spine, acromion, coracoid and glenoid; raised arms rotate it outwards."""
    rise = 0.45 * person.shoulder_rise_mm
    socket = mm(side * 132 * person.width, _neck_y(person) - 6, person.apex_z - 14 + rise)
    upper = mm(side * 72 * person.width, 0.0, person.apex_z - 24 + 0.3 * rise)
    lower = mm(side * (100 + 0.3 * rise) * person.width, 0.0, person.apex_z - 145 * person.stature + rise)
    for corner in (upper, lower):
        corner[1] = person.posterior_wall_y(corner[0], corner[2], 20.0)
    rows = []
    for share in np.linspace(0, 1, 13):
        inner, outer = upper + share * (lower - upper), socket + share * (lower - socket)
        row = inner + np.linspace(0, 1, 9)[:, None] * (outer - inner)
        row[:, 1] = [max(y, person.posterior_wall_y(x, z, 18.0)) for x, y, z in row]
        rows.append(row)
    sheet = np.array(rows)
    acromion = socket + mm(side * 10, 4, 26)
    ridge = [sheet[3, 0], sheet[2, 4] + mm(0, 13, 4), acromion + mm(-side * 14, 10, -6), acromion]
    coracoid = [socket + mm(-side * 10, -4, 10), socket + mm(-side * 14, -22, 20), socket + mm(-side * 4, -36, 14)]
    return Tubes.concatenate(
        [
            *(Tubes.along(row, 1.4, 4.8) for row in sheet[:-1]),
            Tubes.along(sheet[:, -1], [4.5] * 9 + [3.5] * 4),
            Tubes.along(sheet[:, 0], 2.4),
            Tubes.along(ridge, [2.5, 3.5, 5.0, 5.0], [4.0, 7.0, 8.0, 8.0]),
            Tubes.along(coracoid, [6.0, 5.5, 4.5]),
            Tubes.along([socket + mm(-side * 6, 0, 8), socket + mm(-side * 4, 2, -10)], 9.0),
        ]
    )


def humeral_head(person: Person, side: int) -> Float[np.ndarray, " 3"]:
    """Center of the humeral head, which has a diameter of 46 mm and is mostly outside the volume."""
    return np.array(
        [side * 165 * person.width, _neck_y(person) - 12, person.apex_z - 4 + 0.45 * person.shoulder_rise_mm]
    )


def _neck_y(person: Person) -> float:
    return float(person.spine(person.apex_z)[1])
