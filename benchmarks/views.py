"""PSNR and SSIM on held-out phantoms against the number of views: the same network, steps, data and seeds for each.

The views of a set are spread evenly over 180 degrees of azimuth: one is the frontal, two are the frontal and the
lateral. The network is the tiny X2CT-CNN with features back-projected along each view's own rays and averaged over the
views, so that its weights are as many for one view as for eight. Plain PyTorch on one thread.

    python benchmarks/views.py --output benchmarks/results --plot docs/images/views.png
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from matplotlib.figure import Figure

from raylift.datasets.geometry import Geometry, Grid, View, chest
from raylift.datasets.intensity import Window
from raylift.datasets.phantom.thorax import thorax
from raylift.models.drr import Reprojection
from raylift.models.metrics import VOLUME
from raylift.models.systems.x2ct import X2CT_CNN
from raylift.models.zoo import parameters

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import conditions, table_lines

GRID = Grid(32, 10.0)
WINDOW = Window()
BATCH = 2
LR = 1e-3
MEASURES = {"PSNR, dB": "psnr_db", "SSIM": "ssim"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = conditions("views", ("torch", "numpy"))
    hu = [thorax(seed, GRID)[0] for seed in range(options.train + options.test)]
    volumes = torch.stack([WINDOW.to_unit(torch.from_numpy(volume.astype(np.float32))) for volume in hu])[:, None]
    sets = {count: geometry_of(count) for count in options.views}
    images = radiographs(volumes, sets)
    results: dict[int, list[dict[str, float]]] = {count: [] for count in sets}
    seconds = dict.fromkeys(sets, 0.0)
    for seed in options.seeds:
        for count, geometry in sets.items():
            started = time.process_time()
            values, size = trained(hu, volumes, [images[view] for view in geometry.views], geometry, seed, options)
            results[count].append(values)
            print(f"{count} views, seed {seed}: {values}", file=sys.stderr, flush=True)
            seconds[count] += (time.process_time() - started) / len(options.seeds)
    seeds = " and ".join(map(str, options.seeds))
    lines += [
        f"* data: procedural phantoms at {GRID.size}^3 and {GRID.spacing_mm:g} mm, chest geometry; seeds 0 to "
        f"{options.train - 1} train, {options.train} to {options.train + options.test - 1} are held out",
        "* views: spread evenly over 180 degrees of azimuth, from the frontal on",
        f"* network: tiny X2CT-CNN, features back-projected along rays and averaged over views, {size:,} parameters "
        f"for any number of views; {options.steps} steps of batch {BATCH}, Adam at {LR:g} with a linear decay to zero "
        f"in the second half; seeds {seeds}",
        "* metrics: protocol `volume`, mean over the held-out phantoms, then mean ± population standard deviation over "
        "the seeds; seconds: CPU time of training and measuring, a seed\n",
    ]
    rows = [
        [
            str(count),
            *(f"{fmean(v):.3f} ± {pstdev(v):.3f}" for v in measured(figures).values()),
            f"{seconds[count]:.0f}",
        ]
        for count, figures in results.items()
    ]
    lines += table_lines("PSNR and SSIM by the number of views", ["views", *MEASURES, "CPU seconds"], rows)
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / f"{datetime.now(UTC):%Y-%m-%d}-views.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot_curves({count: measured(figures) for count, figures in results.items()}, options)
    return 0


def geometry_of(count: int) -> Geometry:
    """A wall stand with that many views."""
    angles = [k * 180 / count for k in range(count)]
    return replace(chest(GRID), views=tuple(View(f"azimuth{angle:g}".replace(".", "_"), angle) for angle in angles))


def radiographs(volumes: torch.Tensor, sets: dict[int, Geometry]) -> dict[View, torch.Tensor]:
    """Normalized digitally reconstructed radiographs (DRRs) of all phantoms, by view."""
    views = tuple({view.name: view for geometry in sets.values() for view in geometry.views}.values())
    return {
        view: Reprojection(GRID, replace(chest(GRID), views=(view,)), WINDOW, [view.name])(volumes).images[:, 0]
        for view in views
    }


def trained(
    hu: list[np.ndarray],
    volumes: torch.Tensor,
    images: list[torch.Tensor],
    geometry: Geometry,
    seed: int,
    options: argparse.Namespace,
) -> tuple[dict[str, float], int]:
    """Mean metrics of the held-out phantoms after training from that seed, and the number of parameters."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    inputs = torch.stack(images, dim=1)
    tiny = X2CT_CNN.tiny
    names = tuple(view.name for view in geometry.views)
    system = replace(
        tiny,
        views=names,
        lifting=replace(tiny.lifting, kind="repeat", along="rays"),
        fusion=replace(tiny.fusion, kind="average", view_decoders=False),
        decoder=replace(tiny.decoder, head_kernel=3),
    )
    network = system.reconstruction_network(GRID, geometry)
    optimizer = torch.optim.Adam(network.parameters(), LR, betas=(0.9, 0.99))
    half = options.steps // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < half else (options.steps - step) / (options.steps - half)
    )
    for _ in range(options.steps):
        chosen = torch.from_numpy(rng.choice(options.train, BATCH, replace=False))
        difference = network(inputs[chosen]) - volumes[chosen]
        loss = difference.square().mean() + 0.1 * difference.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    scans = []
    with torch.no_grad():
        for index in range(options.train, options.train + options.test):
            predicted = WINDOW.to_hu(network(inputs[index : index + 1]))[0, 0].numpy()
            scans.append(VOLUME.evaluate(predicted, hu[index].astype(np.float32)))
    return {name: fmean(scan[name] for scan in scans) for name in MEASURES.values()}, parameters(network)


def measured(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Each measure's values over the seeds."""
    return {name: [run[name] for run in runs] for name in MEASURES.values()}


def plot_curves(results: dict[int, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """PSNR and SSIM against the number of views: the mean over the seeds, and every seed as a dot."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained", dpi=140)
    for axes, (title, name), color in zip(figure.subplots(1, 2), MEASURES.items(), ("#0369a1", "#b45309"), strict=True):
        counts = list(results)
        axes.plot(counts, [fmean(results[count][name]) for count in counts], marker="o", color=color)
        for count in counts:
            axes.plot([count] * len(results[count][name]), results[count][name], ".", color=color, alpha=0.45)
        axes.set(xlabel="number of views", ylabel=title, xticks=counts)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Held-out phantoms at {GRID.size}$^3$ (protocol volume), {options.steps} steps for every number of views",
        fontsize=10,
    )
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot)


if __name__ == "__main__":
    raise SystemExit(main())
