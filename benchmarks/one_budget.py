"""Systems at one budget: the same CPU time on one thread, on held-out phantoms and by folds on real CT.

Each system trains on phantoms, then, from these weights, once a fold on the deformed CT of the other folds' subjects.
All get the same pairs in the same order, with DRRs as an archive holds them, and their preset's optimizer. Everything
is at 32^3 and 10 mm. What is done already is skipped, so that a run can be interrupted:

    python benchmarks/one_budget.py --prepare --ct ct ct_more --output runs/one_budget
    python benchmarks/one_budget.py --seconds 300 --fold-seconds 40 --output runs/one_budget
    python benchmarks/one_budget_report.py runs/one_budget --output benchmarks/results --plots docs/images
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from raylift.datasets.batch import Batch
from raylift.models import baselines, metrics
from raylift.models.diffusion.generative import GenerativeNetwork
from raylift.models.inference import reconstruct
from raylift.models.literature import Training
from raylift.models.losses import ssim_loss
from raylift.models.system_config import SystemConfig
from raylift.models.zoo import SYSTEMS, parameters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import conditions
from one_budget_data import GEOMETRY, GRID, folds, prepare
from training_batches import WINDOW, Pairs
from training_loop import Log, Metrics, Settings, placed, train

BATCH = 4
VALIDATED = 8
"""Held-out phantoms of the curves."""
FIT_STEPS = 10
"""Steps of the consistency fit."""
BASELINES = "baselines"
NAMES = ("x2ct-gan", "x-recon", "duolift-gan", "diffux2ct", "unrolled")
SLIM = ("diffux2ct", "unrolled")
"""The others' slim networks halve too often for 32 voxels per side: theirs are the tiny ones."""


@dataclass(frozen=True)
class Run:
    """Data, settings and the folder of results."""

    data: Path
    output: Path
    seconds: float
    fold_seconds: float
    folds: int
    seed: int

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Write a result, unless it exists."""
        file = self.output / f"{name}.json"
        if not file.exists():
            result = json.dumps(make(), indent=1)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(result, encoding="utf-8")

    def pairs(self, pattern: str) -> Pairs:
        """Pairs of the files of that name."""
        return Pairs.load(*sorted(self.data.glob(pattern)))

    def test_subjects(self) -> list[list[str]]:
        """The subjects of each fold; none without CT."""
        file = self.data / "ct.npz"
        return folds(Pairs.load(file).names.tolist(), self.folds) if file.exists() else []


def system_of(name: str) -> tuple[SystemConfig, Training]:
    """Settings of a system for 32 voxels per side, and the slim preset's optimizer."""
    entry = SYSTEMS[name]
    return entry.slim if name in SLIM else entry.tiny, entry.slim_training


def run_phantoms(name: str, run: Run) -> None:
    """Train on phantoms and evaluate on held-out ones."""
    folder = run.output / name

    def result() -> dict[str, Any]:
        settings = {"seconds": run.seconds, "warmup_steps": 30, "measure_every_s": run.seconds / 8}
        trained = fit(name, run.pairs("phantoms-*.npz"), run, folder, "phantoms", None, settings)
        return {**trained, "test": evaluate_all(folder / "phantoms.safetensors", name, run.pairs("test.npz"))}

    run.once(f"{name}/phantoms", result)


def run_fold(name: str, run: Run, k: int, held_out: list[str]) -> None:
    """Fine-tune on the deformed CT of the other folds' subjects and evaluate on this fold's CT."""
    folder = run.output / name

    def result() -> dict[str, Any]:
        pairs, begin = run.pairs("deformed.npz"), folder / "phantoms.safetensors"
        others = sorted(set(pairs.names.tolist()) - set(held_out))
        settings = {"seconds": run.fold_seconds, "warmup_steps": 10, "measure_every_s": run.fold_seconds}
        trained = fit(name, pairs.of_subjects(others), run, folder, f"fold-{k}", begin, settings)
        scans = run.pairs("ct.npz").of_subjects(held_out)
        weights = folder / f"fold-{k}.safetensors"
        return {
            **trained,
            "test": evaluate_all(weights, name, scans, folder / f"fold-{k}.npz"),
            "phantom weights": evaluate_all(begin, name, scans),
        }

    run.once(f"{name}/fold-{k}", result)


def fit(
    name: str, pairs: Pairs, run: Run, folder: Path, stage: str, begin: Path | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train one stage; write weights and the log of loss and validation."""
    torch.manual_seed(run.seed)
    system, training = system_of(name)
    objective = placed(system.objective(GRID, GEOMETRY, WINDOW), torch.device("cpu"), "channels-last")
    if begin:
        load_networks(begin, objective.networks())
    log = Log(folder / f"{stage}.jsonl", f"{name} {stage}")
    log.file.unlink(missing_ok=True)
    validation = run.pairs("validation.npz").batch(range(VALIDATED))
    last: Metrics = {}

    def measured(network: nn.Module, position: Metrics) -> None:
        last.update({**position, **({} if begin else measure(network, validation))})
        log({"measured": dict(last)})

    started = time.monotonic(), time.process_time()
    slower = 0.5 if begin else 1.0
    plan = Settings.of(training, clock=time.process_time, ema_decay=0.99, **settings)
    plan = replace(plan, lr=slower * plan.lr)
    ema = train(objective, pairs.batches(BATCH, run.seed), plan, log, measured)
    networks = {**objective.networks(), next(iter(objective.networks())): ema}
    state = {f"{key}.{k}": v.contiguous() for key, net in networks.items() for k, v in net.state_dict().items()}
    safetensors.torch.save_file(state, folder / f"{stage}.safetensors")
    wall, cpu = time.monotonic() - started[0], time.process_time() - started[1]
    return {
        "system": name,
        "parameters": parameters(objective.reconstructor),
        "pairs": len(pairs.names),
        "subjects": sorted(set(pairs.names.tolist())) if begin else [],
        "settings": {**vars(plan), "clock": "process_time", "batch": BATCH, "seed": run.seed},
        "wall_s": round(wall, 1),
        "cpu_s_with_validation": round(cpu, 1),
        "conditions": conditions("one_budget", ("torch", "numpy"))[1:],
        "last": last,
    }


def load_networks(file: Path, networks: dict[str, nn.Module]) -> None:
    """Load every network's network."""
    state = safetensors.torch.load_file(file)
    for key, network in networks.items():
        prefix = f"{key}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if own:
            network.load_state_dict(own)


@torch.no_grad()
def measure(network: nn.Module, batch: Batch) -> Metrics:
    """Mean PSNR (dB) and SSIM of protocol `volume` over a batch, for the curves."""
    volume = network(batch.radiographs).float().clip(0, 1)
    squared = (volume - batch.volume).square().flatten(1).mean(dim=1)
    return {
        "val_psnr_db": float(-10 * squared.log10().mean()),
        "val_ssim": float(1 - ssim_loss(volume, batch.volume)),
    }


def evaluate_all(weights: Path, name: str, pairs: Pairs, volumes: Path | None = None) -> dict[str, Any]:
    """`evaluate` of trained weights; the volumes in HU go to a file."""
    made = reconstructed(weights, name, pairs)
    if volumes:
        np.savez_compressed(volumes, **made)
    return metrics_of(made, pairs)


def reconstructed(weights: Path, name: str, pairs: Pairs) -> dict[str, np.ndarray]:
    """`volumes_of` of trained weights."""
    network = system_of(name)[0].reconstructor(GRID, GEOMETRY).eval()
    (name,) = {key.split(".")[0] for key in safetensors.torch.load_file(weights)} - {"discriminator"}
    load_networks(weights, {name: network})
    return volumes_of(network, pairs)


def volumes_of(network: nn.Module, pairs: Pairs) -> dict[str, np.ndarray]:
    """By `SUBJECT predicted` and `SUBJECT fitted`, the volumes in HU before and after the consistency fit, int16."""
    sampling = network.sampling if isinstance(network, GenerativeNetwork) else None
    volumes = {}
    for k, name in enumerate(pairs.names.tolist()):
        radiographs = pairs.batch([k]).radiographs
        (made,) = reconstruct(
            network, radiographs, WINDOW, GRID, GEOMETRY, sampling=sampling, consistency_steps=FIT_STEPS
        )
        assert made.fitted is not None
        for stage, unit in (("predicted", made.predicted), ("fitted", made.fitted)):
            volumes[f"{name} {stage}"] = WINDOW.to_hu(unit)[0].numpy().round().astype(np.int16)
    return volumes


def metrics_of(volumes: dict[str, np.ndarray], pairs: Pairs) -> dict[str, dict[str, Metrics]]:
    """By subject and stage, the metrics of protocol `volume` and the lung Dice."""
    values: dict[str, dict[str, Metrics]] = {}
    for name, ground_truth in zip(pairs.names.tolist(), pairs.hu.astype(np.float32), strict=True):
        for stage in ("predicted", "fitted"):
            hu = volumes[f"{name} {stage}"].astype(np.float32)
            values.setdefault(name, {})[stage] = {
                **metrics.VOLUME.evaluate(hu, ground_truth),
                "lung_dice": metrics.compare_lungs(hu, ground_truth, GRID.spacing_mm)["lung_dice"],
            }
    return values


def run_baselines(run: Run) -> None:
    """Mean training volume and back-projection, fitted to the training pairs as they are."""

    def fitted(training: Iterable[Pairs], test: Pairs) -> dict[str, Any]:
        batches = (pairs.batch([k]) for pairs in training for k in range(len(pairs.names)))
        networks = baselines.fit(batches, GRID, GEOMETRY).predictors(GRID, GEOMETRY)
        return {"test": {key: metrics_of(volumes_of(network, test), test) for key, network in networks.items()}}

    run.once(f"{BASELINES}/phantoms", lambda: fitted([run.pairs("phantoms-*.npz")], run.pairs("test.npz")))
    for k, held_out in enumerate(run.test_subjects()):
        scans = run.pairs("ct.npz")
        others = scans.of_subjects(sorted(set(scans.names.tolist()) - set(held_out)))
        test = scans.of_subjects(held_out)
        run.once(f"{BASELINES}/fold-{k}", lambda others=others, test=test: fitted([others], test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the data in OUTPUT/data and stop")
    parser.add_argument("--ct", nargs="*", type=Path, default=[], help="folders of CT, each file another subject")
    parser.add_argument("--phantoms", type=int, default=2000)
    parser.add_argument("--systems", nargs="+", default=[*NAMES], choices=NAMES)
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU time on phantoms")
    parser.add_argument("--fold-seconds", type=float, default=40.0, help="CPU time on each fold")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = options.output / "data"
    if options.prepare:
        prepare(data, options.ct, options.phantoms)
        return
    run = Run(data, options.output, options.seconds, options.fold_seconds, options.folds, options.seed)
    run_baselines(run)
    for name in options.systems:
        run_phantoms(name, run)
    for k, held_out in enumerate(run.test_subjects()):
        for name in options.systems:
            run_fold(name, run, k, held_out)


if __name__ == "__main__":
    main()
