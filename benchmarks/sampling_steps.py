"""Quality and time against sampling steps, for each sampler, of a trained diffusion system on the scans of a split.

All samples of a scan start from the same noise. The first row of the table is the mean training volume, which does not
depend on the radiographs; the line below it has the fewest steps that lose less than 0.1 dB to the best of all. The
second table groups the voxels by the standard deviation over samples of other seeds, and has the error of their mean.

    python benchmarks/sampling_steps.py --model runs/diffux2ct --archive data/phantoms [--steps 4 8 16] [--split test]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from raylift.datasets.archive.archive import Archive
from raylift.datasets.batch import Batch
from raylift.datasets.intensity import Window
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines
from raylift.models.diffusion.diffusion_network import DiffusionNetwork, SamplingConfig
from raylift.models.diffusion.samplers import SAMPLERS
from raylift.models.inference import RunningStatistics
from raylift.models.metrics import VOLUME
from raylift.platform import model_store
from raylift.platform.evaluation.predictors import matching_views
from raylift.platform.training.checkpoint import resolve_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

LOSS_DB = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a run, a checkpoint or an exported folder")
    parser.add_argument("--archive", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--scans", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8, help="samples of the second table; 0 leaves it out")
    parser.add_argument("--plot", type=Path, help="file of a plot of the second table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, archive = model_store.load(resolve_checkpoint(options.model)), Archive(options.archive)
    network, views, window = model.network, matching_views(model.description, archive), model.description.window
    if not isinstance(network, DiffusionNetwork):
        parser.error(f"{model.description.system.name} is deterministic and has no sampler")
    if not archive.entries(options.split):
        parser.error(f"{options.archive} has no scan in split {options.split}")
    test = load_batch(archive, archive.entries(options.split)[: options.scans], window, views)

    def measured(predict: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
        """Mean PSNR, mean SSIM and seconds per volume."""
        started = time.perf_counter()
        with torch.no_grad():
            predictions = torch.cat([predict(test.radiographs[k : k + 1]) for k in range(len(test.radiographs))])
        seconds = (time.perf_counter() - started) / len(predictions)
        hu = [window.to_hu(volumes[:, 0].float()).numpy().astype(np.float32) for volumes in (predictions, test.volume)]
        values = [VOLUME.evaluate(volume, ground_truth) for volume, ground_truth in zip(*hu, strict=True)]
        return fmean(f["psnr_db"] for f in values), fmean(f["ssim"] for f in values), seconds

    train = (load_batch(archive, [entry], window, views) for entry in archive.entries("train"))
    grid, geometry = model.description.grid, model.description.geometry
    mean = baselines.fit(train, grid, geometry).predictors(grid, geometry)["mean volume"]
    header("sampling_steps")
    best: dict[int, float] = {}
    rows = [["mean training volume", "", *cells(measured(mean))]]
    for sampler in options.samplers:
        for steps in options.steps:
            settings = SamplingConfig(sampler, steps)
            of_steps = measured(lambda radiographs, settings=settings: network.sample(radiographs, settings))
            best[steps] = max(best.get(steps, -np.inf), of_steps[0])
            rows.append([sampler, str(steps), *cells(of_steps)])
    description = model.description
    title = (
        f"{description.system.name}, {description.grid.size}^3, after {description.provenance.get('step', '?')} steps, "
        f"batch 1, threads {options.threads}; protocol volume, "
        f"mean over {len(test.radiographs)} scans, {options.split} split"
    )
    table(title, ["sampler", "steps", "PSNR, dB", "SSIM", "seconds per volume"], rows)
    enough = min(steps for steps, db in best.items() if db > max(best.values()) - LOSS_DB)
    print(f"Fewest steps that lose less than {LOSS_DB} dB to the best: {enough}.\n")
    if options.samples:
        standard_deviation_and_error(network, test, window, options.samples, options.plot)
    return 0


@torch.no_grad()
def standard_deviation_and_error(
    network: DiffusionNetwork, test: Batch, window: Window, samples: int, plot: Path | None
) -> None:
    """Print, by tenths of the voxels in the order of their standard deviation over samples, the error of the mean."""
    deviations, errors = [], []
    for k in range(len(test.radiographs)):
        statistics = RunningStatistics()
        for seed in range(samples):
            settings = replace(network.sampling, seed=seed)
            statistics.add(network.sample(test.radiographs[k : k + 1], settings).float().clip(0, 1))
        assert statistics.std is not None
        deviations.append(statistics.std.flatten() * window.width_hu)
        errors.append((statistics.mean - test.volume[k : k + 1]).flatten().abs() * window.width_hu)
    deviation, error = torch.cat(deviations).numpy(), torch.cat(errors).numpy()
    tenths = np.array_split(np.argsort(deviation), 10)
    means = [(deviation[tenth].mean(), error[tenth].mean()) for tenth in tenths]
    rows = [[str(k + 1), f"{std:.1f}", f"{mae:.1f}"] for k, (std, mae) in enumerate(means)]
    pearson, spearman = pearsonr(deviation, error).statistic, spearmanr(deviation, error).statistic
    title = (
        f"Mean absolute error of the mean of {samples} samples ({network.sampling.sampler}, {network.sampling.steps} "
        f"steps), by tenths of the voxels of all scans; correlation over voxels: Pearson {pearson:.3f}, Spearman "
        f"{spearman:.3f}"
    )
    table(title, ["tenth of the voxels", "standard deviation, HU", "mean absolute error, HU"], rows)
    if plot:
        figure = Figure(figsize=(4.6, 3.4), layout="constrained", dpi=130)
        axes = figure.subplots()
        axes.plot(*zip(*means, strict=True), marker="o")
        axes.set(xlabel="standard deviation over samples, HU", ylabel="mean absolute error, HU")
        axes.grid(alpha=0.3)
        figure.savefig(plot)


def cells(values: tuple[float, float, float]) -> list[str]:
    psnr, ssim, seconds = values
    return [f"{psnr:.2f}", f"{ssim:.3f}", f"{seconds:.2f}"]


if __name__ == "__main__":
    raise SystemExit(main())
