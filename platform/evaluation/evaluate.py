"""Evaluation of a checkpoint on held-out scans, under named protocols, beside two trivial baselines."""

from __future__ import annotations

import platform as machine
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from raylift import __version__
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import Split
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, consistency
from raylift.models.generative import SamplingFlags
from raylift.models.reconstruction import reconstruct
from raylift.models.weights import Model
from raylift.platform.evaluation.protocols import PROTOCOLS, Prediction, ProtocolName, default_protocols
from raylift.platform.evaluation.results import FITTED, MODEL, Case, Evaluation


def evaluate(
    model: Model,
    archive: Archive,
    *,
    split: Split = "test",
    protocols: Sequence[ProtocolName] = (),
    command: str = "",
    consistency_steps: int = 0,
    sampling: SamplingFlags | None = None,
    samples: int = 1,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Evaluation:
    """Reconstruct every scan of a split and compute its metrics, with the baselines fitted to the train split.

    Args:
        model: the model.
        archive: held-out data on the model's grid and in its geometry.
        split: the scans to use.
        protocols: by default all that compare volumes or, without CT, `reprojection`.
        command: the command line, for the provenance.
        consistency_steps: if not 0, the model's volumes are evaluated a second time after this number of steps of a
            fit to the radiographs (`raylift.models.consistency`).
        sampling: settings of a generative model.
        samples: number of samples of a generative model, whose mean is evaluated; each is fitted by itself.
        progress: called with the number of finished scans, the number of all, and the next scan's name.

    Raises:
        ConfigError: the archive's grid or geometry is not the model's, a protocol needs CT and it has none, the split
            or, with CT, the train split is empty, the steps are negative, or the model does not sample.
    """
    consistency.require_steps(consistency_steps)
    settings = (sampling or SamplingFlags()).resolve(model.network, samples)
    description = model.description
    views = matching_views(model, archive)
    entries = archive.entries(split)
    if not entries:
        raise ConfigError(f"{archive.url} has no sample in the {split} split")
    has_ct = archive.manifest.contents == "volumes"
    protocols = tuple(protocols) or default_protocols(has_ct)
    for name in protocols:
        if PROTOCOLS[name].needs_ct:
            archive.require_volumes(f"protocol {name}")
    if has_ct and not archive.entries("train"):
        raise ConfigError(
            f"{archive.url} has no sample in the train split, to which the trivial baselines are fitted: add training "
            "scans to it"
        )
    window, frame = description.window, (description.grid, description.geometry)
    fitted = baselines.fit(_batches(archive, model, views), *frame) if has_ct else baselines.unfitted(*frame)
    cases, seconds = [], 0.0
    for done, entry in enumerate(entries):
        progress(done, len(entries), entry.id)
        batch = load_batch(
            archive,
            [entry],
            window,
            views,
            volumes=has_ct,
            reference_quantiles=description.reference_quantiles,
            normalization=description.normalization,
        )
        ground_truth = archive.read_array(entry, "volumes").astype(np.float32) if has_ct else None
        (reconstruction,) = reconstruct(
            model.network,
            batch.views,
            window,
            *frame,
            sampling=settings,
            samples=[samples],
            consistency_steps=consistency_steps,
        )
        seconds += reconstruction.prediction_time_s
        volumes = {MODEL: reconstruction.predicted[None]}
        if reconstruction.fitted is not None:
            volumes[FITTED] = reconstruction.fitted[None]
        with torch.no_grad():
            volumes |= {name: baseline(batch.views).float() for name, baseline in fitted.items()}
        predictions = {
            name: Prediction(volume, ground_truth, batch.views, description) for name, volume in volumes.items()
        }
        metrics = {
            predictor: {
                name: PROTOCOLS[name].evaluate(prediction)
                for name in (*protocols, *(["segmentation"] if has_ct else []))
            }
            for predictor, prediction in predictions.items()
        }
        hu = {name: prediction.hu for name, prediction in predictions.items()}
        cases.append(Case(entry, ground_truth, batch.views[0].numpy(), hu, metrics, reconstruction.residuals))
    progress(len(entries), len(entries), "")
    provenance = _provenance(model, archive, command)
    if settings:
        provenance["sampling"] = {**vars(settings), "samples": samples}
    if consistency_steps:
        provenance["consistency"] = {"steps": consistency_steps, "strength": consistency.STRENGTH}
    return Evaluation(cases, protocols, split, provenance, seconds / len(entries))


def matching_views(model: Model, archive: Archive) -> list[int]:
    """Indices of the model's views among the archive's, if both have the same geometry.

    Raises:
        ConfigError: grid, distances, detector, attenuation or views differ.
    """
    description, manifest = model.description, archive.manifest
    if description.grid != manifest.grid:
        raise ConfigError(f"the model was trained on {description.grid}, {archive.url} holds {manifest.grid}")
    missing = [view for view in description.geometry.views if view not in manifest.geometry.views]
    compared = {"source_axis_mm", "source_detector_mm", "detector_px", "detector_pitch_mm", "beam", "attenuation"}
    differ = [
        name for name in sorted(compared) if getattr(description.geometry, name) != getattr(manifest.geometry, name)
    ]
    if missing or differ:
        what = differ or [view.name for view in missing]
        raise ConfigError(
            f"{archive.url} has another geometry than the model's training data ({', '.join(what)} differ): "
            "ingest it with the model's geometry"
        )
    return [manifest.geometry.views.index(view) for view in description.geometry.views]


def _batches(archive: Archive, model: Model, views: list[int]) -> Iterator[Batch]:
    description = model.description
    for entry in archive.entries("train"):
        yield load_batch(
            archive,
            [entry],
            description.window,
            views,
            reference_quantiles=description.reference_quantiles,
            normalization=description.normalization,
        )


def _provenance(model: Model, archive: Archive, command: str) -> dict[str, Any]:
    training = model.description.provenance.get("config", {}).get("train", {})
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "system": model.description.system.name,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "model_sha256": model.sha256,
        "config_sha256": model.description.provenance.get("config_sha256", ""),
        "archive": archive.url,
        "archive_generation": archive.manifest.generation,
        "grid": f"{archive.manifest.grid.size}^3 at {archive.manifest.grid.spacing_mm:g} mm",
        "training": {
            "steps": model.description.provenance.get("step", training.get("steps", "?")),
            "batch_size": training.get("batch_size", "?"),
            "volumes": len(model.description.provenance.get("training_samples", [])),
        },
        "seed": training.get("seed", "?"),
        "command": command,
        "versions": {"raylift": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{machine.system()} {machine.machine()}, {torch.get_num_threads()} threads",
    }
