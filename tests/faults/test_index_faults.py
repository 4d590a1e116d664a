"""Writers killed while they publish, merge segments and prune: the index has whole publications, and goes on."""

from __future__ import annotations

import os
from pathlib import Path

from killed_writers import Operations, kill_at_each_operation
from samples import GEOMETRY, GRID, entry

from raylift.datasets.archive import index, manifest
from raylift.datasets.archive.manifest import Manifest, latest_manifest, prune, publish
from raylift.datasets.archive.store import Folder

OPERATIONS: Operations = [(os, name) for name in ("mkdir", "open", "fsync", "link", "rename", "replace", "unlink")]
KEPT = 2


def write(url: str) -> None:
    """Seven publications of one entry, of which two or three are merged at a time, and a segment is full."""
    index.FAN_IN, index.TIERS, index.FULL, manifest.FULL = 2, 2, 4, 4
    folder = Folder(url)
    current = latest_manifest(folder)
    for seed in range(len(current.entries), 9):
        current = publish(folder, current, [entry(seed)])
        prune(folder, KEPT)


def test_a_writer_killed_at_any_point_of_a_merge_leaves_whole_publications(tmp_path: Path) -> None:
    base = Folder(tmp_path / "base")
    current = Manifest(GRID, GEOMETRY)
    for seed in range(2):
        current = publish(base, current, [entry(seed)])
    numbers = kill_at_each_operation("test_index_faults", tmp_path)
    assert len(numbers) > 60
    seen = []
    for number in numbers:
        folder = Folder(tmp_path / str(number))
        found = latest_manifest(folder)
        assert not found.index_damage()
        assert list(found.entries) == [entry(seed) for seed in range(len(found.entries))]
        seen.append(len(found.entries))
        # The next writer, which merges by other sizes, adds what is missing.
        for seed in range(len(found.entries), 10):
            found = publish(folder, found, [entry(seed)])
            prune(folder, KEPT)
        again = latest_manifest(folder)
        assert list(again.entries) == [entry(seed) for seed in range(10)]
        assert not again.index_damage()
    assert seen == sorted(seen)
    assert set(seen) == set(range(2, 10))
