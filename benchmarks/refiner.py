"""What a refiner gains or loses over its base on held-out scans, by sampling steps and by draws averaged.

The base is the one inside the refiner. Beside the figures of the protocol `volume` stand what the spread of the draws
is worth as a sign of error (the correlation, over the voxels of a scan, of standard deviation and absolute error of the
mean, and how large the one is as a share of the other, root mean squares both) and sharpness: the mean absolute step
from voxel to voxel, over the truth's.

    python benchmarks/refiner.py --model runs/refined --archive data/chest
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.streaming.stream import load_batch
from raylift.models import generative
from raylift.models.generative import RunningStatistics, SamplingConfig
from raylift.models.metrics import PROTOCOLS
from raylift.models.weights import Model
from raylift.platform import model_store
from raylift.platform.evaluation.evaluate import matching_views
from raylift.platform.training.checkpoint import resolve_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

COLUMNS = {"PSNR, dB": "psnr_db", "MAE, HU": "mae_hu", "SSIM": "ssim"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--archive", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, archive = model_store.load(resolve_checkpoint(options.model)), Archive(options.archive)
    base = Model(model.network.base, model.description, "")
    rows = [measured("base", base, archive, options.split, None, (1,))[0]]
    for steps in options.steps:
        settings = replace(model.network.sampling, steps=steps)
        rows += measured(f"{steps} steps", model, archive, options.split, settings, options.draws)
    header("refiner")
    scans = len(archive.entries(options.split))
    title = f"{settings.sampler}, protocol volume, mean ± standard deviation over {scans} {options.split} scans"
    told = ["PSNR less the base's, dB", "spread and error", "spread / error", "sharpness", "seconds"]
    first = rows[0][2]["psnr_db"]
    lines = [
        [name, str(draws), *cells(figures), *gain(figures["psnr_db"], first), *more]
        for name, draws, figures, more in rows
    ]
    table(title, ["", "draws", *COLUMNS, *told], lines)
    return 0


@torch.no_grad()
def measured(
    name: str, model: Model, archive: Archive, split: str, settings: SamplingConfig | None, draws: list[int]
) -> list:
    """A row for each number of draws: figures of all scans, then what the spread is worth, and seconds a scan."""
    window, views = model.description.window, matching_views(model, archive)
    scans: dict[int, list] = {count: [] for count in draws}
    for entry in archive.entries(split):
        batch, truth = load_batch(archive, [entry], window, views), archive.read(entry).volume.astype(np.float32)
        spread, started = RunningStatistics(), time.perf_counter()
        for k in range(max(draws)):
            spread.add(generative.predict(model.network, batch.views, settings, k))
            if k + 1 in scans:
                seconds, hu = time.perf_counter() - started, window.to_hu(spread.mean)[0, 0].numpy()
                figures = PROTOCOLS["volume"].evaluate(hu, truth)
                scans[k + 1].append((figures, *worth(spread, batch.volume), steepness(hu) / steepness(truth), seconds))
    return [
        (
            name,
            count,
            {key: [figures[key] for figures, *_ in found] for key in COLUMNS.values()},
            [f"{fmean(values):.2f}" for values in list(zip(*found, strict=True))[1:]],
        )
        for count, found in scans.items()
    ]


def worth(spread: RunningStatistics, truth: torch.Tensor) -> tuple[float, float]:
    """Correlation of spread and absolute error, and the ratio of their root mean squares; NaN for a single volume."""
    if spread.std is None:
        return float("nan"), float("nan")
    error = (spread.mean - truth).abs()
    together = torch.corrcoef(torch.stack([spread.std.flatten(), error.flatten()]))[0, 1]
    return float(together), float(spread.std.square().mean().sqrt() / error.square().mean().sqrt())


def steepness(hu: np.ndarray) -> float:
    """The mean absolute step from a voxel to the next along the three axes, in HU."""
    return fmean(float(np.abs(np.diff(hu, axis=axis)).mean()) for axis in range(3))


def cells(figures: dict[str, list[float]]) -> list[str]:
    """Mean and standard deviation over scans."""
    digits = {"psnr_db": 2, "mae_hu": 1, "ssim": 4}
    return [f"{fmean(v):.{digits[key]}f} ± {stdev(v):.{digits[key]}f}" for key, v in figures.items()]


def gain(own: list[float], base: list[float]) -> list[str]:
    """The mean difference, scan by scan, and its standard deviation."""
    differences = [one - other for one, other in zip(own, base, strict=True)]
    return [f"{fmean(differences):+.2f} ± {stdev(differences):.2f}"]


if __name__ == "__main__":
    raise SystemExit(main())
