"""`raylift train`: train a preset, or resume a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import absolute
from raylift.datasets.errors import ConfigError
from raylift.datasets.serialization import require_minimum
from raylift.platform.commands.run_arguments import parse, print_usage, split_name
from raylift.platform.config import RunConfig
from raylift.platform.monitor import format_metrics, monitored
from raylift.platform.presets import listing, named_run

USAGE = (
    "raylift train PRESET [options]",
    "raylift train --resume RUN [options]",
    "raylift train PRESET --help, for the options",
)


@dataclass(frozen=True)
class TrainOptions:
    """Train a preset or the configuration in a YAML file, or resume a run."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    output: str = ""
    """Folder or URL of the new run; runs/<preset>-<time> by default."""
    resume: str = ""
    """Folder or URL of a run to resume."""
    take_over: bool = False
    """Resume a run although another process, whose last heartbeat is old, may still train it."""
    until: int = 0
    """Step at which this command ends, with a checkpoint; 0: train.steps. Learning rates are those of train.steps."""
    dry_run: bool = False
    """Print the configuration and an estimate of memory, and stop."""

    def __post_init__(self) -> None:
        require_minimum(self, 0, "until")


def train(arguments: list[str]) -> int:
    """Train a preset on Ray, or resume a run."""
    name, rest = split_name(arguments)
    if "--resume" in rest and rest.index("--resume") + 1 < len(rest):
        from raylift.platform.training import runs

        base = runs.load_run(rest[rest.index("--resume") + 1])
    elif name:
        base = named_run(name)
    else:
        return print_usage(USAGE, listing(), rest)
    options = parse(f"train {name}", rest, TrainOptions(base))
    if options.dry_run:
        return _dry_run(options.run)
    from raylift.platform import cluster
    from raylift.platform.training import lease, resuming, runs
    from raylift.platform.training.checkpoint import best_checkpoint

    cluster.session_folder()
    url = absolute(options.resume or options.output or runs.new_run_url("runs", Path(name).stem))
    _require_further_steps(options, url)
    started = time.monotonic()
    # The record of a run that another process trains does not change, and a folder that is refused is not created.
    run = options.run if options.resume else runs.create(options.run, url)
    with lease.acquire(url, options.take_over):
        if options.resume:
            run = resuming.resume_run(run, url)
        cluster.connect()
        metrics = runs.fit(run, url, leased=True, until=options.until)
    best, summary = best_checkpoint(url)
    print(f"trained in {time.monotonic() - started:.0f} s: validation {format_metrics(metrics)} at the end")
    psnr_db = summary["metrics"][monitored(summary["metrics"])]
    print(f"best checkpoint ({psnr_db:.2f} dB, step {summary['step']}): {best}")
    print(f"curves: tensorboard --logdir {url}/tensorboard")
    return 0


def _require_further_steps(options: TrainOptions, url: str) -> None:
    """Check that `--until` is a step of the run that is not trained yet.

    Raises:
        ConfigError: with the option to change.
    """
    from raylift.platform.training.checkpoint import Checkpoints

    if options.until > options.run.train.steps:
        raise ConfigError(
            f"--until {options.until} is above train.steps {options.run.train.steps}: lower it, or raise train.steps"
        )
    published = Checkpoints(url).published() if options.resume and options.until else []
    if published and options.until <= published[-1][1]["step"]:
        raise ConfigError(
            f"--until {options.until} is not above step {published[-1][1]['step']}, to which {url} is trained: raise it"
        )


def _dry_run(run: RunConfig) -> int:
    from raylift.platform.training import initial_weights
    from raylift.platform.training.inputs import view_indices, with_archive_views
    from raylift.platform.training.memory import estimate

    run, geometry = with_archive_views(initial_weights.resolve(run)), None
    if not set(run.system.views) <= {"frontal", "lateral"}:
        # Only the archive has the poses of other views.
        archive = Archive(run.data.archive, run.data.snapshot)
        view_indices(archive, run)
        geometry = archive.manifest.geometry
    print(run.to_yaml())
    print(f"# config SHA-256 {run.sha256()}")
    for line in estimate(run, geometry).lines():
        print(f"# {line}")
    return 0
