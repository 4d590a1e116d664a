"""Steps and strength of the data-consistency fit of `models:chest-64`, and what limits the lung Dice of its volumes.

    python benchmarks/fit_steps.py --ct archives/ct --phantoms archives/phantoms

Archives of `raylift ingest` and `raylift phantom` at 64^3 and 5 mm. Of the CT the two validation scans are used alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from raylift.datasets import segmentation
from raylift.datasets.archive.archive import Archive
from raylift.datasets.intensity import HU_MAX, HU_MIN, Window
from raylift.datasets.streaming.stream import load_batch
from raylift.models import consistency
from raylift.models.metrics import VOLUME
from raylift.models.segmentation_metrics import dice
from raylift.platform import model_store

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from gpu_training import VALIDATE

MODEL = model_store.load("models:chest-64")
SPACING_MM = MODEL.description.grid.spacing_mm
FITS = ((0, 1.0), *((steps, 1.0) for steps in (5, 10, 20, 60)), *((30, strength) for strength in (0.1, 0.3, 3.0, 10.0)))
"""Steps and strength; the default is 10 steps of strength 1."""
THRESHOLDS_HU = (-700, -600, -550, -500, -450, -400, -350, -300)
BLURS = (0.5, 1.0, 1.5, 2.0)
"""Standard deviations in voxels."""


@dataclass(frozen=True)
class Case:
    """A scan's ground truth in HU, radiographs and the network's volume in [0, 1]."""

    name: str
    hu: np.ndarray
    radiographs: torch.Tensor
    volume: torch.Tensor

    def fit(self, steps: int, strength: float) -> tuple[float, float, float, np.ndarray]:
        """PSNR in dB, lung Dice, mean residual of the views and HU after the fit."""
        described = MODEL.description
        fitted = consistency.fit(
            self.volume, self.radiographs, described.window, described.grid, described.geometry, steps, strength
        )
        hu = described.window.to_hu(fitted.volume)[0, 0].numpy()
        return (
            VOLUME.evaluate(hu, self.hu)["psnr_db"],
            dice(lungs(hu), lungs(self.hu)),
            float(fitted.residual_after.mean()),
            hu,
        )


def lungs(hu: np.ndarray, threshold_hu: int = segmentation.LUNG_AIR_HU) -> np.ndarray:
    """The lungs with another threshold for air: HU are shifted by the difference inside the same body."""
    whole = np.rint(hu.clip(HU_MIN, HU_MAX)).astype(np.int16)
    shifted = np.rint((hu + segmentation.LUNG_AIR_HU - threshold_hu).clip(HU_MIN, HU_MAX)).astype(np.int16)
    return segmentation.lungs(shifted, SPACING_MM, segmentation.body(whole, SPACING_MM))


@torch.no_grad()
def cases(archive: Archive, names: list[str]) -> Iterator[Case]:
    """The scans of these names."""
    for entry in (entry for entry in archive.entries() if entry.id in names):
        batch = load_batch(archive, [entry], Window(), (0, 1), normalization=MODEL.description.normalization)
        volume = MODEL.network(batch.radiographs).float().clip(0, 1)
        yield Case(entry.id, archive.read_array(entry, "volumes").astype(np.float32), batch.radiographs, volume)


def surface(found: np.ndarray, true: np.ndarray) -> list[str]:
    """Dice, missed and added volume in ml, and the share of both within 5 and 10 mm of the true surface."""
    distance = np.where(true, ndimage.distance_transform_edt(true), ndimage.distance_transform_edt(~true)) * SPACING_MM
    wrong, ml = distance[found != true], SPACING_MM**3 / 1000
    near = [f"{100 * (wrong <= limit * 1.001).mean():.0f} %" for limit in (5, 10)]
    volumes = [f"{(true & ~found).sum() * ml:.0f}", f"{(found & ~true).sum() * ml:.0f}"]
    return [f"{dice(found, true):.4f}", *volumes, *near]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", required=True)
    parser.add_argument("--phantoms", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    phantoms = Archive(options.phantoms)
    sets = {
        "validation CT": list(cases(Archive(options.ct), list(VALIDATE))),
        "phantoms": list(cases(phantoms, [entry.id for entry in phantoms.entries()[:8]])),
    }
    header("fit_steps")
    print(f"* {', '.join(f'{len(members)} {name}' for name, members in sets.items())}", end="\n\n")
    rows, fitted = [], {}
    for steps, strength in FITS:
        row = [str(steps), f"{strength:g}" if steps else ""]
        for members in sets.values():
            results = [case.fit(steps, strength) for case in members]
            row += [f"{np.mean([result[k] for result in results]):.{digits}f}" for k, digits in enumerate((2, 4, 4))]
            if (steps, strength) == (10, 1.0):
                fitted |= {case.name: result[3] for case, result in zip(members, results, strict=True)}
        rows.append(row)
    columns = [f"{metric}, {name}" for name in sets for metric in ("PSNR, dB", "lung Dice", "residual")]
    table("The fit: means", ["steps", "strength", *columns], rows)
    rows = [
        [f"{threshold} HU", *(mean_dice(members, fitted, threshold) for members in sets.values())]
        for threshold in THRESHOLDS_HU
    ]
    table("Lung Dice after the fit by the threshold of air in the prediction (-500 HU in the CT)", ["", *sets], rows)
    rows = [
        [f"{blur:g}", *(f"{np.mean([blurred(case.hu, blur) for case in members]):.4f}" for members in sets.values())]
        for blur in BLURS
    ]
    table("Lung Dice of the CT after a Gaussian blur", ["sigma, voxels", *sets], rows)
    table(
        "Disagreement of the lungs after the fit",
        ["scan", "lung Dice", "missed, ml", "added, ml", "within 5 mm of the surface", "within 10 mm"],
        [
            [case.name, *surface(lungs(fitted[case.name]), lungs(case.hu))]
            for members in sets.values()
            for case in members
        ],
    )


def mean_dice(members: list[Case], fitted: dict[str, np.ndarray], threshold_hu: int) -> str:
    """Lung Dice with another threshold in the predictions."""
    return f"{np.mean([dice(lungs(fitted[case.name], threshold_hu), lungs(case.hu)) for case in members]):.4f}"


def blurred(hu: np.ndarray, sigma: float) -> float:
    """Lung Dice of a CT with itself after a blur."""
    return dice(lungs(ndimage.gaussian_filter(hu, sigma)), lungs(hu))


if __name__ == "__main__":
    main()
