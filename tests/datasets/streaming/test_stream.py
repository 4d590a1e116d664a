from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch
from samples import GEOMETRY, GRID, radiographs, sample, seed_of, write_archive

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError, CorruptSampleError
from raylift.datasets.intensity import Window, normalize
from raylift.datasets.streaming.order import BatchPartition, SampleOrder
from raylift.datasets.streaming.stream import BatchStream, CachedReader, SampleReader, UnpairedVolumes, load_batch

COUNT = 11
WINDOW = Window()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    url = str(tmp_path_factory.mktemp("stream") / "archive")
    write_archive(url, range(COUNT))
    return Archive(url)


class Counting:
    """A reader that counts the samples read through it, by their radiographs."""

    def __init__(self, inner: SampleReader) -> None:
        self.inner = inner
        self.reads: Counter[str] = Counter()
        self.changed = threading.Condition()

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        if name == "radiographs":
            self.count(entry)
        return self.inner.read_array(entry, name)

    def count(self, entry: Entry) -> None:
        with self.changed:
            self.reads[entry.id] += 1
            self.changed.notify_all()

    def wait_for(self, count: int, timeout_s: float = 20) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.reads.total() >= count, timeout_s)


class Gated:
    """A reader that fails, or waits, at entries of one's choice."""

    def __init__(self, inner: SampleReader, at: Callable[[Entry], None]) -> None:
        self.inner, self.at = inner, at

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        self.at(entry)
        return self.inner.read_array(entry, name)


def stream(
    reader: SampleReader, archive: Archive, share: BatchPartition, taken: int = 0, **options: Any
) -> BatchStream:
    result = BatchStream(
        reader, archive.entries(), SampleOrder(len(archive.entries()), seed=1), share, WINDOW, **options
    )
    result.samples_consumed = taken
    return result


def ids(batches: list[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.ids]


def global_batches(archive: Archive, batch: int, world: int, steps: int, taken: int = 0) -> list[list[str]]:
    """The samples of each global batch, in the order of their positions, over all workers."""
    workers = [iter(stream(archive, archive, BatchPartition(rank, world, batch), taken)) for rank in range(world)]
    return [[name for worker in workers for name in ids(next(worker))] for _ in range(steps)]


def test_a_batch_holds_its_samples_as_inputs_of_a_network(archive: Archive) -> None:
    entries = archive.entries()
    order = SampleOrder(COUNT, seed=1)
    [first, second] = next(iter(stream(archive, archive, BatchPartition(1, 2, 12, accumulation=2))))
    assert first.volume.shape == (3, 1, *GRID.shape)
    assert first.radiographs.shape == (3, 2, 8, 8)
    assert first.volume.dtype == first.radiographs.dtype == torch.float32
    for batch, positions in ((first, (3, 4, 5)), (second, (9, 10, 11))):
        for k, position in enumerate(positions):
            entry = entries[order.at(position)]
            assert batch.ids[k] == entry.id
            made = sample(seed_of(entry))
            torch.testing.assert_close(batch.volume[k, 0].numpy(), WINDOW.to_unit(made.volume.astype(np.float32)))
            for view in range(2):
                np.testing.assert_array_equal(batch.radiographs[k, view], normalize(made.radiographs[view]))


def test_views_can_be_chosen_and_put_in_another_order(archive: Archive) -> None:
    [both] = next(iter(stream(archive, archive, BatchPartition(0, 1, 4))))
    other = BatchStream(archive, archive.entries(), SampleOrder(COUNT, 1), BatchPartition(0, 1, 4), WINDOW, views=(1,))
    [lateral] = next(iter(other))
    assert torch.equal(lateral.radiographs, both.radiographs[:, 1:])


def test_labels_are_in_the_batches_that_need_them(archive: Archive) -> None:
    share = BatchPartition(0, 1, 4, accumulation=2)
    labeled = BatchStream(archive, archive.entries(), SampleOrder(COUNT, 1), share, WINDOW, labels=True)
    plain = next(iter(stream(archive, archive, share)))
    by_id = {entry.id: entry for entry in archive.entries()}
    for batch, other in zip(next(iter(labeled)), plain, strict=True):
        assert batch.labels is not None
        assert (batch.labels.dtype, batch.labels.shape) == (torch.uint8, (2, 1, *GRID.shape))
        for name, labels in zip(batch.ids, batch.labels, strict=True):
            np.testing.assert_array_equal(labels[0], sample(seed_of(by_id[name])).labels)
        moved = batch.to(torch.device("cpu"))
        assert moved.labels is not None
        assert torch.equal(moved.labels, batch.labels)
        assert torch.equal(batch.volume, other.volume)
        assert torch.equal(batch.radiographs, other.radiographs)
        assert other.labels is None


def test_labels_that_are_not_needed_are_not_read(archive: Archive) -> None:
    read: Counter[str] = Counter()

    class Counted(Archive):
        def read_array(self, entry: Entry, name: str) -> np.ndarray:
            read[name] += 1
            return super().read_array(entry, name)

    counted = Counted(archive.url)
    for labels in (False, True):
        load_batch(counted, counted.entries()[:3], WINDOW, (0, 1), labels=labels)
        assert read == {"volumes": 3, "radiographs": 3, **({"labels": 3} if labels else {})}
        read.clear()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_any_number_of_workers_gets_the_same_global_batches(archive: Archive, world: int) -> None:
    assert global_batches(archive, 6, world, steps=7) == global_batches(archive, 6, 1, steps=7)


def test_a_worker_reads_its_own_samples_and_no_others(archive: Archive) -> None:
    reader = Counting(archive)
    share = BatchPartition(1, 2, 4)
    own = {archive.entries()[SampleOrder(COUNT, 1).at(p)].id for step in range(3) for p in share.positions(4 * step)[0]}
    batches = iter(stream(reader, archive, share, prefetch_batches=2))
    next(batches)
    assert reader.wait_for(6)
    assert set(reader.reads) == own
    assert reader.reads.total() == 6


def test_batches_are_prefetched_up_to_the_limit(archive: Archive) -> None:
    reader = Counting(archive)
    batches = iter(stream(reader, archive, BatchPartition(0, 1, 2), prefetch_batches=3, threads=2))
    next(batches)
    assert reader.wait_for(8), "the batch handed out and three ahead, of two samples each"
    time.sleep(0.1)
    assert reader.reads.total() == 8
    next(batches)
    assert reader.wait_for(10)


def test_reading_goes_on_while_the_consumer_is_busy(archive: Archive) -> None:
    began = threading.Event()

    def at(entry: Entry) -> None:
        if threading.current_thread() is threading.main_thread():
            pytest.fail("a sample was read in the consumer's own thread")
        began.set()

    batches = iter(stream(Gated(archive, at), archive, BatchPartition(0, 1, 1)))
    next(batches)
    began.clear()
    next(batches)
    assert began.wait(20)


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (6, 1), (3, 6)])
def test_going_on_inside_an_epoch_on_another_number_of_workers_loses_and_repeats_nothing(
    archive: Archive, stop: int, before: int, after: int
) -> None:
    workers = [stream(archive, archive, BatchPartition(rank, before, 6)) for rank in range(before)]
    running = [iter(worker) for worker in workers]
    seen = [[name for worker in running for name in ids(next(worker))] for _ in range(stop)]
    [state] = {worker.samples_consumed for worker in workers}
    assert state == 6 * stop
    seen += global_batches(archive, 6, after, steps=8 - stop, taken=state)
    assert seen == global_batches(archive, 6, 1, steps=8)


def test_the_state_counts_what_was_handed_out_and_not_what_was_read_ahead(archive: Archive) -> None:
    reader = Counting(archive)
    source = stream(reader, archive, BatchPartition(0, 1, 2), prefetch_batches=4)
    batches = iter(source)
    assert source.samples_consumed == 0
    for step in range(1, 5):
        next(batches)
        assert source.samples_consumed == 2 * step
    assert reader.wait_for(16)
    assert source.samples_consumed == 8


def test_an_error_of_the_reader_reaches_the_consumer_and_the_state_stays_before_it(archive: Archive) -> None:
    entries = archive.entries()
    bad = entries[SampleOrder(COUNT, 1).at(5)].id
    fired = []

    def fail(entry: Entry) -> None:
        if entry.id == bad and not fired:
            fired.append(entry.id)
            raise CorruptSampleError(f"sample {entry.id} is corrupt")

    source = stream(Gated(archive, fail), archive, BatchPartition(0, 1, 2), prefetch_batches=2)
    batches = iter(source)
    next(batches)
    next(batches)
    with pytest.raises(CorruptSampleError, match=bad):
        next(batches)
    assert fired == [bad]
    assert source.samples_consumed == 4
    # Once the sample is back, the stream resumes at the batch that failed.
    assert ids(next(iter(source))) == [entries[SampleOrder(COUNT, 1).at(p)].id for p in (4, 5)]


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("raylift-read")]


def ended(timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while reading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not reading_threads()


def consume_and_close(batches: Iterator[list[Batch]]) -> None:
    next(batches)
    batches.close()


def consume_and_forget(batches: Iterator[list[Batch]]) -> None:
    for _ in batches:
        break


def consume_and_fail(batches: Iterator[list[Batch]]) -> None:
    def fail() -> None:
        for batch in batches:
            raise ZeroDivisionError(batch)

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("leave", [consume_and_close, consume_and_forget, consume_and_fail])
def test_leaving_the_iterator_ends_its_threads(
    archive: Archive, leave: Callable[[Iterator[list[Batch]]], None]
) -> None:
    assert ended()
    leave(iter(stream(Gated(archive, lambda _: time.sleep(0.01)), archive, BatchPartition(0, 1, 4), threads=3)))
    gc.collect()
    assert ended()


def test_leaving_drops_what_was_not_begun(archive: Archive) -> None:
    assert ended()
    gate = threading.Event()
    reader = Counting(Gated(archive, lambda _: gate.wait(20) and None))
    batches = iter(stream(reader, archive, BatchPartition(0, 1, 2), threads=1, prefetch_batches=4))
    gate.set()
    next(batches)
    gate.clear()
    before = reader.reads.total()
    batches.close()
    gate.set()
    assert ended()
    assert reader.reads.total() <= before + 1, "at most the read that was under way"


def test_exactly_the_given_samples_are_loaded(archive: Archive) -> None:
    chosen = [archive.entries()[k] for k in (4, 0, 4)]
    batch = load_batch(archive, chosen, WINDOW, (0, 1))
    assert batch.ids == tuple(entry.id for entry in chosen)
    assert torch.equal(batch.volume[0], batch.volume[2])
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.radiographs, batch.radiographs)
    assert moved.ids == batch.ids


# --- the cache ---

PAIR_BYTES = 16**3 * 2 + 2 * 8 * 8 * 4


def cached_bytes(cache: CachedReader) -> int:
    """The size of all arrays in a cache."""
    with cache._lock:
        return sum(array.nbytes for array in cache._cache.values())


def read_pair(reader: SampleReader, entry: Entry) -> np.ndarray:
    """The volume, after both arrays of the pair were read."""
    volume = reader.read_array(entry, "volumes")
    reader.read_array(entry, "radiographs")
    return volume


def test_a_cache_reads_each_sample_once(archive: Archive) -> None:
    reader = Counting(archive)
    cache = CachedReader(reader, max_bytes=COUNT * PAIR_BYTES)
    for _ in range(3):
        for entry in archive.entries():
            np.testing.assert_array_equal(read_pair(cache, entry), sample(seed_of(entry)).volume)
    assert set(reader.reads.values()) == {1}


def test_a_full_cache_drops_what_was_used_longest_ago(archive: Archive) -> None:
    reader = Counting(archive)
    cache = CachedReader(reader, max_bytes=3 * PAIR_BYTES)
    a, b, c, d, *_ = archive.entries()
    for entry in (a, b, c, a, d):  # d drops b
        read_pair(cache, entry)
    reader.reads.clear()
    for entry in (a, c, d):
        read_pair(cache, entry)
    assert not reader.reads
    read_pair(cache, b)
    assert reader.reads == {b.id: 1}


def test_a_cache_keeps_the_arrays_that_were_read_and_no_others(archive: Archive) -> None:
    cache = CachedReader(archive, max_bytes=COUNT * 2 * PAIR_BYTES)
    entry = archive.entries()[0]
    whole = sample(seed_of(entry)).arrays()
    held = 0
    for name, array in whole.items():
        for _ in range(2):
            np.testing.assert_array_equal(cache.read_array(entry, name), array)
            assert cached_bytes(cache) == held + array.nbytes
        held += array.nbytes
    assert load_batch(cache, [entry], WINDOW, (0, 1)).labels is None


@pytest.mark.parametrize("max_bytes", [0, 2 * 8 * 8 * 4 - 1])
def test_an_array_that_does_not_fit_is_read_and_not_kept(archive: Archive, max_bytes: int) -> None:
    reader = Counting(archive)
    cache = CachedReader(reader, max_bytes)
    entry = archive.entries()[0]
    for _ in range(2):
        read_pair(cache, entry)
    assert reader.reads[entry.id] == 2
    assert cached_bytes(cache) == 0


def test_a_cache_keeps_to_its_limit_and_returns_the_right_arrays_under_threads(archive: Archive) -> None:
    limit = 4 * PAIR_BYTES + 100
    cache = CachedReader(archive, limit)
    entries = archive.entries()
    most = 0

    def hammer(seed: int) -> None:
        nonlocal most
        rng = np.random.default_rng(seed)
        for k in rng.integers(0, COUNT, 150):
            volume = read_pair(cache, entries[k])
            most = max(most, cached_bytes(cache))
            assert np.array_equal(volume, sample(seed_of(entries[k])).volume)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8)))
    assert limit - PAIR_BYTES < most <= limit
    assert cache._bytes == cached_bytes(cache)


def test_the_first_epoch_of_a_cached_stream_reads_and_the_second_does_not(archive: Archive, tmp_path: Path) -> None:
    reader = Counting(archive)
    cached = CachedReader(reader, 2**30)
    batches = iter(stream(cached, archive, BatchPartition(0, 1, COUNT), prefetch_batches=0))
    for _ in islice(batches, 3):
        pass
    assert set(reader.reads.values()) == {1}
    assert len(reader.reads) == COUNT


# --- radiographs without CT, and CT of other patients ---


def write_radiographs(url: str, count: int) -> Archive:
    with ArchiveWriter(url, GRID, GEOMETRY, contents="radiographs") as writer:
        for seed in range(count):
            writer.add(samples.entry(seed), radiographs(seed))
    return Archive(url)


def test_radiographs_without_ct_make_batches_without_a_volume(tmp_path: Path) -> None:
    archive = write_radiographs(str(tmp_path), COUNT)
    [batch] = next(iter(stream(archive, archive, BatchPartition(0, 1, 4), volumes=False)))
    assert batch.ground_truth is None
    for name, images in zip(batch.ids, batch.radiographs, strict=True):
        np.testing.assert_array_equal(images, radiographs(int(name.partition("-")[2])).radiographs)
    assert batch.to(torch.device("cpu")).ground_truth is None
    with pytest.raises(ConfigError, match="a batch of radiographs without CT"):
        _ = batch.volume
    with pytest.raises(ConfigError, match="holds radiographs without CT, and reading volumes needs CT"):
        load_batch(archive, archive.entries()[:1], WINDOW, (0, 1))


def test_a_stream_without_volumes_reads_none_from_an_archive_that_has_them(archive: Archive) -> None:
    read: Counter[str] = Counter()

    class Counted(Archive):
        def read_array(self, entry: Entry, name: str) -> np.ndarray:
            read[name] += 1
            return super().read_array(entry, name)

    batch = load_batch(Counted(archive.url), archive.entries()[:3], WINDOW, (0, 1), volumes=False)
    assert batch.ground_truth is None
    assert torch.equal(batch.radiographs, load_batch(archive, archive.entries()[:3], WINDOW, (0, 1)).radiographs)
    assert read == {"radiographs": 3}


def unpaired_batches(
    pairs: Archive, archive: Archive, world: int, steps: int, taken: int = 0
) -> list[list[tuple[str, bytes]]]:
    """Names and unpaired volumes of each global batch of 6, over all workers in the order of their positions."""
    others = UnpairedVolumes(archive, archive.entries(), SampleOrder(COUNT, seed=2))
    workers = [
        iter(stream(pairs, pairs, BatchPartition(rank, world, 6), taken, volumes=False, unpaired=others))
        for rank in range(world)
    ]
    found = []
    for _ in range(steps):
        together = []
        for worker in workers:
            for batch in next(worker):
                assert batch.unpaired is not None
                assert batch.unpaired.shape == (len(batch.ids), 1, *GRID.shape)
                together += [
                    (name, bytes(volume.numpy())) for name, volume in zip(batch.ids, batch.unpaired, strict=True)
                ]
        found.append(together)
    return found


def test_unpaired_volumes_follow_the_position_whatever_the_workers_and_after_a_resume(
    archive: Archive, tmp_path: Path
) -> None:
    pairs = write_radiographs(str(tmp_path), 5)
    whole = unpaired_batches(pairs, archive, 1, steps=6)
    for world in (2, 3):
        assert unpaired_batches(pairs, archive, world, steps=6) == whole
        assert unpaired_batches(pairs, archive, world, steps=4, taken=12) == whole[2:]
    # All are used, as often as one another but for those whose subject is in the batch, in an order of their own.
    volumes = {bytes(WINDOW.to_unit(sample(k).volume.astype(np.float32))): k for k in range(COUNT)}
    pairs_of_ids = [(int(name.partition("-")[2]), volumes[volume]) for step in whole for name, volume in step]
    assert {k for _, k in pairs_of_ids} == set(range(COUNT))
    assert [k for _, k in pairs_of_ids[:COUNT]] != [k for _, k in pairs_of_ids[COUNT : 2 * COUNT]]


def test_an_unpaired_volume_is_never_of_the_person_in_the_radiographs(archive: Archive) -> None:
    others = UnpairedVolumes(archive, archive.entries(), SampleOrder(COUNT, seed=2))
    own = {bytes(WINDOW.to_unit(sample(k).volume.astype(np.float32))): f"subject-{k}" for k in range(COUNT)}
    skipped = 0
    for position in range(COUNT):
        at = archive.entries()[others.order.at(position)].subject
        for name in archive.entries():
            volume = others.read(position, name.subject, WINDOW)
            assert own[bytes(volume.numpy())] != name.subject
            skipped += own[bytes(volume.numpy())] != at
    assert skipped == COUNT, "each position had to pass over its own volume for one of the subjects"


def test_volumes_of_one_person_cannot_be_unpaired_for_that_person(archive: Archive) -> None:
    [first, *_] = archive.entries()
    alone = UnpairedVolumes(archive, [first], SampleOrder(1, seed=0))
    with pytest.raises(ConfigError, match=f"all unpaired volumes are of {first.subject}"):
        alone.read(0, first.subject, WINDOW)
