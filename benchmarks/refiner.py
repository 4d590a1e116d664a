"""Metrics of a refiner and of its base on held-out scans, by the number of sampling steps and of averaged samples.

The base is the one inside the refiner. Columns next to the metrics of protocol `volume`: the correlation, over
the voxels of a scan, of the standard deviation over samples and the absolute error of the mean; the ratio of their root
mean squares; and sharpness, the mean absolute difference of adjacent voxels relative to that of the ground truth.

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
from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.inference import RunningStatistics, predict
from raylift.models.metrics import VOLUME
from raylift.models.weights import Model
from raylift.platform import model_store
from raylift.platform.evaluation.predictors import matching_views
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
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, archive = model_store.load(resolve_checkpoint(options.model)), Archive(options.archive)
    base = Model(model.network.base, model.description, "")
    rows = [measured("base", base, archive, options.split, None, (1,))[0]]
    for steps in options.steps:
        settings = replace(model.network.sampling, steps=steps)
        rows += measured(f"{steps} steps", model, archive, options.split, settings, options.samples)
    header("refiner")
    scans = len(archive.entries(options.split))
    title = f"{settings.sampler}, protocol volume, mean ± standard deviation over {scans} {options.split} scans"
    columns = ["PSNR less the base's, dB", "correlation of std and error", "std / error", "sharpness", "seconds"]
    first = rows[0][2]["psnr_db"]
    lines = [
        [name, str(samples), *cells(values), *gain(values["psnr_db"], first), *more]
        for name, samples, values, more in rows
    ]
    table(title, ["", "samples", *COLUMNS, *columns], lines)
    return 0


@torch.no_grad()
def measured(
    name: str, model: Model, archive: Archive, split: str, settings: SamplingConfig | None, samples: list[int]
) -> list:
    """A row for each number of samples: metrics of all scans, std against error, sharpness, and seconds per scan."""
    window, views = model.description.window, matching_views(model.description, archive)
    scans: dict[int, list] = {count: [] for count in samples}
    for entry in archive.entries(split):
        batch, ground_truth = load_batch(archive, [entry], window, views), archive.read(entry).volume.astype(np.float32)
        statistics, started = RunningStatistics(), time.perf_counter()
        for k in range(max(samples)):
            statistics.add(predict(model.network, batch.radiographs, settings, k))
            if k + 1 in scans:
                seconds, hu = time.perf_counter() - started, window.to_hu(statistics.mean)[0, 0].numpy()
                values = VOLUME.evaluate(hu, ground_truth)
                scans[k + 1].append(
                    (
                        values,
                        *error_prediction(statistics, batch.volume),
                        mean_gradient(hu) / mean_gradient(ground_truth),
                        seconds,
                    )
                )
    return [
        (
            name,
            count,
            {key: [values[key] for values, *_ in scores] for key in COLUMNS.values()},
            [f"{fmean(values):.2f}" for values in list(zip(*scores, strict=True))[1:]],
        )
        for count, scores in scans.items()
    ]


def error_prediction(statistics: RunningStatistics, ground_truth: torch.Tensor) -> tuple[float, float]:
    """Correlation of std and absolute error, and the ratio of their root mean squares; NaN for a single sample."""
    if statistics.std is None:
        return float("nan"), float("nan")
    error = (statistics.mean - ground_truth).abs()
    correlation = torch.corrcoef(torch.stack([statistics.std.flatten(), error.flatten()]))[0, 1]
    return float(correlation), float(statistics.std.square().mean().sqrt() / error.square().mean().sqrt())


def mean_gradient(hu: np.ndarray) -> float:
    """The mean absolute difference of adjacent voxels along the three axes, in HU."""
    return fmean(float(np.abs(np.diff(hu, axis=axis)).mean()) for axis in range(3))


def cells(values: dict[str, list[float]]) -> list[str]:
    """Mean and standard deviation over scans."""
    digits = {"psnr_db": 2, "mae_hu": 1, "ssim": 4}
    return [f"{fmean(v):.{digits[key]}f} ± {stdev(v):.{digits[key]}f}" for key, v in values.items()]


def gain(own: list[float], base: list[float]) -> list[str]:
    """The mean difference, scan by scan, and its standard deviation."""
    differences = [refined - unrefined for refined, unrefined in zip(own, base, strict=True)]
    return [f"{fmean(differences):+.2f} ± {stdev(differences):.2f}"]


if __name__ == "__main__":
    raise SystemExit(main())
