"""Comparison of models and volumes on held-out scans, under named protocols, together with the trivial baselines."""

from __future__ import annotations

import platform as machine
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from raylift import __version__
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.splits import SplitChoice
from raylift.datasets.errors import ConfigError
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.models import consistency
from raylift.models.diffusion.diffusion_network import DiffusionNetwork, SamplingFlags
from raylift.models.weights import Model
from raylift.platform.evaluation.case_cache import CaseCache
from raylift.platform.evaluation.cases import CaseEvaluator, Progress, Scan
from raylift.platform.evaluation.cases import evaluate as evaluate_cases
from raylift.platform.evaluation.predictors import (
    ArchiveDescription,
    BaselinePredictor,
    FolderPredictor,
    InputDescription,
    ModelPredictor,
    matching_views,
    trivial_baselines,
)
from raylift.platform.evaluation.protocols import PROTOCOLS, ProtocolName, default_protocols
from raylift.platform.evaluation.ptx import require_comparable
from raylift.platform.evaluation.results import MODEL, Evaluation
from raylift.platform.evaluation.robustness import require_perturbable, robustness_of

MAX_CASES_PLOTTED = 4


def compare(
    candidates: Mapping[str, Model | Path],
    archives: Sequence[Archive],
    *,
    split: SplitChoice = "test",
    include_training_scans: bool = False,
    protocols: Sequence[ProtocolName] = (),
    reference: str = "",
    resample: bool = False,
    command: str = "",
    consistency_steps: int = 0,
    sampling: SamplingFlags | None = None,
    samples: int = 1,
    robustness: bool = False,
    ptx: bool = False,
    segmenter: Segmenter = THRESHOLDS,
    workers: int = 1,
    cache: CaseCache | None = None,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Metrics of models and of other programs' volumes on the same scans, and of the models' trivial baselines.

    Args:
        candidates: models, and folders of volumes whose names are those of the scans, by name.
        archives: scans on the models' grid and in their geometry, all with CT or all without.
        split: the scans to use.
        include_training_scans: evaluate subjects that a model was trained on too, which are left out otherwise.
        protocols: by default all that compare volumes or, without CT, `reprojection`.
        reference: the predictor to which differences are given; by default the first baseline.
        resample: resample volumes of folders on another grid.
        command: the command line, for the provenance.
        consistency_steps: if not 0, the models' volumes are evaluated a second time after this number of steps of a
            fit to the radiographs (`raylift.models.consistency`).
        sampling: settings of diffusion models; those without one are not sampled.
        samples: number of samples of a diffusion model, whose mean is evaluated; each is fitted by itself.
        robustness: evaluate models under perturbations of the radiographs too (`robustness`).
        ptx: measure the pneumothorax in every volume and in the CT too.
        segmenter: finds the lungs of every volume and of the CT.
        workers: 1 to evaluate scan by scan in this process; more for as many Ray actors.
        cache: finished scans of the same comparison are taken from it, and others are added to it.
        progress: called with the number of finished scans, the number of all, and the name of one that is not finished.

    Raises:
        ConfigError: an archive's grid or geometry is not that of a model, a protocol needs CT and it has none, no scan
            remains, the reference is no predictor, the steps are negative, no model samples, there are no workers,
            radiographs are to be perturbed and there is no CT or the beam is parallel, or pneumothorax is to be
            measured and there is no CT or its voxels are too coarse.
        ClusterTooSmallError: the cluster has fewer CPUs than the workers have threads.
        WorkersLostError: workers ended too often.
        FileError: a file of a folder is no volume in HU.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers: give 1 or more")
    models = {name: candidate for name, candidate in candidates.items() if isinstance(candidate, Model)}
    description = _input_description(models, archives)
    has_ct = _have_ct(archives)
    if robustness:
        require_perturbable(archives)
    if ptx:
        require_comparable(archives)
    protocols = tuple(protocols) or default_protocols(has_ct)
    for protocol in protocols:
        if PROTOCOLS[protocol].needs_ct:
            for archive in archives:
                archive.require_volumes(f"protocol {protocol}")
    has_diffusion_model = any(isinstance(model.network, DiffusionNetwork) for model in models.values())
    predictors: list[ModelPredictor | FolderPredictor] = []
    for name, candidate in candidates.items():
        if isinstance(candidate, Model):
            # Without a diffusion model, the settings are an error.
            sampled = isinstance(candidate.network, DiffusionNetwork) or not has_diffusion_model
            flags = (sampling, samples) if sampled else (None, 1)
            predictors.append(ModelPredictor(name, candidate, *flags, consistency_steps))
        else:
            predictors.append(FolderPredictor(name, candidate, description, resample))
    trained_on = frozenset[str]().union(
        *(model.training_data.scans for model in models.values() if model.training_data)
    )
    scans, notes = select(archives, split, trained_on, include_training_scans)
    folders = [predictor for predictor in predictors if isinstance(predictor, FolderPredictor)]
    scans, missing = present(scans, folders)
    held_out = archives if has_ct and split in ("val", "test") else ()
    reprojected = not all(PROTOCOLS[protocol].needs_ct for protocol in protocols)
    trivial, about = _baselines(models, description, held_out, reprojected)
    notes += [*missing, *about, *(note for model in models.values() for note in _unlisted(model))]
    own = [name for baseline in trivial for name in baseline.networks]
    if (reference := reference or own[0]) not in (*candidates, *own):
        raise ConfigError(f"no method '{reference}' to compare with: use one of {', '.join((*candidates, *own))}")
    perturbed = None
    if robustness:
        own_models = [predictor for predictor in predictors if isinstance(predictor, ModelPredictor)]
        perturbed, impossible = robustness_of(own_models, trivial, protocols)
        notes += impossible
    plotted = np.linspace(0, len(scans) - 1, min(MAX_CASES_PLOTTED, len(scans))).astype(int).tolist()
    evaluator = CaseEvaluator(
        scans, frozenset(plotted), predictors, trivial, protocols, has_ct, perturbed, ptx, segmenter
    )
    cases = evaluate_cases(evaluator, workers, cache, progress)
    notes += [note for case in cases for note in case.notes]
    provenance = _provenance(models, folders, archives, command)
    settings = {
        predictor.name: predictor.sampling
        for predictor in predictors
        if isinstance(predictor, ModelPredictor) and predictor.sampling
    }
    if settings:
        each = {name: {**vars(sampling), "samples": samples} for name, sampling in settings.items()}
        provenance["sampling"] = each[MODEL] if list(each) == [MODEL] else each
    if has_ct:
        provenance["segmenter"] = segmenter.name
    if has_ct and segmenter != THRESHOLDS:
        notes.append(f"the lungs of protocol segmentation are those of {segmenter.name}")
    if consistency_steps:
        provenance["consistency"] = {"steps": consistency_steps, "strength": consistency.STRENGTH}
    evaluation = Evaluation(
        cases, tuple(candidates), protocols, split, has_ct, provenance, reference, tuple(dict.fromkeys(notes))
    )
    if evaluation.pneumothorax:
        evaluation = replace(evaluation, notes=(*evaluation.notes, *evaluation.pneumothorax.sentences))
    return evaluation


def _input_description(models: Mapping[str, Model], archives: Sequence[Archive]) -> InputDescription:
    """The description of the first model or of the first archive, after a check of all archives against all models."""
    descriptions: list[InputDescription] = [model.description for model in models.values()]
    descriptions = descriptions or [ArchiveDescription.of(archives[0])]
    for description in descriptions:
        for archive in archives:
            matching_views(description, archive)
    return descriptions[0]


def _baselines(
    models: Mapping[str, Model], description: InputDescription, held_out: Sequence[Archive], reprojected: bool
) -> tuple[list[BaselinePredictor], list[str]]:
    """The baselines of every model, equal ones once, and sentences on what they are fitted to.

    A model that has none of its training data is compared with those of the others or, if no model has any, with
    baselines of the held-out archives.
    """
    predictors: dict[str, BaselinePredictor] = {}
    owners: dict[str, dict[str, str]] = {}
    """By baseline and fingerprint, the first model that has it."""
    known = {name: model for name, model in models.items() if model.training_data and model.training_data.baselines}
    notes = [
        f"the model {name} has no baselines of its training data: it is compared with those of {', '.join(known)}"
        for name in models
        if known and name not in known
    ]
    for name, model in (known or models).items() or [("", None)]:
        predictors[name], note = trivial_baselines(model, model.description if model else description, held_out)
        notes += [note] if note else []
        for baseline in predictors[name].networks:
            owners.setdefault(baseline, {}).setdefault(predictors[name].fingerprint_of(baseline, reprojected), name)
    for name, predictor in predictors.items():
        predictor.networks = {
            baseline if len(owners[baseline]) == 1 else f"{baseline} of {name}": network
            for baseline, network in predictor.networks.items()
            if owners[baseline][predictor.fingerprint_of(baseline, reprojected)] == name
        }
    return [predictor for predictor in predictors.values() if predictor.networks], notes


def _have_ct(archives: Sequence[Archive]) -> bool:
    contents = {archive.manifest.contents for archive in archives}
    if len(contents) > 1:
        raise ConfigError(
            f"some of {', '.join(archive.url for archive in archives)} have CT and some have none: evaluate them apart"
        )
    return contents == {"volumes"}


def select(
    archives: Sequence[Archive], split: SplitChoice, trained_on: frozenset[str], include_training_scans: bool
) -> tuple[list[Scan], list[str]]:
    """Label, archive and entry of every scan to evaluate, and sentences on subjects that a model was trained on."""
    names = [PurePosixPath(archive.url).name for archive in archives]
    if len(set(names)) < len(names):
        names = [archive.url for archive in archives]
    selected: list[Scan] = []
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
            notes.append(f"subjects of {archive.url} that a model was trained on {verb}: {text}")
        if not include_training_scans:
            entries = [entry for entry in entries if entry.subject not in trained]
        if not entries:
            raise ConfigError(
                f"a model was trained on every {which} of {archive.url}: choose another split or archive, or pass "
                "--include-training-scans"
            )
        selected += [(entry.id if len(archives) == 1 else f"{name}/{entry.id}", archive, entry) for entry in entries]
    return selected, notes


def present(scans: list[Scan], folders: Sequence[FolderPredictor]) -> tuple[list[Scan], list[str]]:
    """The scans of which every folder has a volume, and sentences on the others.

    Raises:
        ConfigError: there is none.
    """
    notes = []
    for predictor in folders:
        missing = [label for label, _, entry in scans if entry.id not in predictor.files]
        if len(missing) == len(scans):
            raise ConfigError(
                f"{predictor.folder} has no volume with the name of a scan that is compared: name files after the "
                f"scans, {missing[0]}.nii.gz for the first"
            )
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            notes.append(
                f"{len(missing)} of {len(scans)} scans have no volume in {predictor.folder} and are in no metric: "
                f"{', '.join(missing[:5])}{more}"
            )
        scans = [scan for scan in scans if scan[2].id in predictor.files]
    return scans, notes


def _unlisted(model: Model) -> list[str]:
    """A sentence where a model may have been trained on scans that its training data do not list."""
    if model.training_data is None:
        return [
            f"the scans that a model of {model.description.system.name} was trained on are unknown, so none of them "
            "could be left out"
        ]
    if model.training_data.unlisted:
        return [
            "the training of a model started with another, whose training scans are unknown, so none of them could be "
            "left out"
        ]
    return []


def _provenance(
    models: Mapping[str, Model], folders: Sequence[FolderPredictor], archives: Sequence[Archive], command: str
) -> dict[str, Any]:
    """What the numbers depend on; of a single model called `model` at the top, of others by name."""
    grid, threads = archives[0].manifest.grid, torch.get_num_threads()
    each = {name: _provenance_of(model) for name, model in models.items()}
    each |= {predictor.name: {"folder": str(predictor.folder)} for predictor in folders}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **(each[MODEL] if list(each) == [MODEL] else {"models": each}),
        "archive": ", ".join(archive.url for archive in archives),
        "archive_snapshot": ", ".join(str(archive.manifest.snapshot) for archive in archives),
        "grid": f"{grid.size}^3 at {grid.spacing_mm:g} mm",
        "command": command,
        "versions": {"raylift": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": f"{machine.system()} {machine.machine()}, {threads} PyTorch thread{'s' * (threads > 1)}",
    }


def _provenance_of(model: Model) -> dict[str, Any]:
    recorded, data = model.description.provenance, model.training_data
    training = recorded.get("config", {}).get("train", {})
    return {
        "system": model.description.system.name,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "model_sha256": model.sha256,
        "config_sha256": recorded.get("config_sha256", ""),
        "training": {
            "steps": recorded.get("step", training.get("steps", "?")),
            "batch_size": training.get("batch_size", "?"),
            "volumes": len(recorded.get("training_samples", [])),
        },
        "baselines": {"volumes": data.baselines.volumes if data and data.baselines else 0},
        "seed": training.get("seed", "?"),
    }
