"""Volumes per second from storage to a training batch: raylift's archive against a file a volume.

The alternative is how X2CT-GAN's data are read: one gzip-compressed HDF5 file a volume with the CT at 320^3 and two
radiographs at 320^2, brought to 128 on the fly by `scipy.ndimage.zoom` (order 1). A second alternative spares it the
zoom: the same files already at 128. All readers give the same batch: volume in [0, 1] and two normalized views.

    python benchmarks/archive_reading.py              folder
    python benchmarks/archive_reading.py --s3         and a real S3 server on loopback (Swift; see tests/s3_server.py)
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import h5py
import numpy as np
import torch
from scipy import ndimage

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.intensity import Window, normalize
from raylift.datasets.streaming.order import BatchPartition, SampleOrder
from raylift.datasets.streaming.stream import BatchStream, load_batch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

VOLUMES, SECONDS, THREADS = 16, 20.0, 2
GRID = Grid(128, 2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--s3", action="store_true", help="also over S3 on loopback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    header("archive_reading")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        measure("folder", str(root / "archive"), str(root / "files"))
        if options.s3:
            sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
            from s3_server import S3Server

            with S3Server(root / "s3") as server:
                os.environ.update(server.environment)
                server.make_bucket("bench")
                measure("S3", "s3://bench/archive", "s3://bench/files")


def measure(where: str, archive_url: str, files_url: str) -> None:
    ingest_phantoms(archive_url, GRID, chest(GRID), count=VOLUMES, seed=1, split_fractions=(1.0, 0.0, 0.0))
    archive = Archive(archive_url)
    write_files(archive, files_url)
    entries = archive.entries()
    order, share = SampleOrder(len(entries), 0), BatchPartition(0, 1, 1)
    batches = iter(BatchStream(archive, entries, order, share, Window(), threads=THREADS, prefetch_batches=4))
    rng = np.random.default_rng(0)
    indices = (int(rng.integers(VOLUMES)) for _ in itertools.count())
    rates = {
        "raylift archive, 2 threads ahead": rate(lambda: next(batches)),
        "raylift archive, one after another": rate(
            lambda: load_batch(archive, [entries[next(indices)]], Window(), (0, 1))
        ),
        "gzip HDF5 a volume at 320, zoomed to 128": rate(lambda: read_file(files_url, 320, next(indices))),
        "gzip HDF5 a volume at 128": rate(lambda: read_file(files_url, 128, next(indices))),
    }
    base = rates["gzip HDF5 a volume at 320, zoomed to 128"]
    rows = [[name, f"{value:.1f}", f"{value / base:.1f}"] for name, value in rates.items()]
    table(f"{where}: 128^3 at batch 1, {VOLUMES} phantoms", ["reader", "volumes/s", "against HDF5 with zoom"], rows)


def rate(step: Callable[[], object]) -> float:
    for _ in range(2):
        step()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        step()
        count += 1
    return count / (time.perf_counter() - began)


def write_files(archive: Archive, url: str) -> None:
    """The same volumes as HDF5 files with gzip, at 320 and at 128."""
    folder = Folder(url)
    for number, entry in enumerate(archive.entries()):
        sample = archive.read(entry)
        for size in (128, 320):
            factor = size / 128
            ct = sample.volume if size == 128 else ndimage.zoom(sample.volume, factor, order=1)
            views = [x if size == 128 else ndimage.zoom(x, factor, order=1) for x in sample.radiographs]
            with tempfile.NamedTemporaryFile(suffix=".h5") as temporary:
                with h5py.File(temporary.name, "w") as file:
                    file.create_dataset("ct", data=ct, compression="gzip")
                    for place, view in enumerate(views, 1):
                        file.create_dataset(f"xray{place}", data=view, compression="gzip")
                folder.put(Path(temporary.name), f"{size}/{number}.h5")


def read_file(url: str, size: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Volume and views as network inputs, from the files of that size."""
    with fsspec.open(f"{url}/{size}/{number}.h5", "rb") as raw, h5py.File(raw, "r") as file:
        ct = file["ct"][:].astype(np.float32)
        views = [file[f"xray{view}"][:] for view in (1, 2)]
    if size != GRID.size:
        ct = ndimage.zoom(ct, GRID.size / size, order=1)
        views = [ndimage.zoom(view, GRID.size / size, order=1) for view in views]
    images = np.stack([normalize(view) for view in views])
    return torch.from_numpy(Window().to_unit(ct))[None, None], torch.from_numpy(images)[None]


if __name__ == "__main__":
    main()
