"""The training step of the shipped model on one GPU, in torch alone: layouts, compilation, gradients without atomics.

    python benchmarks/unrolled_step.py --output OUT --kinds "as before" eager "eager channels-last"
    python benchmarks/unrolled_step.py --output OUT --kinds compiled "compiled channels-last"

Writes `steps-NAME.json` (milliseconds of each kind; bf16) and a profile of each kind. `as before` back-projects by
`grid_sample`, whose gradient adds atomically; the other kinds by matrix products, as raylift does on a GPU. With
`neighbors` in its name a kind upsamples by weighted sums of neighbors in place of `F.interpolate`, whose gradient adds
atomically too.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from raylift.datasets import projector
from raylift.datasets.augmentation.augmentation import augment
from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Geometry, Grid, View, chest
from raylift.datasets.intensity import Window
from raylift.models.parts import residual_unet
from raylift.models.systems import unrolled
from raylift.models.zoo import SYSTEMS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stepping import channels_last
from training_batches import augmentations
from training_loop import placed

SOURCE = Grid(96, 4.0)
WAYS = (unrolled.backproject, residual_unet.Upsample.forward)


def backproject_by_grid_sample(
    image: Tensor, shape: tuple[int, int, int], spacing_mm: float, geometry: Geometry, view: View
) -> Tensor:
    """Back-projection of any pose: an offset of a picometer takes the general path."""
    return projector.backproject(image, shape, spacing_mm, geometry, replace(view, offset_mm=(1e-9, 0.0, 0.0)))


def upsample_by_neighbors(module: residual_unet.Upsample, features: Tensor) -> Tensor:
    """`Upsample.forward` with the linear interpolation of each axis as two weighted sums of neighbors."""
    features = module.conv(features)
    for axis in range(2, features.ndim):
        size = features.shape[axis]
        first, last = features.narrow(axis, 0, 1), features.narrow(axis, size - 1, 1)
        previous = torch.cat([first, features.narrow(axis, 0, size - 1)], dim=axis)
        following = torch.cat([features.narrow(axis, 1, size - 1), last], dim=axis)
        pair = [torch.lerp(features, neighbor, 0.25) for neighbor in (previous, following)]
        features = torch.stack(pair, dim=axis + 1).flatten(axis, axis + 1)
    return features


def stepper(kind: str, grid: Grid, batch: Batch, device: torch.device, name: str) -> Callable[[], Tensor]:
    """A training step of one kind."""
    unrolled.backproject = backproject_by_grid_sample if "before" in kind else WAYS[0]
    forward = upsample_by_neighbors if "neighbors" in kind else WAYS[1]
    residual_unet.Upsample.forward = forward  # type: ignore[method-assign]
    torch.manual_seed(0)
    entry = SYSTEMS["unrolled"]
    objective = placed(getattr(entry, name).objective(grid, chest(grid), Window()), device)
    network = objective.reconstruction_network
    if "channels-last" in kind:
        channels_last(network)
    if "compiled" in kind:
        network.volume_unet.compile(dynamic=False)
    (loss_module,) = objective.loss_modules.values()
    optimizer = torch.optim.AdamW(loss_module.parameters(), lr=1e-4)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = loss_module(batch, {})[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loss_module.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def timed(step: Callable[[], Any], device: torch.device, count: int, warm: int) -> float:
    """Milliseconds of one call, the mean of `count` after `warm` others."""
    for k in range(warm + count):
        if k == warm:
            _wait(device)
            start = time.perf_counter()
        step()
    _wait(device)
    return 1000 * (time.perf_counter() - start) / count


@contextmanager
def alone(file: Path | None) -> Iterator[None]:
    """While no other process that has the same file times anything."""
    if file is None:
        yield
        return
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["as before", "eager", "eager channels-last"])
    parser.add_argument("--output", type=Path, default=Path("runs/unrolled_step"))
    parser.add_argument("--name", default="eager", help="part of the names of the files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--preset", choices=["published", "slim", "tiny"], default="published")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lock", type=Path, help="of the processes that time steps, one at a time")
    parser.add_argument("--no-augmentation", dest="augmentation", action="store_false")
    options = parser.parse_args()
    device, grid = torch.device(options.device), Grid(options.size, 320.0 / options.size)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator().manual_seed(0)
    side = options.size
    batch = Batch(
        torch.rand(options.batch, 1, side, side, side, generator=generator),
        torch.rand(options.batch, 2, side, side, generator=generator),
    ).to(device)
    milliseconds: dict[str, float] = {}
    if options.augmentation:
        geometry = chest(grid)
        hu = torch.randint(-1000, 1000, (options.batch, 1, *SOURCE.shape), generator=generator).to(device).float()
        parameters = [augmentations()["full"].sample(0, 0, k, geometry) for k in range(options.batch)]
        with torch.no_grad():
            milliseconds["augmentation"] = timed(
                lambda: augment(hu, SOURCE.spacing_mm, grid, parameters), device, options.steps, 2
            )
        print(json.dumps(milliseconds), flush=True)
    for kind in options.kinds:
        step = stepper(kind, grid, batch, device, options.preset)
        for _ in range(2):
            step()
        with alone(options.lock):
            milliseconds[kind] = timed(step, device, options.steps, 1)
        loss = float(step())
        print(json.dumps({"kind": kind, "ms": round(milliseconds[kind], 1), "loss": loss}), flush=True)
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities={ProfilerActivity.CPU, activity}) as profiler:
            step()
            _wait(device)
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
        (options.output / f"profile-{kind.replace(' ', '-')}.txt").write_text(table)
        (options.output / f"steps-{options.name}.json").write_text(json.dumps(milliseconds))


if __name__ == "__main__":
    main()
