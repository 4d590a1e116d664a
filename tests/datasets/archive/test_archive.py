"""One suite that an archive in a folder and one in a bucket both pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from samples import GEOMETRY, GRID, entry, in_old_format, radiographs, same, sample, seed_of, with_views, write_archive

from raylift.datasets import hashed_json
from raylift.datasets.archive import manifest as module
from raylift.datasets.archive.archive import Archive, digest
from raylift.datasets.archive.index import StoredEntries
from raylift.datasets.archive.manifest import latest_manifest
from raylift.datasets.archive.splits import SplitRule
from raylift.datasets.archive.store import Folder, join, zarr_store
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.errors import ArchiveError, ArchiveNotFoundError, ConfigError
from raylift.datasets.geometry import FRONTAL, Grid
from raylift.datasets.serialization import to_plain


def objects(folder: Folder, under: str = "") -> list[str]:
    """All names below, however deep."""
    return sorted(str(path).removeprefix(folder.key("")) for path in folder.fs.find(folder.key(under).rstrip("/")))


def assert_holds(url: str, seeds: list[int]) -> None:
    """That the archive has exactly the samples of these seeds, bit for bit, each once and in one split a subject."""
    archive = Archive(url)
    entries = archive.entries()
    assert sorted(seed_of(stored) for stored in entries) == sorted(seeds)
    assert len({stored.id for stored in entries}) == len(entries)
    splits: dict[str, str] = {}
    for stored in entries:
        assert same(archive.read(stored), sample(seed_of(stored)))
        assert splits.setdefault(stored.subject, stored.split) == stored.split


def with_entry(manifest: Any, **change: Any) -> Any:
    """The manifest with one field of its first entry changed."""
    archive = manifest["archive"]
    return {**manifest, "archive": {**archive, "entries": [{**archive["entries"][0], **change}]}}


def with_digest(data: Any) -> bytes:
    return hashed_json.encode(data)


# The newest raylift's manifest, and that of older ones, changed.
WRONG_MANIFESTS: list[tuple[bytes | Callable[[Any], Any], str]] = [
    (b"\x00\xff", "is not a raylift manifest"),
    (b"", "is not a raylift manifest"),
    (b"[1, 2]", "is not a raylift manifest"),
    (b'{"format": "other"}', "is not a raylift manifest: KeyError"),
    (lambda m: with_digest({**m, "version": 4}), r"is \('raylift-archive', 4\); this raylift reads .* 1, 2, 3"),
    (lambda m: with_digest({**m, "format": "x"}), r"is \('x', 3\); this raylift reads"),
    (lambda m: with_digest({**m, "archive": 5}), "is not a raylift manifest.*expected keys and values"),
    (lambda m: with_digest({key: value for key, value in m.items() if key != "archive"}), "KeyError"),
    (lambda m: with_digest({**m, "archive": {**m["archive"], "snapshot": "1"}}), "expected int, not '1'"),
    (lambda m: json.dumps({**m, "written_by": "another"}).encode(), "was damaged or edited"),
]
WRONG_OLD_MANIFESTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: {**m, "archive": 5}, "is not a raylift manifest.*expected keys and values"),
    (lambda m: {key: value for key, value in m.items() if key != "archive"}, "KeyError"),
    (lambda m: with_entry(m, index="0"), r"expected int, not '0' @ .*entries\[0\]\.index"),
    (lambda m: with_entry(m, split="exam"), "expected one of train, val, test, not 'exam'"),
    (lambda m: with_entry(m, color=1), r"extra fields found \(color\)"),
]


class ArchiveSuite:
    """`url` is a place that nothing was written to."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    def test_samples_come_back_bit_for_bit(self, url: str) -> None:
        write_archive(url, range(6), samples_per_shard=4)
        assert_holds(url, [0, 1, 2, 3, 4, 5])

    def test_a_pair_is_the_sample_without_its_labels(self, url: str) -> None:
        [stored] = write_archive(url, [3])
        archive = Archive(url)
        pair, whole = archive.read_pair(stored), sample(3)
        assert np.array_equal(pair.volume, whole.volume)
        assert np.array_equal(pair.radiographs, whole.radiographs)
        assert np.array_equal(archive.read_array(stored, "labels"), whole.labels)

    def test_the_manifest_states_of_each_sample_what_was_stated_of_it(self, url: str) -> None:
        given = replace(entry(1), license="CC BY 4.0", record={"size": [1, 2], "note": None})
        with ArchiveWriter(url, GRID, GEOMETRY) as writer:
            writer.add(given, sample(1))
        [stored] = Archive(url).entries()
        assert writer.published == [stored]
        assert stored.sha256 == {name: digest(array) for name, array in sample(1).arrays().items()}
        assert replace(stored, part="", index=-1, sha256={}, split=given.split) == given
        manifest = Archive(url).manifest
        assert (manifest.grid, manifest.geometry) == (GRID, GEOMETRY)

    def test_threads_share_an_archive(self, url: str) -> None:
        write_archive(url, range(5), samples_per_shard=2)
        archive = Archive(url)
        with ThreadPoolExecutor(6) as pool:
            read = list(pool.map(archive.read, archive.entries() * 4))
        assert all(same(one, sample(seed_of(stored))) for one, stored in zip(read, archive.entries() * 4, strict=True))

    def test_another_process_reads_it_and_ends_in_silence(self, url: str) -> None:
        """No session left open, no task never awaited, no thread that keeps the process."""
        write_archive(url, range(3))
        code = (
            "import sys; from raylift.datasets.archive.archive import Archive; from samples import *\n"
            "archive = Archive(sys.argv[1])\n"
            "assert all(same(archive.read(one), sample(seed_of(one))) for one in archive.entries())\n"
            "write_archive(sys.argv[1], [7])\n"
            "print(len(Archive(sys.argv[1]).entries()))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.getcwd()])}
        # Warnings of pydicom's and SimpleITK's own imports aside, which `samples` makes.
        command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code, url]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout, run.stderr) == (0, "4\n", "")

    def test_plain_zarr_shows_what_is_inside(self, url: str) -> None:
        [stored] = write_archive(url, [2])
        group = zarr.open_group(zarr_store(url, read_only=True), mode="r")
        part = group["parts"][stored.part]
        assert set(part.array_keys()) == {"volumes", "radiographs", "labels"}
        np.testing.assert_array_equal(part["volumes"][0], sample(2).volume)

    def test_a_part_is_one_shard_per_array(self, url: str) -> None:
        entries = write_archive(url, range(6), samples_per_shard=3)
        parts = {stored.part for stored in entries}
        assert len(parts) == 2
        assert [stored.index for stored in entries] == [0, 1, 2, 0, 1, 2]
        for part in parts:
            for name in ("volumes", "radiographs", "labels"):
                assert len([o for o in objects(Folder(url), f"parts/{part}/{name}") if "/c/" in o]) == 1

    def test_each_full_part_is_published_at_once_and_the_rest_at_the_end(self, url: str) -> None:
        with ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=2) as writer:
            for seed, published in ((0, 0), (1, 2), (2, 2)):
                writer.add(entry(seed), sample(seed))
                assert len(writer.published) == published
                if published:
                    assert_holds(url, [0, 1])
        assert_holds(url, [0, 1, 2])

    def test_an_error_drops_what_is_not_published_and_nothing_else(self, url: str) -> None:
        def fail() -> None:
            with ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=2) as writer:
                for seed in range(3):
                    writer.add(entry(seed), sample(seed))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert_holds(url, [0, 1])

    def test_where_nothing_was_published_there_is_no_archive(self, url: str) -> None:
        with ArchiveWriter(url, GRID, GEOMETRY):
            pass
        with pytest.raises(ArchiveNotFoundError, match=f"{url} holds no raylift archive: make one with raylift ingest"):
            Archive(url)

    def test_later_runs_add_and_skip_what_is_there(self, url: str) -> None:
        write_archive(url, [0, 1])
        with ArchiveWriter(url, GRID, GEOMETRY) as writer:
            assert [writer.contains(entry(seed).source_sha256) for seed in (0, 1, 2)] == [True, True, False]
        write_archive(url, [2])
        assert_holds(url, [0, 1, 2])

    def test_a_source_given_twice_is_kept_once_and_counted(self, url: str) -> None:
        write_archive(url, [0])
        with ArchiveWriter(url, GRID, GEOMETRY) as writer:
            for seed in (0, 1, 1):
                writer.add(entry(seed), sample(seed))
        assert (len(writer.published), writer.superseded) == (1, 2)
        assert_holds(url, [0, 1])

    def test_scans_of_one_subject_have_ids_of_their_own_and_one_split(self, url: str) -> None:
        write_archive(url, range(3), subjects=["anna"] * 3)
        write_archive(url, range(3, 5), subjects=["anna", "anna-2"])
        entries = Archive(url).entries()
        assert [stored.id for stored in entries] == ["anna", "anna-2", "anna-2-2", "anna-3", "anna-4"]
        assert len({stored.split for stored in entries if stored.subject == "anna"}) == 1

    def test_entries_of_a_split_come_in_order_of_their_ids(self, url: str) -> None:
        rule = SplitRule((0.4, 0.3, 0.3))
        with ArchiveWriter(url, GRID, GEOMETRY, split_rule=rule, samples_per_shard=3) as writer:
            for seed in (5, 3, 9, 1, 7):
                writer.add(entry(seed), sample(seed))
        archive = Archive(url)
        assert [seed_of(stored) for stored in archive.entries()] == [1, 3, 5, 7, 9]
        for split in ("train", "val", "test"):
            wanted = [seed for seed in (1, 3, 5, 7, 9) if rule.split(f"subject-{seed}") == split]
            assert [seed_of(stored) for stored in archive.entries(split)] == wanted

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"grid": Grid(16, 19.0)}, "holds Grid.*20.0.*requested were Grid.*19.0.*use the archive's own"),
            ({"geometry": with_views(GEOMETRY, FRONTAL)}, "use the archive's own, or another URL"),
            ({"split_rule": SplitRule(salt=9)}, "was split by .*cannot change later"),
        ],
    )
    def test_an_archive_keeps_to_one_grid_one_geometry_and_one_split(
        self, url: str, change: dict[str, Any], message: str
    ) -> None:
        write_archive(url, [0])
        with pytest.raises(ConfigError, match=message):
            ArchiveWriter(**{"url": url, "grid": GRID, "geometry": GEOMETRY, **change})

    def test_of_two_writers_at_once_both_are_kept(self, url: str) -> None:
        first = ArchiveWriter(url, GRID, GEOMETRY)
        second = ArchiveWriter(url, GRID, GEOMETRY)
        # One subject comes to both, and one source too.
        for writer, seeds in ((first, (0, 1, 2)), (second, (2, 3, 4))):
            for seed in seeds:
                writer.add(entry(seed, "shared" if seed in (1, 3) else ""), sample(seed))
        first.publish()
        second.publish()
        assert_holds(url, [0, 1, 2, 3, 4])
        assert (len(first.published), len(second.published), second.superseded) == (3, 2, 1)
        assert {stored.id for stored in second.published} == {"shared-2", "subject-4"}
        assert second.published == [one for one in Archive(url).manifest.entries if seed_of(one) in (3, 4)]

    def test_of_two_that_make_an_archive_at_once_the_first_ones_split_rule_holds_for_all(self, url: str) -> None:
        one, other = SplitRule((1, 0, 0)), SplitRule((0, 0, 1))
        first = ArchiveWriter(url, GRID, GEOMETRY, split_rule=one)
        second = ArchiveWriter(url, GRID, GEOMETRY, split_rule=other)
        first.add(entry(0, "anna"), sample(0))
        second.add(entry(1, "anna"), sample(1))
        first.publish()
        second.publish()
        assert Archive(url).manifest.split_rule == one
        assert_holds(url, [0, 1])
        assert not Archive(url).entries("test")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"grid": Grid(16, 19.0)}, "use the archive's own, or another URL"),
            ({"split_rule": SplitRule(assigned={"subject-1": "test"})}, "other subjects assigned to splits by hand"),
        ],
    )
    def test_of_two_that_make_different_archives_at_once_the_second_is_refused(
        self, url: str, options: dict[str, Any], message: str
    ) -> None:
        first = ArchiveWriter(url, GRID, GEOMETRY, split_rule=SplitRule())
        second = ArchiveWriter(**{"url": url, "grid": GRID, "geometry": GEOMETRY, **options})
        for writer, seed in ((first, 0), (second, 1)):
            writer.add(entry(seed), sample(seed))
        first.publish()
        with pytest.raises(ConfigError, match=message):
            second.publish()
        assert_holds(url, [0])

    def test_few_manifests_are_kept_and_an_open_archive_goes_on(self, url: str) -> None:
        write_archive(url, [0])
        old = Archive(url)
        write_archive(url, range(1, 7), samples_per_shard=1)
        names = Folder(url).names("manifests")
        assert names == [f"{n:06d}.json" for n in range(3, 8)]
        assert same(old.read(old.entries()[0]), sample(0))
        assert_holds(url, list(range(7)))

    def test_an_archive_that_is_opened_while_others_publish_is_always_whole(self, url: str) -> None:
        write_archive(url, [0])
        done = threading.Event()

        def watch() -> list[int]:
            sizes = []
            while not done.is_set():
                archive = Archive(url)
                sizes.append(len(archive.entries()))
                newest = max(archive.manifest.entries, key=seed_of)
                assert same(archive.read(newest), sample(seed_of(newest)))
            return sizes

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                write_archive(url, range(1, 8), samples_per_shard=1)
            finally:
                done.set()
            sizes = watching.result()
        assert sizes == sorted(sizes)

    def test_reading_writes_nothing(self, url: str) -> None:
        write_archive(url, [0, 1])
        before = objects(Folder(url))
        archive = Archive(url)
        for stored in archive.entries():
            archive.read(stored)
        assert objects(Folder(url)) == before

    def test_a_manifest_that_is_none_or_anothers_is_refused_by_its_place(self, url: str) -> None:
        write_archive(url, [0])
        folder = Folder(url)
        sound = json.loads(folder.read("manifests/000001.json"))
        del sound[hashed_json.KEY]
        for change, message in WRONG_MANIFESTS:
            folder.write("manifests/000002.json", change if isinstance(change, bytes) else change(sound))
            with pytest.raises(ArchiveError, match=message) as caught:
                Archive(url)
            assert join(url, "manifests", "000002.json") in str(caught.value)
        with pytest.raises(ArchiveError):
            ArchiveWriter(url, GRID, GEOMETRY)
        folder.remove("manifests/000002.json")
        in_old_format(url)
        sound = json.loads(folder.read("manifests/000001.json"))
        for edit, message in WRONG_OLD_MANIFESTS:
            folder.write("manifests/000001.json", json.dumps(edit(sound)).encode())
            with pytest.raises(ArchiveError, match=message) as caught:
                Archive(url)
            assert join(url, "manifests", "000001.json") in str(caught.value)

    def test_an_archive_of_radiographs_states_what_it_holds_and_has_no_ct(self, url: str) -> None:
        with ArchiveWriter(url, GRID, GEOMETRY, contents="radiographs", samples_per_shard=2) as writer:
            for seed in range(3):
                writer.add(entry(seed), radiographs(seed))
        archive = Archive(url)
        assert archive.manifest.contents == "radiographs"
        for stored in archive.entries():
            assert list(stored.sha256) == ["radiographs"]
            made = radiographs(seed_of(stored)).radiographs
            np.testing.assert_array_equal(archive.read_array(stored, "radiographs"), made)
        for read in (archive.read, archive.read_pair, lambda one: archive.read_array(one, "labels")):
            with pytest.raises(ConfigError, match=f"{url} holds radiographs without CT, and .* needs CT: give"):
                read(archive.entries()[0])
        assert not [name for name in objects(Folder(url)) if "volumes" in name or "labels" in name]

    @pytest.mark.parametrize("there", ["volumes", "radiographs"])
    def test_an_archive_keeps_to_one_kind_of_sample(self, url: str, there: Any) -> None:
        other: Any = {"volumes": "radiographs", "radiographs": "volumes"}[there]
        samples: dict[str, Any] = {"volumes": sample, "radiographs": radiographs}
        racing = ArchiveWriter(url, GRID, GEOMETRY, contents=other)
        racing.add(entry(5), samples[other](5))
        with ArchiveWriter(url, GRID, GEOMETRY, contents=there) as writer:
            with pytest.raises(ConfigError, match=f"holds {there}, and subject-1 is another kind of sample"):
                writer.add(entry(1), samples[other](1))
            writer.add(entry(0), samples[there](0))
        with pytest.raises(ConfigError, match=f"{url} holds {there}, not {other}: use another URL"):
            ArchiveWriter(url, GRID, GEOMETRY, contents=other)
        with pytest.raises(ConfigError, match=f"{url} holds {there}, not {other}"):
            racing.publish()
        assert len(Archive(url).entries()) == 1

    processes, publications = 3, 6

    def test_processes_that_write_at_once_all_get_their_samples_in(self, url: str) -> None:
        each, total = self.publications, self.processes * self.publications
        code = (
            "import sys; from samples import *; first, count = map(int, sys.argv[2:]); sys.stdin.readline()\n"
            "write_archive(sys.argv[1], range(first, first + count), samples_per_shard=1, subjects='abcdefgh'[:count])"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.getcwd()])}
        arguments = [[sys.executable, "-c", code, url, str(each * k), str(each)] for k in range(self.processes)]
        writers = [subprocess.Popen(words, env=environment, stdin=subprocess.PIPE) for words in arguments]
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(b"go\n")
            writer.stdin.close()
        assert [writer.wait(timeout=120) for writer in writers] == [0] * self.processes
        assert_holds(url, list(range(total)))
        manifest = latest_manifest(Folder(url))
        assert manifest.snapshot == total
        assert isinstance(manifest.entries, StoredEntries)
        assert len(manifest.entries.segments) < total, "segments were merged meanwhile"
        assert not manifest.index_damage()

    def test_a_part_holds_one_sample_or_more(self, url: str) -> None:
        with pytest.raises(ConfigError, match="0 samples per shard"):
            ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=0)


class TestFolder(ArchiveSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "archive")

    def test_pruning_leaves_what_another_writer_is_about_to_publish(self, url: str) -> None:
        write_archive(url, range(6), samples_per_shard=1)
        aside = Path(url) / "manifests" / ".000008.json.0123"
        aside.write_bytes(b"half of it")
        write_archive(url, [6])
        assert aside.exists()
        assert_holds(url, list(range(7)))

    def test_a_manifest_that_is_listed_but_cannot_be_read_is_an_error_and_no_endless_search(self, url: str) -> None:
        write_archive(url, [0])
        (Path(url) / "manifests" / "000002.json").symlink_to("nowhere")
        with pytest.raises(ArchiveError, match=r"000002\.json is listed but cannot be read"):
            Archive(url)


class TestBucket(ArchiveSuite):
    processes, publications = 2, 4

    @pytest.fixture
    def url(self, s3_bucket_url: str) -> str:
        return f"{s3_bucket_url}/{uuid.uuid4().hex}"


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((2, 3), np.int16),
        np.arange(6, dtype=np.int16).reshape(3, 2),
        np.arange(6, dtype=np.uint16).reshape(2, 3),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.arange(6, dtype=np.int16),
    ],
    ids=["values", "shape", "type", "byte order", "dimensions"],
)
def test_arrays_that_differ_in_anything_have_different_digests(other: np.ndarray) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert digest(array) == digest(np.asfortranarray(array)) == digest(array.copy())
    assert digest(other) != digest(array)


def test_digests_are_kept_across_versions() -> None:
    """Changing them makes every published archive unreadable."""
    assert (
        digest(np.arange(6, dtype=np.int16).reshape(2, 3))
        == "c6440f77bbd3715f782313f0b6933b4cbee6f2726bbfa6f692df6a774454d18d"
    )
    assert (module.FORMAT, module.FORMAT_VERSION, module.OLD_FORMAT_VERSIONS) == ("raylift-archive", 3, (1, 2))


def test_a_manifest_of_the_first_format_version_stays_readable(tmp_path: Path) -> None:
    raw = (Path(__file__).parent / "manifest-1.json").read_bytes()
    Folder(tmp_path).write("manifests/000003.json", raw)
    manifest = latest_manifest(Folder(tmp_path))
    assert manifest.grid == Grid(128, 2.5)
    assert [stored.split for stored in manifest.entries] == ["train", "test"]
    assert manifest.split_rule.assigned == {"anna": "test"}
    expected = json.loads(raw)["archive"]
    # Written before archives named the attenuation of their DRRs: it was linear.
    expected["geometry"]["attenuation"] = "linear"
    for name, value in expected.items():
        assert json.loads(json.dumps(to_plain(getattr(manifest, name)))) == value
    # Runs have this digest.
    assert manifest.sha256() == "17a5984b3d55856bc912edab4ad143a2e6e2c58905f09d78e1c8fd621f902850"


def test_the_newest_manifest_is_the_archive(tmp_path: Path) -> None:
    write_archive(str(tmp_path), [0])
    write_archive(str(tmp_path), [1])
    assert latest_manifest(Folder(str(tmp_path))).snapshot == 2
