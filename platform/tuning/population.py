"""Population-based training: in each generation the worst members give way to variants of the best ones.

A generation trains every member to its next validation. Then the worst quarter of the members ends, and as many new
ones start from checkpoints of the best quarter, with other learning rates and loss weights. A member keeps its settings
and has a run of its own, whose first checkpoint is its parent's. Everything that is random depends on the seed and the
step alone, so a search that was killed continues as an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.tune.search.sample import Domain, Float

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder, join
from raylift.datasets.errors import AlteredFileError, ConfigError
from raylift.datasets.serialization import from_plain, to_plain
from raylift.platform import cluster
from raylift.platform.config import RunConfig, TrainConfig, override
from raylift.platform.monitor import format_metrics
from raylift.platform.presets import options_of, train_command
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import RUN_FILE, CheckpointError, Checkpoints
from raylift.platform.training.divergence import DivergedLossError
from raylift.platform.training.driver import RunFailedError
from raylift.platform.training.loop import NonFiniteLossError
from raylift.platform.training.resuming import LOSS_WEIGHT
from raylift.platform.tuning.algorithms import PBT, SAMPLERS, FeasibleSearch
from raylift.platform.tuning.trials import Segment, Trial, describe, tabulate

POPULATION_FILE = "population.json"
FACTORS = (0.8, 1.2)
"""Factors of which one multiplies a setting that is perturbed."""
RESAMPLED = 0.25
"""Probability that a setting is sampled from its distribution instead."""
QUARTER = 4
"""One of so many members, and at least one, is replaced after each generation."""


@dataclass(frozen=True)
class Member:
    """A trial, with the checkpoint it started from."""

    id: str
    settings: dict[str, Any]
    parent: str = ""
    """The member whose checkpoint it started from; empty for random initial weights."""
    first_step: int = 0
    """The step of that checkpoint."""
    error: str = ""


@dataclass(frozen=True)
class Population:
    """The state of a search after a generation."""

    step: int
    """The step to which every member was trained."""
    living: list[str]
    """The members of the next generation."""
    members: dict[str, Member] = field(default_factory=dict)
    """All members so far by id, in the order of their start."""

    def lineage(self, member: str, last_step: int) -> list[Segment]:
        """The settings that led to a step of a member, the earliest first."""
        segments: list[Segment] = []
        while member:
            entry = self.members[member]
            segments.insert(0, Segment(member, entry.first_step, last_step, entry.settings))
            member, last_step = entry.parent, entry.first_step
        return segments


def require_possible(scheduler: str, members: int, train: TrainConfig, space: dict[str, Domain]) -> None:
    """Check that a search with population-based training changes settings; others pass.

    Raises:
        ConfigError: with the option to change.
    """
    if scheduler != PBT:
        return
    if members < 2:
        raise ConfigError(f"{PBT} needs a population of 2 trials or more: raise --trials")
    if train.validate_every >= train.steps:
        raise ConfigError(
            f"{PBT} changes settings after each validation, and train.validate_every {train.validate_every} is not "
            f"below train.steps {train.steps}: lower it"
        )
    if not _perturbable(space):
        raise ConfigError(
            f"{PBT} changes the optimizer's settings and loss weights during the training, and the space has a range "
            "(uniform or log_uniform) of none: add optimizer.lr, or give another --scheduler"
        )


def _perturbable(space: dict[str, Domain]) -> dict[str, Float]:
    """The settings that do not change the network, with their ranges."""
    return {
        key: domain
        for key, domain in space.items()
        if isinstance(domain, Float) and (key.startswith("optimizer.") or LOSS_WEIGHT.fullmatch(key))
    }


def load(url: str) -> Population | None:
    """The state of the search in a folder; None before the first one is written.

    Raises:
        ConfigError: it was altered.
    """
    folder = Folder(url)
    if not folder.exists(POPULATION_FILE):
        return None
    try:
        return from_plain(Population, folder.read_hashed(POPULATION_FILE), POPULATION_FILE)
    except AlteredFileError as error:
        raise ConfigError(f"{error}. Restore it, or start a new search") from error


def fit(
    url: str, run: RunConfig, space: dict[str, Domain], size: int, seed: int, concurrent: int, metric: str
) -> list[Trial]:
    """Train a population, or the remaining generations of one, and return its table, the best member first.

    Args:
        url: the search's folder.
        run: the base run.
        space: the distribution of each setting.
        size: number of members.
        seed: of settings and of choices among members.
        concurrent: number of members that train at once.
        metric: the monitored metric.

    Raises:
        CheckpointError: the checkpoint of a member that others continue is missing or altered.
        RunFailedError: a member failed for another reason than its settings, or the settings of every member failed.
    """
    population = load(url) or _first_generation(run, space, size, seed, metric)
    while population.step < run.train.steps:
        Folder(url).write(POPULATION_FILE, hashed_json.encode(to_plain(population)))
        step = min(population.step + run.train.validate_every, run.train.steps)
        scores, errors = _train(url, run, population, step, concurrent, metric)
        failed = {name: replace(population.members[name], error=error) for name, error in errors.items()}
        population = replace(population, step=step, members={**population.members, **failed})
        if not scores:
            reasons = "; ".join(f"trial {name}: {error}" for name, error in errors.items()) or "no metric is finite"
            raise RunFailedError(f"every member of {url} failed: {reasons}")
        if step < run.train.steps:
            population = _next_generation(population, scores, space, np.random.default_rng([seed, step]))
    Folder(url).write(POPULATION_FILE, hashed_json.encode(to_plain(population)))
    table = tabulate(url, [(member.id, member.settings, member.error) for member in population.members.values()])
    return [replace(trial, lineage=population.lineage(trial.id, trial.step)) for trial in table]


def _first_generation(run: RunConfig, space: dict[str, Domain], size: int, seed: int, metric: str) -> Population:
    proposals = FeasibleSearch(run, SAMPLERS["random"](seed))
    proposals.set_search_properties(metric, "max", space)
    members: dict[str, Member] = {}
    for name in (f"{number:05d}" for number in range(size)):
        settings = proposals.suggest(name)
        if not isinstance(settings, dict):
            raise ConfigError(f"only {len(members)} of {size} members have settings that make a network")
        members[name] = Member(name, settings)
    return Population(0, list(members), members)


def _train(
    url: str, run: RunConfig, population: Population, step: int, concurrent: int, metric: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Train all members to a step, and return the metric of each, and the errors of those that diverged."""
    _copy_checkpoints(url, population)
    task = ray.remote(_train_member).options(
        num_cpus=0, resources=cluster.HEAD_NODE, max_retries=run.cluster.max_failures
    )
    waiting = [population.members[name] for name in population.living]
    running: dict[Any, str] = {}
    scores, errors, failures = {}, {}, []
    try:
        while waiting or running:
            while waiting and len(running) < concurrent:
                member = waiting.pop(0)
                settings = to_plain(override(run, member.settings))
                trial = task.remote(settings, join(url, "trials", member.id), member.first_step, step)
                running[trial] = member.id
            (done,), _ = ray.wait(list(running))
            name = running.pop(done)
            try:
                metrics = ray.get(done)
            except Exception as error:
                print(f"tune: trial {name} failed: {describe(error)}", flush=True)
                if isinstance(error, NonFiniteLossError | DivergedLossError):
                    errors[name] = describe(error)
                else:
                    failures.append(f"trial {name} failed: {describe(error)}")
                continue
            print(f"tune: trial {name} step {step}: {format_metrics(metrics)}", flush=True)
            if math.isfinite(metrics[metric]):
                scores[name] = metrics[metric]
    finally:
        for trial in running:
            ray.cancel(trial, force=True)
    if failures:
        raise RunFailedError(f"{'; '.join(failures)}: resume with raylift tune --resume {url}")
    return scores, errors


def _copy_checkpoints(url: str, population: Population) -> None:
    """Copy the parent's checkpoint to each member that has none, before any member trains and prunes its own."""
    for member in (population.members[name] for name in population.living):
        checkpoints = Checkpoints(join(url, "trials", member.id))
        if member.parent and not checkpoints.published():
            checkpoints.copy(Checkpoints(join(url, "trials", member.parent)).at(member.first_step))


def _train_member(settings: dict[str, Any], url: str, first_step: int, until: int) -> dict[str, Any]:
    """The driver of a member: a Ray Train run in its folder, resumed if it exists.

    Raises:
        CheckpointError: no checkpoint of `first_step`, its parent's, or a later step is valid.
    """
    cluster.apply_environment()
    run = from_plain(RunConfig, settings, "run")
    if first_step:
        checkpoints = Checkpoints(url)
        newest, rejected = checkpoints.newest()
        if newest is None or newest < checkpoints.at(first_step):
            reasons = "; ".join([f"{url} has no valid checkpoint of step {first_step} or later", *rejected])
            raise CheckpointError(f"{reasons}: restore one, or start a new search")
    if not Folder(url).exists(RUN_FILE):
        runs.create(run, url)
    return runs.fit(run, url, title="", leased=True, until=until)


def _next_generation(
    population: Population, scores: dict[str, float], space: dict[str, Domain], generator: np.random.Generator
) -> Population:
    """The population in which variants of the best quarter replace the worst quarter and the members that failed."""
    ranked = sorted(population.living, key=lambda name: (-scores.get(name, -math.inf), name))
    count = max(1, len(ranked) // QUARTER)
    best = [name for name in ranked[:count] if name in scores]
    replaced = [name for name in ranked if name in ranked[-count:] or name not in scores]
    members, living = dict(population.members), list(population.living)
    for name in replaced:
        parent = members[best[generator.integers(len(best))]]
        settings = parent.settings | _perturbed(parent.settings, _perturbable(space), generator)
        child = Member(f"{len(members):05d}", settings, parent.id, population.step)
        members[child.id], living[living.index(name)] = child, child.id
        changed = ", ".join(f"{key} {settings[key]:.4g}" for key in _perturbable(space))
        print(
            f"tune: trial {child.id} replaces {name} at step {child.first_step}, from {parent.id}: {changed}",
            flush=True,
        )
    return replace(population, living=living, members=members)


def _perturbed(settings: dict[str, Any], ranges: dict[str, Float], generator: np.random.Generator) -> dict[str, float]:
    """New values of the settings that have a range, within it."""

    def value(key: str, domain: Float) -> float:
        if generator.random() < RESAMPLED:
            return float(domain.sample(random_state=generator))
        return float(np.clip(settings[key] * generator.choice(FACTORS), domain.lower, domain.upper))

    return {key: value(key, domain) for key, domain in ranges.items()}


def commands(run: RunConfig, lineage: Sequence[Segment]) -> str:
    """The commands that train a member again, from its first ancestor's initial weights to the end.

    Raises:
        ConfigError: no preset has the run's parts.
    """
    first, *others = lineage
    folder = f"runs/trial-{[first, *others][-1].trial}"
    lines = [f"{train_command(override(run, first.settings))} --output {folder}"]
    settings = first.settings
    for segment in others:
        lines[-1] += f" --until {segment.first_step}"
        changed = {key: value for key, value in segment.settings.items() if value != settings[key]}
        lines.append(f"raylift train --resume {folder} {options_of(changed)}".rstrip())
        settings = segment.settings
    return "\n".join(lines)
