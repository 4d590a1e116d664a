"""Phantoms a second on one thread: `OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/phantom.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.thorax import thorax

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table


def main() -> None:
    header("phantom")
    rows = [
        [f"{grid.size}^3 at {grid.spacing_mm:g} mm", f"{measure(grid, volumes):.2f}"]
        for grid, volumes in ((Grid(64, 5.0), 20), (Grid(128, 2.5), 5))
    ]
    table("procedural phantoms", ["grid", "volumes/s"], rows)


def measure(grid: Grid, volumes: int) -> float:
    thorax(volumes, grid)
    started = time.perf_counter()
    for seed in range(volumes):
        thorax(seed, grid)
    return volumes / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
