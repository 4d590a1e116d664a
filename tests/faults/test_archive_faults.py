"""Processes killed, objects damaged, servers gone: an archive is the old one or the new one, and never made up."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr.storage._local
from killed_writers import ENVIRONMENT, Operations, kill_at_each_operation
from s3_server import S3Server
from samples import same, sample, seed_of, thorax_image, write_archive, write_image

from raylift.datasets.archive import store
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ArchiveError, CorruptSampleError, StoreError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.ct import ingest_ct
from raylift.datasets.scans.header_checks import ScanLimits


def seeds_in(url: str) -> list[int]:
    """The seeds of the samples of an archive, after each was read and found to be what was written."""
    archive = Archive(url)
    for entry in archive.entries():
        assert same(archive.read(entry), sample(seed_of(entry)))
    return sorted(seed_of(entry) for entry in archive.entries())


# --- a writer is killed ---

# Every way in which names and bytes reach the disk, through pathlib and zarr too.
OPERATIONS: Operations = [
    *((os, name) for name in ("mkdir", "open", "fsync", "link", "rename", "replace", "unlink")),
    (zarr.storage._local, "_put"),
]


def write(url: str) -> None:
    """Two publications of two samples each."""
    write_archive(url, range(3, 7), samples_per_shard=2)


def test_a_writer_killed_at_any_point_leaves_an_archive_and_the_next_run_writes_what_is_missing(tmp_path: Path) -> None:
    write_archive(str(tmp_path / "base"), range(3))
    numbers = kill_at_each_operation("test_archive_faults", tmp_path)
    assert len(numbers) > 40

    seen = []
    for number in numbers:
        url = str(tmp_path / str(number))
        there = seeds_in(url)
        assert there in ([0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6])
        seen.append(len(there))
        parts = set(Folder(url).names("parts"))
        published = write_archive_of_missing(url, range(3, 7))
        assert sorted(published) == [seed for seed in range(3, 7) if seed not in there]
        assert len(set(Folder(url).names("parts")) - parts) == (1 if published else 0)
        assert sorted(seed_of(entry) for entry in Archive(url).entries()) == [0, 1, 2, 3, 4, 5, 6]
        shutil.rmtree(url)
    # The later the kill, the more is there; and some came before, between and after the two publications.
    assert seen == sorted(seen)
    assert set(seen) == {3, 5, 7}


def write_archive_of_missing(url: str, seeds: range) -> list[int]:
    return [seed_of(entry) for entry in write_archive(url, seeds)]


KILLED_INGESTS = """
import os, signal, sys
from pathlib import Path
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.ct import ingest_ct

grid = Grid(24, 16.0)
for fatal in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        def progress(done, count, name):
            if done == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        ingest_ct([Path(sys.argv[1])], f"{sys.argv[2]}/{fatal}", grid, chest(grid), limits=ScanLimits(),
                  samples_per_shard=2, progress=progress)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_an_ingest_killed_at_any_file_goes_on_where_it_was(tmp_path: Path) -> None:
    scans, grid = tmp_path / "scans", Grid(24, 16.0)
    scans.mkdir()
    for k in range(5):
        image = thorax_image((30, 24, 30), (12.0, 11.0, 12.0))
        image[0, 0, 0] = -1000 + k
        write_image(image, scans / f"{k}.nii.gz")
    command = [sys.executable, "-c", KILLED_INGESTS, scans, tmp_path, "6"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["9"] * 6, run.stderr
    for fatal in range(6):
        outcome = ingest_ct([scans], str(tmp_path / str(fatal)), grid, chest(grid), limits=ScanLimits())
        assert (outcome.already_present, len(outcome.added)) == (fatal // 2 * 2, 5 - fatal // 2 * 2)
        entries = Archive(str(tmp_path / str(fatal))).entries()
        assert [entry.source for entry in entries] == [f"{k}.nii.gz" for k in range(5)]


def test_writers_killed_while_others_write_lose_nothing_of_the_others(tmp_path: Path) -> None:
    url = str(tmp_path / "archive")
    code = (
        "import sys; from samples import write_archive; first = int(sys.argv[2])\n"
        "print('up', flush=True); write_archive(sys.argv[1], range(first, first + 200), samples_per_shard=1)"
    )
    victims = [
        subprocess.Popen([sys.executable, "-c", code, url, str(1000 * k)], env=ENVIRONMENT, stdout=subprocess.PIPE)
        for k in (1, 2)
    ]
    try:
        for victim in victims:
            assert victim.stdout is not None
            victim.stdout.readline()
        time.sleep(0.3)
        write_archive(url, range(8), samples_per_shard=2)
    finally:
        for victim in victims:
            victim.kill()
            victim.communicate()
    assert [victim.returncode for victim in victims] == [-9, -9], "neither had come to its end"
    there = seeds_in(url)
    assert set(range(8)) <= set(there)
    assert len(there) > 8, "the others had published too"
    assert write_archive_of_missing(url, range(8)) == []


# --- objects are damaged ---


def with_json(text: bytes, **change: object) -> bytes:
    return json.dumps({**json.loads(text), **change}).encode()


DAMAGED_HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda text: text[: len(text) // 2],
    "another type": lambda text: text.replace(b'"int16"', b'"uint16"'),
    "another byte order": lambda text: text.replace(b'"little"', b'"big"'),
    "another shape": lambda text: with_json(text, shape=[4, 16, 16, 8]),
    "fewer samples": lambda text: with_json(text, shape=[2, 16, 16, 16]),
    "fewer axes": lambda text: with_json(text, shape=[16, 16, 16]),
    "another format": lambda text: with_json(text, zarr_format=2),
    "no codecs": lambda text: with_json(text, codecs=[]),
    "a group": lambda text: with_json(text, node_type="group"),
}


class DamageSuite:
    """What reading does with an archive of two parts, of four samples each, of which something is damaged."""

    flips: int

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def folder(self, url: str) -> Folder:
        write_archive(url, range(8), samples_per_shard=4)
        return Folder(url)

    @staticmethod
    def shard(entry: Entry, name: str = "volumes") -> str:
        last = "c/0/0/0/0"
        return f"parts/{entry.part}/{name}/{last}"

    @staticmethod
    def read_all(url: str, name: str, part: str) -> tuple[list[Entry], list[str]]:
        """The samples of a part of which this array came back, all of them true, and the refusals of the others."""
        archive = Archive(url)
        true, refusals = [], []
        for entry in (entry for entry in archive.entries() if entry.part == part):
            try:
                array = archive.read_array(entry, name)
            except CorruptSampleError as error:
                refusals.append(str(error))
                wanted = (entry.id, f"{url}/parts/{part}/{name}", entry.sha256[name], f"chunk {entry.index} ")
                if not all(one in str(error) for one in wanted):
                    raise AssertionError(f"{error} lacks one of {wanted}") from error
            else:
                key = {"volumes": "volume"}.get(name, name)
                assert np.array_equal(array, getattr(sample(seed_of(entry)), key))
                true.append(entry)
        return true, refusals

    @pytest.mark.parametrize("name", ["volumes", "radiographs", "labels"])
    def test_a_changed_byte_anywhere_in_a_shard_is_noticed(self, folder: Folder, url: str, name: str) -> None:
        first = Archive(url).manifest.entries[0]
        key = self.shard(first, name)
        whole = folder.read(key)
        rng = random.Random(name)
        # Somewhere in the chunks, and in the index at the end, which holds their positions.
        places = [rng.randrange(len(whole)) for _ in range(self.flips)] + [len(whole) - 1 - rng.randrange(64), 0]
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.randrange(8)
            folder.write(key, bytes(damaged))
            _, refusals = self.read_all(url, name, first.part)
            assert refusals, f"byte {place} of {len(whole)} was changed without an error"
        folder.write(key, whole)
        assert seeds_in(url) == list(range(8))

    def test_damage_in_one_part_leaves_the_other_readable(self, folder: Folder, url: str) -> None:
        first, last = Archive(url).manifest.entries[0], Archive(url).manifest.entries[-1]
        folder.remove(self.shard(first))
        true, refusals = self.read_all(url, "volumes", last.part)
        assert (len(true), len(refusals)) == (4, 0)

    @pytest.mark.parametrize("name", ["volumes", "radiographs", "labels"])
    def test_a_missing_shard_is_never_read_as_zeros(self, folder: Folder, url: str, name: str) -> None:
        first = Archive(url).manifest.entries[0]
        folder.remove(self.shard(first, name))
        true, refusals = self.read_all(url, name, first.part)
        assert (len(true), len(refusals)) == (0, 4)

    def test_a_truncated_shard_is_noticed(self, folder: Folder, url: str) -> None:
        first = Archive(url).manifest.entries[0]
        whole = folder.read(self.shard(first))
        for keep in (0, 10, len(whole) // 2, len(whole) - 70, len(whole) - 1):
            folder.write(self.shard(first), whole[:keep])
            true, refusals = self.read_all(url, "volumes", first.part)
            assert (len(true), len(refusals)) == (0, 4)

    def test_two_shards_that_changed_places_are_noticed_though_each_is_sound(self, folder: Folder, url: str) -> None:
        keys = [self.shard(entry) for entry in (Archive(url).manifest.entries[0], Archive(url).manifest.entries[-1])]
        one, other = (folder.read(key) for key in keys)
        folder.write(keys[0], other)
        folder.write(keys[1], one)
        for entry in (Archive(url).manifest.entries[0], Archive(url).manifest.entries[-1]):
            true, refusals = self.read_all(url, "volumes", entry.part)
            assert (len(true), len(refusals)) == (0, 4)

    def test_a_damaged_array_header_is_noticed(self, folder: Folder, url: str) -> None:
        first = Archive(url).manifest.entries[0]
        key = f"parts/{first.part}/volumes/zarr.json"
        sound = folder.read(key)
        for what, change in DAMAGED_HEADERS.items():
            damaged = change(sound)
            assert damaged != sound, what
            folder.write(key, damaged)
            true, refusals = self.read_all(url, "volumes", first.part)
            # With fewer samples in the array, those that are left may still be read.
            assert (len(true), len(refusals)) == ((2, 2) if what == "fewer samples" else (0, 4)), what
        folder.remove(key)
        assert self.read_all(url, "volumes", first.part)[0] == []

    def test_a_missing_part_is_noticed(self, folder: Folder, url: str) -> None:
        first = Archive(url).manifest.entries[0]
        folder.remove(f"parts/{first.part}")
        true, refusals = self.read_all(url, "volumes", first.part)
        assert (len(true), len(refusals)) == (0, 4)

    def test_damage_after_the_archive_was_opened_and_read_is_noticed(self, folder: Folder, url: str) -> None:
        archive = Archive(url)
        first = archive.manifest.entries[0]
        archive.read(first)
        folder.remove(self.shard(first))
        with pytest.raises(CorruptSampleError, match=first.id):
            archive.read(first)

    def test_a_manifest_cut_short_is_an_error_and_not_a_smaller_archive(self, folder: Folder, url: str) -> None:
        name = folder.names("manifests")[-1]
        whole = folder.read(f"manifests/{name}")
        for keep in (0, 1, len(whole) // 2, len(whole) - 1):
            folder.write(f"manifests/{name}", whole[:keep])
            with pytest.raises(ArchiveError, match=f"{name} is not a raylift manifest"):
                Archive(url)


class TestFolder(DamageSuite):
    flips = 25

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "archive")


class TestBucket(DamageSuite):
    flips = 4

    @pytest.fixture
    def url(self, s3_bucket_url: str) -> str:
        return f"{s3_bucket_url}/{uuid.uuid4().hex}"


# --- the server goes away ---


# A write that fails leaves some of Zarr's own coroutines unawaited.
UNAWAITED = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited", "ignore:Exception ignored in. <coroutine"
)


@pytest.fixture
def bucket(s3_bucket_url: str) -> str:
    return f"{s3_bucket_url}/{uuid.uuid4().hex}"


@pytest.fixture
def running(s3_server: S3Server) -> Iterator[S3Server]:
    """The session's server, which runs again after the test whatever the test did to it."""
    yield s3_server
    gc.collect()  # what Zarr left behind belongs to this test and its filter of warnings
    if any(process.poll() is not None for process in s3_server.processes.values()):
        s3_server.kill()
        s3_server.start()


def outage(server: S3Server, seconds: float) -> tuple[float, float]:
    """Kill the server, start it again after a while; when it was away."""
    server.kill()
    begun = time.monotonic()
    time.sleep(seconds)
    server.start()
    return begun, time.monotonic()


@UNAWAITED
def test_readers_continue_after_a_restart_of_the_server(running: S3Server, bucket: str) -> None:
    write_archive(bucket, range(4))
    archive = Archive(bucket)
    done = threading.Event()

    def read() -> list[tuple[float, float]]:
        spans = []
        while not done.is_set():
            for entry in archive.entries():
                begun = time.monotonic()
                assert same(archive.read(entry), sample(seed_of(entry)))
                spans.append((begun, time.monotonic()))
        return spans

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            time.sleep(0.5)
            begun, ended = outage(running, 1.0)
            time.sleep(0.5)
        finally:
            done.set()
        for reader in readers:
            spans = reader.result(timeout=120)
            assert any(start <= ended and end >= begun for start, end in spans), "a read met the outage"
            assert any(start < begun for start, _ in spans)


@UNAWAITED
def test_a_writer_continues_after_a_restart_of_the_server(running: S3Server, bucket: str) -> None:
    write_archive(bucket, [0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_archive, bucket, range(1, 40), samples_per_shard=3)
        time.sleep(0.5)
        assert not writing.done()
        outage(running, 0.5)
        assert not writing.done(), "the outage came in its middle"
        writing.result(timeout=120)
    assert seeds_in(bucket) == list(range(40))


@UNAWAITED
def test_an_unavailable_server_is_named_and_what_was_published_is_there_when_it_is_back(
    running: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer attempts than usual, which would ride out half a minute.
    options = {"config_kwargs": {"retries": {"max_attempts": 2, "mode": "standard"}, "connect_timeout": 6}}
    monkeypatch.setattr(store, "S3_OPTIONS", options)
    write_archive(bucket, range(3))
    archive = Archive(bucket)
    entry = archive.entries()[0]
    archive.read(entry)
    running.kill()
    for act in (
        lambda: archive.read(entry),
        lambda: Archive(bucket),
        lambda: write_archive(bucket, [7]),
        lambda: archive.read_pair(archive.entries()[1]),
    ):
        begun = time.monotonic()
        with pytest.raises(StoreError, match=f"{bucket}.*AWS_ENDPOINT_URL_S3"):
            act()
        assert time.monotonic() - begun < 20
    running.start()
    assert same(archive.read(entry), sample(seed_of(entry)))
    assert seeds_in(bucket) == [0, 1, 2]


@UNAWAITED
@pytest.mark.parametrize("delay_s", [0.1, 0.5])
def test_a_writer_cut_off_permanently_leaves_an_archive_that_the_next_run_completes(
    running: S3Server, bucket: str, delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"config_kwargs": {"retries": {"max_attempts": 1, "mode": "standard"}, "connect_timeout": 7}}
    monkeypatch.setattr(store, "S3_OPTIONS", options)
    write_archive(bucket, range(2))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_archive, bucket, range(2, 60), samples_per_shard=2)
        time.sleep(delay_s)
        running.kill()
        with pytest.raises(StoreError):
            writing.result(timeout=60)
    running.start()
    there = seeds_in(bucket)
    assert there == list(range(len(there)))
    assert 2 <= len(there) < 60
    assert len(write_archive_of_missing(bucket, range(2, 12))) == max(0, 12 - len(there))


def test_a_subprocess_that_loses_the_server_ends_without_loose_ends(running: S3Server, bucket: str) -> None:
    """No open session and no unretrieved exception, also after an error."""
    write_archive(bucket, [0])
    code = (
        "import sys; from raylift.datasets.archive import store; from raylift.datasets.archive.archive import Archive\n"
        "from raylift.datasets.errors import StoreError\n"
        "store.S3_OPTIONS = {'config_kwargs': {'retries': {'max_attempts': 1}, 'connect_timeout': 5}}\n"
        "archive = Archive(sys.argv[1]); print('open', flush=True); sys.stdin.readline()\n"
        "try: archive.read(archive.entries()[0])\n"
        "except StoreError: print('unreachable')"
    )
    command = [sys.executable, "-W", "error", "-c", code, bucket]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**ENVIRONMENT, **running.environment}, text=True, **pipes) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        running.kill()
        out, err = reader.communicate("go\n", timeout=60)
    assert (reader.returncode, out, err) == (0, "unreachable\n", "")
