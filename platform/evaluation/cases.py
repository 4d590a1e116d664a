"""The metrics of every scan of a comparison, computed in this process or by Ray actors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float32
from ray.exceptions import RayActorError, RayTaskError
from ray.util import ActorPool

from raylift import __version__
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.augmentation.perturbation import PERTURBATIONS
from raylift.datasets.errors import WorkersLostError
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.datasets.segmentation import Label
from raylift.platform import cluster
from raylift.platform.evaluation.case_cache import CaseCache
from raylift.platform.evaluation.predictors import Predictor
from raylift.platform.evaluation.protocols import PROTOCOLS, ProtocolName
from raylift.platform.evaluation.results import Case, Images, thumbnails
from raylift.platform.evaluation.robustness import SEED, RobustnessEvaluator

Scan = tuple[str, Archive, Entry]
"""Label, archive and entry."""
Progress = Callable[[int, int, str], None]
"""Called with the number of finished scans, the number of all, and the name of one that is not finished."""
MAX_RESTARTS = 2
"""How often a lost actor is started again and repeats its scan."""


@dataclass(frozen=True)
class CaseEvaluator:
    """Everything that the metrics of a comparison's scans depend on; can be sent to another process."""

    scans: Sequence[Scan]
    plotted: frozenset[int]
    """Indices of the scans with images."""
    candidates: Sequence[Predictor]
    """Their volumes are in the images and thumbnails."""
    baselines: Sequence[Predictor]
    protocols: Sequence[ProtocolName]
    has_ct: bool
    robustness: RobustnessEvaluator | None = None
    """If given, metrics under perturbations of the radiographs too."""
    ptx: bool = False
    """Whether the pneumothorax is measured too."""
    segmenter: Segmenter = THRESHOLDS
    """Finds the lungs of every volume."""

    @property
    def measured(self) -> tuple[str, ...]:
        """The protocols, with those that are not chosen by name."""
        return (*self.protocols, *(["segmentation"] if self.has_ct else []), *(["pneumothorax"] if self.ptx else []))

    def evaluate(self, index: int) -> Case:
        """The metrics of one scan, its thumbnails and, if it is plotted, images; volumes are not kept."""
        label, archive, entry = self.scans[index]
        ground_truth = read_ground_truth(archive, entry) if self.has_ct else None
        first = [predictor.predict(archive, entry, ground_truth) for predictor in self.candidates]
        outcomes = [*first, *(predictor.predict(archive, entry, ground_truth) for predictor in self.baselines)]
        predictions = {
            name: replace(prediction, segmenter=self.segmenter)
            for outcome in outcomes
            for name, prediction in outcome.predictions.items()
        }
        shown = [name for outcome in first for name in outcome.predictions]
        return Case(
            label,
            entry.subject,
            archive.url,
            {
                name: {key: PROTOCOLS[key].evaluate(value) for key in self.measured}
                for name, value in predictions.items()
            },
            {name: residuals for outcome in outcomes for name, residuals in outcome.residuals.items()},
            {name: seconds for outcome in outcomes for name, seconds in outcome.seconds.items()},
            Images.of(predictions, shown) if index in self.plotted else None,
            thumbnails(predictions, shown),
            (*(note for outcome in outcomes for note in outcome.notes), *_about_mask(label, ground_truth)),
            self.robustness.evaluate(archive, entry, ground_truth)
            if self.robustness and ground_truth is not None
            else {},
        )

    def keys(self) -> list[str]:
        """A digest for each scan of everything that its result depends on."""
        predictors = [predictor.fingerprint for predictor in (*self.candidates, *self.baselines)]
        versions = (__version__, torch.__version__, np.__version__, torch.get_num_threads())
        perturbed = (SEED, PERTURBATIONS) if self.robustness else ()
        # The name has the version of the package, the representation the whole digest of the weights.
        segmenter = (self.segmenter.name, self.segmenter)
        shared = hashlib.sha256(repr((predictors, *self.measured, segmenter, versions, perturbed)).encode())
        keys = []
        for index, (label, archive, entry) in enumerate(self.scans):
            total = shared.copy()
            total.update(repr((label, archive.url, archive.manifest.geometry, entry, index in self.plotted)).encode())
            keys.append(total.hexdigest()[:32])
        return keys


def read_ground_truth(archive: Archive, entry: Entry) -> Float32[np.ndarray, "d h w"]:
    """The CT in HU; NaN outside its field of view if the archive has a mask of it."""
    hu: Float32[np.ndarray, "d h w"] = archive.read_array(entry, "volumes").astype(np.float32)
    if entry.has_field_of_view_mask:
        hu[archive.read_array(entry, "labels") == Label.OUTSIDE_FIELD_OF_VIEW] = np.nan
    return hu


def _about_mask(label: str, ground_truth: Float32[np.ndarray, "d h w"] | None) -> list[str]:
    """A sentence on voxels that metrics and figures leave out."""
    outside = 0.0 if ground_truth is None else float(np.isnan(ground_truth).mean())
    masked = f"{label}: the {outside:.1%} of voxels outside the field of view are in no metric and blank in figures"
    return [masked] if outside else []


def evaluate(evaluator: CaseEvaluator, workers: int, cache: CaseCache | None, progress: Progress) -> list[Case]:
    """The metrics of every scan, in order.

    Args:
        evaluator: the scans and what they are evaluated by.
        workers: 1 for this process; more for as many Ray actors, with as many PyTorch threads as this process has.
        cache: scans that are finished are taken from it, others are added to it.
        progress: called after each scan.

    Raises:
        ClusterTooSmallError: the cluster has fewer CPUs than the actors have threads.
        WorkersLostError: actors ended too often.
    """
    keys = evaluator.keys() if cache else []
    cases = {index: case for index, key in enumerate(keys) if cache and (case := cache.load(key))}
    remaining = [index for index in range(len(evaluator.scans)) if index not in cases]

    def show() -> None:
        unfinished = next((evaluator.scans[index][0] for index in remaining if index not in cases), "")
        progress(len(cases), len(evaluator.scans), unfinished)

    show()
    results = ((index, evaluator.evaluate(index)) for index in remaining)
    for index, case in results if workers == 1 or not remaining else _distributed(evaluator, remaining, workers):
        cases[index] = case
        if cache:
            cache.save(keys[index], case)
        show()
    return [cases[index] for index in range(len(evaluator.scans))]


class _Worker:
    """An actor, which loads every model once."""

    def __init__(self, threads: int) -> None:
        # The last digits of a result depend on the number of threads.
        torch.set_num_threads(threads)
        self._evaluator: CaseEvaluator | None = None

    def evaluate(self, shared: list[ray.ObjectRef[CaseEvaluator]], index: int) -> tuple[int, Case]:
        """Index and metrics of a scan; `shared` is in a list so that Ray does not load it for each of them."""
        self._evaluator = self._evaluator or ray.get(shared[0])
        return index, self._evaluator.evaluate(index)


def _distributed(evaluator: CaseEvaluator, indices: list[int], workers: int) -> Iterator[tuple[int, Case]]:
    """Index and metrics of scans in the order in which actors finish them."""
    cluster.connect()
    threads, count = torch.get_num_threads(), min(workers, len(indices))
    cluster.require_resources(
        count * threads, 0, f"a comparison by {count} workers of {threads} threads", "--workers or OMP_NUM_THREADS"
    )
    options = {"num_cpus": threads, "max_restarts": MAX_RESTARTS, "max_task_retries": MAX_RESTARTS}
    kind: Any = ray.remote(_Worker).options(**options)
    shared = [ray.put(evaluator)]
    actors = [kind.remote(threads) for _ in range(count)]
    pool: Any = ActorPool(actors)
    try:
        yield from pool.map_unordered(lambda actor, index: actor.evaluate.remote(shared, index), indices)
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise WorkersLostError(
            f"workers were lost ({str(error).splitlines()[0]}): the same command continues with the scans that remain"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)
