"""Cost of augmentation and of phantoms in the stream: the wait for data as a share of a training step.

    python benchmarks/augmentation.py [--preset x2ct-gan-slim] [--steps 6] [--threads 1]

One worker trains a preset on an archive of phantoms, as `raylift train` does but in plain torch and in one process: the
batches come from `open_stream`, whose threads read ahead while the step is computed. Steps and waits are wall time,
means over the counted steps, after two to fill the queue. CPU seconds of a sample are those of one thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.augmentation.augmentation import Augmenter
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.streaming.order import BatchPartition
from raylift.platform.config import RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training.inputs import check, describe, open_stream

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from stepping import stepper

SAMPLES = 8
GRID = Grid(64, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="x2ct-gan-slim", choices=[name for name in PRESETS if "slim" in name])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the step and in each reader")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header("augmentation")
    preset = PRESETS[options.preset]
    augmentation = replace(preset.data.augmentation, enabled=True)
    with tempfile.TemporaryDirectory() as folder:
        ingest_phantoms(folder, GRID, chest(GRID), count=SAMPLES, seed=0, split_fractions=(0.5, 0.25, 0.25))
        base = replace(preset, data=replace(preset.data, archive=folder))
        half = len(Archive(folder).entries("train"))
        cases = {
            "stored pairs": base,
            "augmentation": replace(base, data=replace(base.data, augmentation=augmentation)),
            "half phantoms": replace(base, data=replace(base.data, phantoms_per_epoch=half)),
            "augmentation, half phantoms": replace(
                base, data=replace(base.data, augmentation=augmentation, phantoms_per_epoch=half)
            ),
        }
        rows = [[name, *measured(run, options.steps)] for name, run in cases.items()]
    title = f"{options.preset}, 64^3, batch {preset.train.batch_size}, one worker, {options.steps} steps after two"
    table(title, ["samples", "s/step", "wait for data, s", "share of the step", "CPU s/step, all threads"], rows)
    costs = sample_costs(base)
    table("one sample", ["part", "CPU s"], [[name, f"{seconds:.3f}"] for name, seconds in costs.items()])


def measured(run: RunConfig, steps: int) -> list[str]:
    """Seconds of a step, seconds of it that it waits for its batch, their ratio, and CPU seconds of the process."""
    archive = check(run)
    torch.manual_seed(0)
    take = stepper(run.system.objective(GRID, archive.manifest.geometry, run.data.window), torch.device("cpu"), "fp32")
    share = BatchPartition(0, 1, run.train.batch_size, run.engine.gradient_accumulation_steps)
    batches = iter(open_stream(archive, run, describe(run, archive), share))
    waits, times, cpu = [], [], []
    for _ in range(2 + steps):
        began, began_cpu = time.perf_counter(), time.process_time()
        micro_batches = next(batches)
        waits.append(time.perf_counter() - began)
        for batch in micro_batches:
            take(batch)
        times.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    batches.close()  # type: ignore[attr-defined]
    step, wait = float(np.mean(times[2:])), float(np.mean(waits[2:]))
    return [f"{step:.2f}", f"{wait:.3f}", f"{100 * wait / step:.1f} %", f"{np.mean(cpu[2:]):.2f}"]


def sample_costs(run: RunConfig, repeats: int = 5) -> dict[str, float]:
    """CPU seconds of an augmented sample and of a phantom, the fastest of several."""
    hu, _ = thorax(0, GRID)
    augmenter = Augmenter(run.data.augmentation, 0, GRID, chest(GRID), torch.device("cpu"))
    parts = {"augmentation": lambda k: augmenter(hu, None, 0, k), "phantom": lambda k: thorax(k, GRID)}
    costs = {}
    for name, part in parts.items():
        spent = []
        for k in range(repeats):
            began = time.process_time()
            part(k)
            spent.append(time.process_time() - began)
        costs[name] = min(spent)
    return costs


if __name__ == "__main__":
    main()
