"""The inputs of a run: its archive, the archive of unpaired CT volumes, and checks that they fit the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import ray
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raylift import __version__
from raylift.datasets.archive.archive import Archive
from raylift.datasets.augmentation.augmentation import Augmenter, require_cone_beam
from raylift.datasets.errors import ConfigError
from raylift.datasets.intensity import normalize
from raylift.datasets.radiographs.histogram import ReferenceHistograms, mean_quantiles
from raylift.datasets.serialization import to_plain
from raylift.datasets.streaming.order import BatchPartition, SampleOrder
from raylift.datasets.streaming.stream import BatchStream, CachedReader, UnpairedVolumes, load_batch
from raylift.datasets.streaming.streamed_phantoms import StreamedPhantoms
from raylift.models import baselines
from raylift.models.baselines import FittedBaselines
from raylift.models.objectives.objective import Objective
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description
from raylift.platform import model_store
from raylift.platform.config import RunConfig
from raylift.platform.training import initial_weights

MAX_REFERENCE_SAMPLES = 256
"""Number of samples whose digitally reconstructed radiographs (DRRs) give the reference of histogram matching; the mean
changes little with more."""
MAX_BASELINE_VOLUMES = 256
"""Number of volumes that the trivial baselines are fitted to, evenly spaced in the train split. The mean squared error
of the mean of n volumes is that of the exact mean times 1 + 1/n, so more would gain less than 0.02 dB."""
ALL_VIEWS = "all"
"""Value of `system.views` that selects every view of the archive, in its order."""
CPU = torch.device("cpu")
UNPAIRED = 1
"""Makes the seed of the order of unpaired volumes differ from the run's own."""


def open_stream(
    archive: Archive,
    run: RunConfig,
    description: Description,
    share: BatchPartition,
    samples_consumed: int = 0,
    device: torch.device = CPU,
) -> BatchStream:
    """This worker's stream of batches, at the position after `samples_consumed` samples.

    Augmented samples are computed on `device` and stay there.
    """
    cache_bytes = int(run.data.cache_gib * 2**30)
    unpaired = None
    if run.data.unpaired:
        # Two readers share the cache of a worker.
        cache_bytes //= 2
        others = Archive(run.data.unpaired, run.data.unpaired_snapshot)
        entries = others.entries("train")
        seed = int(np.random.SeedSequence([run.train.seed, UNPAIRED]).generate_state(1)[0])
        unpaired = UnpairedVolumes(CachedReader(others, cache_bytes), entries, SampleOrder(len(entries), seed))
    entries, data, seed = archive.entries("train"), run.data, run.train.seed
    grid, geometry = archive.manifest.grid, archive.manifest.geometry
    augmenter = None
    if data.augmentation.enabled:
        augmenter = Augmenter(data.augmentation, seed, grid, description.geometry, device, data.normalization)
    phantoms = StreamedPhantoms(data.phantoms_per_epoch, seed, grid, geometry) if data.phantoms_per_epoch else None
    stream = BatchStream(
        CachedReader(archive, cache_bytes),
        entries,
        SampleOrder(data.ct_repeats * len(entries) + data.phantoms_per_epoch, seed),
        share,
        run.data.window,
        views=view_indices(archive, run),
        volumes=run.system.supervision == "volumes",
        labels=run.system.needs_labels,
        reference_quantiles=description.reference_quantiles,
        normalization=run.data.normalization,
        unpaired=unpaired,
        augmenter=augmenter,
        phantoms=phantoms,
        threads=data.threads,
        prefetch_batches=data.prefetch_batches,
    )
    stream.samples_consumed = samples_consumed
    return stream


def notes(run: RunConfig, objective: Objective) -> tuple[str, ...]:
    """Remarks for the log: the objective's, and one on masks of the field of view that it does not use."""
    url, snapshot = run.data.archive, run.data.snapshot
    if run.system.supervision != "volumes":
        url, snapshot = run.data.unpaired, run.data.unpaired_snapshot
    if objective.masks_field_of_view or not url:
        return objective.notes
    entries = Archive(url, snapshot).entries("train")
    masked = sum(entry.has_field_of_view_mask for entry in entries)
    if not masked:
        return objective.notes
    return *objective.notes, (
        f"system {run.system.name} does not mask the field of view: for {masked} of {len(entries)} training scans with "
        "a mask, its losses include the air beyond it"
    )


def with_archive_views(run: RunConfig) -> RunConfig:
    """The run with the names of the archive's views where `system.views` is `all`."""
    has_own_views = any(field.name == "views" for field in fields(run.system))
    if not has_own_views or run.system.views != (ALL_VIEWS,):
        return run
    views = Archive(run.data.archive, run.data.snapshot).manifest.geometry.views
    selected: dict[str, Any] = {"views": tuple(view.name for view in views)}
    return replace(run, system=replace(run.system, **selected))


def with_snapshots(run: RunConfig) -> RunConfig:
    """The run with the numbers of the archives' newest snapshots where these are `latest`."""
    data = run.data
    selected: dict[str, Any] = {"snapshot": Archive(data.archive, data.snapshot).manifest.snapshot}
    if data.unpaired:
        selected["unpaired_snapshot"] = Archive(data.unpaired, data.unpaired_snapshot).manifest.snapshot
    return replace(run, data=replace(data, **selected))


def archive_digests(run: RunConfig) -> dict[str, str]:
    """The digest of the manifest of each archive of a run, by its setting."""
    digests = {"data.archive": Archive(run.data.archive, run.data.snapshot).manifest.sha256()}
    if run.data.unpaired:
        others = Archive(run.data.unpaired, run.data.unpaired_snapshot)
        digests["data.unpaired"] = others.manifest.sha256()
    return digests


def require_archives(run: RunConfig, expected: dict[str, str]) -> None:
    """Check that the archives hold the samples that the run began with.

    Raises:
        ConfigError: names the archive that does not.
    """
    current = archive_digests(run)
    for setting, url in (("data.archive", run.data.archive), ("data.unpaired", run.data.unpaired)):
        if setting in expected and current.get(setting) != expected[setting]:
            raise ConfigError(
                f"{url} does not hold the samples that this run began with (snapshot "
                f"{run.data.snapshot if setting == 'data.archive' else run.data.unpaired_snapshot}, SHA-256 "
                f"{expected[setting]}): restore the archive, or start a new run"
            )


def view_indices(archive: Archive, run: RunConfig) -> list[int]:
    """Indices of the system's views among the archive's."""
    names = [view.name for view in archive.manifest.geometry.views]
    missing = [view for view in run.system.views if view not in names]
    if missing:
        raise ConfigError(
            f"{archive.url} has the views {', '.join(names)}, not {', '.join(missing)}: pass --system.views with names "
            "of the archive's views, or all"
        )
    return [names.index(view) for view in run.system.views]


def describe(run: RunConfig, archive: Archive, resume_from: str | None = None) -> Description:
    """The description of the trained network that is saved with its weights.

    A run that resumes from a checkpoint keeps the reference histograms and the record of the models that it started
    with, also if the archive or those models changed.
    """
    import deepspeed

    earlier = model_store.description_of(resume_from) if resume_from else None

    indices = view_indices(archive, run)
    geometry = archive.manifest.geometry
    versions = {"raylift": __version__, "torch": torch.__version__, "ray": ray.__version__}
    provenance: dict[str, Any] = {
        "archive": archive.url,
        "archive_snapshot": archive.manifest.snapshot,
        "archive_contents": archive.manifest.contents,
        "training_samples": [entry.id for entry in archive.entries("train")],
        "config": to_plain(run),
        "config_sha256": run.sha256(),
        "versions": {**versions, "deepspeed": deepspeed.__version__},
    }
    if run.data.unpaired:
        others = Archive(run.data.unpaired, run.data.unpaired_snapshot)
        provenance["unpaired"] = {
            "archive": others.url,
            "archive_snapshot": others.manifest.snapshot,
            "samples": [entry.id for entry in others.entries("train")],
        }
    started_with = earlier.provenance.get("initial_weights", {}) if earlier else initial_weights.record(run)
    if started_with:
        provenance["initial_weights"] = started_with
    histograms: ReferenceHistograms = {}
    if run.data.match_histograms:
        histograms = earlier.histograms if earlier else reference_histograms(archive, run, indices)
    return Description(
        system=run.system,
        grid=archive.manifest.grid,
        geometry=replace(geometry, views=tuple(geometry.views[index] for index in indices)),
        window=run.data.window,
        histograms=histograms,
        normalization=run.data.normalization,
        provenance=provenance,
    )


def training_data(
    archive: Archive, run: RunConfig, description: Description, resume_from: str | None = None
) -> TrainingData:
    """Digests of the training scans, and the trivial baselines, that are saved with the weights of a run.

    Scans are those of the train splits and of the models that the run started with. The baselines are fitted to the
    stored CT of the archive or, without CT, to the unpaired volumes if they have its geometry.
    """
    sources = [archive]
    if run.data.unpaired:
        sources.append(Archive(run.data.unpaired, run.data.unpaired_snapshot))
    scans = frozenset(entry.source_sha256 for source in sources for entry in source.entries("train"))
    earlier = model_store.load(resume_from).training_data if resume_from else None
    if earlier and scans <= earlier.scans:
        return earlier
    started_with = [earlier] if resume_from else initial_weights.training_data(run)
    known = [data for data in started_with if data]
    with_ct = (source for source in sources if source.manifest.contents == "volumes")
    source = next(
        (candidate for candidate in with_ct if candidate.manifest.geometry == archive.manifest.geometry), None
    )
    return TrainingData(
        scans.union(*(data.scans for data in known)),
        _fit_baselines(source, description, view_indices(archive, run)) if source else None,
        len(started_with) - len(known) + sum(data.unlisted for data in known),
    )


def _fit_baselines(source: Archive, description: Description, views: list[int]) -> FittedBaselines:
    entries = source.entries("train")
    batches = (
        load_batch(
            source,
            [entry],
            description.window,
            views,
            reference_quantiles=description.reference_quantiles,
            normalization=description.normalization,
        )
        for entry in entries[:: -(-len(entries) // MAX_BASELINE_VOLUMES)]
    )
    return baselines.fit(batches, description.grid, description.geometry)


def reference_histograms(archive: Archive, run: RunConfig, indices: Sequence[int]) -> ReferenceHistograms:
    """Mean quantiles of the train split's DRRs in these views; see `histogram_source`."""
    source = histogram_source(archive, run)
    entries = source.entries("train")[:MAX_REFERENCE_SAMPLES]
    stored = [source.read_array(entry, "radiographs") for entry in entries]
    views = archive.manifest.geometry.views
    return {views[k].name: mean_quantiles(normalize(images[k]) for images in stored) for k in indices}


def histogram_source(archive: Archive, run: RunConfig) -> Archive:
    """The archive to whose DRRs histograms are matched: the run's own if it has CT, else the unpaired one.

    Raises:
        ConfigError: neither has DRRs in the archive's geometry.
    """
    if archive.manifest.contents == "volumes":
        return archive
    others = Archive(run.data.unpaired, run.data.unpaired_snapshot) if run.data.unpaired else archive
    if others.manifest.contents != "volumes" or others.manifest.geometry != archive.manifest.geometry:
        raise ConfigError(
            f"data.match-histograms needs DRRs, and {archive.url} holds real radiographs: name an "
            "archive of CT with its geometry as data.unpaired, or turn data.match-histograms off"
        )
    return others


def check(run: RunConfig) -> Archive:
    """Check the inputs of a run before it starts, and return its archive.

    Raises:
        ConfigError: an archive does not fit the run or the system, or has no training or validation samples.
    """
    archive = Archive(run.data.archive, run.data.snapshot)
    check_size(archive, run)
    view_indices(archive, run)
    name = run.system.name
    if run.system.supervision == "volumes":
        archive.require_volumes(f"system {name} is supervised by volumes and")
        if run.data.unpaired:
            raise ConfigError(
                f"system {name} is supervised by the volumes of {archive.url} and uses no others: leave data.unpaired "
                "empty, or choose a system supervised by radiographs"
            )
    for split in ("train", "val"):
        if not archive.entries(split):
            raise ConfigError(f"{archive.url} has no sample in the {split} split: ingest more subjects")
    if run.data.unpaired:
        others = Archive(run.data.unpaired, run.data.unpaired_snapshot)
        others.require_volumes("data.unpaired")
        check_size(others, run)
        if others.manifest.grid != archive.manifest.grid:
            raise ConfigError(
                f"{others.url} holds {others.manifest.grid}, {archive.url} is for {archive.manifest.grid}"
            )
        if not others.entries("train"):
            raise ConfigError(f"{others.url} has no sample in the train split: ingest more subjects")
    if run.data.match_histograms:
        histogram_source(archive, run)
    if run.data.augmentation.enabled:
        archive.require_volumes("data.augmentation")
        require_cone_beam(archive.manifest.geometry)
    if run.data.phantoms_per_epoch:
        archive.require_volumes("data.phantoms_per_epoch")
    return archive


def check_size(archive: Archive, run: RunConfig) -> None:
    """Raise a ConfigError if an archive's volumes are not of the run's size."""
    size = archive.manifest.grid.size
    if size != run.data.size:
        contents = "holds volumes" if archive.manifest.contents == "volumes" else "is for volumes"
        raise ConfigError(
            f"{archive.url} {contents} of {size} voxels per side, the run has data.size {run.data.size}: "
            f"pass --data.size {size} or use another archive"
        )


def check_network(run: RunConfig, archive: Archive) -> None:
    """Raise a ConfigError if no network can be built for the archive's voxels. No memory is used for weights."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        run.system.objective(archive.manifest.grid, archive.manifest.geometry, run.data.window)
