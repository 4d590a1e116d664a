"""An archive as an endless stream of batches: each worker reads only its own samples, ahead of time, in threads.

The stream is a pure function of the archive, the seed and the position (see `order`), so its whole state is one
number: how many samples of the run all workers together have taken. Any number of workers can go on from it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.archive import Entry, Pair
from raylift.datasets.intensity import Window, standardise
from raylift.datasets.order import SampleOrder, Share


@dataclass(frozen=True)
class Batch:
    """What a network trains on."""

    volume: Float[Tensor, "n 1 d h w"]
    """CT in the window's [0, 1]."""
    views: Float[Tensor, "n views rows columns"]
    """Radiographs in [0, 1], bone bright, each standardised by its own percentiles."""
    ids: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.volume.to(device, non_blocking=True), self.views.to(device, non_blocking=True), self.ids)


@runtime_checkable
class Reader(Protocol):
    """What reads a pair: an archive, or something around one."""

    def read_pair(self, entry: Entry) -> Pair:
        """The volume and the radiographs of a manifest entry."""
        ...


class Cache:
    """A reader that keeps the pairs read last, up to a number of bytes; threads may share it."""

    def __init__(self, inner: Reader, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, Pair] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes_held(self) -> int:
        """What it keeps now; never more than its limit."""
        with self._lock:
            return self._bytes

    def read_pair(self, entry: Entry) -> Pair:
        """The pair, from memory if it is there."""
        with self._lock:
            if entry.id in self._held:
                self._held.move_to_end(entry.id)
                return self._held[entry.id]
        pair = self._inner.read_pair(entry)
        with self._lock:
            if entry.id not in self._held and _size(pair) <= self._max_bytes:
                self._held[entry.id] = pair
                self._bytes += _size(pair)
            while self._bytes > self._max_bytes:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= _size(dropped)
        return pair


class Stream:
    """Micro-batches of one worker, for ever.

    Each item is the list of the worker's micro-batches in one global batch. `samples_taken` counts the samples of all
    workers up to the last item handed out; set it before iterating to go on from there.
    """

    def __init__(
        self,
        reader: Reader,
        entries: list[Entry],
        order: SampleOrder,
        share: Share,
        window: Window,
        *,
        views: Sequence[int] = (0, 1),
        threads: int = 2,
        batches_ahead: int = 2,
    ) -> None:
        self.samples_taken = 0
        self._reader = reader
        self._entries = entries
        self._order = order
        self._share = share
        self._window = window
        self._views = views
        self._threads = threads
        self._batches_ahead = batches_ahead

    def __iter__(self) -> Iterator[list[Batch]]:
        start = self.samples_taken
        queue: deque[list[list[Future[tuple[Entry, Tensor, Tensor]]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="raylift-read")
        try:
            while True:
                while len(queue) <= self._batches_ahead:
                    queue.append(
                        [[pool.submit(self._load, p) for p in micro] for micro in self._share.positions(start)]
                    )
                    start += self._share.global_batch
                batches = [collate([future.result() for future in micro]) for micro in queue.popleft()]
                self.samples_taken += self._share.global_batch
                yield batches
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, position: int) -> tuple[Entry, Tensor, Tensor]:
        entry = self._entries[self._order.at(position)]
        return entry, *to_tensors(self._reader.read_pair(entry), self._window, self._views)


def to_tensors(
    pair: Pair, window: Window, views: Sequence[int]
) -> tuple[Float[Tensor, "1 d h w"], Float[Tensor, "views rows columns"]]:
    """A stored pair as a network sees it: the volume in the window's [0, 1], the chosen views standardised."""
    volume = window.to_unit(torch.from_numpy(pair.volume.astype(np.float32)))[None]
    images = np.stack([standardise(pair.radiographs[view]) for view in views])
    return volume, torch.from_numpy(images)


def collate(loaded: list[tuple[Entry, Tensor, Tensor]]) -> Batch:
    """Samples as one batch, in order."""
    entries, volumes, views = zip(*loaded, strict=True)
    return Batch(torch.stack(volumes), torch.stack(views), tuple(entry.id for entry in entries))


def load(reader: Reader, entries: list[Entry], window: Window, views: Sequence[int]) -> Batch:
    """A batch of exactly these samples."""
    return collate([(entry, *to_tensors(reader.read_pair(entry), window, views)) for entry in entries])


def _size(pair: Pair) -> int:
    return pair.volume.nbytes + pair.radiographs.nbytes
