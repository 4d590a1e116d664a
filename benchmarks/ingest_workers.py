"""Scans a second of `raylift ingest` by one process and by several, and whether their archives are equal.

    python benchmarks/ingest_workers.py ct/ --workers 2
    python benchmarks/ingest_workers.py phantoms/ --phantoms 80 --workers 2

Runs alternate, each in a new archive; the figure is the ratio of the medians, and of the pair of successive runs with
the highest ratio, since other programs may use the machine meanwhile. A process is started for each run, so the time
that workers take to start is in it. `--phantoms` writes phantoms at 2 mm with noise into a new folder first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.scans.resample import archive_image, whole_scan

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

GRID, FILE_SPACING_MM, NOISE_HU = Grid(88, 4.0), 2.0, 25.0
"""Grid of the phantoms, spacing of their files, to which they are resampled, and standard deviation of the noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--phantoms", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.phantoms and not Path(options.sources[0]).exists():
        write_phantoms(Path(options.sources[0]), options.phantoms)
    header("ingest_workers")
    seconds: dict[int, list[float]] = {1: [], options.workers: []}
    digests = set()
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for workers, times in seconds.items():
                url = str(Path(folder) / f"{workers}-{repeat}")
                began = time.perf_counter()
                ingest(options, url, workers)
                times.append(time.perf_counter() - began)
                entries = Archive(url).entries()
                digests.add(str([(entry.id, entry.sha256) for entry in entries]))
    assert len(digests) == 1, "the archives differ"
    single = statistics.median(seconds[1])
    rows = [
        [str(workers), f"{statistics.median(times):.1f}", f"{len(entries) / statistics.median(times):.2f}",
         f"{single / statistics.median(times):.2f}"]
        for workers, times in seconds.items()
    ]  # fmt: skip
    title = f"{len(entries)} CT scans to {options.size}^3, median of {options.repeats}; the archives are equal"
    table(title, ["workers", "seconds", "scans/s", "ratio to one"], rows)
    pairs = zip(seconds[1], seconds[options.workers], strict=True)
    table("Pairs of successive runs", ["1 worker, s", f"{options.workers} workers, s", "ratio"], [
        [f"{one:.1f}", f"{several:.1f}", f"{one / several:.2f}"] for one, several in pairs
    ])  # fmt: skip


def write_phantoms(folder: Path, count: int) -> None:
    """Phantoms with seeds from 0, as compressed NIfTI with noise."""
    folder.mkdir(parents=True)
    for seed in range(count):
        image = whole_scan(archive_image(thorax(seed, GRID)[0], GRID), FILE_SPACING_MM)
        hu = sitk.GetArrayFromImage(image)
        noisy = hu + np.random.default_rng(seed).normal(0, NOISE_HU, hu.shape)
        written = sitk.GetImageFromArray(noisy.round().astype(np.int16))
        written.CopyInformation(image)
        sitk.WriteImage(written, str(folder / f"phantom-{seed:03}.nii.gz"))


def ingest(options: argparse.Namespace, url: str, workers: int) -> None:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "raylift", "ingest", *options.sources, "--archive", url]
    command += ["--size", str(options.size), "--workers", str(workers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
