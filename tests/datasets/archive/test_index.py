"""The index of an archive: segments, their merging, old archives, damage."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import GEOMETRY, GRID, entry, in_old_format, same, sample, seed_of, write_archive

from raylift.datasets.archive import index, manifest
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.index import KnownKeys, StoredEntries, merge_count
from raylift.datasets.archive.manifest import Manifest, latest_manifest, manifest_at, prune, publish
from raylift.datasets.archive.store import Folder
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import ArchiveError, ArchiveNotFoundError
from raylift.platform import cli


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that are merged by two and change no more from eight samples on."""
    monkeypatch.setattr(index, "FAN_IN", 2)
    monkeypatch.setattr(index, "TIERS", 3)
    monkeypatch.setattr(index, "FULL", 8)
    monkeypatch.setattr(manifest, "FULL", 8)


def published(folder: Folder, sizes: list[int], kept: int = 5) -> tuple[Manifest, list[list[Entry]]]:
    """The manifest after publications of so many entries, and the entries of each."""
    current, entries = Manifest(GRID, GEOMETRY), []
    for size in sizes:
        first = sum(map(len, entries))
        entries.append([entry(seed) for seed in range(first, first + size)])
        current = publish(folder, current, entries[-1])
        prune(folder, kept)
    return current, entries


@pytest.mark.parametrize(
    ("samples", "count"),
    [
        ([8], 1),
        ([8] * 7, 1),
        ([8] * 8, 8),
        ([64, *[8] * 7], 1),
        ([64, *[8] * 8], 8),
        ([*[64] * 7, *[8] * 8], 15),
        ([*[512] * 7, *[64] * 7, *[8] * 8], 22),
        ([*[1] * 7, 8], 1),
        ([*[8] * 7, 1, 8], 9),
        ([4096], 1),
        ([8, 64, 4096], 3),
        ([1] * 8, 8),
    ],
)
def test_eight_segments_of_a_size_become_one_and_a_full_one_has_none_before_it(samples: list[int], count: int) -> None:
    assert merge_count(samples) == count


@pytest.mark.parametrize("sizes", [[8], [1], [64], [8, 1], [1, 64], [3, 8, 70]])
def test_an_entry_is_written_few_times_and_segments_are_few_for_any_sizes_of_publications(sizes: list[int]) -> None:
    generator, written, segments, total, full = random.Random(0), 0, [], 0, 0
    for _ in range(6000):
        size = generator.choice(sizes)
        segments.append(size)
        count = merge_count(segments)
        segments[-count:] = [sum(segments[-count:])]
        written += segments[-1]
        total += size
        if segments[-1] >= index.FULL:
            assert len(segments) == 1, "segments that change no more are in their order"
            segments, full = [], full + 1
        assert len(segments) <= 8 * 8
    assert full == total // index.FULL or full > total / index.FULL / 2
    assert written <= 6 * total


@pytest.mark.usefixtures("small_segments")
def test_every_snapshot_has_its_entries_in_their_order_after_any_merges(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    sizes = random.Random(1).choices([1, 2, 3, 9], k=40)
    current, entries = published(folder, sizes)
    assert current.stored is not None
    assert len(current.stored[1].segments) > 4
    for snapshot in range(1, 41):
        expected = tuple(one for part in entries[:snapshot] for one in part)
        opened = manifest_at(folder, snapshot)
        assert len(opened.entries) == len(expected)
        assert tuple(opened.entries) == expected
        assert opened.sha256() == Manifest(GRID, GEOMETRY, entries=expected).sha256()
    for number in (-1, 0, 41):
        with pytest.raises(ArchiveError, match=f"has no snapshot {number}, its newest is 40"):
            manifest_at(folder, number)
    assert not latest_manifest(folder).index_damage()


@pytest.mark.usefixtures("small_segments")
def test_objects_that_no_kept_manifest_has_are_removed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    current, _ = published(folder, [1] * 40)
    named = set()
    for name in folder.names("manifests"):
        head, base = manifest.read_manifest(folder, name).stored or pytest.fail("an old format")
        named |= {head.base, *(key for one in (*head.segments, *base.segments) for key in (one.entries, one.keys))}
    assert set(folder.names("index")) == named
    assert len(folder.names("manifests")) == 5
    assert len(current.entries) == 40


@pytest.mark.usefixtures("small_segments")
def test_a_reader_continues_after_a_writer_has_merged_and_removed_its_segments(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    early, entries = published(folder, [1, 2, 1])
    assert isinstance(early.entries, StoredEntries)
    opened, keys = latest_manifest(folder), latest_manifest(folder)
    current = early
    for seed in range(4, 30):
        current = publish(folder, current, [entry(seed)])
        prune(folder, 1)
    there = set(folder.names("index"))
    assert not {name for segment in early.entries.segments for name in (segment.entries, segment.keys)} & there
    assert tuple(opened.entries) == tuple(one for part in entries for one in part)
    assert [one.id for one in keys.matching("source_sha256", {f"{2:064x}", f"{20:064x}"})] == ["subject-2"]
    assert KnownKeys(keys.entries).has_id("subject-1")
    assert not early.index_damage()


@pytest.mark.usefixtures("small_segments")
def test_a_writer_whose_segments_another_one_has_merged_publishes_after_it(tmp_path: Path) -> None:
    url = str(tmp_path)
    with ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=1) as late:
        late.add(entry(0), sample(0))
        write_archive(url, range(10, 30), samples_per_shard=1)
        late.add(entry(10), sample(10))
        late.add(entry(1), sample(1))
        late.add(entry(11), sample(11))
    assert (len(late.published), late.superseded) == (2, 2)
    assert sorted(seed_of(stored) for stored in Archive(url).entries()) == [0, 1, *range(10, 30)]


@pytest.mark.parametrize("paused", [False, True])
def test_a_writer_that_others_have_overtaken_by_more_snapshots_than_are_kept_loses_nothing(
    tmp_path: Path, paused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "archive")
    with ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=1) as fast:
        fast.add(entry(0), sample(0))
        slow = ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=1)

        def overtake() -> None:
            for seed in range(1, 8):
                fast.add(entry(seed), sample(seed))

        if paused:
            # The others publish after the first check of the newest manifest.
            append = manifest.append

            def appended(*arguments: Any) -> Any:
                monkeypatch.setattr(manifest, "append", append)
                overtake()
                return append(*arguments)

            monkeypatch.setattr(manifest, "append", appended)
        else:
            overtake()
        slow.add(entry(100), sample(100))
    archive = Archive(url)
    assert sorted(seed_of(stored) for stored in archive.entries()) == [*range(8), 100]
    assert [seed_of(stored) for stored in slow.published] == [100]
    [own] = slow.published
    assert same(archive.read(own), sample(100))
    assert not archive.manifest.index_damage()


def test_sources_and_ids_of_stored_and_of_added_entries_are_known(tmp_path: Path) -> None:
    current, _ = published(Folder(tmp_path), [8] * 10)
    known = KnownKeys(current.entries)
    known.add([entry(100)])
    for seed in range(120):
        there = seed < 80 or seed == 100
        assert (known.has_source(f"{seed:064x}"), known.has_id(f"subject-{seed}")) == (there, there)
    empty = KnownKeys(())
    assert not empty.has_source("a")
    assert not empty.has_id("a")


def test_entries_are_found_by_source_and_subject_and_only_their_segments_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    _, entries = published(folder, [8] * 11)
    read, real = [], index.read_object
    monkeypatch.setattr(index, "read_object", lambda folder, name: read.append(name) or real(folder, name))
    opened = latest_manifest(folder)
    assert opened.matching("subject", {"subject-70", "another"}) == [entries[8][6]]
    assert len([name for name in read if name.endswith(".keys")]) == 4
    assert len([name for name in read if name.endswith(".gz")]) == 1
    assert opened.matching("source_sha256", {f"{seed:064x}" for seed in (3, 87, 88)}) == [entries[0][3], entries[10][7]]
    read.clear()
    assert opened.matching("source_sha256", set()) == []
    assert len(opened.entries) == 88
    assert read == [], "the number of entries is in the manifest"


@pytest.mark.parametrize("version", [1, 2])
def test_an_archive_of_an_old_format_is_read_and_added_to_and_keeps_its_snapshots(tmp_path: Path, version: int) -> None:
    url = str(tmp_path)
    write_archive(url, range(5), samples_per_shard=2)
    digests = {number: Archive(url, number).manifest.sha256() for number in (1, 2, 3)}
    in_old_format(url, version, recorded_from=2)
    assert json.loads((tmp_path / "manifests/000003.json").read_bytes())["version"] == version
    for added in (False, True):
        if added:
            assert [seed_of(stored) for stored in write_archive(url, range(3, 8), samples_per_shard=2)] == [5, 6, 7]
            assert latest_manifest(Folder(url)).snapshot == 5
        for number in (2, 3):
            archive = Archive(url, number)
            assert archive.manifest.sha256() == digests[number]
            assert [seed_of(stored) for stored in archive.manifest.entries] == list(range(4 if number == 2 else 5))
        with pytest.raises(ArchiveError, match="has no snapshot 1,"):
            Archive(url, 1)
    archive = Archive(url)
    assert all(same(archive.read(stored), sample(seed_of(stored))) for stored in archive.entries())
    assert [seed_of(stored) for stored in archive.manifest.entries] == list(range(8))
    assert not archive.manifest.index_damage()


def test_an_old_archive_without_records_of_its_snapshots_keeps_the_newest(tmp_path: Path) -> None:
    url = str(tmp_path)
    write_archive(url, range(4), samples_per_shard=2)
    in_old_format(url, recorded_from=0)
    digest = Archive(url).manifest.sha256()
    write_archive(url, [4])
    assert Archive(url, 2).manifest.sha256() == digest
    assert [seed_of(stored) for stored in Archive(url, 3).manifest.entries] == [0, 1, 2, 3, 4]
    (tmp_path / "manifests/000002.json").unlink()
    assert Archive(url, 2).manifest.sha256() == digest
    with pytest.raises(ArchiveError, match="has no snapshot 1,"):
        Archive(url, 1)


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("change", ["changed", "missing", "cut"])
@pytest.mark.parametrize("kind", [".jsonl.gz", ".keys"])
def test_a_damaged_segment_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, change: str) -> None:
    url = str(tmp_path / "archive")
    write_archive(url, range(6), samples_per_shard=2)
    assert cli.main(["archive", "verify", url]) == 0
    stored = latest_manifest(Folder(url)).stored
    assert stored is not None
    name = getattr(stored[0].segments[1], "entries" if kind == ".jsonl.gz" else "keys")
    path = tmp_path / "archive/index" / name
    whole = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged(whole) if change == "changed" else whole[:-1])
    capsys.readouterr()
    assert cli.main(["archive", "verify", url]) == 1
    output = capsys.readouterr().out
    defect = "is missing: restore it" if change == "missing" else "is not what was written, its name is its SHA-256"
    assert f"damaged: {path} {defect}" in output
    assert "restore its index, which lists the samples, first" in output
    with pytest.raises(ArchiveError, match=name):
        Archive(url).entries() if kind == ".jsonl.gz" else ArchiveWriter(url, GRID, GEOMETRY)
    with pytest.raises(ArchiveError) as caught:
        write_archive(url, range(10, 16), samples_per_shard=1)
    assert not isinstance(caught.value, ArchiveNotFoundError)
    path.write_bytes(whole)
    write_archive(url, range(10, 16), samples_per_shard=1)
    assert cli.main(["archive", "verify", url]) == 0


def test_keys_of_other_entries_are_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    current, _ = published(folder, [2])
    assert current.stored is not None
    head, base = current.stored
    name = index.write_object(folder, index.keys_of([entry(7), entry(8)]).tobytes(), ".keys")
    wrong = replace(head, segments=(replace(head.segments[0], keys=name),))
    entries = manifest._manifest(folder, wrong, base).entries
    assert isinstance(entries, StoredEntries)
    [error] = entries.damage()
    assert f"{name} has not the keys of {head.segments[0].entries}" in str(error)


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "archive")
    write_archive(url, [0])
    [path] = (tmp_path / "archive/index").glob("*.json")
    whole = path.read_bytes()
    path.write_bytes(damaged(whole))
    with pytest.raises(ArchiveError, match=f"{path.name} is not what was written"):
        Archive(url)
    path.unlink()
    with pytest.raises(ArchiveError, match=f"000001.json is listed but cannot be read: .*{path.name} is missing"):
        Archive(url)
    with pytest.raises(ArchiveError, match=path.name):
        ArchiveWriter(url, GRID, GEOMETRY)


def test_a_copy_has_the_same_digest_and_a_publication_adds_three_small_files(tmp_path: Path) -> None:
    url = str(tmp_path / "archive")
    write_archive(url, range(16), samples_per_shard=8)
    shutil.copytree(url, tmp_path / "copy")
    assert Archive(str(tmp_path / "copy")).manifest.sha256() == Archive(url).manifest.sha256()
    before = {path: path.stat().st_size for path in Path(url).rglob("*") if path.is_file()}
    write_archive(url, range(16, 24), samples_per_shard=8)
    new = [path for path in Path(url).rglob("*") if path.is_file() and path not in before and "parts" not in str(path)]
    assert sorted(path.suffix for path in new) == [".gz", ".json", ".keys"]
    assert sum(path.stat().st_size for path in new) < 6000
