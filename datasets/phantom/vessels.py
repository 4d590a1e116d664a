"""Heart, great vessels, esophagus, airways and the pulmonary vessel trees of a phantom.

Points near the spine are written `at(left, posterior, z)`: mm from the center of the spine, z relative to the carina.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from raylift.datasets.phantom.person import SIDES, Person
from raylift.datasets.phantom.shapes import Real, Tubes, mm, superellipse

Course = tuple[list[Float[np.ndarray, " 3"]], list[Real]]
"""Points along a vessel and the radius at each."""

CHAMBERS = {
    "left ventricle": ([30, 4, -8], [51, 33, 33], [0.80, -0.43, -0.42]),
    "right ventricle": ([9, -22, -11], [50, 32, 25], [0.84, -0.22, -0.50]),
    "right atrium": ([-28, -2, 0], [38, 28, 26], [0.10, 0.05, 1.0]),
    "left atrium": ([2, 27, 21], [34, 24, 21], [1.0, 0.0, 0.08]),
}
"""Center relative to the heart's, semi-axes including the wall, and direction of the first axis; mm, average size."""

ARTERIES, VEINS = 420, 340
"""Branches per lung: with more of them small vessels merge at 2.5 mm, with fewer the lung is too sparse."""


def heart_center(person: Person) -> Float[np.ndarray, " 3"]:
    """Center of the heart, which rests on the diaphragm between sternum and spine."""
    z = float(np.mean(person.dome_z)) + 27 * person.heart
    x, y, _, anterior, _ = (float(value) for value in person.cage(z))
    front, back = y - anterior, float(person.spine(z)[1]) - 16
    left, posterior = person.heart_shift_mm
    return mm(x + 6 + left, (front + back) / 2 + posterior, z)


def chambers(person: Person) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Center, semi-axes and axes (rows) of the outer surface of each chamber."""
    turn = np.deg2rad(person.heart_turn_deg)
    tilt = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    # A flat chest flattens the heart.
    room = mm(1, min(1.0, person.depth + 0.12), 1)
    result = {}
    for name, (offset, half, long) in CHAMBERS.items():
        first = np.array(long) / np.linalg.norm(long)
        second = np.cross([0.0, -1.0, 0.0], first)
        second /= np.linalg.norm(second)
        axes = np.stack([first, second, np.cross(first, second)]) @ tilt
        center = heart_center(person) + person.heart * room * (np.array(offset) @ tilt)
        result[name] = (center, person.heart * np.array(half), axes)
    return result


def aorta(person: Person) -> Tubes:
    """The aorta from its root over the left main bronchus and down the left side of the spine."""
    r, far, z, at = person.aorta_mm, person.unfolding_mm, person.carina_z, person.beside_spine
    left = 15 + 0.9 * r
    points = [
        heart_center(person) + person.heart * mm(0, 4, 18),
        at(-12 - 0.5 * far, -66, z - 16),
        at(-9, -61, z + 10),
        at(7, -40, z + 24 + 0.5 * far),
        at(25 + 0.4 * far, -17, z + 18 + 0.5 * far),
        at(left + 2 + 0.4 * far, -4, z - 4),
        at(left - 2 + 0.3 * far, -5, z - 45),
        at(left - 7, -12, z - 95),
        at(11, -24, z - 140),
        at(4, -30, z - 200),
        at(3, -32, z - 320),
    ]
    return Tubes.along(points, r * np.array([1.3, 1.3, 1.22, 1.1, 1.06, 1.0, 0.97, 0.93, 0.9, 0.82, 0.7]))


def arteries(person: Person) -> Tubes:
    """The branches of the aortic arch, and the pulmonary trunk with its two main branches."""
    z, at = person.carina_z, person.beside_spine
    right, left = hila(person)
    outflow = heart_center(person) + person.heart * mm(14, -26, 18)
    fork = at(10, -52, z - 18)
    courses: list[Course] = [
        ([at(-3, -48, z + 30), at(-16, -38, z + 56), at(-24, -30, z + 84), at(-26, -24, z + 150)], [6.5, 6, 4, 3.5]),
        ([at(-18, -36, z + 62), at(-48, -30, z + 84), at(-110, -34, z + 80)], [5, 4.5, 4]),
        ([at(8, -40, z + 30), at(16, -34, z + 66), at(24, -24, z + 150)], [4.5, 4, 3.5]),
        ([at(20, -22, z + 26), at(26, -18, z + 62), at(52, -26, z + 84), at(110, -34, z + 80)], [5.5, 5, 4.5, 4]),
        ([outflow, at(22, -66, z - 32), fork], [15, 14, 13]),
        ([fork, at(-10, -48, z - 23), at(-32, -44, z - 26), right], [11, 10.5, 9.5, 7.5]),
        ([fork, at(28, -40, z - 6), at(42, -22, z - 4), left], [11.5, 11, 10, 7.5]),
    ]
    return Tubes.concatenate([Tubes.along(points, radii) for points, radii in courses])


def veins(person: Person) -> Tubes:
    """Both venae cavae with the brachiocephalic, jugular and azygos veins."""
    z, at, (dome, _) = person.carina_z, person.beside_spine, person.dome_z
    atrium = heart_center(person) + person.heart * mm(-26, 0, 0)
    jugular_right, jugular_left, meeting = at(-36, -40, z + 95), at(36, -40, z + 95), at(-25, -50, z + 21)
    azygos = [
        at(-9, -20, dome - 60),
        at(-10, -19, z - 20),
        at(-13, -20, z + 2),
        at(-24, -34, z + 8),
        at(-25, -46, z + 2),
    ]
    inferior = [atrium + mm(2, 12, -20), at(-26, -42, dome - 12), at(-22, -30, dome - 70), at(-20, -28, dome - 180)]
    courses: list[Course] = [
        ([meeting, at(-27, -49, z - 25), atrium + mm(0, 8, 22)], [9, 9.5, 10]),
        ([jugular_right, at(-31, -46, z + 58), meeting], [5.5, 6, 7.5]),
        ([jugular_left, at(30, -52, z + 56), at(6, -66, z + 36), meeting], [5.5, 6, 6.5, 7]),
        (inferior, [11, 11, 10, 10]),
        (azygos, [2.5, 3.5, 4, 4.5, 4.5]),
    ]
    return Tubes.concatenate([Tubes.along(points, radii) for points, radii in courses])


def pulmonary_veins(person: Person) -> Tubes:
    """The pulmonary veins, two on each side, from the hilum to the left atrium."""
    center = heart_center(person)
    return Tubes.concatenate(
        [
            Tubes.along([center + person.heart * mm(side * 20, 27, above), root], [7.5, 5.5])
            for side, root in zip(SIDES, vein_roots(person), strict=True)
            for above in (12, 26)
        ]
    )


def esophagus(person: Person) -> Tubes:
    """The esophagus from the neck behind trachea and heart to the stomach."""
    z, at, (_, dome) = person.carina_z, person.beside_spine, person.dome_z
    upper = [at(1, -17, z + 130), at(3, -18, z + 60), at(4, -22, z), at(3, -24, z - 50)]
    return Tubes.along([*upper, at(9, -32, dome + 8), at(24, -46, dome - 26)], [6, 6.5, 6.5, 7, 7.5, 7.5])


def airway(person: Person) -> Tubes:
    """The lumen of the trachea and the main bronchi."""
    z, at = person.carina_z, person.beside_spine
    r = 7.6 if person.female else 8.8
    right, left = hila(person)
    courses: list[Course] = [
        ([at(0, -30, z + 160), at(1, -33, z + 70), at(-2, -35, z + 20), at(-1, -35, z)], [1, 1, 1, 1.05]),
        ([at(-2, -35, z + 2), at(-18, -31, z - 16), right + mm(3, 12, -4)], [0.85, 0.78, 0.68]),
        ([at(1, -35, z + 2), at(20, -29, z - 18), left + mm(-3, 4, -14)], [0.8, 0.7, 0.6]),
    ]
    return Tubes.concatenate([Tubes.along(points, r * np.array(radii)) for points, radii in courses])


def hila(person: Person) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Positions at which the right and the left pulmonary artery enter the lung."""
    z, at = person.carina_z, person.beside_spine
    return at(-47, -38, z - 32), at(49, -20, z - 20)


def vein_roots(person: Person) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Positions at which the pulmonary veins leave the right and the left lung."""
    z, at = person.carina_z, person.beside_spine
    return at(-46, -48, z - 50), at(46, -44, z - 48)


def lung_trees(person: Person, side: int) -> tuple[Tubes, Tubes, Tubes]:
    """Pulmonary arteries, pulmonary veins and bronchi of one lung."""
    which = SIDES.index(side)
    rng = np.random.default_rng([person.seed, 1 + which])
    low = mm(8, person.spine_y - 165, person.apex_z - person.height - 20)
    high = mm(140, person.spine_y + 40, person.apex_z)
    trees = []
    for root, count in ((hila(person)[which], ARTERIES), (vein_roots(person)[which], VEINS)):
        # A quasi-random lattice covers the lung more evenly than independent points.
        steps = np.array([0.8191725134, 0.6710436067, 0.5497004779])
        unit = (rng.random(3) + np.arange(6 * count)[:, None] * steps) % 1
        points = (low + unit * (high - low)) * [side, 1, 1]
        targets = points[_in_lung(person, points, 4.0)][:count]
        trees.append(branching(root, targets + rng.normal(0, 3.0, targets.shape)))
    (start, end, fed), vein = trees
    # A bronchus accompanies every larger artery, slightly posterior and superior.
    large = fed > 14
    bronchi = Tubes.tapering(start[large], end[large], fed[large], 0.62, 2.7).moved((0.0, 4.5, 3.0))
    return Tubes.tapering(start, end, fed, 0.95, 2.6), Tubes.tapering(*vein, 0.9, 2.6), bronchi


def _in_lung(person: Person, points: Float[np.ndarray, "n 3"], margin_mm: float) -> Bool[np.ndarray, " n"]:
    """True for points about `margin_mm` or more inside a lung."""
    x, y, z = points.T
    spine_x, spine_y = person.spine(z)
    inside = person.wall(x, y, z) < -margin_mm
    inside &= (z > person.dome(x, y) + margin_mm) & (z < person.cupola(x, y) - margin_mm)
    inside &= superellipse(x - spine_x, y - spine_y - 8, 22.0, 32.0, 2.0) > margin_mm
    inside &= np.abs(x - spine_x) > np.where(person.level(z) < 0.3, 30, 12)
    for center, half, axes in chambers(person).values():
        inside &= np.linalg.norm((points - center) @ axes.T / (half + margin_mm), axis=1) > 1
    return np.asarray(inside)


def branching(
    root: Float[np.ndarray, " 3"], targets: Float[np.ndarray, "n 3"], detour: float = 0.5
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"], Int[np.ndarray, " n"]]:
    """A tree from `root` through all targets: start and end of every branch, and the number of tips it supplies.

    Targets are added one by one where `length of the new branch + detour * path length to the root` is minimal: 0 gives
    a minimum spanning tree, large values give a star.
    """
    count = len(targets)
    nodes = np.concatenate([root[None], targets])
    parent, way = np.zeros(count + 1, dtype=np.intp), np.zeros(count + 1)
    cost = np.linalg.norm(nodes - root, axis=1)
    cost[0] = np.inf
    order = []
    for _ in range(count):
        new = int(np.argmin(cost))
        order.append(new)
        # An added node gets infinite cost and keeps its parent.
        cost[new] = np.inf
        gap = nodes - nodes[new]
        length = np.sqrt(np.einsum("nk,nk->n", gap, gap))
        way[new] = way[parent[new]] + length[parent[new]]
        through = length + detour * way[new]
        nearer = (through < cost) & np.isfinite(cost)
        cost[nearer], parent[nearer] = through[nearer], new
    fed = np.ones(count + 1, dtype=np.intp)
    fed[parent[1:]] = 0
    for node in reversed(order):
        fed[parent[node]] += fed[node]
    weight = fed[1:, None].astype(float)
    for _ in range(3):
        # Straighten: forks move towards their parent and their branches, weighted by thickness.
        pull, total = np.zeros_like(nodes), np.zeros((count + 1, 1))
        np.add.at(pull, parent[1:], nodes[1:] * weight)
        np.add.at(total, parent[1:], weight)
        fork = total[:, 0] > 0
        fork[0] = False
        nodes[fork] = 0.4 * nodes[fork] + 0.3 * nodes[parent[fork]] + 0.3 * pull[fork] / total[fork]
    return nodes[parent[1:]], nodes[1:], fed[1:]
