"""`raylift train` and `raylift tune`: a preset to a run, a space to a search."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.store import absolute
from raylift.datasets.errors import ConfigError
from raylift.platform.config import RunConfig
from raylift.platform.monitor import format_metrics, monitored
from raylift.platform.presets import listing, named_run
from raylift.platform.progress import console


@dataclass(frozen=True)
class TrainOptions:
    """Train a preset (or a YAML file of the same tree), or go on with a run."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    output: str = ""
    """Folder or URL of the new run; runs/<preset>-<time> otherwise."""
    resume: str = ""
    """Folder or URL of a run to go on with."""
    dry_run: bool = False
    """Print the whole configuration and an estimate of memory, and stop."""


def train(arguments: list[str]) -> int:
    """Train a preset on Ray, or go on with a run."""
    name, rest = _first_word(arguments)
    if "--resume" in rest and rest.index("--resume") + 1 < len(rest):
        from raylift.platform.training import runs

        base = runs.load_run(rest[rest.index("--resume") + 1])
    elif name:
        base = named_run(name)
    else:
        print(f"usage: raylift train PRESET [options]\n       raylift train --resume RUN [options]\n\n{listing()}")
        return 0 if {"-h", "--help"} & set(rest) else 2
    options = tyro.cli(
        TrainOptions,
        prog=f"raylift train {name}",
        args=rest,
        default=TrainOptions(base),
        config=(tyro.conf.AvoidSubcommands,),
    )
    if options.dry_run:
        return _dry_run(options.run)
    from raylift.platform import cluster
    from raylift.platform.training import runs
    from raylift.platform.training.checkpoint import best_checkpoint

    if options.resume and _seen(options.run) != _seen(base):
        raise ConfigError(
            "a resumed run keeps its system, its window and what its histograms are: start a new one to change them"
        )
    url = absolute(options.resume or options.output or runs.new_run_url("runs", Path(name).stem))
    run = options.run if options.resume else runs.create(options.run, url)
    started = time.monotonic()
    cluster.connect()
    metrics = runs.fit(run, url)
    best, summary = best_checkpoint(url)
    print(f"trained in {time.monotonic() - started:.0f} s: validation {format_metrics(metrics)} at the end")
    score = summary["metrics"][monitored(summary["metrics"])]
    print(f"best checkpoint ({score:.2f} dB, step {summary['step']}): {best}")
    print(f"curves: tensorboard --logdir {url}/tensorboard")
    return 0


@dataclass(frozen=True)
class TuneOptions:
    """Search settings over a space of `tune_spaces` (or a YAML file), or go on with a search."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    trials: int = 8
    """Trials in all."""
    max_concurrent: int = 0
    """Maximum number of trials at once; 0: as many as the cluster holds."""
    reduction_factor: int = 3
    """ASHA: at each rung the best 1/n of the trials continue."""
    seed: int = 0
    """Of the proposals; the run's own seed is train.seed."""
    output: str = ""
    """Folder or URL of the new search; runs/search-<space>-<time> otherwise."""
    resume: str = ""
    """Folder or URL of a search to go on with."""


def tune(arguments: list[str]) -> int:
    """Search settings, or go on with a search."""
    from raylift.platform import cluster
    from raylift.platform.training import runs
    from raylift.platform.tuning import search as search

    name, rest = _first_word(arguments)
    if not name and "--resume" not in rest:
        known = ", ".join(sorted(path.stem for path in search.spaces_folder().glob("*.yaml")))
        usage = "usage: raylift tune SPACE [--preset NAME] [options]\n       raylift tune --resume SEARCH"
        print(f"{usage}\n\nspaces: {known}")
        return 0 if {"-h", "--help"} & set(rest) else 2
    preset, rest = _option(rest, "--preset")
    space = search.load_space(name) if name else search.Space({})
    base = named_run(preset or space.preset or "x2ct-gan-slim")
    options = tyro.cli(
        TuneOptions,
        prog=f"raylift tune {name}",
        args=rest,
        default=TuneOptions(base),
        config=(tyro.conf.AvoidSubcommands,),
    )
    url = absolute(options.resume or options.output or runs.new_run_url("runs", f"search-{Path(name).stem}"))
    if not options.resume:
        asked = search.Search(
            run=options.run,
            space=space,
            trials=options.trials,
            max_concurrent=options.max_concurrent,
            reduction_factor=options.reduction_factor,
            seed=options.seed,
        )
        search.validate(asked)
        search.create(asked, url)
    cluster.connect()
    table = search.fit(url, say=lambda text: print(f"tune: {text}", flush=True))
    console.print(search.as_table(table))
    best = table[0]
    if best.best_psnr_db is None:
        raise ConfigError(f"no trial of {url} reached a validation: {best.error}")
    print(f"best checkpoint ({best.best_psnr_db:.2f} dB, step {best.step}): {best.checkpoint}")
    print(f"all trials: {url}/trials.json")
    return 0


def _seen(run: RunConfig) -> tuple[object, ...]:
    """What a network is, and what it is shown."""
    return run.system, run.data.window, run.data.match_histograms


def _dry_run(run: RunConfig) -> int:
    from raylift.platform.training import pretrained
    from raylift.platform.training.memory import estimate

    run = pretrained.resolve(run)
    print(run.to_yaml())
    print(f"# config SHA-256 {run.sha256()}")
    for line in estimate(run).lines():
        print(f"# {line}")
    return 0


def _first_word(arguments: list[str]) -> tuple[str, list[str]]:
    """The leading word that is no option, and the rest."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return "", arguments


def _option(arguments: list[str], name: str) -> tuple[str, list[str]]:
    """The value of an option taken out of the arguments; empty where it is not given."""
    if name not in arguments:
        return "", arguments
    place = arguments.index(name)
    if place + 1 >= len(arguments):
        raise ConfigError(f"{name} wants a value")
    return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
