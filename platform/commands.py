"""The verbs of the command line: options in, one call, and a few lines for a person."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from raylift.datasets.archive import Archive
from raylift.datasets.ct import Limits
from raylift.datasets.errors import ConfigError, NoArchive
from raylift.datasets.geometry import GEOMETRIES, Geometry, Grid
from raylift.datasets.splits import Split, read_assignments
from raylift.datasets.store import absolute
from raylift.models import weights
from raylift.models.zoo import LITERATURE, SYSTEMS, parameters
from raylift.platform.config import RunConfig, from_yaml
from raylift.platform.presets import PRESETS
from raylift.platform.progress import console, meter

GeometryName = Literal["chest", "x2ct", "parallel"]


@dataclass(frozen=True)
class GridOptions:
    """The grid and geometry of a new archive; an archive that exists keeps its own."""

    size: int | None = None
    """Voxels a side; 128 for a new archive."""
    spacing_mm: float | None = None
    """Edge of a voxel; 2.5 for a new archive."""
    geometry: GeometryName | None = None
    """How radiographs are projected; chest (SAD 1650, SDD 1800 mm) for a new archive."""

    def resolve(self, url: str) -> tuple[Grid, Geometry]:
        """The archive's own grid and geometry where it exists and nothing else was asked for."""
        try:
            there = Archive(url).manifest
        except NoArchive:
            there = None
        default = there.grid if there else Grid()
        grid = Grid(self.size or default.size, self.spacing_mm or default.spacing_mm)
        if self.geometry or there is None:
            return grid, GEOMETRIES[self.geometry or "chest"](grid)
        return grid, there.geometry


@dataclass(frozen=True)
class IngestOptions:
    """Bring CT scans (NIfTI, NRRD, MetaImage, DICOM series) into an archive, skipping those already in it."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Files and folders."""
    archive: str
    """Folder or URL of the archive."""
    grid: Annotated[GridOptions, tyro.conf.arg(name="")] = field(default_factory=GridOptions)
    limits: Limits = field(default_factory=Limits)
    licence: str = "not stated"
    """Licence of the scans, kept with every sample."""
    subject_pattern: str = ""
    """Regular expression whose first group is the subject in a file's name; the whole name otherwise."""
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of subjects that train, validate and test."""
    splits: Path | None = None
    """CSV with columns subject and split, for subjects whose split is given."""
    require_whole_thorax: bool = False
    """Refuse scans without two whole lungs."""
    keep_table: bool = False
    """Keep what lies around the body."""
    per_part: int = 8
    """Volumes a shard; each full shard is published at once."""


def ingest(arguments: list[str]) -> int:
    """CT files and folders to an archive."""
    from raylift.datasets.ingest import ingest as run

    options = tyro.cli(IngestOptions, prog="raylift ingest", args=arguments)
    grid, geometry = options.grid.resolve(options.archive)
    with meter("ingest") as shown:
        outcome = run(
            options.sources,
            options.archive,
            grid,
            geometry,
            limits=options.limits,
            licence=options.licence,
            subject_pattern=options.subject_pattern,
            shares=options.shares,
            assigned=read_assignments(options.splits) if options.splits else None,
            require_whole_thorax=options.require_whole_thorax,
            keep_table=options.keep_table,
            per_part=options.per_part,
            progress=shown.at,
        )
    for refusal in outcome.refused:
        print(f"refused: {refusal}")
    print(f"{absolute(options.archive)}: {outcome.summary()}")
    return 0 if outcome.added or outcome.already_there else 1


@dataclass(frozen=True)
class PhantomOptions:
    """Draw synthetic thoraces into an archive; the same seed draws the same people."""

    archive: str
    """Folder or URL of the archive."""
    count: int = 32
    """Volumes."""
    seed: int = 0
    grid: Annotated[GridOptions, tyro.conf.arg(name="")] = field(default_factory=GridOptions)
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares that train, validate and test."""
    per_part: int = 8
    """Volumes a shard."""


def phantom(arguments: list[str]) -> int:
    """Synthetic thorax volumes to an archive."""
    from raylift.datasets.ingest import ingest_phantoms

    options = tyro.cli(PhantomOptions, prog="raylift phantom", args=arguments)
    grid, geometry = options.grid.resolve(options.archive)
    with meter("phantom") as shown:
        outcome = ingest_phantoms(
            options.archive,
            grid,
            geometry,
            count=options.count,
            seed=options.seed,
            shares=options.shares,
            per_part=options.per_part,
            progress=shown.at,
        )
    print(f"{absolute(options.archive)}: {outcome.summary()}")
    return 0


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
        from raylift.platform import runs

        base = runs.load_run(rest[rest.index("--resume") + 1])
    elif name:
        base = _named_run(name)
    else:
        print(f"usage: raylift train PRESET [options]\n       raylift train --resume RUN [options]\n\n{_presets()}")
        return 0 if {"-h", "--help"} & set(rest) else 2
    options = tyro.cli(TrainOptions, prog=f"raylift train {name}", args=rest, default=TrainOptions(base))
    if options.dry_run:
        return _dry_run(options.run)
    from raylift.platform import cluster, runs

    if options.resume and (options.run.system, options.run.data.window) != (base.system, base.data.window):
        raise ConfigError("a resumed run keeps its system and window: start a new one to change them")
    url = absolute(options.resume or options.output or runs.new_run_url("runs", Path(name).stem))
    run = options.run if options.resume else runs.start(options.run, url)
    started = time.monotonic()
    cluster.connect()
    metrics = runs.fit(run, url)
    best, summary = runs.best_checkpoint(url)
    print(f"trained in {time.monotonic() - started:.0f} s: validation PSNR {metrics['val_psnr_db']:.2f} dB at the end")
    print(f"best checkpoint ({summary['metrics']['val_psnr_db']:.2f} dB, step {summary['step']}): {best}")
    print(f"curves: tensorboard --logdir {url}/tensorboard")
    return 0


@dataclass(frozen=True)
class TuneOptions:
    """Search settings over a space of `tune_spaces` (or a YAML file), or go on with a search."""

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    trials: int = 8
    """Trials in all."""
    concurrent: int = 0
    """Trials at once at most; 0 is as many as the cluster holds."""
    halving: int = 3
    """At each validation the best 1/n of the trials go on."""
    seed: int = 0
    """Of the proposals; the run's own seed is train.seed."""
    output: str = ""
    """Folder or URL of the new search; runs/search-<space>-<time> otherwise."""
    resume: str = ""
    """Folder or URL of a search to go on with."""


def tune(arguments: list[str]) -> int:
    """Search settings, or go on with a search."""
    from raylift.platform import cluster, runs
    from raylift.platform import tune as search

    name, rest = _first_word(arguments)
    if not name and "--resume" not in rest:
        known = ", ".join(sorted(path.stem for path in search.spaces_folder().glob("*.yaml")))
        print(
            f"usage: raylift tune SPACE [--preset NAME] [options]\n       raylift tune --resume SEARCH\n\nspaces: {known}"
        )
        return 0 if {"-h", "--help"} & set(rest) else 2
    preset, rest = _option(rest, "--preset")
    space = search.load_space(name) if name else search.Space({})
    base = _named_run(preset or space.preset or "x2ct-gan-slim")
    options = tyro.cli(TuneOptions, prog=f"raylift tune {name}", args=rest, default=TuneOptions(base))
    url = absolute(options.resume or options.output or runs.new_run_url("runs", f"search-{Path(name).stem}"))
    if not options.resume:
        asked = search.Search(
            run=options.run,
            space=space,
            trials=options.trials,
            concurrent=options.concurrent,
            halving=options.halving,
            seed=options.seed,
        )
        search.validate(asked)
        search.start(asked, url)
    cluster.connect()
    table = search.fit(url, say=lambda text: print(f"tune: {text}", flush=True))
    console.print(search.as_table(table))
    best = table[0]
    if best.best is None:
        raise ConfigError(f"no trial of {url} reached a validation: {best.error}")
    print(f"best checkpoint ({best.best:.2f} dB, step {best.step}): {best.checkpoint}")
    print(f"all trials: {url}/trials.json")
    return 0


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a checkpoint on held-out scans, beside the mean training volume and plain back-projection."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, a run (its best checkpoint) or an exported model."""
    archive: str
    """Folder or URL of the archive."""
    split: Split = "test"
    protocols: tuple[Literal["volume", "x2ct", "cvaa"], ...] = ("volume", "x2ct", "cvaa")
    """How figures are computed; see raylift.models.metrics."""
    output: Path = Path("evaluation")
    """Folder for report.html, metrics.json and figures."""
    seed: int = 0


def evaluate(arguments: list[str]) -> int:
    """Measure a checkpoint: table, JSON, figures, report."""
    from raylift.platform import evaluate as evaluation
    from raylift.platform import report, runs

    options = tyro.cli(EvaluateOptions, prog="raylift evaluate", args=arguments)
    url = runs.checkpoint_of(options.checkpoint)
    model = weights.load(url)
    with meter("evaluate") as shown:
        result = evaluation.evaluate(
            model,
            Archive(options.archive),
            split=options.split,
            protocols=options.protocols,
            seed=options.seed,
            progress=shown.at,
        )
    page = report.write(
        result, options.output, model.description.grid, model.description.geometry, runs.history_of(url)
    )
    for table in report.terminal_tables(result):
        console.print(table)
    print(result.verdict())
    print(f"report: {page}")
    return 0


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint as safetensors with its description and a model card."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, or a run (its best checkpoint)."""
    folder: tyro.conf.Positional[Path]
    """A new or empty folder."""


def export(arguments: list[str]) -> int:
    """A checkpoint as safetensors, config and model card."""
    from raylift.platform import export as exporting
    from raylift.platform import runs

    options = tyro.cli(ExportOptions, prog="raylift export", args=arguments)
    url = runs.checkpoint_of(options.checkpoint)
    sha256 = exporting.export(weights.load(url), options.folder, runs.metrics_of(url))
    print(f"{options.folder}: weights SHA-256 {sha256}")
    return 0


def systems(arguments: list[str]) -> int:
    """Systems of the literature, and which of them are here."""
    tyro.cli(_Nothing, prog="raylift systems", args=arguments, description=systems.__doc__)
    import torch
    from rich.table import Table

    table = Table("system", "here as", "kind", "views", "parameters", "paper")
    for published in LITERATURE:
        count = ""
        if published.name:
            with torch.device("meta"):
                count = f"{parameters(SYSTEMS[published.name]().reconstructor(128)):,}"
        name = published.name or "[dim]not in this version[/dim]"
        table.add_row(published.title, name, published.kind, published.views, count, published.paper)
    console.print(table)
    print("parameters: generator at the published settings, two views, 128 voxels a side")
    print(_presets())
    return 0


def doctor(arguments: list[str]) -> int:
    """What is installed and reachable, and what is missing."""
    tyro.cli(_Nothing, prog="raylift doctor", args=arguments, description=doctor.__doc__)
    from raylift.platform.doctor import examine

    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.mark:<4} {finding.name:<{width}}  {finding.text}")
        if finding.remedy:
            print(f"     {'':<{width}}  -> {finding.remedy}")
    return 1 if any(finding.mark == "FAIL" for finding in findings) else 0


@dataclass(frozen=True)
class _Nothing:
    pass


def _dry_run(run: RunConfig) -> int:
    from raylift.platform.memory import estimate

    print(run.to_yaml())
    print(f"# config SHA-256 {run.sha256()}")
    for line in estimate(run).lines():
        print(f"# {line}")
    return 0


def _named_run(name: str) -> RunConfig:
    if name in PRESETS:
        return PRESETS[name]()
    if name.endswith((".yaml", ".yml")):
        return from_yaml(Path(name).read_text(encoding="utf-8"), name)
    raise ConfigError(f"no preset '{name}': use one of {', '.join(PRESETS)}, or a YAML file")


def _presets() -> str:
    width = max(map(len, PRESETS))
    return "presets:\n" + "\n".join(
        f"  {name:<{width}}  {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items()
    )


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
