"""Scans a second of `raylift ingest` by one process and by several, and whether their archives are equal.

    python benchmarks/ingest_workers.py ct/ --workers 2

Runs alternate, each in a new archive; the figure is the ratio of the medians. A process is started for each run, so the
time that workers take to start is in it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raylift.datasets.archive.archive import Archive

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
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


def ingest(options: argparse.Namespace, url: str, workers: int) -> None:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "raylift", "ingest", *options.sources, "--archive", url]
    command += ["--size", str(options.size), "--workers", str(workers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
