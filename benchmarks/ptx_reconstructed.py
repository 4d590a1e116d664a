"""PTX-Seg on reconstructions of phantoms with pneumothorax, and on CT without a known one on the models' voxels.

    python benchmarks/ptx_reconstructed.py MODEL... [--count 100] [--seed 0] [--ct FOLDER...] [--output FILE]

The CT is the phantom on the models' grid, and its own ground truth the labels. Volumes are measured as by
`raylift compare --ptx`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from raylift.datasets import ptx_seg
from raylift.datasets.archive.archive import Archive
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.ptx_seg import SIDES
from raylift.datasets.scans import reader
from raylift.datasets.segmentation import Label
from raylift.platform import model_store
from raylift.platform.evaluation import ptx
from raylift.platform.evaluation.agreement import agreement
from raylift.platform.evaluation.predictors import ModelPredictor
from raylift.platform.evaluation.ptx_table import QUANTITIES, cells

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import conditions, table_lines
from ptx import COARSE_MM, coarser, measured

PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "SimpleITK")
PERCENTILES = (5, 50, 95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--count", type=int, default=100, help="phantoms, all with pneumothorax")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ct", type=Path, nargs="*", default=[], help="folders or files")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [*conditions("ptx_reconstructed", PACKAGES), ""]
    models = {name: ModelPredictor(name, model_store.load(name), None, 1, 0) for name in options.models}
    first = next(iter(models.values())).model.description
    with tempfile.TemporaryDirectory() as folder:
        settings = {"pneumothorax_fraction": 1.0, "split_fractions": (0.0, 0.0, 1.0)}
        ingest_phantoms(folder, first.grid, first.geometry, count=options.count, seed=options.seed, **settings)
        lines += reconstructed_lines(models, Archive(folder))
    lines += ["", *ct_lines(options.ct)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def reconstructed_lines(models: dict[str, ModelPredictor], archive: Archive) -> list[str]:
    """Agreement of the CT with its labels and of each model's volumes with the CT, and the HU of the gas in them."""
    grid = archive.manifest.grid
    pairs: dict[str, list[dict[str, float]]] = {}
    gas: dict[str, list[np.ndarray]] = {}
    for entry in archive.entries("test"):
        hu, labels = (archive.read_array(entry, name) for name in ("volumes", "labels"))
        true = hu.astype(np.float32)
        volumes = {"CT": true} | {
            name: model.predict(archive, entry, true).predictions[name].hu for name, model in models.items()
        }
        by_labels = labeled(labels, grid.spacing_mm)
        for name, volume in volumes.items():
            found = ptx.compare(volume, true, grid)
            pairs.setdefault(name, []).append(found | by_labels if name == "CT" else found)
            gas.setdefault(name, []).append(volume[labels == Label.PNEUMOTHORAX])
        print(entry.id, [round(rows[-1]["pneumothorax_ml"]) for rows in pairs.values()], flush=True)
    lines = []
    for quantity, (metric, unit) in QUANTITIES.items():
        rows = []
        for name, found in pairs.items():
            values, true = (np.array([row[key] for row in found]) for key in (metric, f"ct_{metric}"))
            of = "labels" if name == "CT" else "CT"
            rows.append([name, of, f"{(values > 0).sum()} of {len(values)}", *cells(agreement(values, true))])
        columns = ["volumes", "compared with", "found in", "Pearson", "Spearman", "ICC(2,1)", f"MAE, {unit}"]
        columns += [f"bias, {unit}", f"limits of agreement, {unit}"]
        title = f"Pneumothorax, {quantity}: {len(found)} phantoms, {grid.size}^3 voxels of {grid.spacing_mm:g} mm"
        lines += [*table_lines(title, columns, rows), ""]
    rows = [
        [name, *(f"{value:.0f}" for value in np.percentile(np.concatenate(values), PERCENTILES))]
        for name, values in gas.items()
    ]
    columns = ["volumes", *(f"{percentile}th percentile, HU" for percentile in PERCENTILES)]
    return lines + table_lines("Voxels whose label is pneumothorax", columns, rows)


def labeled(labels: np.ndarray, spacing_mm: float) -> dict[str, float]:
    """Volume of both sides and occupancy of the larger, from labels."""
    middle = labels.shape[2] // 2
    sides = dict(zip(SIDES, (labels[:, :, :middle], labels[:, :, middle:]), strict=True))
    air = {side: int((half == Label.PNEUMOTHORAX).sum()) for side, half in sides.items()}
    larger = max(SIDES, key=air.__getitem__)
    lung = int(np.isin(sides[larger], (Label.LUNG, Label.VESSEL)).sum())
    return {
        "ct_pneumothorax_ml": sum(air.values()) * spacing_mm**3 / 1000,
        "ct_occupancy_percent": 100 * air[larger] / (air[larger] + lung),
    }


def ct_lines(folders: list[Path]) -> list[str]:
    """What is found in CT on coarse voxels with the distance to the wall that is used for them."""
    grids = [*((mm,) * 3 for mm in COARSE_MM[1:])]
    rows = []
    for source in reader.find(folders).sources if folders else []:
        image = reader.read(source).image
        found = [measured(coarser(image, grid), ptx_seg.COARSE_WALL_MM) for grid in grids]
        rows.append([source.subject, *(f"{sum(sides.values()):.0f}" for sides in found)])
    columns = ["scan", *(f"{grid[0]:g} mm, ml" for grid in grids)]
    return table_lines(f"{len(rows)} CT without a known pneumothorax, both sides", columns, rows) if rows else []


if __name__ == "__main__":
    main()
