"""The whole workflow on this machine, by the commands of the command line.

`make demo` runs it: archive, training, search, evaluation, report, service. Each stage prints its command, its duration
and the path of its result. A second run reuses the results of finished stages.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from raylift.datasets.errors import ConfigError
from raylift.platform.training.checkpoint import RUN_FILE, best_checkpoint
from raylift.platform.tuning.search import SEARCH_FILE, fit


@dataclass(frozen=True)
class DemoOptions:
    """Run the whole workflow: archive, training, search, evaluation, report, service."""

    ct: Path | None = None
    """Folder of CT scans; without it, synthetic thorax volumes are used."""
    folder: Path = Path("demo")
    """Folder of all results."""
    phantoms: int = 48
    """Number of synthetic volumes, if no CT is given."""
    steps: int = 200
    """Training steps."""
    trials: int = 4
    """Trials of the search."""
    trial_steps: int = 32
    """Training steps of a trial."""
    serve: bool = True
    """Serve the pretrained model and the best checkpoint at the end, until Ctrl-C."""
    port: int = 8000


def main() -> int:
    """Run all stages in order."""
    options = tyro.cli(DemoOptions, prog="python -m raylift.platform.demo")
    home = options.folder / ("ct" if options.ct else "phantom")
    archive, run, search, report = (str(home / name) for name in ("archive", "run", "search", "report"))
    started = time.monotonic()
    grid = ["--size", "64", "--spacing-mm", "5"]
    if options.ct:
        _stage("archive", ["ingest", str(options.ct), "--archive", archive, *grid], archive)
    else:
        _stage("archive", ["phantom", "--archive", archive, "--count", str(options.phantoms), *grid], archive)
    _stage("training", ["train", *_training(options, archive, run)], run)
    _stage("search", ["tune", *_search(options, archive, search)], search)
    best = os.path.relpath(_best(run, search))
    _stage("evaluation", ["evaluate", best, "--archive", archive, "--output", report], f"{report}/report.html")
    if not (home / "model" / "model.json").exists():
        _stage("export", ["export", best, str(home / "model")], str(home / "model"))
    print(f"\ndemo: done in {time.monotonic() - started:.0f} s; the report is {report}/report.html")
    if options.serve:
        # Half a core for each model, so that both fit on two cores.
        words = ["serve", "--also", str(home / "model"), "--port", str(options.port), "--cpus-per-replica", "0.5"]
        print("demo: the page has the pretrained model, and a link to the one just trained")
        print(f"\n== service\n$ raylift {shlex.join(words)}", flush=True)
        service = _command(words)
        os.execv(service[0], service)  # noqa: S606
    return 0


def _training(options: DemoOptions, archive: str, run: str) -> list[str]:
    if (Path(run) / RUN_FILE).exists():
        return ["--resume", run]
    steps = ["--train.steps", str(options.steps), "--train.validate-every", str(max(1, options.steps // 6))]
    return ["x2ct-gan-slim", "--data.archive", archive, "--output", run, *steps]


def _search(options: DemoOptions, archive: str, search: str) -> list[str]:
    if (Path(search) / SEARCH_FILE).exists():
        return ["--resume", search]
    steps = ["--train.steps", str(options.trial_steps), "--train.validate-every", str(max(1, options.trial_steps // 4))]
    # One worker a trial, so that two trials run at once on two cores.
    flags = ["--trials", str(options.trials), *steps, "--cluster.workers", "1"]
    return ["x2ct-gan", "--data.archive", archive, "--output", search, *flags]


def _stage(title: str, arguments: list[str], result: str) -> None:
    print(f"\n== {title}\n$ raylift {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    # Each command has a Ray of its own, as when a user types it: a stopped trial may leave resources reserved.
    with subprocess.Popen(_command(arguments)) as process:
        while True:
            try:
                status = process.wait()
                break
            except KeyboardInterrupt:
                # The command has received Ctrl-C too and ends by itself.
                continue
    if status:
        raise SystemExit(status)
    print(f"-- {title} took {time.monotonic() - started:.0f} s: {result}", flush=True)


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "raylift", *arguments]


def _best(run: str, search: str) -> str:
    """The checkpoint with the higher validation PSNR: the run's best or the search's best."""
    run_checkpoint, summary = best_checkpoint(run)
    trials = [trial for trial in fit(search) if trial.best_psnr_db is not None]
    if not trials:
        raise ConfigError(f"no trial of {search} reached a validation")
    run_psnr_db = summary["metrics"]["val_psnr_db"]
    search_psnr_db = trials[0].best_psnr_db
    print(
        f"\nbest of the run {run_psnr_db:.2f} dB, of the search {search_psnr_db:.2f} dB "
        "(validation PSNR, protocol volume)"
    )
    return run_checkpoint if search_psnr_db is None or run_psnr_db >= search_psnr_db else trials[0].checkpoint


if __name__ == "__main__":
    raise SystemExit(main())
