"""False alarms and missed images of the checks of radiographs, by kind of image.

    python benchmarks/input_checks.py ../shared/data

The folder has `xray/` with pairs of radiographs and `ct/` and `ct_more/` with CT scans. The limits of the checks were
chosen on seeds 0 to 29 of each kind of image that is made here and on phantoms 0 to 39; the results are of other seeds
and phantoms, and of slices of CT, which were not used. Real pairs, CT scans and photographs are few: limits were chosen
on them too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gradio
import numpy as np
from PIL import Image
from skimage import data as skimage_data

from raylift.datasets.geometry import GEOMETRIES, Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.check_result import warnings
from raylift.datasets.radiographs.input_checks import check_images, check_radiograph
from raylift.datasets.radiographs.preparation import prepare
from raylift.datasets.scans import reader, resample

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from input_check_images import KINDS, scaled, slices

VIEWS = ("frontal", "lateral")
GRID = Grid(64, 5.0)
PHANTOMS, FIRST_SEED = range(100, 140), 1000
PHOTOS = ("astronaut.png", "camera.png", "coffee.png", "rocket.jpg", "moon.png", "retina.jpg", "grass.png", "horse.png",
          "page.png", "cell.png", "brick.png", "gravel.png", "clock_motion.png", "text.png")  # fmt: skip
Pair = tuple[np.ndarray, np.ndarray]
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inverted": lambda image: 1 - image,
    "upside down": lambda image: image[::-1],
    "a quarter turn": np.rot90,
    "without 30 % at a side": lambda image: image[:, int(0.3 * image.shape[1]) :],
    "without the lower 40 %": lambda image: image[: int(0.6 * image.shape[0])],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=40, help="of each kind of image that is no chest")
    options = parser.parse_args()
    header("input_checks")
    volumes = [hu for source in ("ct", "ct_more") for hu in scans(options.data / source)]
    pairs = {"real pairs": list(real_pairs(options.data / "xray"))}
    for name in GEOMETRIES:
        pairs[f"DRRs of CT, geometry {name}"] = [drrs(hu, name) for hu in volumes]
        pairs[f"DRRs of phantoms, geometry {name}"] = [drrs(thorax(seed, GRID)[0], name) for seed in PHANTOMS]

    rows = []
    for kind, of_kind in pairs.items():
        found = [[check(image, view) for image, view in zip(pair, VIEWS, strict=True)] for pair in of_kind]
        names = Counter(name for pair in found for names in pair for name in names)
        names.update(name for pair in of_kind for name in of_both(pair))
        rows.append([kind, str(len(of_kind)), str(sum(any(pair) for pair in found)), listed(names)])
    table("False alarms: pairs with any warning", ["pairs", "count", "with a warning", "warnings"], rows)

    kinds = {**KINDS, "axial slices of CT": slices(volumes, ("axial",)),
             "coronal and sagittal slices of CT": slices(volumes, ("coronal", "sagittal"))}  # fmt: skip
    negatives = {
        kind: [make(np.random.default_rng(seed)) for seed in range(FIRST_SEED, FIRST_SEED + options.images)]
        for kind, make in kinds.items()
    }
    negatives["gray photographs and textures"] = list(photographs())
    rows = []
    for kind, images in negatives.items():
        for view in VIEWS:
            rows.append([kind, view, *missed(images, view)])
    table("Images that are no chest radiograph", ["kind", "given as", "count", "missed", "warnings"], rows)

    chosen = {kind: of_kind for kind, of_kind in pairs.items() if "x2ct" not in kind and "parallel" not in kind}
    rows = []
    for kind, of_kind in chosen.items():
        for position, view in enumerate(VIEWS):
            images = [pair[position] for pair in of_kind]
            rows.append([kind, f"exchanged, given as {view}", *missed([pair[1 - position] for pair in of_kind], view)])
            for change, apply in CHANGES.items():
                rows.append([kind, f"{view} {change}", *missed(map(apply, images), view)])
        for position, view in enumerate(VIEWS):
            twice = [of_both((pair[position], pair[position][:, ::-1])) for pair in of_kind]
            rows.append([kind, f"{view} given twice, one of them flipped", str(len(twice)), str(twice.count([])), ""])
    columns = ["images", "change", "count", "missed", "warnings"]
    table("Chest radiographs that are wrong", columns, rows)
    two_patients(pairs)
    timing(pairs["real pairs"])


def check(image: np.ndarray, view: str) -> list[str]:
    """Names of the warnings of one image."""
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    return [result.name for result in warnings(check_radiograph(pixels, view))]


def of_both(pair: Pair) -> list[str]:
    """Names of the warnings of two views together."""
    images = [prepare(np.ascontiguousarray(image, dtype=np.float32), 64) for image in pair]
    return [result.name for result in warnings([check_images(("frontal", "lateral"), images)])]


def missed(images: Iterable[np.ndarray], view: str) -> list[str]:
    """Number of images, of those without a warning, and the warnings of the others."""
    found = [check(image, view) for image in images]
    return [str(len(found)), str(found.count([])), listed(Counter(name for names in found for name in names))]


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def scans(folder: Path) -> Iterator[np.ndarray]:
    """The CT scans of a folder on a grid of 128 voxels of 2.5 mm."""
    for source in reader.find([folder]).sources:
        yield resample.resample(reader.read(source), Grid(128, 2.5))[0]


def drrs(hu: np.ndarray, geometry: str) -> Pair:
    grid = Grid(hu.shape[0], 320.0 / hu.shape[0])
    frontal, lateral = render_drrs(hu, grid, GEOMETRIES[geometry](grid))
    return scaled(frontal), scaled(lateral)


def real_pairs(folder: Path) -> Iterator[Pair]:
    for frontal in sorted(folder.glob("*_frontal.jpg")):
        lateral = frontal.with_name(frontal.name.replace("frontal", "lateral"))
        yield tuple(scaled(np.asarray(Image.open(path).convert("L"), np.float32)) for path in (frontal, lateral))


def photographs() -> Iterator[np.ndarray]:
    """Photographs that packages of Python come with, in gray."""
    own = Path(skimage_data.__file__).parent
    pages = Path(gradio.__file__).parent / "media_assets" / "images"
    for path in [*(own / name for name in PHOTOS), *sorted(pages.glob("*.jp*g"))]:
        if path.exists():
            yield scaled(np.asarray(Image.open(path).convert("L"), np.float32))


def two_patients(pairs: dict[str, list[Pair]]) -> None:
    """What the sum of each row, which two parallel projections of one patient share, would detect."""
    rows = []
    for kind, of_kind in pairs.items():
        sums = [[prepare(image, 64).sum(axis=1) for image in pair] for pair in of_kind]
        own = [np.corrcoef(frontal, lateral)[0, 1] for frontal, lateral in sums]
        other = [
            np.corrcoef(frontal, lateral)[0, 1]
            for k, (frontal, _) in enumerate(sums)
            for j, (_, lateral) in enumerate(sums)
            if k != j
        ]
        below = np.mean(np.array(other) < min(own))
        rows.append([kind, f"{min(own):.2f}", f"{np.median(own):.2f}", f"{np.median(other):.2f}", f"{below:.0%}"])
    columns = ["pairs", "one patient, least", "median", "two patients, median", "two patients below the least of one"]
    table("Two patients, not a check: correlation of the sums of rows", columns, rows)


def timing(pairs: list[Pair]) -> None:
    began = time.process_time()
    for pair in pairs:
        for image, view in zip(pair, VIEWS, strict=True):
            check_radiograph(image, view)
    print(f"{1000 * (time.process_time() - began) / len(pairs):.0f} ms of processor time for a real pair.")


if __name__ == "__main__":
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    main()
