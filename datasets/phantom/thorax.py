"""A procedural thorax phantom in Hounsfield units with ground-truth labels, free of patient data.

`thorax(seed, grid)` samples one anatomy and rasterizes it from the outside in: skin, fat and muscle, abdominal organs,
heart and vessels, lungs, bones. The same seed is the same anatomy at any voxel size. There is no noise, and no disease
but a pneumothorax on request.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int16, UInt8

from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN
from raylift.datasets.phantom import bones, vessels
from raylift.datasets.phantom.person import BODY_HALF_DEPTH_MM, BODY_HALF_WIDTH_MM, SIDES, Person
from raylift.datasets.phantom.pneumothorax import Pneumothorax
from raylift.datasets.phantom.shapes import (
    FAR_MM,
    Numbers,
    Raster,
    Real,
    Singles,
    Tubes,
    capsule,
    intersection,
    mm,
    superellipse,
    union,
)
from raylift.datasets.phantom.tissue import Tissue
from raylift.datasets.segmentation import Label

Volume = Float32[np.ndarray, "d h w"]
GAS_HU, BRONCHUS_WALL_HU, GASTRIC_HU, SKIN_HU = -990.0, 0.0, 22.0, 25.0
PLEURA_HU, PLEURA_MM = 0.0, 1.0
"""The visceral pleura, visible as a line where air lies outside it."""


def thorax(
    seed: int, grid: Grid, pneumothorax: Pneumothorax | None = None
) -> tuple[Int16[np.ndarray, "d h w"], UInt8[np.ndarray, "d h w"]]:
    """HU and labels (`segmentation.Label`) of the phantom of `seed`, in volume order.

    Args:
        seed: any integer from 0.
        grid: voxel grid; 64 voxels of 5 mm and 128 of 2.5 mm both extend from the neck to the upper abdomen.
        pneumothorax: air in a pleural cavity; None for none.
    """
    rasterizer = ThoraxRasterizer(Person.sample(seed), Tissue.sample(seed), Raster(grid), pneumothorax)
    rasterizer.trunk()
    rasterizer.abdomen()
    rasterizer.mediastinum()
    rasterizer.lungs()
    rasterizer.bones()
    return rasterizer.hu.round().clip(HU_MIN, HU_MAX).astype(np.int16), rasterizer.labels


class ThoraxRasterizer:
    """Rasterizes one phantom over air, each tissue over the previous ones."""

    def __init__(
        self, person: Person, tissue: Tissue, raster: Raster, pneumothorax: Pneumothorax | None = None
    ) -> None:
        self.person, self.tissue, self.raster, self.pneumothorax = person, tissue, raster, pneumothorax
        self.hu: Volume = np.full(raster.grid.shape, HU_MIN, dtype=np.float32)
        self.labels = np.full(raster.grid.shape, Label.OTHER, dtype=np.uint8)
        self.wall: Volume = person.wall(raster.x, raster.y, raster.z)
        """Signed distance from the inner surface of the rib cage, negative in thorax and abdomen."""
        self.above: Volume = raster.z - person.dome(raster.x, raster.y).astype(np.float32)
        """Height above the diaphragm."""
        self.diaphragm: Volume = self.above * 0.7
        """Approximate distance from the diaphragm, negative in the abdomen; height is on average 1.4 times it."""
        self.cavity = raster.coverage(self.wall)
        self.level: Float32[np.ndarray, "d 1 1"] = person.level(raster.z).astype(np.float32)
        self.cage = tuple(value.astype(np.float32) for value in person.cage(raster.z))
        self.spine = tuple(value.astype(np.float32) for value in person.spine(raster.z))

    def blend(self, share: Singles, hu: Real | Volume) -> None:
        """Blend `share` of every voxel with `hu`."""
        self.hu += share * (hu - self.hu)

    def fill_hollow(self, outer: Volume, inner: Volume, shell: Real, core: Real) -> None:
        """Fill `inner` with `core` and the rest of `outer` with `shell`."""
        inner = np.minimum(inner, outer)
        self.hu *= 1 - outer
        self.hu += (outer - inner) * shell + inner * core

    def trunk(self) -> None:
        """Skin and fat, and the muscles around rib cage, neck and shoulders."""
        p, r, t, level = self.person, self.raster, self.tissue, self.level
        _, middle_y, half, _, _ = self.cage
        x = np.abs(r.x - self.spine[0])
        backwards = np.clip(0.5 + (r.y - middle_y) / 60, 0, 1)
        pectoral = 9 + 12 * p.muscle * _bump(level, 0.25, 0.2) * _bump(x, 66, 48)
        dorsal = 11 + 15 * p.muscle * _bump(x, 34, 32) + 4 * _bump(x, 0, 16)
        dorsal = dorsal + 26 * p.muscle**0.5 * _bump(level, 0.24, 0.3) * _bump(x / half, 0.9, 0.35)
        folds = 12 * _bump(level, 0.1, 0.22) * np.minimum(x / half, 1.2) ** 4
        muscle = self.wall - (pectoral * (1 - backwards) + dorsal * backwards) - folds
        # Raised arms leave the volume at its upper corners.
        neck_y, rise, thick = float(p.spine(p.apex_z)[1]), p.apex_z + 0.8 * p.shoulder_rise_mm, 52 * p.muscle**0.3
        root = mm(66 * p.width, neck_y - 4, p.apex_z - 22)
        joint = mm(120 * p.width, neck_y - 8, rise - 6)
        elbow = mm(215, neck_y - 18, rise + 42)
        for start, end, radii in ((root, joint, (thick, thick)), (joint, elbow, (thick, 47.0))):
            muscle = union(muscle, capsule((x, r.y, r.z), start, end, radii), 55.0)
        belly, flank = _bump(level, 1.15, 0.35) * (1 - backwards), _bump(level, 0.9, 0.4) * backwards
        skin = muscle - p.fat_mm * (1 + 0.5 * belly + 0.35 * flank) - 1.5
        breasts, glands = self._breasts()
        skin = r.rescaled(union(skin, breasts, 34.0))

        self.blend(r.coverage(skin), SKIN_HU)
        self.blend(r.coverage(skin + 2), t.fat)
        self.blend(r.coverage(np.maximum(glands, skin + 5) * 0.35) * 0.8, SKIN_HU)
        # Curved sheets of fat separate the muscles, roughly parallel to the ribs and thicker in obese phantoms.
        planes = r.smooth_noise(np.random.default_rng([p.seed, 5]), 110.0) * 9 + (self.wall - 26) * 0.7
        fat = r.sheet(planes, 1.6 + 0.1 * p.fat_mm)
        self.blend(r.coverage(np.maximum(muscle, skin + 3)), t.muscle + fat * (t.fat - t.muscle))
        self.blend(r.sheet(self.wall - 11.5, 2.5) * r.coverage(muscle + 8) * np.clip(8 * level, 0, 1), t.fat)
        for side in SIDES:
            z = p.apex_z - 0.17 * p.height
            _, y, wide, _, _ = (float(value) for value in p.cage(z))
            armpit = r.ellipsoid((side * (wide + 19), y - 16, z), (14, 32, 48))
            self.blend(r.coverage(armpit * 0.3) * r.coverage(skin + 5) * 0.85, t.fat)
        self.blend(self.cavity * r.coverage(r.z - p.apex_z), t.fat)

    def _breasts(self) -> tuple[Volume, Volume]:
        """Signed distances from the breasts in supine position, and from their glandular tissue."""
        p, r = self.person, self.raster
        breasts = glands = np.full(r.grid.shape, FAR_MM, dtype=np.float32)
        if p.breast_mm:
            z = p.apex_z - 0.47 * p.height
            _, y, wide, anterior, _ = (float(value) for value in p.cage(z))
            for side in SIDES:
                middle = (side * 0.62 * wide, y - 0.76 * anterior - 0.6 * p.fat_mm, z)
                size = (0.55 * wide, 24 + p.breast_mm, 62 + 0.4 * p.breast_mm)
                breasts = np.minimum(breasts, r.ellipsoid(middle, size))
                middle = (side * 0.66 * wide, y - 0.78 * anterior - p.fat_mm - 8, z - 4)
                glands = np.minimum(glands, r.ellipsoid(middle, (0.28 * wide, 12 + 0.5 * p.breast_mm, 30)))
        return breasts, glands

    def abdomen(self) -> None:
        """Abdomen: psoas, kidneys, stomach, liver, spleen and bowel in fat."""
        p, r, t = self.person, self.raster, self.tissue
        (right, left), y, w = p.dome_z, p.spine_y, p.width
        room = intersection(self.wall + 1, self.diaphragm + 2.5, 6.0)

        def organ(x: Real, y: Real, z: Real, half: tuple[Real, Real, Real]) -> Volume:
            return np.asarray(np.maximum(r.ellipsoid((x, y, z), half), room))

        self.blend(self.cavity * r.sheet(self.diaphragm + 1, 3.0), t.muscle)
        for side in SIDES:
            psoas = r.ellipsoid((side * 34, y - 4, right - 200), (17, 20, 110))
            self.blend(r.coverage(psoas) * r.coverage(self.diaphragm), t.muscle)
            self.blend(r.coverage(organ(side * 58 * w, y + 6, right - 118 - 8 * side, (24, 22, 52))), t.kidney)
        fundus = organ(64 * w, y - 42, left - 38, (44 * w, 46, 50))
        stomach = union(fundus, organ(34 * w, y - 92 * p.depth, left - 84, (46, 26, 40)), 20.0)
        self.fill_hollow(r.coverage(stomach), r.coverage(stomach + 4), t.muscle, GASTRIC_HU)
        right_lobe = organ(-66 * w, y - 34, right - 68, (82 * w, 96 * p.depth, 92))
        liver = union(right_lobe, organ(0.0, y - 84 * p.depth, right - 46, (64 * w, 40, 44)), 30.0)
        self.blend(r.coverage(liver), t.liver)
        self.blend(r.coverage(organ(96 * w, y + 2, left - 68, (30, 46, 54))), t.spleen)
        # In supine position gas is in the anterior part of the stomach.
        surface = y - 92 * p.depth - 14 + p.gas_mm
        self.blend(r.coverage(np.maximum(stomach + 5, r.y - surface)), GAS_HU)
        free = 1 - r.coverage(union(liver, stomach, 5.0) - 4)
        rng = np.random.default_rng([p.seed, 3])
        for _ in range(14):
            at = rng.uniform([-80 * w, y - 125 * p.depth, left - 190], [110 * w, y - 70 * p.depth, left - 80])
            half = rng.uniform(10, 24, 3)
            loop = organ(at[0], at[1], at[2], (half[0], half[1], half[2]))
            filling = GAS_HU if rng.random() < 0.3 else rng.uniform(-20, 40)
            self.fill_hollow(r.coverage(loop) * free, r.coverage(loop + 3) * free, 40.0, filling)

    def mediastinum(self) -> None:
        """Heart, great vessels, esophagus and airways in fat, and the space between the lungs."""
        p, r, t = self.person, self.raster, self.tissue
        spine_x, spine_y = self.spine
        chambers = {name: r.ellipsoid(*shape) for name, shape in vessels.chambers(p).items()}
        heart: Volume = np.full(r.grid.shape, FAR_MM, dtype=np.float32)
        for chamber in chambers.values():
            heart = union(heart, chamber, 12.0)
        aorta, arteries, veins = vessels.aorta(p), vessels.arteries(p), vessels.veins(p)
        esophagus, airway = vessels.esophagus(p), vessels.airway(p)
        column = superellipse(r.x - spine_x, r.y - spine_y - 9, 22.0, 28.0, 2.2)
        # The lungs are close to each other behind the sternum, less so above the heart.
        _, middle_y, _, anterior, _ = self.cage
        depth = np.maximum(r.y - middle_y + anterior, 0)
        upper = np.interp(self.level, [0, 0.1, 0.2, 0.26, 0.36, 0.5, 0.8, 1], [13, 19, 20, 12, 3, 1, 2, 5])
        half = 3 + upper.astype(np.float32) * np.minimum(depth / 55, 1) + 14 * np.exp(-depth / 10)
        between = np.abs(r.x - spine_x - 3) - half
        # The pericardium rests on the diaphragm, with pads of fat in the angle.
        rest = union(heart - 3, np.maximum(self.above, heart - 45), 22.0)
        great = r.tube_distance(Tubes.concatenate([aorta, arteries, veins, esophagus, airway]), 30.0)
        self.space = union(union(rest, great - 2, 20.0), union(column, between, 10.0), 14.0)

        self.blend(r.coverage(column) * self.cavity, t.fat)
        clear = 1 - r.coverage(self.diaphragm)
        self.blend(r.coverage(r.rescaled(heart)) * clear, t.myocardium)
        for name, wall_mm in (
            ("right atrium", 2.5),
            ("right ventricle", 4),
            ("left atrium", 2.5),
            ("left ventricle", 11),
        ):
            if name == "left ventricle":
                # Its wall includes the septum, so it overlaps the right ventricle.
                self.blend(r.coverage(chambers[name]) * clear, t.myocardium)
            blood = t.right_blood if name.startswith("right") else t.blood
            self.blend(r.coverage(chambers[name] + wall_mm) * clear, blood)
        self.blend(r.tubes(esophagus), 35.0)
        self.blend(r.tubes(veins), t.right_blood)
        self.blend(r.tubes(vessels.pulmonary_veins(p)), t.blood)
        self.blend(r.tubes(arteries), t.blood)
        self.blend(r.tubes(aorta), t.blood)
        self.fill_hollow(r.tubes(airway, -1.5), r.tubes(airway), t.muscle, GAS_HU)

    def lungs(self) -> None:
        """Lungs with their fissures, vessels and airways."""
        p, r, t = self.person, self.raster, self.tissue
        cupola = r.z - p.cupola(r.x, r.y).astype(np.float32)
        pleura = intersection(intersection(self.wall + 1.5, cupola, 10.0), -self.above, 4.0)
        cavity = r.rescaled(intersection(pleura, -self.space, 8.0))
        share = r.coverage(cavity)
        rng = np.random.default_rng([p.seed, 4])
        # In supine position the posterior and basal lung is denser.
        density = t.lung + 10 * r.smooth_noise(rng, 70.0)
        density += 0.35 * (r.y - (p.spine_y - 60)) - 0.12 * (r.z - (p.carina_z - 60))
        density = (density + self._fissures(rng)).clip(-930, -700)
        if self.pneumothorax:
            lung = self.pneumothorax.lung(p, r, cavity)
            self.labels[share > 0.5] = Label.PNEUMOTHORAX
            # Blood leaves a collapsed lung too, so its density grows by less than its volume falls.
            growth = (1 - self.pneumothorax.collapse) ** -0.7 - 1
            density = density + self.pneumothorax.of_side(p, r) * growth * (density + 1000)
            aerated = r.coverage(lung)
            self.blend(share, GAS_HU + aerated / np.maximum(share, 1e-6) * (density - GAS_HU))
            self.blend(share * np.clip((lung - cavity) / 2, 0, 1) * r.sheet(lung, PLEURA_MM), PLEURA_HU)
            share = aerated
        else:
            self.blend(share, density)
        self.labels[share > 0.5] = Label.LUNG
        trees = [vessels.lung_trees(p, side) for side in SIDES]
        vessel = share * r.tubes(
            Tubes.concatenate([vessels.pulmonary_veins(p), *(tubes for tree in trees for tubes in tree[:2])])
        )
        self.blend(vessel, 0.5 * (t.blood + t.right_blood))
        self.labels[(vessel > 0.4) & (share > 0.5)] = Label.VESSEL
        bronchi = Tubes.concatenate([tree[2] for tree in trees])
        self.fill_hollow(r.tubes(bronchi, -0.9) * share, r.tubes(bronchi) * share, BRONCHUS_WALL_HU, GAS_HU)

    def _fissures(self, rng: np.random.Generator) -> Volume:
        """HU added by the fissures: oblique on both sides, horizontal on the right."""
        p, r = self.person, self.raster
        result: Volume = np.zeros(r.grid.shape, dtype=np.float32)
        posterior = r.y - float(p.spine(p.carina_z)[1])
        for side in SIDES:
            fall = rng.uniform(0.9, 1.3)
            across = side * r.x
            oblique = r.z - (p.carina_z + 12) - fall * posterior - 0.0022 * (across - 60) ** 2
            oblique /= np.hypot(1, fall)
            result += (across > 0) * r.sheet(oblique, 1.0) * 140
            if side < 0:
                level = r.z - (p.carina_z - 48) - 0.1 * posterior + 0.0015 * (across - 70) ** 2
                result += ((across > 0) & (oblique > 0)) * r.sheet(level, 0.8) * 140
        return result

    def bones(self) -> None:
        """Spine, ribs and costal cartilage, sternum, clavicles, scapulae and humeral heads."""
        p, r = self.person, self.raster
        pairs = [(number, side) for number in range(1, 13) for side in SIDES]
        cartilage = Tubes.concatenate([bones.cartilage(p, *pair) for pair in pairs if pair[0] in bones.WITH_CARTILAGE])
        self.blend(r.tubes(cartilage), self.tissue.cartilage)
        self._vertebral_bodies()
        for side in SIDES:
            self._bone(r.ellipsoid(bones.humeral_head(p, side), (23, 23, 24)), 2.0)
        scapulae = [bones.scapula(p, side) for side in SIDES]
        thin = Tubes.concatenate([*(bones.rib(p, *pair) for pair in pairs), bones.vertebral_arches(p), *scapulae])
        clavicles = Tubes.concatenate([bones.clavicle(p, side) for side in SIDES])
        for tubes, cortex_mm in ((thin, p.cortex_mm), (clavicles, 2 * p.cortex_mm)):
            share = r.tubes(tubes)
            self.fill_hollow(share, r.tubes(tubes, cortex_mm), self.tissue.cortex, self.tissue.marrow)
            self.labels[share > 0.5] = Label.BONE
        self._sternum()

    def _bone(self, distance: Volume, cortex_mm: Real) -> None:
        """A solid of marrow in a shell of cortical bone."""
        share, core = self.raster.coverage(distance), self.raster.coverage(distance + cortex_mm)
        self.fill_hollow(share, core, self.tissue.cortex, self.tissue.marrow)
        self.labels[share > 0.5] = Label.BONE

    def _sternum(self) -> None:
        p, r = self.person, self.raster
        notch, angle, lower = p.sternum_z
        knots = [lower - 34, lower - 12, lower, lower + 25, angle - 12, angle, notch - 14, notch, notch + 2]
        half = np.interp(r.z, knots, [3, 5, 11, 19, 15, 13, 25, 22, 8]).astype(np.float32)
        x, middle_y, _, anterior, _ = self.cage
        plate = superellipse(r.x - x, r.y - (middle_y - anterior - 6), half, 5.5, 2.6)
        self._bone(np.maximum(plate, np.maximum(r.z - notch, lower - 30 - r.z)).astype(np.float32), 1.2)

    def _vertebral_bodies(self) -> None:
        p, r = self.person, self.raster
        x, y = self.spine
        # End plates are orthogonal to the curve of the spine.
        slope = np.gradient(y[:, 0, 0], r.z[:, 0, 0])[:, None, None]
        tops = p.vertebra_tops
        index = np.arange(len(tops) - 1)
        number = np.interp(-(r.z + slope * (r.y - y)), -tops, np.arange(len(tops))).astype(np.float32)
        share = number % 1
        tall, half_x, half_y = (
            np.interp(number, index, values).astype(np.float32)
            for values in (-np.diff(tops), BODY_HALF_WIDTH_MM, BODY_HALF_DEPTH_MM)
        )
        waist = 1 - 0.1 * np.sin(np.pi * np.minimum(share / 0.8, 1))
        sides = superellipse(r.x - x, r.y - y, half_x * waist, half_y * waist, 2.5)
        present = (number > 0) & (number < len(index))
        canal = superellipse(r.x - x, r.y - y - half_y - 9, 9.0, 8.0, 2.0)
        self.blend(r.coverage(canal) * present, 20.0)
        self.blend(r.coverage(sides + 1) * present, self.tissue.cartilage)
        # The lower fifth of each level is the disc.
        plates = (np.abs(share - 0.4) - 0.4) * tall
        self._bone(np.where(present, np.maximum(sides, plates), FAR_MM), 0.6)


def _bump(value: Numbers, center: Real, width: Real) -> Numbers:
    return np.asarray(np.exp(-(((value - center) / width) ** 2)))
