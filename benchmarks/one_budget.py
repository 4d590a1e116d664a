"""Systems at one budget: the same wall time on one GPU, on held-out phantoms and by folds on CT.

Each system trains on deformed phantoms, then, from these weights, once per fold, on deformed phantoms and the deformed
CT of the other folds' subjects. All get the same samples in the same order, with DRRs as an archive holds them, and
their slim preset's optimizer. All train at once, each in a process of its own. With torch alone:

    python benchmarks/gpu_training.py --pack ct ct_more --ct ct.npz
    python benchmarks/one_budget.py --prepare --ct ct.npz --output runs/one_budget
    python benchmarks/one_budget.py --seconds 380 --fold-seconds 40 --output runs/one_budget
    python benchmarks/one_budget_report.py runs/one_budget --output benchmarks/results --plots docs/images
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid, chest
from raylift.models import baselines, metrics, segmentation_metrics, weights
from raylift.models.diffusion.diffusion_network import DiffusionNetwork
from raylift.models.inference import reconstruct
from raylift.models.losses import ssim_loss
from raylift.models.systems.diffux2ct import TriPlaneSystem
from raylift.models.zoo import SYSTEMS, parameters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import conditions
from one_budget_data import GRIDS, batches, folds, load, prepare
from training_batches import WINDOW, Pairs
from training_loop import Log, Metrics, Settings, placed, train

FIT_STEPS = 10
"""Steps of the data-consistency fit."""
BASELINES = "baselines"
BASELINE_BATCHES = 50
"""Batches of 8 to which the trivial baselines are fitted."""
PUBLISHED_SCHEDULE = "diffux2ct-published-schedule"
"""The slim DiffuX2CT with the published noise schedule and epsilon-prediction."""
NAMES = ("x2ct-gan", "x-recon", "duolift-gan", "diffux2ct", PUBLISHED_SCHEDULE, "unrolled")
TISSUES = {
    "air": (-1024, -950),
    "lung": (-950, -500),
    "between lung and soft tissue": (-500, -200),
    "soft tissue": (-200, 150),
    "bone": (150, 1477),
}
"""HU of the ground truth, from and below."""


class Run:
    """Data, settings and the folder of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output, self.data = options.output, options.output / "data"
        self.device = torch.device(options.device)
        self.grid: Grid = GRIDS[options.size][0]
        self.geometry: Geometry = chest(self.grid)

    def pairs(self, name: str) -> Pairs:
        """The pairs of a file of the data."""
        return Pairs.load(self.data / f"{name}.npz")

    def test_subjects(self) -> list[list[str]]:
        """The subjects of each fold; none without CT."""
        file = self.data / "ct.npz"
        return folds(np.load(file)["names"].tolist(), self.options.folds) if file.exists() else []


def system_of(name: str, size: int) -> Any:
    """A system's slim preset, or the tiny one for a trial at 32 voxels per side."""
    if name != PUBLISHED_SCHEDULE:
        return SYSTEMS[name].slim if size >= 64 else SYSTEMS[name].tiny
    published, slim = SYSTEMS["diffux2ct"].full, SYSTEMS["diffux2ct"].slim
    assert isinstance(published, TriPlaneSystem)
    assert isinstance(slim, TriPlaneSystem)
    return replace(slim, scheduler=published.scheduler, sampling=published.sampling)


def run_system(name: str, run: Run) -> None:
    """Train one system on phantoms and on every fold; write weights, volumes, logs and settings."""
    options, folder = run.options, run.output / name
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    phantoms, test = load(run.data, "phantoms", run.device), run.pairs("test")
    begin = folder / "phantoms.safetensors"
    plan = {"seconds": options.seconds, "warmup_steps": 100, "ema_decay": 0.999}
    fit(name, [phantoms], run, "phantoms", None, {**plan, "measure_every_s": options.seconds / 8})
    predict(name, begin, test, run, folder / "phantoms.npz")
    subjects = run.test_subjects()
    if not subjects:
        return
    scans, (hu, labels) = run.pairs("ct"), load(run.data, "ct-source", run.device)
    predict(name, begin, scans, run, folder / "ct-phantom-weights.npz")
    plan |= {"seconds": options.fold_seconds, "warmup_steps": 20, "ema_decay": 0.99}
    for k, held_out in enumerate(subjects):
        others = torch.from_numpy(~np.isin(scans.names, held_out)).to(run.device)
        ct = hu[others], labels[others]
        fit(name, [phantoms, ct], run, f"fold-{k}", begin, {**plan, "measure_every_s": options.fold_seconds})
        predict(name, folder / f"fold-{k}.safetensors", scans.of_subjects(held_out), run, folder / f"fold-{k}.npz")


def fit(name: str, kinds: list[Any], run: Run, stage: str, begin: Path | None, plan: dict[str, Any]) -> None:
    """Train one stage; write weights, the log of loss and validation, and the settings."""
    options, folder = run.options, run.output / name
    torch.manual_seed(options.seed)
    objective = placed(system_of(name, run.grid.size).objective(run.grid, run.geometry, WINDOW), run.device)
    if begin:
        load_networks(begin, objective.networks())
    log = Log(folder / f"{stage}.jsonl", f"{name} {stage}")
    log.file.unlink(missing_ok=True)
    validation = run.pairs("validation")
    batch = validation.batch(range(len(validation.names))).to(run.device)
    last: Metrics = {}
    training = SYSTEMS[name if name in SYSTEMS else "diffux2ct"].slim_training
    settings = Settings.of(training, precision=options.precision, **plan)
    settings = replace(settings, lr=(0.5 if begin else 1.0) * settings.lr)

    def measured(network: nn.Module, position: Metrics) -> None:
        last.update({**position, **measure(network, batch, settings)})
        log({"measured": dict(last)})

    stream = batches(kinds, run.grid, run.geometry, options.batch, options.seed + bool(begin))
    ema = train(objective, stream, settings, log, measured)
    networks = {**objective.networks(), next(iter(objective.networks())): ema}
    state = {f"{key}.{k}": v.half().contiguous() for key, net in networks.items() for k, v in net.state_dict().items()}
    safetensors.torch.save_file(state, folder / f"{stage}.safetensors")
    described = {
        "system": name,
        "parameters": parameters(objective.reconstruction_network),
        "volumes": [len(hu) for hu, _ in kinds],
        "settings": {**vars(settings), "clock": "monotonic", "batch": options.batch, "seed": options.seed},
        "grid": vars(run.grid),
        "conditions": [*conditions("one_budget", ("torch", "numpy"))[1:], card(run.device)],
        "last": last,
    }
    (folder / f"{stage}.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def card(device: torch.device) -> str:
    """The line of conditions that names the device."""
    return f"* device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}"


def key_of(file: Path) -> str:
    """The key of the reconstruction network among the networks of a file."""
    (key,) = {name.split(".")[0] for name in safetensors.torch.load_file(file)} - {"discriminator"}
    return key


def load_networks(file: Path, networks: dict[str, nn.Module]) -> None:
    """Load the weights of every network that the file has."""
    state = safetensors.torch.load_file(file)
    for key, network in networks.items():
        prefix = f"{key}."
        own = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
        if own:
            network.load_state_dict(own)


@torch.no_grad()
def measure(network: nn.Module, batch: Batch, settings: Settings) -> Metrics:
    """Mean PSNR (dB) and SSIM of protocol `volume` over a batch, for the curves."""
    with settings.autocast(batch.radiographs.device):
        volume = network(batch.radiographs).float().clip(0, 1)
    squared = (volume - batch.volume).square().flatten(1).mean(dim=1)
    return {
        "val_psnr_db": float(-10 * squared.log10().mean()),
        "val_ssim": float(1 - ssim_loss(volume, batch.volume)),
    }


def predict(name: str, weights_file: Path, pairs: Pairs, run: Run, file: Path) -> None:
    """Write `volumes_of` of trained weights in fp32."""
    network = system_of(name, run.grid.size).reconstruction_network(run.grid, run.geometry).eval()
    load_networks(weights_file, {key_of(weights_file): network})
    np.savez(file, **volumes_of(network.to(run.device), pairs, run))


def volumes_of(network: nn.Module, pairs: Pairs, run: Run) -> dict[str, np.ndarray]:
    """By `SUBJECT predicted` and `SUBJECT fitted`, volumes in HU before and after the data-consistency fit, int16."""
    sampling = network.sampling if isinstance(network, DiffusionNetwork) else None
    volumes = {}
    for k, name in enumerate(pairs.names.tolist()):
        radiographs = pairs.batch([k]).radiographs.to(run.device)
        (made,) = reconstruct(
            network, radiographs, WINDOW, run.grid, run.geometry, sampling=sampling, consistency_steps=FIT_STEPS
        )
        assert made.fitted is not None
        for stage, unit in (("predicted", made.predicted), ("fitted", made.fitted)):
            volumes[f"{name} {stage}"] = WINDOW.to_hu(unit)[0].cpu().numpy().round().astype(np.int16)
    return volumes


def export(name: str, run: Run) -> None:
    """Write the weights trained on phantoms as a model that every command takes, to OUTPUT/SYSTEM/model."""
    folder = run.output / name
    described = json.loads((folder / "phantoms.json").read_text())
    system = system_of(name, run.grid.size)
    network = system.reconstruction_network(run.grid, run.geometry)
    load_networks(folder / "phantoms.safetensors", {key_of(folder / "phantoms.safetensors"): network})
    provenance = {
        "archive": f"{described['volumes'][0]} phantoms, deformed",
        "training_samples": [f"phantom {seed}" for seed in range(described["volumes"][0])],
        "step": described["last"]["step"],
        "seconds": described["last"]["seconds"],
        "script": "benchmarks/one_budget.py",
        "conditions": described["conditions"],
        "config": {"train": {"batch_size": described["settings"]["batch"], "seed": described["settings"]["seed"]}},
    }
    description = weights.Description(system, run.grid, run.geometry, WINDOW, provenance=provenance)
    weights.save(folder / "model", network.state_dict(), description)


def predict_baselines(run: Run) -> None:
    """Mean training volume and back-projection, fitted to deformed training phantoms, or to CT of other folds."""

    def fitted(training: Iterable[Batch], test: Pairs, file: str) -> None:
        networks = baselines.fit(training, run.grid, run.geometry).predictors(run.grid, run.geometry)
        for key, network in networks.items():
            folder = run.output / f"{BASELINES}-{key.replace(' ', '-')}"
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / file, **volumes_of(network.to(run.device), test, run))

    samples = batches([load(run.data, "phantoms", run.device)], run.grid, run.geometry, 8, run.options.seed)
    training = (batch.to(torch.device("cpu")) for batch in islice(samples, BASELINE_BATCHES))
    fitted(training, run.pairs("test"), "phantoms.npz")
    for k, held_out in enumerate(run.test_subjects()):
        scans = run.pairs("ct")
        others = [k for k, name in enumerate(scans.names.tolist()) if name not in held_out]
        fitted([scans.batch([k]) for k in others], scans.of_subjects(held_out), f"fold-{k}.npz")
    (run.output / "baselines.done").touch()


def evaluate(file: Path, data: Path, spacing_mm: float) -> None:
    """Write the metrics of protocol `volume`, the lung Dice and errors by tissue of a file of volumes as JSON."""
    volumes = np.load(file)
    ground_truths = {}
    for name in ("test", "ct"):
        if (data / f"{name}.npz").exists():
            pairs = Pairs.load(data / f"{name}.npz")
            ground_truths |= dict(zip(pairs.names.tolist(), pairs.hu, strict=True))
    values: dict[str, dict[str, Metrics]] = {}
    for key in volumes.files:
        subject, stage = key.rsplit(" ", 1)
        hu, ground_truth = volumes[key].astype(np.float32), ground_truths[subject].astype(np.float32)
        values.setdefault(subject, {})[stage] = {
            **metrics.VOLUME.evaluate(hu, ground_truth),
            "lung_dice": segmentation_metrics.compare(hu, ground_truth, (spacing_mm,) * 3)["lung_dice"],
            **errors_by_tissue(hu, ground_truth),
        }
    (file.parent / f"{file.stem}-metrics.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def errors_by_tissue(hu: np.ndarray, ground_truth: np.ndarray) -> Metrics:
    """For each tissue of the ground truth, sum and sum of squares of the error in HU, and the number of voxels."""
    ground_truth = WINDOW.to_hu(WINDOW.to_unit(ground_truth.astype(np.float64)))
    error, sums = hu - ground_truth, {}
    for name, (low, high) in TISSUES.items():
        inside = error[(ground_truth >= low) & (ground_truth < high)]
        sums |= {f"{name} sum": float(inside.sum()), f"{name} squares": float(np.square(inside).sum())}
        sums |= {f"{name} voxels": float(inside.size)}
    return sums


def evaluate_all(run: Run, workers: int) -> None:
    """`evaluate` of every file of volumes that has no metrics, in processes."""
    files = [file for file in run.output.glob("*/*.npz") if file.parent != run.data]
    todo = [file for file in files if not (file.parent / f"{file.stem}-metrics.json").exists()]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(partial(evaluate, data=run.data, spacing_mm=run.grid.spacing_mm), todo, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the data in OUTPUT/data and stop")
    parser.add_argument("--ct", default="", help="file of packed scans")
    parser.add_argument("--phantoms", type=int, default=1600)
    parser.add_argument("--size", type=int, default=64, choices=GRIDS, help="voxels per side")
    parser.add_argument("--systems", nargs="+", default=[*NAMES], choices=NAMES)
    parser.add_argument("--seconds", type=float, default=380.0, help="wall time on phantoms")
    parser.add_argument("--fold-seconds", type=float, default=40.0, help="wall time on each fold")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=14, help="processes that make data and evaluate")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--export", choices=NAMES, help="write a model that every command takes, and stop")
    parser.add_argument("--system", choices=[*NAMES, BASELINES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = Run(options)
    if options.prepare:
        prepare(run.data, options.ct, options.phantoms, options.size, options.workers)
    elif options.export:
        export(options.export, run)
    elif options.system == BASELINES:
        predict_baselines(run)
    elif options.system:
        run_system(options.system, run)
    else:
        started = time.monotonic()
        each = [[sys.executable, *sys.argv, "--system", name] for name in (*options.systems, BASELINES)]
        codes = [process.wait() for process in [subprocess.Popen(command) for command in each]]
        evaluate_all(run, options.workers)
        print(f"exit statuses {codes}; {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
