"""Evaluation of a model on held-out scans, under named protocols, beside two trivial baselines."""

from __future__ import annotations

import platform as machine
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from raylift import __version__
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.manifest import Entry
from raylift.datasets.archive.splits import SplitChoice
from raylift.datasets.errors import ConfigError
from raylift.models import consistency
from raylift.models.generative import SamplingFlags
from raylift.models.weights import Model
from raylift.platform.evaluation.predictors import ModelPredictor, Outcome, matching_views, trivial_baselines
from raylift.platform.evaluation.protocols import PROTOCOLS, ProtocolName, default_protocols
from raylift.platform.evaluation.results import MODEL, Case, Evaluation, Images

MAX_CASES_PLOTTED = 4


def evaluate(
    model: Model,
    *archives: Archive,
    split: SplitChoice = "test",
    include_training_scans: bool = False,
    protocols: Sequence[ProtocolName] = (),
    command: str = "",
    consistency_steps: int = 0,
    sampling: SamplingFlags | None = None,
    samples: int = 1,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Evaluation:
    """Reconstruct every scan of a split and compute its metrics, beside the baselines of the model's training data.

    Args:
        model: the model.
        archives: scans on the model's grid and in its geometry, all with CT or all without.
        split: the scans to use.
        include_training_scans: evaluate subjects that the model was trained on too, which are left out otherwise.
        protocols: by default all that compare volumes or, without CT, `reprojection`.
        command: the command line, for the provenance.
        consistency_steps: if not 0, the model's volumes are evaluated a second time after this number of steps of a
            fit to the radiographs (`raylift.models.consistency`).
        sampling: settings of a generative model.
        samples: number of samples of a generative model, whose mean is evaluated; each is fitted by itself.
        progress: called with the number of finished scans, the number of all, and the next scan's name.

    Raises:
        ConfigError: the archive's grid or geometry is not the model's, a protocol needs CT and it has none, no scan
            remains, the steps are negative, or the model does not sample.
    """
    predictor = ModelPredictor(MODEL, model, sampling, samples, consistency_steps)
    for archive in archives:
        matching_views(model.description, archive)
    has_ct = _have_ct(archives)
    protocols = tuple(protocols) or default_protocols(has_ct)
    for name in protocols:
        if PROTOCOLS[name].needs_ct:
            for archive in archives:
                archive.require_volumes(f"protocol {name}")
    trained_on = model.training_data.scans if model.training_data else frozenset()
    scans, notes = _select(archives, split, trained_on, include_training_scans)
    held_out = archives if has_ct and split in ("val", "test") else ()
    trivial, note = trivial_baselines(model, held_out)
    notes += [*([note] if note else []), *_unlisted(model)]
    plotted = set(np.linspace(0, len(scans) - 1, min(MAX_CASES_PLOTTED, len(scans))).astype(int).tolist())
    cases = []
    for done, (label, archive, entry) in enumerate(scans):
        progress(done, len(scans), label)
        ground_truth = archive.read_array(entry, "volumes").astype(np.float32) if has_ct else None
        outcomes = [one.predict(archive, entry, ground_truth) for one in (predictor, trivial)]
        cases.append(_case(label, archive, outcomes, protocols, has_ct, plotted=done in plotted))
    progress(len(scans), len(scans), "")
    provenance = _provenance(model, archives, command)
    if predictor.sampling:
        provenance["sampling"] = {**vars(predictor.sampling), "samples": samples}
    if consistency_steps:
        provenance["consistency"] = {"steps": consistency_steps, "strength": consistency.STRENGTH}
    return Evaluation(cases, protocols, split, has_ct, provenance, tuple(notes))


def _case(
    label: str,
    archive: Archive,
    outcomes: Sequence[Outcome],
    protocols: Sequence[ProtocolName],
    has_ct: bool,
    plotted: bool,
) -> Case:
    """The metrics of one scan and, if it is plotted, its images; volumes are not kept."""
    predictions = {name: one for outcome in outcomes for name, one in outcome.predictions.items()}
    chosen = (*protocols, *(["segmentation"] if has_ct else []))
    figures = {name: {key: PROTOCOLS[key].evaluate(one) for key in chosen} for name, one in predictions.items()}
    return Case(
        label,
        archive.url,
        figures,
        {name: residuals for outcome in outcomes for name, residuals in outcome.residuals.items()},
        {name: seconds for outcome in outcomes for name, seconds in outcome.seconds.items()},
        Images.of(predictions, outcomes[0].predictions.keys()) if plotted else None,
    )


def _have_ct(archives: Sequence[Archive]) -> bool:
    contents = {archive.manifest.contents for archive in archives}
    if len(contents) > 1:
        raise ConfigError(
            f"some of {', '.join(archive.url for archive in archives)} have CT and some have none: evaluate them apart"
        )
    return contents == {"volumes"}


def _select(
    archives: Sequence[Archive], split: SplitChoice, trained_on: frozenset[str], include_training_scans: bool
) -> tuple[list[tuple[str, Archive, Entry]], list[str]]:
    """Label, archive and entry of every scan to evaluate, and sentences on subjects that a model was trained on."""
    names = [PurePosixPath(archive.url).name for archive in archives]
    if len(set(names)) < len(names):
        names = [archive.url for archive in archives]
    selected: list[tuple[str, Archive, Entry]] = []
    notes = []
    for name, archive in zip(names, archives, strict=True):
        entries = archive.entries(None if split == "all" else split)
        which = "sample" if split == "all" else f"sample in the {split} split"
        if not entries:
            raise ConfigError(f"{archive.url} has no {which}")
        trained = {entry.subject for entry in archive.entries() if entry.source_sha256 in trained_on}
        contained = [entry for entry in entries if entry.subject in trained]
        if contained:
            subjects = sorted({entry.subject for entry in contained})
            text = ", ".join(subjects[:20]) + (f" and {len(subjects) - 20} more" if len(subjects) > 20 else "")
            verb = "are included" if include_training_scans else "are left out"
            notes.append(f"subjects of {archive.url} that the model was trained on {verb}: {text}")
        if not include_training_scans:
            entries = [entry for entry in entries if entry.subject not in trained]
        if not entries:
            raise ConfigError(
                f"the model was trained on every {which} of {archive.url}: choose another split or archive, or pass "
                "--include-training-scans"
            )
        selected += [(entry.id if len(archives) == 1 else f"{name}/{entry.id}", archive, entry) for entry in entries]
    return selected, notes


def _unlisted(model: Model) -> list[str]:
    """A sentence where a model may have been trained on scans that its training data do not list."""
    if model.training_data is None:
        return [
            f"the scans that this model of {model.description.system.name} was trained on are unknown, so none of them "
            "could be left out"
        ]
    if model.training_data.unlisted:
        return ["the training started with a model whose training scans are unknown, so none of them could be left out"]
    return []


def _provenance(model: Model, archives: Sequence[Archive], command: str) -> dict[str, Any]:
    training = model.description.provenance.get("config", {}).get("train", {})
    grid, data = model.description.grid, model.training_data
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "system": model.description.system.name,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "model_sha256": model.sha256,
        "config_sha256": model.description.provenance.get("config_sha256", ""),
        "archive": ", ".join(archive.url for archive in archives),
        "archive_generation": ", ".join(str(archive.manifest.generation) for archive in archives),
        "grid": f"{grid.size}^3 at {grid.spacing_mm:g} mm",
        "training": {
            "steps": model.description.provenance.get("step", training.get("steps", "?")),
            "batch_size": training.get("batch_size", "?"),
            "volumes": len(model.description.provenance.get("training_samples", [])),
        },
        "baselines": {"volumes": data.baselines.volumes if data and data.baselines else 0},
        "seed": training.get("seed", "?"),
        "command": command,
        "versions": {"raylift": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{machine.system()} {machine.machine()}, {torch.get_num_threads()} threads",
    }
