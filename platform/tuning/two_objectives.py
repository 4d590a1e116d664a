"""Two objectives of a search: quality and inference time of each trial's best checkpoint, and their Pareto set."""

from __future__ import annotations

import platform as machine
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import ray
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets import hashed_json
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.manifest import Contents
from raylift.datasets.archive.store import Folder
from raylift.datasets.batch import Batch
from raylift.datasets.choices import KeyOf
from raylift.datasets.errors import AlteredFileError, ConfigError
from raylift.datasets.intensity import Window
from raylift.datasets.serialization import from_plain, to_plain
from raylift.datasets.streaming.stream import load_batch
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.models.inference import predict
from raylift.models.metrics import VOLUME
from raylift.models.weights import Description
from raylift.platform import model_store
from raylift.platform.config import RunConfig
from raylift.platform.monitor import monitored
from raylift.platform.training.checkpoint import best_checkpoint

WARM_UP_PASSES, TIMED_PASSES = 2, 7
"""Forward passes on one sample before those that are timed, and the number of timed ones."""
MEASUREMENT_FILE = "objectives.json"
"""File of a trial's measurement in its folder."""
METRICS, MODES = ["quality", "inference_s"], ["max", "min"]
"""Names of both objectives in a measurement, and whether each is maximized."""

OBJECTIVES: dict[str, str] = {"psnr": "", "psnr-time": "PSNR, dB", "ssim-time": "SSIM"}
"""Name of the quality metric by the objectives of a search; empty for a single objective."""
Objectives = KeyOf[str, OBJECTIVES]


@dataclass(frozen=True)
class Measurement:
    """Quality and inference time of a trial's best checkpoint."""

    metric: str
    """`PSNR, dB` or `SSIM`."""
    quality: float
    """Validation PSNR, or mean SSIM over the validation samples by the protocol `volume`."""
    inference_s: float
    """Median inference time of one sample, in fp32."""
    device: str
    """Processor with the number of threads, or GPU."""

    def __str__(self) -> str:
        return f"{self.metric}: {self.quality:.4g}; inference time {self.inference_s:.4g} s"


def require_possible(objectives: Objectives, scheduler: str, contents: Contents | None = None) -> None:
    """Check that a search can have these objectives.

    Args:
        objectives: of the search.
        scheduler: of the search.
        contents: of its archive; by default any.

    Raises:
        ConfigError: with the option to change.
    """
    if OBJECTIVES[objectives] and scheduler != "none":
        raise ConfigError(
            f"{objectives} has two objectives, which are measured when a trial ends, and {scheduler} stops trials "
            "early: give --scheduler none"
        )
    if objectives == "ssim-time" and contents == "radiographs":
        raise ConfigError("SSIM is of volumes, and this archive has radiographs alone: give --objectives psnr-time")


def load(trial_url: str) -> Measurement | None:
    """The measurement of a trial; None if it has none yet.

    Raises:
        ConfigError: it was altered.
    """
    folder = Folder(trial_url)
    if not folder.exists(MEASUREMENT_FILE):
        return None
    try:
        return from_plain(Measurement, folder.read_hashed(MEASUREMENT_FILE), MEASUREMENT_FILE)
    except AlteredFileError as error:
        raise ConfigError(f"{error}. Restore it, or start a new search") from error


def measure(run: RunConfig, trial_url: str, objectives: Objectives) -> Measurement:
    """The measurement of a trained trial, by a task with the resources of a worker. A recorded one is returned."""
    if recorded := load(trial_url):
        return recorded
    resources = run.cluster
    task = ray.remote(_measure).options(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        # The placement group of a trial has the driver's resources alone.
        scheduling_strategy="DEFAULT",
    )
    measured: Measurement = ray.get(task.remote(run, trial_url, objectives))
    Folder(trial_url).write(MEASUREMENT_FILE, hashed_json.encode(to_plain(measured)))
    return measured


def _measure(run: RunConfig, trial_url: str, objectives: Objectives) -> Measurement:
    torch.set_num_threads(run.cluster.threads_per_worker)
    device = torch.device("cuda" if run.cluster.gpus_per_worker else "cpu")
    checkpoint, summary = best_checkpoint(trial_url)
    model = model_store.load(checkpoint)
    network, sampling = model.network.to(device), SamplingFlags().resolve(model.network)

    @torch.no_grad()
    def reconstruct(batch: Batch) -> Tensor:
        return predict(network, batch.radiographs.to(device), sampling)

    with_ct = objectives == "ssim-time"
    samples = _samples(run, model.description, count=run.train.validation_samples if with_ct else 1, volumes=with_ct)
    first = next(samples)
    seconds = median_seconds(lambda: reconstruct(first), device)
    if with_ct:
        scores = [ssim(reconstruct(batch), batch, model.description.window) for batch in chain([first], samples)]
        quality = statistics.fmean(scores)
    else:
        quality = summary["metrics"][monitored(summary["metrics"])]
    return Measurement(OBJECTIVES[objectives], quality, seconds, device_name(device))


def _samples(run: RunConfig, description: Description, count: int, volumes: bool) -> Iterator[Batch]:
    """The first samples of the val split, each a batch, with the window of the protocol `volume`."""
    archive = Archive(run.data.archive, run.data.snapshot)
    names = [view.name for view in archive.manifest.geometry.views]
    for entry in archive.entries("val")[:count]:
        yield load_batch(
            archive,
            [entry],
            VOLUME.window,
            [names.index(view.name) for view in description.geometry.views],
            volumes=volumes,
            reference_quantiles=description.reference_quantiles,
            normalization=description.normalization,
        )


def ssim(prediction: Float[Tensor, "1 1 d h w"], batch: Batch, window: Window) -> float:
    """SSIM by the protocol `volume` of a prediction in the [0, 1] of a window."""
    ground_truth = torch.where(batch.inside, VOLUME.window.to_hu(batch.volume), torch.nan)
    volumes = window.to_hu(prediction.cpu()), ground_truth
    return VOLUME.evaluate(*(volume[0, 0].numpy() for volume in volumes))["ssim"]


def median_seconds(reconstruct: Callable[[], object], device: torch.device) -> float:
    """Median time of `TIMED_PASSES` calls after `WARM_UP_PASSES` others, each synchronized with the device."""
    times = []
    for _ in range(WARM_UP_PASSES + TIMED_PASSES):
        synchronize(device)
        started = time.perf_counter()
        reconstruct()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP_PASSES:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has ended its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with the number of PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, machine.machine())}, threads: {torch.get_num_threads()}"


def is_pareto_optimal(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Whether no other point dominates each: has at least its quality and at most its time, not both equal."""
    known = [point for point in points if point is not None]

    def is_dominated(quality: float, seconds: float) -> bool:
        return any(q >= quality and s <= seconds and (q, s) != (quality, seconds) for q, s in known)

    return [point is not None and not is_dominated(*point) for point in points]


def cells(measurement: Measurement | None, pareto: bool) -> list[str]:
    """Quality, time and membership of the Pareto set in a row of a table."""
    if measurement is None:
        return ["none", "none", "no"]
    return [f"{measurement.quality:.4g}", f"{measurement.inference_s:.4g}", "yes" if pareto else "no"]


def devices(measurements: Iterable[Measurement | None]) -> str:
    """The devices of measurements, with a remark if there are several."""
    names = sorted({measurement.device for measurement in measurements if measurement})
    return "; ".join(names) + (": times on different devices are not comparable" if len(names) > 1 else "")
