"""Quality and time against sampling steps, for each sampler, of a trained diffusion system on the scans of a split.

All samples of a scan start from the same noise. The first row of the table is the mean training volume, which does not
depend on the radiographs; the last line has the fewest steps that lose less than 0.1 dB to the best of all.

    python benchmarks/sampling_steps.py --model runs/diffux2ct --archive data/phantoms [--steps 4 8 16] [--split test]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from raylift.datasets.archive.archive import Archive
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines
from raylift.models.diffusion.generative import GenerativeNetwork, SamplingConfig
from raylift.models.diffusion.samplers import SAMPLERS
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, archive = model_store.load(resolve_checkpoint(options.model)), Archive(options.archive)
    network, views, window = model.network, matching_views(model.description, archive), model.description.window
    if not isinstance(network, GenerativeNetwork):
        parser.error(f"{model.description.system.name} is deterministic and has no sampler")
    test = load_batch(archive, archive.entries(options.split)[: options.scans], window, views)

    def measured(predict: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
        """Mean PSNR, mean SSIM and seconds a volume."""
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
    table(title, ["sampler", "steps", "PSNR, dB", "SSIM", "seconds a volume"], rows)
    enough = min(steps for steps, db in best.items() if db > max(best.values()) - LOSS_DB)
    print(f"Fewest steps that lose less than {LOSS_DB} dB to the best: {enough}.")
    return 0


def cells(values: tuple[float, float, float]) -> list[str]:
    psnr, ssim, seconds = values
    return [f"{psnr:.2f}", f"{ssim:.3f}", f"{seconds:.2f}"]


if __name__ == "__main__":
    raise SystemExit(main())
