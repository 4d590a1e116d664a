"""CPU seconds of a training step of all networks of every slim preset, at its own size, in fp32, batch 1.

CPU seconds are user and system time, steadier than wall time on a shared machine; the fastest of the counted steps is
given.

    python benchmarks/slim_training_step.py [--threads 1] [--steps 3] [--presets psr-slim ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from raylift.datasets.geometry import Grid, chest
from raylift.platform.presets import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from stepping import random_batch, stepper
from systems import SLIM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--presets", nargs="+", choices=SLIM, default=SLIM, metavar="PRESET")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header("slim_training_step")
    rows = []
    for name in options.presets:
        size = PRESETS[name].data.size
        rows.append([name, f"{size}^3", f"{cpu_seconds(name, options.steps):.2f}"])
    threads = f"{options.threads} CPU thread{'s' * (options.threads > 1)}"
    title = f"batch 1, fp32, {threads}, fastest of {options.steps} steps after one"
    table(title, ["preset", "size", "CPU s/step"], rows)


def cpu_seconds(name: str, steps: int) -> float:
    """The fastest step's, after one to warm up."""
    torch.manual_seed(0)
    run = PRESETS[name]
    size, system = run.data.size, run.system
    take = stepper(system.objective(Grid(size), chest(Grid(size))), torch.device("cpu"), "fp32")
    batch = random_batch(system, size, 1, torch.device("cpu"))
    take(batch)
    spent = []
    for _ in range(steps):
        began = time.process_time()
        take(batch)
        spent.append(time.process_time() - began)
    return min(spent)


if __name__ == "__main__":
    main()
