"""Whether a scheduler finds the best trial of a full search, and with which part of its training steps.

Every search has random settings of the same seed, hence the same trials in the same order; without a scheduler all of
them train to the end. Trials run one at a time. Population-based training has fewer members, whose settings change, so
its best one has no rank.

    python benchmarks/search_schedulers.py --output runs/schedulers
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from raylift.platform.tuning.search import load_search
from raylift.platform.tuning.study import TrialHistory, load_trials

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

SPACE = """space:
  optimizer.lr: {log_uniform: [1.0e-5, 1.0e-2]}
  system.loss.mse_weight: {log_uniform: [1.0, 100.0]}
  system.fusion.kind: {choice: [average, sum]}
"""
SCHEDULERS = ("none", "asha", "median", "pbt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=18)
    parser.add_argument("--members", type=int, default=8, help="of the population")
    parser.add_argument("--steps", type=int, default=54, help="of a trial that is not stopped")
    parser.add_argument("--validate-every", type=int, default=6)
    parser.add_argument("--phantoms", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/schedulers"))
    options = parser.parse_args()
    header("search schedulers")
    options.output.mkdir(parents=True, exist_ok=True)
    archive, space = options.output / "archive", options.output / "space.yaml"
    space.write_text(SPACE)
    count = ["--count", str(options.phantoms), "--size", "32", "--spacing-mm", "10"]
    raylift("phantom", "--archive", str(archive), *count, log=options.output / "phantom.log")
    found = {name: search(name, archive, space, options) for name in SCHEDULERS}
    full = sorted(found["none"], key=psnr, reverse=True)
    ranks = {settings(trial): rank for rank, trial in enumerate(full, start=1)}
    steps = {name: sum(trial.trained_steps for trial in trials) for name, trials in found.items()}
    rows = []
    for name, trials in found.items():
        assert name == "pbt" or {settings(trial) for trial in trials} == set(ranks), f"{name} has other trials"
        best = max(trials, key=psnr)
        share, ended = steps[name] / steps["none"], sum(trial.state == "finished" for trial in trials)
        rank = ranks.get(settings(best), "none")
        rows.append([name, f"{psnr(best):.2f}", str(rank), str(steps[name]), f"{share:.0%}", str(ended)])
    columns = ["scheduler", "best validation PSNR, dB", "its rank in the full search", "steps", "of the full search's"]
    title = f"{options.trials} trials of up to {options.steps} steps with x2ct-gan-tiny on phantoms at 32^3"
    table(title, [*columns, "trials trained to the end"], rows)
    best = full[0]
    print(f"Best settings: {', '.join(f'{key} {value}' for key, value in best.settings.items())}")
    return 0


def search(scheduler: str, archive: Path, space: Path, options: argparse.Namespace) -> list[TrialHistory]:
    """The trials of a search with a scheduler; one that ended before is read."""
    url = options.output / scheduler
    if not (url / "trials.json").exists():
        words = {
            "--preset": "x2ct-gan-tiny",
            "--data.archive": archive,
            "--output": url,
            "--trials": options.members if scheduler == "pbt" else options.trials,
            "--max-concurrent-trials": 1,
            "--sampler": "random",
            "--scheduler": scheduler,
            "--seed": options.seed,
            "--cluster.workers": 1,
            "--train.steps": options.steps,
            "--train.validate-every": options.validate_every,
            "--train.validation-samples": 8,
        }
        arguments = [str(word) for pair in words.items() for word in pair]
        raylift("tune", str(space), *arguments, log=options.output / f"{scheduler}.log")
    return load_trials(str(url), load_search(str(url)))


def raylift(*words: str, log: Path) -> None:
    with log.open("w") as output:
        subprocess.run([sys.executable, "-m", "raylift", *words], check=True, stdout=output, stderr=output)


def psnr(trial: TrialHistory) -> float:
    return trial.best[1] if trial.best else float("-inf")


def settings(trial: TrialHistory) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in sorted(trial.settings.items()))


if __name__ == "__main__":
    sys.exit(main())
