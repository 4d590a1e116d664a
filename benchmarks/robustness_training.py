"""Small models for `robustness.py`: the same steps on the same phantoms, with and without augmentation.

    python benchmarks/robustness_training.py unrolled:none unrolled:full x2ct-gan:full --output runs/robustness

Every job, SYSTEM:AUGMENTATION, has the same phantoms in the same order at 32^3 and 10 mm, made with a margin of four
voxels so that a deformation finds anatomy outside. Without augmentation the same code projects them as they are. A job
whose model is written already is skipped.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylift.datasets.augmentation.augmentation import Augmentation, augment
from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.models import baselines, weights
from raylift.models.training_data import TrainingData
from raylift.models.zoo import SYSTEMS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import conditions
from one_budget import measure
from training_batches import HELD_OUT_SEED, WINDOW, augmentations, clean_views, phantoms
from training_loop import Log, Settings, placed, train

GRID = Grid(32, 10.0)
GEOMETRY = chest(GRID)
SOURCE = Grid(GRID.size + 8, GRID.spacing_mm)
BATCH = 4
SLIM = "unrolled"
"""The others' slim networks halve too often for 32 voxels per side: theirs are the tiny ones."""
VALIDATED = 8
"""Held-out phantoms of the curves."""


class Steps:
    """A clock that counts batches, so that every job has as many steps."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self) -> float:
        """Batches so far."""
        return float(self.taken)


def batches(hu: torch.Tensor, augmentation: Augmentation, seed: int, clock: Steps) -> Iterator[Batch]:
    """Batches without end: every phantom once, in random order, before any comes again."""
    rng = np.random.default_rng([seed, 1])
    order: list[int] = []
    for step in itertools.count():
        while len(order) < BATCH:
            order += rng.permutation(len(hu)).tolist()
        picked, order = order[:BATCH], order[BATCH:]
        parameters = [augmentation.sample(seed, 0, BATCH * step + k, GEOMETRY) for k in range(BATCH)]
        with torch.no_grad():
            volume, radiographs = augment(hu[picked, None].float(), SOURCE.spacing_mm, GRID, parameters)
        clock.taken += 1
        yield Batch(WINDOW.to_unit(volume), radiographs)


def run(job: str, hu: torch.Tensor, validation: Batch, options: argparse.Namespace) -> None:
    """Train a model and write it, with the trivial baselines of its phantoms, to a folder."""
    name, kind = job.split(":")
    folder = options.output / f"{name}-{kind}"
    if (folder / weights.WEIGHTS_FILE).exists():
        return
    torch.manual_seed(options.seed)
    system = SYSTEMS[name].slim if name == SLIM else SYSTEMS[name].tiny
    objective = placed(system.objective(GRID, GEOMETRY, WINDOW), torch.device("cpu"), "channels-last")
    clock, started = Steps(), time.process_time()
    log = Log(options.output / f"{name}-{kind}.jsonl", job)
    plan = Settings.of(
        SYSTEMS[name].slim_training,
        clock=clock,
        seconds=options.steps,
        warmup_steps=30,
        ema_decay=0.99,
        log_every_s=50,
        measure_every_s=250,
    )
    last: dict[str, Any] = {}

    def measured(network: torch.nn.Module, position: dict[str, float]) -> None:
        last.update({**position, **measure(network, validation, plan)})
        log({"measured": dict(last)})

    ema = train(objective, batches(hu, augmentations()[kind], options.seed, clock), plan, log, measured)
    center = hu[:, 4:-4, 4:-4, 4:-4].float()[:, None]
    views = clean_views(center, GRID, GEOMETRY)
    fit = baselines.fit(
        (Batch(WINDOW.to_unit(v[None]), x[None]) for v, x in zip(center, views, strict=True)), GRID, GEOMETRY
    )
    provenance = {
        "conditions": conditions("robustness_training", ("torch", "numpy"))[1:],
        "step": clock.taken,
        "config": {"train": {"batch_size": BATCH, "seed": options.seed}},
        "training_samples": [f"phantom seed {seed}" for seed in range(len(hu))],
        "augmentation": kind,
        "cpu_s": round(time.process_time() - started),
        "last": last,
    }
    description = weights.Description(system, GRID, GEOMETRY, WINDOW, provenance=provenance)
    weights.save(folder, ema.state_dict(), description, training_data=TrainingData(frozenset(), fit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", metavar="SYSTEM:AUGMENTATION", help="augmentation is full, volume or none")
    parser.add_argument("--phantoms", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1, help="processes that make the phantoms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    made = options.output / "phantoms.npy"
    if not made.exists():
        np.save(made, phantoms(SOURCE, range(options.phantoms), options.workers))
    hu = torch.from_numpy(np.load(made))
    held_out = torch.from_numpy(phantoms(GRID, range(HELD_OUT_SEED, HELD_OUT_SEED + VALIDATED), 1)).float()[:, None]
    validation = Batch(WINDOW.to_unit(held_out), clean_views(held_out, GRID, GEOMETRY))
    for job in options.jobs:
        run(job, hu, validation, options)


if __name__ == "__main__":
    main()
