"""What each part of `unrolled` brings: variants of its slim preset at one budget of CPU time, on validation phantoms.

All get the same samples in the same order, deformed phantoms at 32^3 with DRRs as an archive holds them, and the slim
preset's optimizer. A variant that is done is not trained again:

    python benchmarks/one_budget.py --prepare --size 32 --phantoms 600 --workers 1 --output runs/ablation
    python benchmarks/ablation.py --seconds 240 --output runs/ablation > benchmarks/results/DATE-ablation.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raylift.datasets.geometry import chest
from raylift.models.systems.unrolled import SLIM, UNROLLED
from raylift.models.zoo import parameters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from one_budget import measure
from one_budget_data import GRIDS, batches, load
from training_batches import WINDOW, Pairs
from training_loop import Log, Metrics, Settings, placed, train

GRID = GRIDS[32][0]
GEOMETRY = chest(GRID)
BATCH = 4
VARIANTS = {
    "slim preset": SLIM,
    "1 iteration: no data consistency": replace(SLIM, iterations=1),
    "3 iterations": replace(SLIM, iterations=3),
    "back-projected features of 1 channel": replace(SLIM, lifted_channels=(1, 1, 1, 1)),
    "1 learned feature of the residual": replace(SLIM, residual_channels=1),
    "no deep supervision": replace(SLIM, loss=replace(SLIM.loss, deep_supervision_weight=0.0)),
    "no SSIM in the loss": replace(SLIM, loss=replace(SLIM.loss, ssim_weight=0.0)),
}


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant, unless its result exists, and return the result."""
    file = options.output / f"{name.split(':')[0].replace(' ', '-')}.json"
    if file.exists():
        result: dict[str, Any] = json.loads(file.read_text())
        return result
    torch.manual_seed(options.seed)
    objective = placed(VARIANTS[name].objective(GRID, GEOMETRY, WINDOW), torch.device("cpu"), "channels-last")
    validation = Pairs.load(options.output / "data/validation.npz", options.output / "data/test.npz")
    batch = validation.batch(range(len(validation.names)))
    settings = Settings.of(
        UNROLLED.slim_training,
        seconds=options.seconds,
        clock=time.process_time,
        warmup_steps=30,
        ema_decay=0.99,
        measure_every_s=options.seconds,
    )
    last: Metrics = {}

    def measured(network: nn.Module, position: Metrics) -> None:
        last.update({**position, **measure(network, batch, settings)})

    phantoms = load(options.output / "data", "phantoms", torch.device("cpu"))
    stream = batches([phantoms], GRID, GEOMETRY, BATCH, options.seed, workers=0)
    train(objective, stream, settings, Log(file.with_suffix(".jsonl"), name), measured)
    result = {**last, "parameters": parameters(objective.reconstruction_network), "phantoms": len(phantoms[0])}
    file.write_text(json.dumps({**result, "validated": len(validation.names)}), encoding="utf-8")
    return run(name, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0, help="CPU time of each variant, validation excluded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stdout, sys.stdout = sys.stdout, sys.stderr
    results = {name: run(name, options) for name in VARIANTS}
    sys.stdout = stdout
    header("ablation")
    first = results["slim preset"]
    rows = [
        [
            name,
            f"{result['parameters']:,}",
            str(result["step"]),
            f"{1e3 * result['seconds'] / result['step']:.0f}",
            f"{result['val_psnr_db']:.2f} ({result['val_psnr_db'] - first['val_psnr_db']:+.2f})",
            f"{result['val_ssim']:.3f} ({result['val_ssim'] - first['val_ssim']:+.3f})",
        ]
        for name, result in results.items()
    ]
    title = (
        f"{options.seconds:g} CPU seconds on one thread, batch {BATCH}, {GRID.size}^3, {first['phantoms']} deformed "
        f"phantoms, seed {options.seed}; EMA weights on {first['validated']} validation phantoms, protocol volume "
        "(difference to the slim preset)"
    )
    table(title, ["variant", "parameters", "steps", "CPU ms/step", "PSNR, dB", "SSIM"], rows)


if __name__ == "__main__":
    main()
