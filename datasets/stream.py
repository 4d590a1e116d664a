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
from jaxtyping import Float, UInt8
from torch import Tensor

from raylift.datasets.archive import Entry, Pair, Sample
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
    labels: UInt8[Tensor, "n 1 d h w"] | None = None
    """Values of `segmentation.Label`, for objectives that ask for them; they are not read otherwise."""
    unpaired: Float[Tensor, "n 1 d h w"] | None = None
    """CT of other people, in the window's [0, 1], for objectives that know volumes only as a kind."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        volume, views = (tensor.to(device, non_blocking=True) for tensor in (self.volume, self.views))
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        unpaired = None if self.unpaired is None else self.unpaired.to(device, non_blocking=True)
        return Batch(volume, views, self.ids, labels, unpaired)


@runtime_checkable
class Reader(Protocol):
    """What reads samples: an archive, or something around one."""

    def read(self, entry: Entry) -> Sample:
        """All that is stored of a manifest entry."""
        ...

    def read_pair(self, entry: Entry) -> Pair:
        """The volume and the radiographs of a manifest entry."""
        ...


class Cache:
    """A reader that keeps the samples read last, up to a number of bytes; threads may share it."""

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

    def read(self, entry: Entry) -> Sample:
        """The sample, from memory if it is there with its labels."""
        held = self._find(entry)
        if isinstance(held, Sample):
            return held
        sample = self._inner.read(entry)
        self._keep(entry, sample)
        return sample

    def read_pair(self, entry: Entry) -> Pair:
        """The pair, from memory if it is there."""
        held = self._find(entry)
        if held is not None:
            return held
        pair = self._inner.read_pair(entry)
        self._keep(entry, pair)
        return pair

    def _find(self, entry: Entry) -> Pair | None:
        with self._lock:
            if entry.id in self._held:
                self._held.move_to_end(entry.id)
            return self._held.get(entry.id)

    def _keep(self, entry: Entry, pair: Pair) -> None:
        with self._lock:
            known = self._held.get(entry.id)
            if pair.nbytes > self._max_bytes or (known is not None and known.nbytes >= pair.nbytes):
                return
            self._bytes += pair.nbytes - (known.nbytes if known else 0)
            self._held[entry.id] = pair
            self._held.move_to_end(entry.id)
            while self._bytes > self._max_bytes:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= dropped.nbytes


class Stream:
    """Micro-batches of one worker, for ever.

    Each item is the list of the worker's micro-batches in one global batch. `samples_taken` counts the samples of all
    workers up to the last item handed out; set it before iterating to go on from there.

    Args:
        reader: what samples are read from, in threads.
        entries: the samples, in the order that `order` counts them.
        order: which sample stands at which position.
        share: which positions are this worker's.
        window: the HU range that becomes [0, 1].
        views: which radiographs, by their place in the archive's geometry.
        labels: whether batches carry labels.
        threads: readers at once.
        batches_ahead: global batches that are read while one is used.
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
        labels: bool = False,
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
        self._labels = labels
        self._threads = threads
        self._batches_ahead = batches_ahead

    def __iter__(self) -> Iterator[list[Batch]]:
        start = self.samples_taken
        queue: deque[list[list[Future[Batch]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="raylift-read")
        try:
            while True:
                while len(queue) <= self._batches_ahead:
                    queue.append(
                        [[pool.submit(self._load, p) for p in micro] for micro in self._share.positions(start)]
                    )
                    start += self._share.global_batch
                batches = [_joined([future.result() for future in micro]) for micro in queue.popleft()]
                self.samples_taken += self._share.global_batch
                yield batches
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, position: int) -> Batch:
        entry = self._entries[self._order.at(position)]
        return _single(self._reader, entry, self._window, self._views, self._labels)


def load(reader: Reader, entries: list[Entry], window: Window, views: Sequence[int], *, labels: bool = False) -> Batch:
    """A batch of exactly these samples; see `Stream` for the arguments."""
    return _joined([_single(reader, entry, window, views, labels) for entry in entries])


def _single(reader: Reader, entry: Entry, window: Window, views: Sequence[int], labels: bool) -> Batch:
    """One sample as a network sees it: volume in the window's [0, 1], the chosen views standardised."""
    pair = reader.read(entry) if labels else reader.read_pair(entry)
    volume = window.to_unit(torch.from_numpy(pair.volume.astype(np.float32)))
    images = torch.from_numpy(np.stack([standardise(pair.radiographs[view]) for view in views]))
    marks = torch.from_numpy(pair.labels)[None, None] if labels and isinstance(pair, Sample) else None
    return Batch(volume[None, None], images[None], (entry.id,), marks)


def _joined(singles: list[Batch]) -> Batch:
    """Samples as one batch, in order."""
    labels = [single.labels for single in singles if single.labels is not None]
    return Batch(
        torch.cat([single.volume for single in singles]),
        torch.cat([single.views for single in singles]),
        tuple(name for single in singles for name in single.ids),
        torch.cat(labels) if labels else None,
    )
