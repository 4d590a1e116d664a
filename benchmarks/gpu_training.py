"""Train the models that are part of the package, on one GPU with torch alone, for a given time.

    python benchmarks/gpu_training.py --ct ct.npz --phantoms 4000 --job unrolled:2:300 --output OUT

Volumes stay on the device; each sample is an augmented pair (`datasets.augmentation.pair`) of a CT, with
probability `--ct-share`, or else of a phantom. The learning rate falls along a cosine of the time given. Every minute
the exponential moving average of the weights is written (half precision) with its metrics on held-out phantoms and CT,
so that an interrupted training is not lost; `--from` starts from such weights.

The CT file is written by `python benchmarks/gpu_training.py --pack FOLDER... --ct ct.npz`: `source:NAME` on 96 voxels
of 4 mm, `ground_truth:NAME` on 64 of 5 mm as `raylift ingest` stores it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from raylift.datasets.augmentation.pair import Augmentation, GeometryJitter, Parameters, augment
from raylift.datasets.augmentation.radiograph import RadiographAugmentation
from raylift.datasets.augmentation.volume import VolumeAugmentation
from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid, chest
from raylift.datasets.intensity import Window, hu_to_attenuation, standardize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project
from raylift.models.losses import ssim_loss
from raylift.models.objectives.objective import frozen
from raylift.models.system_config import SystemConfig
from raylift.models.zoo import SYSTEMS

GRID = Grid(64, 5.0)
SOURCE = Grid(96, 4.0)
"""Twenty percent larger than the result, so that a deformation finds anatomy outside."""
TEST = ("lidc_idri_0007_2mm", "qin_lung_ct_qin_lsc_0049_2mm", "qin_lung_ct_qin_lsc_0064_2mm")
VALIDATE = ("lidc_idri_0006_2mm", "qin_lung_ct_qin_lsc_0088_2mm")
HELD_OUT_SEED = 10_000_000
"""Phantoms from this seed on are never trained on."""
WINDOW = Window()


def systems() -> dict[str, SystemConfig]:
    """What a job can name."""
    published = {name: entry.published for name, entry in SYSTEMS.items()}
    return published | {f"{name}-slim": entry.slim for name, entry in SYSTEMS.items()}


def pack(folders: list[Path], file: Path) -> None:
    """Resample scans as ingest does and write them to one file."""
    from raylift.datasets.scans import reader
    from raylift.datasets.scans.resample import resample

    arrays = {}
    for source in reader.find(folders).sources:
        name = Path(str(source.where)).name.split(".")[0]
        scan = reader.read(source)
        arrays[f"source:{name}"] = resample(scan, SOURCE)[0]
        arrays[f"ground_truth:{name}"] = resample(scan, GRID)[0]
        print(name, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)


def source_phantom(seed: int) -> np.ndarray:
    """A phantom to train on, with a margin."""
    return thorax(seed, SOURCE)[0]


def held_out_phantom(seed: int) -> np.ndarray:
    """A phantom to measure on, as `raylift phantom` stores it."""
    return thorax(HELD_OUT_SEED + seed, GRID)[0]


class ParameterStream(IterableDataset[list[Parameters]]):
    """Parameters of one batch after the other, sampled in worker processes."""

    def __init__(self, augmentation: Augmentation, geometry: Geometry, seed: int, batch: int) -> None:
        self.augmentation, self.geometry, self.seed, self.batch = augmentation, geometry, seed, batch

    def __iter__(self) -> Iterator[list[Parameters]]:
        """Without end; workers take turns."""
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        index = worker
        while True:
            first = index * self.batch
            yield [self.augmentation.sample(self.seed, 0, first + k, self.geometry) for k in range(self.batch)]
            index += workers


def clean_views(hu: Tensor, geometry: Geometry) -> Tensor:
    """Standardized DRRs of volumes in HU, as an archive holds them."""
    density = hu_to_attenuation(hu)
    images = torch.cat([project(density, GRID.spacing_mm, geometry, view) for view in geometry.views], dim=1)
    standard = np.stack([[standardize(image) for image in views] for views in images.cpu().numpy()])
    return torch.from_numpy(standard).to(hu.device)


@torch.no_grad()
def measure(network: torch.nn.Module, sets: dict[str, tuple[Tensor, Tensor]], autocast: Any) -> dict[str, float]:
    """PSNR (dB) and SSIM of protocol `volume`, by set."""
    figures = {}
    for name, (ground_truth, views) in sets.items():
        psnr, ssim = [], []
        for target, images in zip(ground_truth, views, strict=True):
            with autocast():
                volume = network(images[None])
            volume = volume.float().clip(0, 1)
            psnr.append(float(-10 * (volume - target[None]).square().mean().log10()))
            ssim.append(float(1 - ssim_loss(volume, target[None])))
        figures[f"{name}_psnr_db"], figures[f"{name}_ssim"] = float(np.mean(psnr)), float(np.mean(ssim))
    return figures


def train(
    name: str, views: int, seconds: float, volumes: dict[str, Tensor], sets: dict[str, Tensor], options: Any
) -> None:
    """One job: train, log, measure and save until its time is over."""
    device, output = torch.device(options.device), Path(options.output)
    torch.manual_seed(options.seed)
    geometry = chest(GRID)
    geometry = replace(geometry, views=geometry.views[:views])
    system = replace(systems()[name], views=tuple(view.name for view in geometry.views))
    objective = system.objective(GRID, geometry, WINDOW)
    players = {key: player.to(device) for key, player in objective.players.items()}
    network = objective.reconstructor
    if options.begin:
        network.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(options.begin).items()})
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    label = f"{name}-{views}-{options.label}".rstrip("-")
    if options.compile:
        for part in ("image_unet", "volume_unet"):
            if hasattr(network, part):
                getattr(network, part).compile()
    optimizers = {
        key: torch.optim.AdamW(player.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=None)
        for key, player in players.items()
    }
    bf16 = options.precision == "bf16"

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    window = WINDOW
    measured = {
        key: (window.to_unit(hu), clean_views(hu, geometry))
        for key, hu in ((k, v.to(device).float()) for k, v in sets.items())
    }
    augmentation = augmentations()[options.augmentation]
    stream = ParameterStream(augmentation, geometry, options.seed, options.batch)
    workers = options.workers
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
    rng = np.random.default_rng([options.seed, 1])
    log = (output / f"{label}.jsonl").open("a")
    start, step, last_save, last_log, waited = time.monotonic(), 0, time.monotonic(), 0.0, 0.0
    sums: dict[str, Tensor] = {}
    counted = skipped = 0
    while (elapsed := time.monotonic() - start) < seconds:
        rate = options.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / seconds)))
        before = time.monotonic()
        parameters = next(loader)
        waited += time.monotonic() - before
        kinds = rng.random(options.batch) < options.ct_share
        picked = [
            volumes["ct"][rng.integers(len(volumes["ct"]))]
            if kind and len(volumes["ct"])
            else volumes["phantom"][rng.integers(len(volumes["phantom"]))]
            for kind in kinds
        ]
        with torch.no_grad():
            hu, images = augment(torch.stack(picked)[:, None].float(), SOURCE.spacing_mm, GRID, parameters)
            batch = Batch(window.to_unit(hu), images)
        carried: dict[str, Tensor] = {}
        for key, player in players.items():
            others = [other for k, other in objective.networks().items() if k != key]
            for group in optimizers[key].param_groups:
                group["lr"] = rate
            optimizers[key].zero_grad(set_to_none=True)
            with frozen(others):
                with autocast():
                    loss, logs, kept = player(batch, carried)
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(player.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizers[key].step()
            else:
                skipped += 1
            carried |= kept
            for term, value in {f"{key}_loss": loss.detach(), **logs}.items():
                sums[term] = sums.get(term, 0) + value
        counted += 1
        step += 1
        with torch.no_grad():
            decay = min(options.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
            for kept_buffer, buffer in zip(ema.buffers(), network.buffers(), strict=True):
                kept_buffer.copy_(buffer)
        if time.monotonic() - last_log > options.log_every_s:
            means = {term: round(float(value / counted), 5) for term, value in sums.items()}
            row = {"step": step, "seconds": round(time.monotonic() - start, 1), "lr": rate, **means}
            row["skipped"] = skipped
            row["ms_a_step"] = round(1000 * (time.monotonic() - start) / step, 1)
            row["waited_share"] = round(waited / (time.monotonic() - start), 3)
            print(label, json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
            sums, counted, last_log = {}, 0, time.monotonic()
        if time.monotonic() - last_save > options.save_every_s:
            save(
                ema,
                output,
                label,
                {"step": step, "seconds": time.monotonic() - start, **measure(ema, measured, autocast)},
                log,
            )
            last_save = time.monotonic()
    figures = {"step": step, "samples": step * options.batch, "seconds": round(time.monotonic() - start, 1)}
    figures |= measure(ema, measured, autocast)
    if device.type == "cuda":
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    save(ema, output, label, figures, log)


def save(network: torch.nn.Module, output: Path, label: str, figures: dict[str, float], log: Any) -> None:
    """Weights in half precision, and a line of figures."""
    state = {key: value.half().cpu().contiguous() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(state, output / f"{label}.safetensors")
    print(label, json.dumps(figures), flush=True)
    log.write(json.dumps({"measured": figures}) + "\n")
    log.flush()


def augmentations() -> dict[str, Augmentation]:
    """By name: everything, or deformation alone."""
    plain = Augmentation(geometry=GeometryJitter(probability=0), radiograph=RadiographAugmentation(probability=0))
    none = replace(plain, volume=VolumeAugmentation(probability=0))
    return {"full": Augmentation(), "volume": plain, "none": none}


def phantoms(count: int, workers: int, folder: str) -> np.ndarray:
    """Made in processes, or taken from a folder where another process is still making them."""
    if folder:
        files = sorted(Path(folder).glob("*.npy"))[:count]
        return np.stack([np.load(file) for file in files])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.stack(pool.map(source_phantom, range(count), chunksize=4))


def make_phantoms(folder: Path, workers: int) -> None:
    """Write phantoms to a folder until the process is ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for seed, hu in enumerate(pool.imap(source_phantom, range(100_000), chunksize=2)):
            temporary = folder / f"{seed:06d}.tmp"
            with temporary.open("wb") as file:
                np.save(file, hu)
            temporary.rename(folder / f"{seed:06d}.npy")


def report(folder: Path) -> None:
    """The curves of every job in a folder as Markdown, and a plot of them beside the logs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [row for row in rows if "measured" not in row]
        axes[0].semilogy([row["seconds"] for row in losses], [row["voxel_mse"] for row in losses], label=path.stem)
        measured = [row["measured"] for row in rows if "measured" in row]
        keys = [key for key in measured[-1] if key.endswith(("_psnr_db", "_ssim"))]
        for key in (key for key in keys if key.endswith("_psnr_db")):
            name = f"{path.stem}, {key.removesuffix('_psnr_db')}"
            axes[1].plot([row["seconds"] for row in measured], [row[key] for row in measured], label=name)
        print(f"{path.stem}\n")
        print("| step | seconds | " + " | ".join(keys) + " |")
        print("| --- | --- | " + " | ".join("---" for _ in keys) + " |")
        for row in measured:
            figures = " | ".join(f"{row[key]:.3f}" if key.endswith("ssim") else f"{row[key]:.2f}" for key in keys)
            print(f"| {row['step']} | {row['seconds']:.0f} | {figures} |")
        print()
    axes[0].set(xlabel="seconds", ylabel="voxel MSE (training)")
    axes[1].set(xlabel="seconds", ylabel="PSNR, dB (protocol volume)")
    for axis in axes:
        axis.legend(fontsize=6)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)


def export(weights_file: Path, views: int, ct: str, phantoms: int, folder: Path) -> None:
    """Weights and their last figures as a model that raylift loads, in half precision, with its card."""
    from raylift.models.weights import Description, Model
    from raylift.platform.export import export as export_model

    geometry = chest(GRID)
    geometry = replace(geometry, views=geometry.views[:views])
    system = replace(systems()[weights_file.stem.rsplit("-", 1)[0]], views=tuple(view.name for view in geometry.views))
    log = weights_file.with_suffix(".jsonl").read_text().splitlines()
    figures = [json.loads(line)["measured"] for line in log if "measured" in line][-1]
    held = (*TEST, *VALIDATE)
    scans = sorted(key.removeprefix("source:") for key in np.load(ct).files if key.startswith("source:"))
    scans = [name for name in scans if name not in held]
    collections = "LIDC-IDRI, QIN LUNG CT, Lung-PET-CT-Dx; CC BY"
    provenance = {
        "archive": f"{phantoms} phantoms and {len(scans)} CT ({collections}), augmented",
        "training_samples": [*scans, *(f"phantom {seed}" for seed in range(phantoms))],
        "step": figures["step"],
        "seconds": figures["seconds"],
        "script": "benchmarks/gpu_training.py",
        "result": "benchmarks/results/2026-11-26-gpu_training.md",
    }
    network = system.reconstructor(GRID, geometry)
    network.load_state_dict({name: value.float() for name, value in safetensors.torch.load_file(weights_file).items()})
    metrics = {
        name.replace("val_ct", "val"): value for name, value in figures.items() if name.endswith(("_psnr_db", "_ssim"))
    }
    description = Description(system, GRID, geometry, WINDOW, provenance=provenance)
    export_model(Model(network, description, ""), folder, metrics, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", default="", help="file of packed scans")
    parser.add_argument("--pack", nargs="*", type=Path, help="folders of scans to pack into --ct")
    parser.add_argument("--make-phantoms", type=Path, help="fill this folder with phantoms until ended")
    parser.add_argument("--export", type=Path, help="a folder for a model: of --begin, with --views, --ct, --phantoms")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--report", type=Path, help="print the curves of a folder of logs and plot them")
    parser.add_argument("--phantoms", type=int, default=64)
    parser.add_argument("--phantom-folder", default="")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--job", action="append", default=[], help="system:views:seconds[:weights in OUTPUT]")
    parser.add_argument("--output", default="runs/gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--ct-share", type=float, default=0.5)
    parser.add_argument("--augmentation", choices=["full", "volume", "none"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--begin", default="", help="weights to begin from")
    parser.add_argument("--label", default="")
    parser.add_argument("--log-every-s", type=float, default=10.0)
    parser.add_argument("--save-every-s", type=float, default=60.0)
    parser.add_argument("--all-ct", action="store_true", help="train on validation and test scans too")
    options = parser.parse_args()
    if options.pack:
        pack(options.pack, Path(options.ct))
        return
    if options.make_phantoms:
        make_phantoms(options.make_phantoms, options.workers)
        return
    if options.export:
        export(Path(options.begin), options.views, options.ct, options.phantoms, options.export)
        return
    if options.report:
        report(options.report)
        return
    Path(options.output).mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    made = phantoms(options.phantoms, max(1, options.workers), options.phantom_folder)
    with multiprocessing.get_context("spawn").Pool(max(1, options.workers)) as pool:
        held_out = np.stack(pool.map(held_out_phantom, range(options.held_out)))
    scans = dict(np.load(options.ct)) if options.ct else {}
    held = () if options.all_ct else (*TEST, *VALIDATE)
    train_ct = [
        hu for key, hu in scans.items() if key.startswith("source:") and key.removeprefix("source:") not in held
    ]
    device = torch.device(options.device)
    empty = torch.zeros(0, *SOURCE.shape, dtype=torch.int16)
    volumes = {
        "phantom": torch.from_numpy(made).to(device),
        "ct": (torch.from_numpy(np.stack(train_ct)) if train_ct else empty).to(device),
    }
    sets = {"phantom": torch.from_numpy(held_out)[:, None]}
    for name, ids in (("val_ct", VALIDATE), ("test_ct", TEST)):
        if scans:
            sets[name] = torch.from_numpy(np.stack([scans[f"ground_truth:{one}"] for one in ids]))[:, None]
    print(f"{len(made)} phantoms and {len(train_ct)} CT ready after {time.monotonic() - start:.0f} s", flush=True)
    torch.backends.cudnn.benchmark = True
    for job in options.job:
        name, views, seconds, *begin = job.split(":")
        if begin:
            options.begin = str(Path(options.output) / f"{begin[0]}.safetensors")
        train(name, int(views), float(seconds), volumes, sets, options)


if __name__ == "__main__":
    main()
