"""Search: trials that are each a Ray Train run, proposed by Optuna and stopped early by a scheduler of Ray Tune.

```
<search>/search.json          space, base run and settings of the search
<search>/trials/<id>/         a run each, with its checkpoints and, of two objectives, their measurement
<search>/trials.json          the table: settings, best metric and checkpoint of every trial, and the Pareto set
<search>/report.html          the report, which `raylift tune --report` writes again; optuna.log: an Optuna storage
<search>/ray/                 Ray Tune's state, from which --resume continues, or
<search>/population.json      the state of population-based training
```
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from ray import cloudpickle, tune

from raylift.datasets import hashed_json
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder, absolute, join, require_reachable
from raylift.datasets.choices import KeyOf
from raylift.datasets.errors import AlteredFileError, ConfigError
from raylift.datasets.serialization import from_plain, to_plain
from raylift.platform import cluster
from raylift.platform.config import RunConfig, override, with_absolute_paths
from raylift.platform.monitor import MONITORED, format_metrics
from raylift.platform.presets import PRESETS
from raylift.platform.training import initial_weights, lease, runs
from raylift.platform.training.checkpoint import RUN_FILE
from raylift.platform.training.driver import Interrupted, interruptible
from raylift.platform.training.inputs import check, with_archive_views, with_snapshots
from raylift.platform.training.resuming import changes
from raylift.platform.tuning import population, two_objectives
from raylift.platform.tuning.algorithms import PBT, SAMPLERS, SCHEDULERS, FeasibleSearch, Sampler, Scheduler
from raylift.platform.tuning.trials import TABLE_FILE, Trial, describe, load_table, name_results, tabulate
from raylift.platform.tuning.two_objectives import OBJECTIVES, Measurement, Objectives

SEARCH_FILE, RAY_FOLDER = "search.json", "ray"

RESUMABLE_CHANGES = ("run.cluster.", "run.data.threads", "run.data.prefetch_batches", "run.data.cache_gib")
"""Settings, or beginnings of settings, that a resumed search may change: those that change no result."""


DISTRIBUTIONS: dict[str, Callable[[list[Any]], Any]] = {
    "uniform": lambda ends: tune.uniform(*ends),
    "log_uniform": lambda ends: tune.loguniform(*ends),
    "integer": lambda ends: tune.randint(ends[0], ends[1] + 1),
    "choice": tune.choice,
}
"""Ray Tune's distributions by the names that they have in a search space."""
Distribution = KeyOf[str, DISTRIBUTIONS]


@dataclass(frozen=True)
class Space:
    """A search space: a distribution with its parameters for each dotted key of a run's settings."""

    space: dict[str, dict[Distribution, list[Any]]]
    preset: str = ""
    """The preset it is meant for; by default the slim preset of the system that its file is named after. --preset
    selects another."""


@dataclass(frozen=True)
class Search:
    """The configuration of a search."""

    run: RunConfig
    space: Space
    trials: int = 8
    """Total number of trials; with population-based training, the number of members."""
    max_concurrent_trials: int = 0
    """Maximum number of trials at once; 0: as many as the cluster has resources for."""
    sampler: Sampler = "tpe"
    """Optuna's sampler of settings."""
    scheduler: Scheduler = "asha"
    """What stops trials early: ASHA, median stopping, population-based training or nothing."""
    reduction_factor: int = 3
    """ASHA's: at each rung the best 1/n of the trials continue."""
    seed: int = 0
    objectives: Objectives = "psnr"
    """What the search optimizes: validation PSNR, or a quality metric and the inference time."""

    def __post_init__(self) -> None:
        two_objectives.require_possible(self.objectives, self.scheduler)


def load_space(name: str) -> Space:
    """A space by its name in `tune_spaces`, or from a YAML file.

    Raises:
        ConfigError: it does not exist, or is not a valid search space.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = spaces_folder() / f"{name.replace('-', '_')}.yaml"
    if not path.is_file():
        raise ConfigError(f"no search space '{name}': give a YAML file or one of {', '.join(space_names())}")
    try:
        space = from_plain(Space, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    named_after = f"{path.stem.replace('_', '-')}-slim"
    return space if space.preset or named_after not in PRESETS else replace(space, preset=named_after)


def spaces_folder() -> Path:
    """The folder of raylift's own search spaces."""
    import raylift.tune_spaces

    return Path(next(iter(raylift.tune_spaces.__path__)))


def space_names() -> list[str]:
    """The names of raylift's own search spaces, which are those of their systems."""
    return sorted(path.stem.replace("_", "-") for path in spaces_folder().glob("*.yaml"))


def validate(search: Search) -> dict[str, Any]:
    """Check every key and the ends of every range against the run, and return the space as Ray Tune's domains.

    Raises:
        ConfigError: a key is not a setting, or one of its values is not valid.
    """
    domains = {}
    for key, distributions in search.space.space.items():
        if len(distributions) != 1:
            raise ConfigError(f"'{key}' has {len(distributions)} distributions: give one of {', '.join(DISTRIBUTIONS)}")
        ((kind, values),) = distributions.items()
        if kind != "choice" and (len(values) != 2 or not all(isinstance(v, int | float) for v in values)):
            raise ConfigError(f"'{key}': {kind} takes [low, high], not {values}")
        for value in values:
            override(search.run, {key: value})
        domains[key] = DISTRIBUTIONS[kind](values)
    population.require_possible(search.scheduler, search.trials, search.run.train, domains)
    return domains


def create(search: Search, url: str) -> None:
    """Create a search: write its configuration."""
    require_reachable(url)
    runs.write_record(url, SEARCH_FILE, to_plain(prepare(search)), "search")


def prepare(search: Search) -> Search:
    """The search with absolute paths, base models, and the views and snapshots of its archives.

    Raises:
        ConfigError: the archive does not have what the objectives need.
    """
    run = with_snapshots(with_archive_views(with_absolute_paths(initial_weights.resolve(search.run))))
    contents = Archive(run.data.archive, run.data.snapshot).manifest.contents
    two_objectives.require_possible(search.objectives, search.scheduler, contents)
    return replace(search, run=run)


def resume_search(search: Search, url: str) -> None:
    """Check the settings of a search that is resumed, print and record those that change.

    Args:
        search: the search with the settings that were given to `--resume`.
        url: the search's folder.

    Raises:
        ConfigError: settings differ that a resumed search keeps; names each with both values.
    """
    saved = load_search(url)
    changed = changes(saved, search, RESUMABLE_CHANGES, url, "search")
    for key, (before, after) in changed.items():
        print(f"raylift: {key} changes from {before} to {after}", flush=True)
    if changed:
        Folder(url).write(SEARCH_FILE, hashed_json.encode(to_plain(search)))


def require_capacity(search: Search) -> int:
    """The number of trials at a time.

    Raises:
        ClusterTooSmallError: the cluster cannot run a single trial.
    """
    cpus, gpus = _trial_resources(search)
    cluster.require_resources(cpus, gpus, "a trial")
    return min(filter(None, (cluster.capacity(cpus, gpus), search.max_concurrent_trials, search.trials)))


def _trial_resources(search: Search) -> tuple[float, float]:
    """CPUs and GPUs of a trial."""
    resources = search.run.cluster
    return resources.workers * resources.cpus_per_worker, resources.workers * resources.gpus_per_worker


def load_search(url: str) -> Search:
    """Load the configuration of a search."""
    require_reachable(url)
    try:
        return from_plain(Search, Folder(url).read_hashed(SEARCH_FILE), f"{url}/{SEARCH_FILE}")
    except FileNotFoundError as error:
        raise ConfigError(f"{absolute(url)} is not a search: it has no {SEARCH_FILE}") from error
    except AlteredFileError as error:
        raise ConfigError(f"{error}. Restore it, or start a new search") from error


def fit(url: str, *, leased: bool = False) -> list[Trial]:
    """Run a created search, or its remaining trials, and return its table, the best trial first.

    Args:
        url: the search's folder.
        leased: whether the caller holds the lease of the search.

    Raises:
        ConfigError: another process runs the search.
        ClusterTooSmallError: the cluster cannot run a single trial.
        Interrupted: on SIGINT or SIGTERM; trials end with this process.
    """
    url = absolute(url)
    search = load_search(url)
    if Folder(url).exists(TABLE_FILE):
        return load_table(url)
    space = validate(search)
    archive = check(search.run)
    initial_weights.check(search.run, archive)
    metric = MONITORED[archive.manifest.contents]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    concurrent = require_capacity(search)
    cpus, gpus = _trial_resources(search)
    _report(f"{search.trials} trials, {concurrent} at a time: each needs {cpus:g} CPUs and {gpus:g} GPUs")
    with nullcontext() if leased else lease.acquire(url):
        try:
            with interruptible():
                if search.scheduler == PBT:
                    failed = False
                    table = population.fit(url, search.run, space, search.trials, search.seed, concurrent, metric)
                else:
                    results = _tuner(search, url, space, concurrent, metric).fit()
                    failed = bool(results.errors)
                    table = tabulate(url, name_results(results[index] for index in range(len(results))))
        except Interrupted as interrupted:
            raise Interrupted(f"{interrupted}; resume with raylift tune --resume {url}") from None
    if not failed:
        Folder(url).write(TABLE_FILE, hashed_json.encode({"trials": to_plain(table)}))
    return table


def run_trial(settings: dict[str, Any], search: dict[str, Any], url: str) -> None:
    """The driver of a trial: a Ray Train run in the trial's folder, resumed if it exists."""
    cluster.apply_environment()
    configuration = from_plain(Search, search, "search")
    run, objectives = override(configuration.run, settings), configuration.objectives
    trial_url = join(url, "trials", tune.get_context().get_trial_id())
    if not Folder(trial_url).exists(RUN_FILE):
        runs.create(run, trial_url)
    runs.fit(run, trial_url, to_tune=True)
    if OBJECTIVES[objectives]:
        tune.report({"step": run.train.steps, **to_plain(two_objectives.measure(run, trial_url, objectives))})


def _tuner(search: Search, url: str, space: dict[str, Any], concurrent: int, metric: str) -> tune.Tuner:
    path, filesystem = cluster.ray_storage(url)
    single, scheduler = not OBJECTIVES[search.objectives], SCHEDULERS[search.scheduler]
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, search=to_plain(search), url=url), cluster.TRIAL_DRIVER
    )
    state = f"{path}/{RAY_FOLDER}"
    if tune.Tuner.can_restore(state, storage_filesystem=filesystem):
        return tune.Tuner.restore(
            state, trainable, resume_unfinished=True, resume_errored=True, storage_filesystem=filesystem
        )
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=metric if single else None,
            mode="max" if single else None,
            num_samples=search.trials,
            max_concurrent_trials=concurrent,
            search_alg=FeasibleSearch(search.run, SAMPLERS[search.sampler](search.seed), two_objectives=not single),
            scheduler=scheduler(url, search.run.train, search.reduction_factor) if scheduler else None,
        ),
        run_config=tune.RunConfig(
            name=RAY_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            # A trial repeats itself what a restart can cure (see `driver`).
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[_PrintReports()],
            verbose=0,
        ),
    )


class _PrintReports(tune.Callback):
    """One line for each report of a trial.

    It holds no function, because Tune pickles it, and Ray replaces `builtins.print` in the driver's process.
    """

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:  # type: ignore[override]
        _report(f"trial {trial.trial_id} step {result.get('step')}: {_format(result)}")

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:  # type: ignore[override]
        # The trial's folder in the storage does not have the error yet.
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes()) if trial.pickled_error_file else None
        _report(f"trial {trial.trial_id} failed: {describe(error)}")


def _format(result: dict[str, Any]) -> str:
    if "inference_s" in result:
        return str(Measurement(**{field.name: result[field.name] for field in fields(Measurement)}))
    return format_metrics(result)


def _report(text: str) -> None:
    print(f"tune: {text}", flush=True)
