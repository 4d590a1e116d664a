"""An archive as an endless stream of batches: each worker reads only its own samples, ahead of time, in threads.

The stream is a pure function of the archive, the seed and the position (see `order`), so its whole state is one
number: how many samples of the run all workers together have taken. Any number of workers can go on from it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.archive.manifest import Entry
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.intensity import Window
from raylift.datasets.radiographs.histogram import Quantiles, standardize_and_match
from raylift.datasets.streaming.order import BatchPartition, SampleOrder


@runtime_checkable
class SampleReader(Protocol):
    """What reads samples: an archive, or something around one."""

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """One of the arrays stored of a manifest entry: volumes, radiographs or labels."""
        ...


class CachedReader:
    """A reader that keeps the arrays read last, up to a number of bytes; threads may share it."""

    def __init__(self, inner: SampleReader, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes_held(self) -> int:
        """What it keeps now; never more than its limit."""
        with self._lock:
            return self._bytes

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """The array, from memory if it is there."""
        key = entry.id, name
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        array = self._inner.read_array(entry, name)
        with self._lock:
            if array.nbytes <= self._max_bytes and key not in self._held:
                self._held[key] = array
                self._bytes += array.nbytes
                while self._bytes > self._max_bytes:
                    _, dropped = self._held.popitem(last=False)
                    self._bytes -= dropped.nbytes
        return array


@dataclass(frozen=True)
class UnpairedVolumes:
    """CT of other people, in an order of its own that follows from the position in the stream alone."""

    reader: SampleReader
    entries: list[Entry]
    order: SampleOrder

    def read(self, position: int, subject: str, window: Window) -> Float[Tensor, "1 1 d h w"]:
        """The volume that goes with a position, or the next one that is not the subject's own."""
        first = self.order.at(position)
        turned = self.entries[first:] + self.entries[:first]
        entry = next((entry for entry in turned if entry.subject != subject), None)
        if entry is None:
            raise ConfigError(f"all unpaired volumes are of {subject}, whose radiographs are in the batch: ingest more")
        return _volume(self.reader, entry, window)


class BatchStream:
    """Micro-batches of one worker, for ever.

    Each item is the list of the worker's micro-batches in one global batch. `samples_consumed` counts samples of all
    workers up to the last item handed out; set it before iterating to go on from there.

    Args:
        reader: what samples are read from, in threads.
        entries: the samples, in the order that `order` counts them.
        order: which sample stands at which position.
        share: which positions are this worker's.
        window: the HU range that becomes [0, 1].
        views: which radiographs, by their place in the archive's geometry.
        volumes: whether batches carry the CT of the views.
        labels: whether batches carry labels.
        reference_quantiles: quantiles that each view is matched to; none if they are not.
        unpaired: CT of other people, one for each sample.
        threads: readers at once.
        prefetch_batches: global batches that are read while one is used.
    """

    def __init__(
        self,
        reader: SampleReader,
        entries: list[Entry],
        order: SampleOrder,
        share: BatchPartition,
        window: Window,
        *,
        views: Sequence[int] = (0, 1),
        volumes: bool = True,
        labels: bool = False,
        reference_quantiles: Sequence[Quantiles] = (),
        unpaired: UnpairedVolumes | None = None,
        threads: int = 2,
        prefetch_batches: int = 2,
    ) -> None:
        self.samples_consumed = 0
        self._reader = reader
        self._entries = entries
        self._order = order
        self._share = share
        self._window = window
        self._views = views
        self._volumes = volumes
        self._labels = labels
        self._reference_quantiles = reference_quantiles
        self._unpaired = unpaired
        self._threads = threads
        self._prefetch_batches = prefetch_batches

    def __iter__(self) -> Iterator[list[Batch]]:
        start = self.samples_consumed
        queue: deque[list[list[Future[Batch]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="raylift-read")
        try:
            while True:
                while len(queue) <= self._prefetch_batches:
                    queue.append(
                        [[pool.submit(self._load, p) for p in micro] for micro in self._share.positions(start)]
                    )
                    start += self._share.global_batch
                batches = [_joined([future.result() for future in micro]) for micro in queue.popleft()]
                self.samples_consumed += self._share.global_batch
                yield batches
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, position: int) -> Batch:
        entry = self._entries[self._order.at(position)]
        single = _single(
            self._reader, entry, self._window, self._views, self._volumes, self._labels, self._reference_quantiles
        )
        if self._unpaired is None:
            return single
        return replace(single, unpaired=self._unpaired.read(position, entry.subject, self._window))


def load_batch(
    reader: SampleReader,
    entries: list[Entry],
    window: Window,
    views: Sequence[int],
    *,
    volumes: bool = True,
    labels: bool = False,
    reference_quantiles: Sequence[Quantiles] = (),
) -> Batch:
    """A batch of exactly these samples; see `BatchStream` for the arguments."""
    return _joined([_single(reader, entry, window, views, volumes, labels, reference_quantiles) for entry in entries])


def _single(
    reader: SampleReader,
    entry: Entry,
    window: Window,
    views: Sequence[int],
    volumes: bool,
    labels: bool,
    reference_quantiles: Sequence[Quantiles],
) -> Batch:
    """One sample as a network sees it: volume in the window's [0, 1], the chosen views finished (see `histogram`).

    Stored radiographs are standardized already; a second time changes nothing.
    """
    truth = _volume(reader, entry, window) if volumes else None
    stored = reader.read_array(entry, "radiographs")
    levels: Sequence[Quantiles | None] = reference_quantiles or [None] * len(views)
    finished = [standardize_and_match(stored[view], quantiles) for view, quantiles in zip(views, levels, strict=True)]
    images = torch.from_numpy(np.stack(finished))
    marks = torch.from_numpy(reader.read_array(entry, "labels"))[None, None] if labels else None
    return Batch(truth, images[None], (entry.id,), marks)


def _volume(reader: SampleReader, entry: Entry, window: Window) -> Float[Tensor, "1 1 d h w"]:
    return window.to_unit(torch.from_numpy(reader.read_array(entry, "volumes").astype(np.float32)))[None, None]


def _joined(singles: list[Batch]) -> Batch:
    """Samples as one batch, in order."""

    def together(tensors: list[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(there) if there else None

    return Batch(
        together([single.ground_truth for single in singles]),
        torch.cat([single.views for single in singles]),
        tuple(name for single in singles for name in single.ids),
        together([single.labels for single in singles]),
        together([single.unpaired for single in singles]),
    )
