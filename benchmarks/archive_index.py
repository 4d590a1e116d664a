"""Cost of an archive's index by the number of samples: of a publication of eight, and of opening it.

    python benchmarks/archive_index.py

Entries are simulated, with a record as `raylift ingest` writes it and without arrays. Publications are a whole cycle of
merges, in which the last segment fills once; bytes are those of all files that they write, and a publication's time has
its lookups and its pruning. "whole manifest" is what format versions 1 and 2 wrote at each publication: a JSON file of
all entries. Memory is the peak of a new process, without and with its imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.index import FULL, KnownKeys
from raylift.datasets.archive.manifest import Manifest, new_entries, prune, publish
from raylift.datasets.archive.store import Folder
from raylift.datasets.archive.writer import MANIFESTS_KEPT, ArchiveWriter
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.serialization import to_plain

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

GRID = Grid(64, 5.0)
SAMPLES = 8


class CountedFolder(Folder):
    """A folder that counts the bytes which are written to it."""

    written = 0

    def write(self, name: str, data: bytes) -> None:
        """Count and write."""
        self.written += len(data)
        super().write(name, data)

    def create(self, name: str, data: bytes) -> None:
        """Count and create."""
        self.written += len(data)
        super().create(name, data)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def entry(number: int) -> Entry:
    record = {
        "source_size": [512, 512, 200 + number % 300],
        "source_spacing_mm": [0.703125, 0.703125, 1.25],
        "source_orientation": "LPS",
        "source_rescale": [1.0, -1024.0],
        "changes": [],
        "center_lps_mm": [number % 97 / 7, number % 89 / 7, -number % 83 / 7],
        "centered_on": "lungs",
        "table_removed": True,
        "field_of_view_truncation": {"left": 0.0, "right": 0.0, "anterior": 0.0, "posterior": number % 7 / 8},
        "beyond_field_of_view": "keep",
    }
    return Entry(
        id=sha256(f"patient {number // 2}")[:16],
        subject=sha256(f"patient {number // 2}")[:16],
        source=f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{number}",
        source_sha256=sha256(f"source {number}"),
        license="CC BY 4.0",
        label_method="threshold",
        record=record,
        part=sha256(f"part {number // SAMPLES}")[:12],
        index=number % SAMPLES,
        sha256={name: sha256(f"{name} {number}") for name in ("volumes", "radiographs", "labels")},
    )


def add(folder: Folder, manifest: Manifest, known: KnownKeys, first: int, count: int) -> Manifest:
    """What a writer does with new entries after their arrays are written."""
    new = new_entries(manifest.split_rule, known, [entry(number) for number in range(first, first + count)])
    assert len(new) == count
    manifest = publish(folder, manifest, new)
    known.add(new)
    prune(folder, MANIFESTS_KEPT)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--whole-manifest-up-to", type=int, default=100_000)
    parser.add_argument("--open", choices=["reader", "writer"])
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.open:
        measure_opening(options.open, options.url)
        return
    header("archive_index")
    publications, openings = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = CountedFolder(place)
        manifest, known, total = Manifest(GRID, chest(GRID)), KnownKeys(()), 0
        for size in options.sizes:
            while total < size:
                # Whole segments, then the rest as an ingest does.
                count = FULL if size - total >= FULL else SAMPLES
                manifest, total = add(folder, manifest, known, total, count), total + count
            whole = whole_manifest(place, manifest) if size <= options.whole_manifest_up_to else ("", "")
            folder.written, seconds, used = 0, [], time.process_time()
            for _ in range(FULL // SAMPLES):
                begun = time.perf_counter()
                manifest, total = add(folder, manifest, known, total, SAMPLES), total + SAMPLES
                seconds.append(time.perf_counter() - begun)
            stored, used = folder.written / len(seconds), (time.process_time() - used) / len(seconds)
            publications.append(
                [f"{size:,}", f"{stored / 1e3:.1f}", f"{1e3 * used:.1f}", f"{1e3 * statistics.median(seconds):.1f}",
                 f"{1e3 * statistics.mean(seconds):.1f}",
                 f"{1e3 * max(seconds):.0f}", f"{Folder(f'{place}/index').size() / total:.0f}", *whole]
            )  # fmt: skip
            openings.append([f"{size:,}", *opened("reader", place), *opened("writer", place)])
    table(
        f"{len(seconds)} publications of {SAMPLES}",
        [
            "entries",
            "kB written, mean",
            "ms of CPU, mean",
            "ms, median",
            "mean",
            "most",
            "bytes stored per entry",
            "whole manifest, kB",
            "ms",
        ],
        publications,
    )
    table(
        "Opening",
        ["entries", "reader, s", "MB", "with imports", "writer, s", "MB", "with imports", "lookup, us"],
        openings,
    )


def whole_manifest(place: str, manifest: Manifest) -> tuple[str, str]:
    """Kilobytes and milliseconds of a publication in format version 1."""
    plain = {name: to_plain(getattr(manifest, name)) for name in ("grid", "geometry", "split_rule", "snapshot")}
    entries = list(manifest.entries)
    begun = time.perf_counter()
    data = json.dumps({"archive": {**plain, "entries": [to_plain(one) for one in entries]}}, indent=1).encode()
    Folder(f"{place}/whole").write("manifest.json", data)
    return f"{len(data) / 1e3:,.0f}", f"{1e3 * (time.perf_counter() - begun):,.0f}"


def opened(kind: str, place: str) -> list[str]:
    """Seconds, megabytes and, of a writer, the microseconds of a lookup, measured by a new process."""
    command = [sys.executable, __file__, "--open", kind, "--url", place]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def measure_opening(kind: str, url: str) -> None:
    """Print what `opened` returns."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what there is now
    before = peak_mb()
    begun = time.perf_counter()
    figures = []
    if kind == "reader":
        count = len(Archive(url).manifest.entries)
    else:
        writer = ArchiveWriter(url, GRID, chest(GRID))
        count = len(writer.manifest.entries)
        assert writer.contains(sha256(f"source {count - 1}"))
    seconds, peak = time.perf_counter() - begun, peak_mb()
    if kind == "writer":
        begun = time.perf_counter()
        numbers = range(0, 2 * count, 2 * count // 1_000)
        there = sum(writer.contains(sha256(f"source {number}")) for number in numbers)
        figures = [f"{1e6 * (time.perf_counter() - begun) / len(numbers):.1f}"]
        assert there == sum(number < count for number in numbers)
    print(f"{seconds:.3f}", f"{peak - before:.0f}", f"{peak:.0f}", *figures)


def peak_mb() -> float:
    """The highest resident memory since it was last reset."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
