"""Phantoms per second on one thread: `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/phantom.py`."""

from __future__ import annotations

import os
import platform
import sys
import time

import numpy as np
import scipy

from raylift.datasets.geometry import Grid
from raylift.datasets.phantom import thorax


def measure(grid: Grid, volumes: int) -> float:
    thorax(volumes, grid)
    started = time.perf_counter()
    for seed in range(volumes):
        thorax(seed, grid)
    return volumes / (time.perf_counter() - started)


if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{platform.processor() or platform.machine()}, {cores} core(s), python {sys.version.split()[0]}, ", end="")
    print(f"numpy {np.__version__}, scipy {scipy.__version__}")
    for grid, volumes in ((Grid(64, 5.0), 20), (Grid(128, 2.5), 5)):
        print(f"{grid.size}^3 at {grid.spacing_mm} mm: {measure(grid, volumes):.2f} volumes/s")
