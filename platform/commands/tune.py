"""`raylift tune`: search settings over a space, or resume a search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from raylift.datasets.archive.store import Folder, absolute
from raylift.datasets.errors import ConfigError
from raylift.platform.commands.run_arguments import parse, pop_option, print_usage, split_name
from raylift.platform.config import RunConfig
from raylift.platform.presets import named_run
from raylift.platform.progress import console
from raylift.platform.tuning.algorithms import Sampler, Scheduler
from raylift.platform.tuning.two_objectives import Objectives


@dataclass(frozen=True)
class TuneOptions:
    """Search hyperparameters in a search space of `tune_spaces` or of a YAML file, or resume a search."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    trials: int = 8
    """Total number of trials; pbt: the number of members of the population."""
    max_concurrent_trials: int = 0
    """Maximum number of trials at once; 0: as many as the cluster has resources for."""
    sampler: Sampler = "tpe"
    """How settings are chosen: by Optuna's tree-structured Parzen estimator (TPE), or at random, as always with pbt."""
    scheduler: Scheduler = "asha"
    """What stops trials early: successive halving (ASHA), the median of the other trials' average validations,
    population-based training (PBT), or nothing."""
    reduction_factor: int = 3
    """ASHA: at each rung the best 1/n of the trials continue."""
    seed: int = 0
    """Seed of Optuna's sampler; the seed of training is train.seed."""
    objectives: Objectives = "psnr"
    """What is optimized: the validation PSNR (psnr), or the inference time with PSNR (psnr-time) or SSIM
    (ssim-time), which gives a Pareto set. Two objectives need --scheduler none."""
    output: str = ""
    """Folder or URL of the new search; runs/search-<space>-<time> by default."""
    resume: str = ""
    """Folder or URL of a search to resume."""
    report: str = ""
    """Folder or URL of a search whose report is written again, also while it runs: report.html, and optuna.log for
    optuna-dashboard. Ray Tune's state in the folder is unpickled: write reports of your own searches only."""
    take_over: bool = False
    """Resume a search although another process, whose last heartbeat is old, may still run it."""


SETTINGS = ("run", "trials", "max_concurrent_trials", "sampler", "scheduler", "reduction_factor", "seed", "objectives")
"""Settings of a search that are options."""


def tune(arguments: list[str]) -> int:
    """Search settings, or resume a search."""
    from raylift.platform import cluster
    from raylift.platform.training import lease, runs
    from raylift.platform.tuning import search, search_report, trials, two_objectives

    name, rest = split_name(arguments)
    reported, others = pop_option(arguments, "--report")
    if reported:
        if others:
            raise ConfigError(f"--report takes a search alone: leave out {' '.join(others)}")
        options = parse("tune", arguments, TuneOptions(named_run("x2ct-gan-slim")))
        cluster.session_folder()
        print(f"report: {search_report.write(options.report)}")
        return 0
    if not name and "--resume" not in rest:
        usage = (
            "raylift tune SPACE [--preset NAME] [options]",
            "raylift tune --resume SEARCH",
            "raylift tune --report SEARCH",
        )
        return print_usage(usage, f"spaces: {', '.join(search.space_names())}", rest)
    preset, rest = pop_option(rest, "--preset")
    resumed, _ = pop_option(rest, "--resume")
    if resumed:
        if name or preset:
            raise ConfigError(f"{resumed} keeps its space and preset: leave out {name or '--preset'}")
        base = search.load_search(resumed)
    else:
        space = search.load_space(name)
        base = search.Search(named_run(preset or space.preset or "x2ct-gan-slim"), space)
    options = parse(f"tune {name}", rest, TuneOptions(**{key: getattr(base, key) for key in SETTINGS}))
    new = replace(base, **{key: getattr(options, key) for key in SETTINGS})
    cluster.session_folder()
    url = absolute(options.resume or options.output or runs.new_run_url("runs", f"search-{Path(name).stem}"))
    search.validate(new)
    if not options.resume:
        new = search.prepare(new)
    cluster.connect()
    search.require_capacity(new)
    if not options.resume:
        search.create(new, url)
    with lease.acquire(url, options.take_over):
        if options.resume:
            search.resume_search(new, url)
        table = search.fit(url, leased=True)
    console.print(trials.as_table(table))
    print(f"report: {search_report.write(url)}")
    complete = Folder(url).exists(trials.TABLE_FILE)
    if not complete:
        failed = sum(bool(trial.error) for trial in table)
        print(f"{failed} of {len(table)} trials failed: raylift tune --resume {url} repeats them")
    best = table[0]
    if two_objectives.OBJECTIVES[new.objectives] and best.measurement is None:
        raise ConfigError(f"no trial of {url} was measured: {best.error}")
    if best.best_psnr_db is None:
        raise ConfigError(f"no trial of {url} reached a validation: {best.error}")
    if best.measurement:
        print(f"Pareto set, measured on {two_objectives.devices(trial.measurement for trial in table)}:")
        for trial in table:
            if trial.pareto:
                print(f"  {trial.measurement}: {trial.checkpoint}")
    else:
        print(f"best checkpoint ({best.best_psnr_db:.2f} dB, step {best.step}): {best.checkpoint}")
        if best.lineage:
            print("settings that led to it, by step:")
            console.print(trials.as_lineage_table(best.lineage))
    if complete:
        print(f"all trials: {url}/trials.json")
    return 0
