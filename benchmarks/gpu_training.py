"""Train the models that are part of the package, on one GPU with torch alone, for a given time.

    python benchmarks/gpu_training.py --ct ct.npz --phantoms 4000 --job unrolled:2:300 --output OUT

Volumes stay on the device; each sample is an augmented pair (`datasets.augmentation.augmentation`) of a CT, with
probability `--ct-share`, or else of a phantom. The learning rate decays along a cosine over the job's time limit. Every
minute the exponential moving average of the weights is written (fp16) with its metrics on held-out phantoms
and CT, so that an interrupted training is not lost; `--from` starts from such weights.

The CT file is written by `python benchmarks/gpu_training.py --pack FOLDER... --ct ct.npz`: `source:NAME` on 96 voxels
of 4 mm, `ground_truth:NAME` on 64 of 5 mm as `raylift ingest` stores it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from raylift.datasets.augmentation.augmentation import augment
from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid, chest
from raylift.models.losses import ssim_loss
from raylift.models.system_config import SystemConfig
from raylift.models.systems.diffux2ct import TriPlaneSystem
from raylift.models.zoo import SYSTEMS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training_batches import (
    HELD_OUT_SEED,
    WINDOW,
    ParameterStream,
    augmentations,
    clean_views,
    make_phantoms,
    pack,
    phantoms,
)
from training_loop import Log, Metrics, Settings, curves, placed, train

GRID = Grid(64, 5.0)
SOURCE = Grid(96, 4.0)
"""Twenty percent larger than the result, so that a deformation finds anatomy outside."""
RELOAD_S = 30.0
"""Seconds after which new phantoms of the folder are read."""
TEST = ("lidc_idri_0007_2mm", "qin_lung_ct_qin_lsc_0049_2mm", "qin_lung_ct_qin_lsc_0064_2mm")
VALIDATE = ("lidc_idri_0006_2mm", "qin_lung_ct_qin_lsc_0088_2mm")


def systems() -> dict[str, SystemConfig]:
    """What a job can name."""
    published = {name: entry.full for name, entry in SYSTEMS.items()}
    slim = {f"{name}-slim": entry.slim for name, entry in SYSTEMS.items()}
    as_published = {
        f"{name}-slim-published": replace(entry.slim, scheduler=entry.full.scheduler, sampling=entry.full.sampling)
        for name, entry in SYSTEMS.items()
        if isinstance(entry.full, TriPlaneSystem) and isinstance(entry.slim, TriPlaneSystem)
    }
    return published | slim | as_published


def use_views(network: torch.nn.Module, views: int) -> None:
    """Let an unrolled network take the first views of its geometry alone."""
    network.views = list(network.geometry.views[:views])


@torch.no_grad()
def measure(
    network: torch.nn.Module, sets: dict[str, tuple[Tensor, Tensor]], settings: Settings, views: int
) -> Metrics:
    """PSNR (dB) and SSIM of protocol `volume` with the first views, by set."""
    values = {}
    for name, (ground_truth, radiographs) in sets.items():
        psnr, ssim = [], []
        for target, images in zip(ground_truth, radiographs[:, :views], strict=True):
            with settings.autocast(images.device):
                volume = network(images[None])
            volume = volume.float().clip(0, 1)
            psnr.append(float(-10 * (volume - target[None]).square().mean().log10()))
            ssim.append(float(1 - ssim_loss(volume, target[None])))
        values[f"{name}_psnr_db"], values[f"{name}_ssim"] = float(np.mean(psnr)), float(np.mean(ssim))
    return values


def augmented(volumes: dict[str, Tensor], geometry: Geometry, options: Any) -> Iterator[Batch]:
    """Batches of augmented pairs of CT, with probability `ct_share`, and of phantoms, on the volumes' device."""
    stream = ParameterStream(augmentations()[options.augmentation], geometry, options.seed, options.batch)
    workers = options.workers
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))
    rng = np.random.default_rng([options.seed, 1])
    folder, made, began = Path(options.phantom_folder), len(volumes["phantom"]), time.monotonic()
    while True:
        if options.phantom_folder and time.monotonic() - began > RELOAD_S:
            # Another process is making more of them.
            files = sorted(folder.glob("*.npy"))[made : options.phantoms]
            if files:
                more = torch.from_numpy(np.stack([np.load(file) for file in files])).to(volumes["phantom"])
                volumes["phantom"] = torch.cat([volumes["phantom"], more])
                made, began = len(volumes["phantom"]), time.monotonic()
        parameters = next(loader)
        kinds = rng.random(options.batch) < options.ct_share
        picked = []
        for is_ct in kinds & bool(len(volumes["ct"])):
            source = volumes["ct" if is_ct else "phantom"]
            hu = source[rng.integers(len(source))]
            picked.append(hu.flip(-1) if is_ct and rng.random() < options.mirror_share else hu)
        with torch.no_grad():
            hu, images = augment(torch.stack(picked)[:, None].float(), SOURCE.spacing_mm, GRID, parameters)
        count = 1 if rng.random() < options.frontal_share else images.shape[1]
        yield Batch(WINDOW.to_unit(hu), images[:, :count])


def run_job(
    name: str, views: int, seconds: float, volumes: dict[str, Tensor], sets: dict[str, Tensor], options: Any
) -> None:
    """One job: train, log, measure and save until its time is over."""
    device, output = torch.device(options.device), Path(options.output)
    torch.manual_seed(options.seed)
    geometry = chest(GRID)
    geometry = replace(geometry, views=geometry.views[:views])
    system = replace(systems()[name], views=tuple(view.name for view in geometry.views))
    objective = placed(system.objective(GRID, geometry, WINDOW), device)
    network = objective.reconstruction_network
    if options.begin:
        network.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(options.begin).items()})
    label = f"{name}-{views}-{options.label}".rstrip("-")
    if options.compile and hasattr(network, "volume_unet"):
        network.volume_unet.compile(dynamic=False)
    settings = Settings(
        seconds,
        lr=options.lr,
        ema_decay=options.ema,
        precision=options.precision,
        log_every_s=options.log_every_s,
        measure_every_s=options.save_every_s,
    )
    prepared = {
        key: (WINDOW.to_unit(hu), clean_views(hu, GRID, geometry))
        for key, hu in ((k, v.to(device).float()) for k, v in sets.items())
    }
    log = Log(output / f"{label}.jsonl", label)

    def measured(ema: torch.nn.Module, position: Metrics) -> None:
        values = {**position, "samples": position["step"] * options.batch, **measure(ema, prepared, settings, views)}
        values["phantoms"] = len(volumes["phantom"])
        if options.frontal_share:
            use_views(ema, 1)
            values |= {f"frontal_{name}": value for name, value in measure(ema, prepared, settings, 1).items()}
            use_views(ema, views)
        if device.type == "cuda":
            values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        state = {key: value.half().cpu().contiguous() for key, value in ema.state_dict().items()}
        safetensors.torch.save_file(state, output / f"{label}.safetensors")
        log({"measured": values})
        described = {
            "command": shlex.join(["python", *sys.argv]),
            **{
                name: getattr(options, name)
                for name in ("seed", "batch", "precision", "ct_share", "frontal_share", "mirror_share")
            },
            "augmentation": options.augmentation,
            "steps": position["step"],
            "seconds": position["seconds"],
            "optimizer": {
                "name": "AdamW",
                "lr": settings.lr,
                "betas": settings.betas,
                "weight_decay": settings.weight_decay,
                "warmup_steps": settings.warmup_steps,
                "schedule": "cosine decay over the job's time limit",
                "gradient_norm_max": settings.gradient_clipping,
            },
            "ema_decay": settings.ema_decay,
            "phantoms": len(volumes["phantom"]),
            "scans": options.scans,
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }
        (output / f"{label}.settings.json").write_text(json.dumps(described, indent=1))

    def batches() -> Iterator[Batch]:
        for batch in augmented(volumes, geometry, options):
            if options.frontal_share:
                use_views(network, batch.radiographs.shape[1])
            yield batch

    train(objective, batches(), settings, log, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", default="", help="file of packed scans")
    parser.add_argument("--pack", nargs="*", type=Path, help="folders of scans to pack into --ct")
    parser.add_argument("--make-phantoms", type=Path, help="fill this folder with phantoms until ended")
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
    parser.add_argument("--mirror-share", type=float, default=0.0, help="share of CT mirrored left to right")
    parser.add_argument("--augmentation", choices=["full", "volume", "none"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--frontal-share", type=float, default=0.0, help="share of steps with the first view alone")
    parser.add_argument("--begin", default="", help="weights to begin from")
    parser.add_argument("--label", default="")
    parser.add_argument("--log-every-s", type=float, default=10.0)
    parser.add_argument("--save-every-s", type=float, default=60.0)
    parser.add_argument("--all-ct", action="store_true", help="train on validation and test scans too")
    options = parser.parse_args()
    if options.pack:
        pack(options.pack, Path(options.ct), GRID, SOURCE)
        return
    if options.make_phantoms:
        make_phantoms(options.make_phantoms, SOURCE, options.workers)
        return
    if options.report:
        curves(options.report, options.report / "curves.png")
        return
    Path(options.output).mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    if options.phantom_folder:
        # Another process may still be making them.
        made = np.stack(
            [np.load(file) for file in sorted(Path(options.phantom_folder).glob("*.npy"))[: options.phantoms]]
        )
    else:
        made = phantoms(SOURCE, range(options.phantoms), options.workers)
    held_out = phantoms(GRID, range(HELD_OUT_SEED, HELD_OUT_SEED + options.held_out), options.workers)
    scans = dict(np.load(options.ct)) if options.ct else {}
    held = () if options.all_ct else (*TEST, *VALIDATE)
    sources = ("source:", "extended-source:")
    train_ct = [hu for key, hu in scans.items() if key.startswith(sources) and key.split(":")[1] not in held]
    options.scans = sorted({key.split(":")[1] for key in scans if key.split(":")[1] not in held})
    device = torch.device(options.device)
    empty = torch.zeros(0, *SOURCE.shape, dtype=torch.int16)
    volumes = {
        "phantom": torch.from_numpy(made).to(device),
        "ct": (torch.from_numpy(np.stack(train_ct)) if train_ct else empty).to(device),
    }
    sets = {"phantom": torch.from_numpy(held_out)[:, None]}
    for name, ids in (("val_ct", VALIDATE), ("test_ct", TEST)):
        if scans:
            for kind in ("", "extended-"):
                chosen = np.stack([scans[f"{kind}ground_truth:{scan}"] for scan in ids])
                sets[kind.replace("-", "_") + name] = torch.from_numpy(chosen)[:, None]
    print(f"{len(made)} phantoms and {len(train_ct)} CT ready after {time.monotonic() - start:.0f} s", flush=True)
    torch.backends.cudnn.benchmark = True
    for job in options.job:
        name, views, seconds, *begin = job.split(":")
        if begin:
            options.begin = str(Path(options.output) / f"{begin[0]}.safetensors")
        run_job(name, int(views), float(seconds), volumes, sets, options)


if __name__ == "__main__":
    main()
