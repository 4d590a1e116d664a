"""Checkpoints, published atomically and verified by digests.

```
<run>/checkpoints/step-00000500/
    model/model.safetensors, model.json, training_data.npz
                                           the reconstruction network, in the format of `models.weights`: its EMA
                                           weights if an EMA is kept, else its weights
    networks/<name>.safetensors            weights of the other networks, and of networks that keep an EMA
    adam/<name>.safetensors                Adam's moments of every network, by parameter name
    state.json                             step, samples consumed, metrics, history, config
    checkpoint.json                        step, metrics and SHA-256 of every file above; written last, which
                                           publishes the checkpoint
```

Files are written to a local folder first, hashed, copied to the run, and listed in `checkpoint.json` once all are
copied. A folder without that file, or with a file that does not match it, is no checkpoint: a run resumes from the
newest one that verifies. The JSON files have their own digests too (`datasets.hashed_json`). A checkpoint depends
neither on the ZeRO stage nor on the number of workers, and holds no pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from raylift.datasets import hashed_json, process_folder
from raylift.datasets.archive.store import Folder, absolute, is_local, join
from raylift.datasets.errors import AlteredFileError, RayliftError
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models import weights
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description, file_sha256
from raylift.platform import model_store
from raylift.platform.monitor import PROTOCOL_OF, monitored

RUN_FILE = "run.json"
"""The file that marks a folder as a run."""
CHECKPOINTS_FOLDER, MODEL_FOLDER, INDEX_FILE, STATE_FILE = "checkpoints", "model", "checkpoint.json", "state.json"

NamedTensors = dict[str, Tensor]


class CheckpointError(RayliftError, ValueError):
    """A checkpoint that is absent, unfinished or altered."""


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to resume, in addition to its tensors."""

    step: int
    samples_consumed: int
    metrics: dict[str, float]
    """Metrics of the validation at this step."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Logged averages and validations so far, each with its step."""
    config: dict[str, Any] = field(default_factory=dict)
    config_sha256: str = ""


@dataclass(frozen=True)
class Tensors:
    """All tensors of a run by network."""

    networks: dict[str, NamedTensors]
    adam: dict[str, NamedTensors]
    ema: dict[str, NamedTensors] = field(default_factory=dict)
    """EMA weights of the networks that keep an EMA."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_url: str) -> None:
        self.url = join(absolute(run_url), CHECKPOINTS_FOLDER)
        self._folder = Folder(self.url)

    def save(
        self,
        state: TrainingState,
        tensors: Tensors,
        description: Description,
        training_data: TrainingData | None = None,
    ) -> str:
        """Publish a checkpoint and return its URL. One process calls it; the first network reconstructs the volume."""
        name = _name(state.step)
        # Left by a run that was interrupted while it published this step.
        self._folder.remove(name)
        first, *others = tensors.networks
        with process_folder.make("checkpoint-files") as local:
            reconstructing = {**tensors.networks, **tensors.ema}[first]
            weights.save(local / MODEL_FOLDER, reconstructing, description, training_data=training_data)
            for network in [*others, *tensors.ema]:
                _save_tensors(local / "networks" / f"{network}.safetensors", tensors.networks[network])
            for network, moments in tensors.adam.items():
                _save_tensors(local / "adam" / f"{network}.safetensors", moments)
            (local / STATE_FILE).write_bytes(hashed_json.encode(to_plain(state)))
            files = sorted(path for path in local.rglob("*") if path.is_file())
            digests = {path.relative_to(local).as_posix(): file_sha256(path) for path in files}
            for relative in digests:
                self._folder.put(local / relative, f"{name}/{relative}")
        summary = {"step": state.step, "metrics": state.metrics, "sha256": digests}
        self._folder.write(f"{name}/{INDEX_FILE}", hashed_json.encode(summary))
        return join(self.url, name)

    def published(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and summaries of published checkpoints, oldest first; only the summaries are verified here."""
        return self._summaries()[0]

    def _summaries(self) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
        """The published checkpoints, and why others were rejected, by name."""
        complete, rejected = [], {}
        for name in self._folder.names():
            index = join(self.url, name, INDEX_FILE)
            try:
                summary = self._folder.read_hashed(f"{name}/{INDEX_FILE}")
            except (FileNotFoundError, NotADirectoryError):
                continue  # unpublished, left by an interrupted run
            except AlteredFileError as error:
                rejected[name] = str(error)
                continue
            if name == _name(summary["step"]):
                complete.append((name, summary))
            else:
                rejected[name] = f"{index} is of step {summary['step']}: the folder was renamed"
        return complete, rejected

    def best(self, metric: str) -> tuple[str, dict[str, Any]]:
        """URL and summary of the verified checkpoint with the highest metric; of equal ones the oldest.

        One line is printed for each better checkpoint that is missing or altered.

        Raises:
            CheckpointError: there is no checkpoint with that metric.
        """
        published, rejected = self._summaries()
        passed_over = list(rejected.values())
        for name, summary in _ranked(published, metric):
            url = join(self.url, name)
            try:
                with local_copy(url, [MODEL_FOLDER, STATE_FILE]):
                    pass
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            if not passed_over:
                passed_over = self._missing_best(published, metric, summary)
            for reason in passed_over:
                print(f"raylift: {reason}: {url} is used instead", flush=True)
            return url, summary
        raise CheckpointError("; ".join([f"{self.url} holds no checkpoint with the metric {metric}", *passed_over]))

    def _missing_best(
        self, published: list[tuple[str, dict[str, Any]]], metric: str, chosen: dict[str, Any]
    ) -> list[str]:
        """Why the best checkpoint of the history is not the chosen one, if it is not."""
        for name, _ in reversed(published):
            try:
                with local_copy(join(self.url, name), [STATE_FILE]) as local:
                    history = load_state(local).history
            except CheckpointError:
                continue
            top = max((entry for entry in history if metric in entry), key=lambda entry: entry[metric], default=None)
            if top is None or top[metric] <= chosen["metrics"][metric]:
                return []
            return [f"the best checkpoint, {join(self.url, _name(int(top['step'])))} ({top[metric]:.2f}), is missing"]
        return []

    def at(self, step: int) -> str:
        """URL of the checkpoint of a step."""
        return join(self.url, _name(step))

    def copy(self, source: str) -> None:
        """Publish a verified copy of another run's checkpoint, whose history has no earlier validations.

        Raises:
            CheckpointError: a file of it is missing or altered.
        """
        with local_copy(source) as local:
            state = load_state(local)
            kept = [
                each for each in state.history if each["step"] == state.step or not PROTOCOL_OF.keys() & each.keys()
            ]
            content = hashed_json.encode(to_plain(replace(state, history=kept)))
            summary, name = Folder(source).read_hashed(INDEX_FILE), _name(state.step)
            self._folder.remove(name)
            for relative in summary["sha256"]:
                if relative != STATE_FILE:
                    self._folder.put(local / relative, f"{name}/{relative}")
        self._folder.write(f"{name}/{STATE_FILE}", content)
        digests = {**summary["sha256"], STATE_FILE: hashlib.sha256(content).hexdigest()}
        self._folder.write(f"{name}/{INDEX_FILE}", hashed_json.encode({**summary, "sha256": digests}))

    def newest_before(self, step: int) -> str | None:
        """URL of the newest checkpoint of fewer steps, if there is one."""
        earlier = [name for name, summary in self.published() if summary["step"] < step]
        return join(self.url, earlier[-1]) if earlier else None

    def prune(self, keep: int, diverged_at: int | None = None) -> None:
        """Remove all but the newest `keep` checkpoints, the best one, and the newest one before a divergence."""
        published = self.published()
        # The last one may have no metrics: SIGTERM writes it without a validation.
        metric = monitored(name for _, summary in published for name in summary["metrics"])
        earlier = [] if diverged_at is None else [item for item in published if item[1]["step"] < diverged_at]
        retained = {name for name, _ in [*published[-keep:], *_ranked(published, metric)[:1], *earlier[-1:]]}
        for name, _ in published:
            if name not in retained:
                # The index goes first, so that an interruption leaves no published checkpoint that lacks files.
                self._folder.remove(f"{name}/{INDEX_FILE}")
                self._folder.remove(name)

    def newest(self, only: Sequence[str] = ()) -> tuple[str | None, list[str]]:
        """URL of the newest checkpoint whose files match, or None, and why newer ones were rejected.

        Args:
            only: the files and folders to check; by default all.
        """
        published, unread = self._summaries()
        rejected: list[str] = []
        for name in sorted([*(name for name, _ in published), *unread], reverse=True):
            url = join(self.url, name)
            try:
                if name in unread:
                    raise CheckpointError(unread[name])
                with local_copy(url, only):
                    return url, rejected
            except CheckpointError as error:
                rejected.append(str(error))
        return None, rejected

    def newest_state(self) -> TrainingState | None:
        """The newest state that matches its digest, whatever the other files of its checkpoint are; None if none does.

        One line is printed for each newer checkpoint that is passed over.
        """
        url, rejected = self.newest([STATE_FILE])
        for reason in rejected:
            print(f"raylift: {reason}: {url or 'no checkpoint'} is used instead", flush=True)
        if url is None:
            return None
        with local_copy(url, [STATE_FILE]) as local:
            return load_state(local)


def best_checkpoint(run_url: str) -> tuple[str, dict[str, Any]]:
    """URL and summary of a run's best checkpoint by its monitored metric."""
    checkpoints = Checkpoints(run_url)
    metrics = [name for _, summary in checkpoints.published() for name in summary["metrics"]]
    return checkpoints.best(monitored(metrics))


def resolve_checkpoint(url: str) -> str:
    """The exact name or URL of a model; for a run, the URL of its best checkpoint."""
    exact = model_store.resolve(url)
    is_run = not model_store.is_named(exact) and any(map(Folder(exact).exists, (RUN_FILE, CHECKPOINTS_FOLDER)))
    return best_checkpoint(exact)[0] if is_run else exact


@contextmanager
def local_copy(url: str, only: Sequence[str] = ()) -> Iterator[Path]:
    """The files of a checkpoint as a local folder, each checked against its digest.

    Args:
        url: the checkpoint.
        only: the files and folders to check; by default all.

    Raises:
        CheckpointError: it was never published, or a file is missing or altered.
    """
    url = absolute(url)
    folder = Folder(url)
    try:
        digests = folder.read_hashed(INDEX_FILE)["sha256"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{url} is not a published checkpoint: it has no {INDEX_FILE}") from error
    except AlteredFileError as error:
        raise CheckpointError(str(error)) from error
    with nullcontext(Path(url)) if is_local(url) else process_folder.make("checkpoint-files") as local:
        for relative, expected in digests.items():
            if only and relative.split("/")[0] not in only:
                continue
            try:
                if not is_local(url):
                    folder.get(relative, local / relative)
                computed = file_sha256(local / relative)
            except FileNotFoundError as error:
                raise CheckpointError(f"{url}/{relative} is missing") from error
            if computed != expected:
                raise CheckpointError(f"{url}/{relative} has SHA-256 {computed}, not {expected}")
        yield local


def _name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def _ranked(published: list[tuple[str, dict[str, Any]]], metric: str) -> list[tuple[str, dict[str, Any]]]:
    """The checkpoints with that metric, the best first; of equal ones the oldest."""
    scored = [(name, summary) for name, summary in published if metric in summary["metrics"]]
    return sorted(scored, key=lambda item: (-item[1]["metrics"][metric], item[1]["step"]))


def load_state(local: Path) -> TrainingState:
    """The state in a local copy."""
    where = str(local / STATE_FILE)
    return from_plain(TrainingState, hashed_json.decode((local / STATE_FILE).read_bytes(), where), where)


def load_network(local: Path, network: str, first: bool) -> NamedTensors:
    """A network's weights from a local copy; those of the first network are in `model/` unless it keeps an EMA."""
    path = local / "networks" / f"{network}.safetensors"
    return load_model_weights(local) if first and not path.exists() else safetensors.torch.load_file(path)


def load_model_weights(local: Path) -> NamedTensors:
    """The weights used for inference, from a local copy."""
    return safetensors.torch.load_file(local / MODEL_FOLDER / weights.WEIGHTS_FILE)


def load_adam(local: Path, network: str) -> NamedTensors:
    """A network's moments from a local copy."""
    return safetensors.torch.load_file(local / "adam" / f"{network}.safetensors")


def _save_tensors(path: Path, tensors: NamedTensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
