"""An archive as an endless stream of batches: each worker prefetches its own samples in threads.

The stream is a pure function of the archive, the seed and the position (see `order`), so its state is one number: the
samples that all workers together have consumed. Any number of workers can resume from it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.archive.entry import Entry
from raylift.datasets.augmentation.augmentation import Augmenter
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.intensity import Normalization, Window
from raylift.datasets.radiographs.histogram import Quantiles, match_histogram, normalize_and_match
from raylift.datasets.streaming.order import BatchPartition, SampleOrder
from raylift.datasets.streaming.streamed_phantoms import StreamedPhantoms

ReadArray = Callable[[str], np.ndarray]
"""One array of a sample by its name: volumes, radiographs or labels."""


@runtime_checkable
class SampleReader(Protocol):
    """Reads samples: an archive, or a wrapper around one."""

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """One stored array of a manifest entry: volumes, radiographs or labels."""
        ...


class CachedReader:
    """A thread-safe reader with a cache of the most recently used arrays, up to a number of bytes."""

    def __init__(self, inner: SampleReader, max_bytes: int) -> None:
        self._inner = inner
        self._max_bytes = max_bytes
        self._cache: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read_array(self, entry: Entry, name: str) -> np.ndarray:
        """The array, from the cache if possible."""
        key = entry.id, name
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        array = self._inner.read_array(entry, name)
        with self._lock:
            if array.nbytes <= self._max_bytes and key not in self._cache:
                self._cache[key] = array
                self._bytes += array.nbytes
                while self._bytes > self._max_bytes:
                    _, dropped = self._cache.popitem(last=False)
                    self._bytes -= dropped.nbytes
        return array


@dataclass(frozen=True)
class UnpairedVolumes:
    """CT of other subjects, in an order that depends on the position in the stream only."""

    reader: SampleReader
    entries: list[Entry]
    order: SampleOrder

    def read(self, position: int, subject: str, window: Window) -> Float[Tensor, "1 1 d h w"]:
        """The volume for a position: the one in order, or the next one that is not of the same subject."""
        first = self.order.at(position)
        rotated = self.entries[first:] + self.entries[:first]
        entry = next((entry for entry in rotated if entry.subject != subject), None)
        if entry is None:
            raise ConfigError(f"all unpaired volumes are of {subject}, who is in the batch: ingest more subjects")
        return _volume(partial(self.reader.read_array, entry), window)


class BatchStream:
    """Endless micro-batches of one worker.

    Each item is the list of the worker's micro-batches in one global batch. `samples_consumed` counts samples of all
    workers up to the last item handed out; set it before iterating to resume there.

    Args:
        reader: source of the samples, called from threads.
        entries: the samples that `order` indexes, each once or equally often, before the phantoms of an epoch.
        order: the sample at each position.
        partition: the positions of this worker.
        window: the HU range that maps to [0, 1].
        views: indices of the radiographs in the archive's geometry.
        volumes: whether batches have ground-truth CT.
        labels: whether batches have labels; with volumes they have them too where one masks its field of view.
        reference_quantiles: quantiles for histogram matching, one per view; empty to leave it out.
        normalization: how radiographs are scaled to [0, 1].
        unpaired: CT of other subjects, one per sample.
        augmenter: makes a new pair of each volume in place of the stored radiographs; unpaired CT is as stored.
        phantoms: the samples that `order` indexes after the entries; None for none.
        threads: number of reader threads.
        prefetch_batches: global batches that are read ahead.
    """

    def __init__(
        self,
        reader: SampleReader,
        entries: list[Entry],
        order: SampleOrder,
        partition: BatchPartition,
        window: Window,
        *,
        views: Sequence[int] = (0, 1),
        volumes: bool = True,
        labels: bool = False,
        reference_quantiles: Sequence[Quantiles] = (),
        normalization: Normalization = "percentiles",
        unpaired: UnpairedVolumes | None = None,
        augmenter: Augmenter | None = None,
        phantoms: StreamedPhantoms | None = None,
        threads: int = 2,
        prefetch_batches: int = 2,
    ) -> None:
        self.samples_consumed = 0
        self._reader = reader
        self._entries = entries
        self._order = order
        self._partition = partition
        self._window = window
        self._views = views
        self._volumes = volumes
        self._labels = _need_labels(entries, volumes, labels)
        self._reference_quantiles = reference_quantiles
        self._normalization = normalization
        self._unpaired = unpaired
        self._augmenter = augmenter
        self._phantoms = phantoms
        self._threads = threads
        self._prefetch_batches = prefetch_batches

    @property
    def epochs_consumed(self) -> float:
        """Epochs of all workers until now."""
        return self.samples_consumed / self._order.count

    def __iter__(self) -> Iterator[list[Batch]]:
        start = self.samples_consumed
        queue: deque[list[list[Future[Batch]]]] = deque()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="raylift-read")
        try:
            while True:
                while len(queue) <= self._prefetch_batches:
                    queue.append(
                        [[pool.submit(self._load, p) for p in micro] for micro in self._partition.positions(start)]
                    )
                    start += self._partition.global_batch
                batches = [_collate([future.result() for future in micro]) for micro in queue.popleft()]
                self.samples_consumed += self._partition.global_batch
                yield batches
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, position: int) -> Batch:
        name, subject, read = self._sample(position)
        if self._augmenter is None:
            single = _single(
                name,
                read,
                self._window,
                self._views,
                self._volumes,
                self._labels,
                self._reference_quantiles,
                self._normalization,
            )
        else:
            single = self._augmented(name, read, self._augmenter, position)
        if self._unpaired is None:
            return single
        return replace(single, unpaired=self._unpaired.read(position, subject, self._window))

    def _sample(self, position: int) -> tuple[str, str, ReadArray]:
        """Id, subject and arrays of the entry or phantom at a position."""
        index = self._order.at(position)
        stored = self._order.count - (self._phantoms.count if self._phantoms else 0)
        if self._phantoms and index >= stored:
            phantom = self._phantoms.at(self._order.epoch(position), index - stored)
            return phantom.id, phantom.id, phantom.read
        entry = self._entries[index % len(self._entries)]
        return entry.id, entry.subject, partial(self._reader.read_array, entry)

    def _augmented(self, name: str, read: ReadArray, augmenter: Augmenter, position: int) -> Batch:
        """A new pair of the sample's volume, on the augmenter's device."""
        labels = read("labels") if self._labels else None
        hu, images, labels_of_pair = augmenter(read("volumes"), labels, self._order.epoch(position), position)
        if self._reference_quantiles:
            matched = [
                match_histogram(image, reference)
                for image, reference in zip(images[0].cpu().numpy(), self._reference_quantiles, strict=True)
            ]
            images = torch.from_numpy(np.stack(matched))[None].to(images.device)
        return Batch(self._window.to_unit(hu) if self._volumes else None, images, (name,), labels_of_pair)


def load_batch(
    reader: SampleReader,
    entries: list[Entry],
    window: Window,
    views: Sequence[int],
    *,
    volumes: bool = True,
    labels: bool = False,
    reference_quantiles: Sequence[Quantiles] = (),
    normalization: Normalization = "percentiles",
) -> Batch:
    """A batch of the given samples; see `BatchStream` for the arguments."""
    labels = _need_labels(entries, volumes, labels)
    return _collate(
        [
            _single(
                entry.id,
                partial(reader.read_array, entry),
                window,
                views,
                volumes,
                labels,
                reference_quantiles,
                normalization,
            )
            for entry in entries
        ]
    )


def _need_labels(entries: Sequence[Entry], volumes: bool, labels: bool) -> bool:
    """Whether samples are read with labels, which all samples of a batch have or none."""
    return labels or (volumes and any(entry.has_field_of_view_mask for entry in entries))


def _single(
    name: str,
    read: ReadArray,
    window: Window,
    views: Sequence[int],
    volumes: bool,
    labels: bool,
    reference_quantiles: Sequence[Quantiles],
    normalization: Normalization,
) -> Batch:
    """One sample as a batch: the volume in the window's [0, 1], the radiographs normalized and optionally matched.

    Normalization is idempotent, so it does not change radiographs that are stored normalized.
    """
    ground_truth = _volume(read, window) if volumes else None
    stored = read("radiographs")
    references: Sequence[Quantiles | None] = reference_quantiles or [None] * len(views)
    prepared = [
        normalize_and_match(stored[view], reference, normalization)
        for view, reference in zip(views, references, strict=True)
    ]
    images = torch.from_numpy(np.stack(prepared))
    label_volume = torch.from_numpy(read("labels"))[None, None] if labels else None
    return Batch(ground_truth, images[None], (name,), label_volume)


def _volume(read: ReadArray, window: Window) -> Float[Tensor, "1 1 d h w"]:
    return window.to_unit(torch.from_numpy(read("volumes").astype(np.float32)))[None, None]


def _collate(singles: list[Batch]) -> Batch:
    """Concatenate batches in order."""

    def concatenate(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Batch(
        concatenate([single.ground_truth for single in singles]),
        torch.cat([single.radiographs for single in singles]),
        tuple(name for single in singles for name in single.ids),
        concatenate([single.labels for single in singles]),
        concatenate([single.unpaired for single in singles]),
    )
