"""The losses of one network in several precisions, from the same initial weights and on the same batches.

The table has the distance of the first losses of each precision from those of fp32, before rounding errors accumulate,
and the mean loss of the last quarter of the steps; a plot has the curves. The published X2CT-GAN is trained on
synthetic thorax volumes at 128^3 for a GPU, or its slim preset's network for two cores.

    python benchmarks/precision_curves.py --gpu --steps 200 --batch 4 --output curves
    python benchmarks/precision_curves.py --slim --size 32 --steps 40 --output curves
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import normalized_drrs
from raylift.models.systems.x2ct import X2CT_GAN

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from stepping import stepper

CHEST_MM = 320.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--slim", action="store_true")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", default=["fp32", "bf16", "bf16 channels-last"])
    parser.add_argument("--output", type=Path, default=Path("curves"))
    options = parser.parse_args()
    header("precision_curves")
    grid = Grid(options.size, CHEST_MM / options.size)
    device = torch.device("cuda" if options.gpu else "cpu")
    people = phantom_pairs(options.people, grid)
    curves = {kind: trained(kind, options, grid, people, device) for kind in options.kinds}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "curves.json").write_text(json.dumps(curves), encoding="utf-8")
    plot(curves, options.output / "curves.png")
    first, last = curves[options.kinds[0]], max(1, options.steps // 4)
    rows = []
    for kind, curve in curves.items():
        apart = [max(abs(curve[name][k] / first[name][k] - 1) for name in first) for k in range(min(3, options.steps))]
        rows.append([kind, *(f"{gap:.2e}" for gap in apart)])
        rows[-1] += [f"{fmean(curve[name][-last:]):.4f}" for name in first]
    columns = ["kind", *(f"step {k + 1}" for k in range(min(3, options.steps)))]
    columns += [f"{name}, mean of the last {last}" for name in first]
    what = f"{'slim' if options.slim else 'published'} X2CT-GAN at {options.size}^3, batch {options.batch}"
    table(f"{what}: greatest relative distance of a loss from {options.kinds[0]}'s; losses at the end", columns, rows)


def phantom_pairs(count: int, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Thoraces in the window's [0, 1] and their normalized radiographs."""
    window, geometry = Window(), chest(grid)
    volumes, views = [], []
    for seed in range(count):
        hu, _ = thorax(seed, grid)
        volumes.append(window.to_unit(torch.from_numpy(hu).float())[None])
        views.append(torch.from_numpy(normalized_drrs(hu, grid, geometry)))
    return torch.stack(volumes), torch.stack(views)


def trained(
    kind: str, options: argparse.Namespace, grid: Grid, people: Sequence[torch.Tensor], device: torch.device
) -> dict[str, list[float]]:
    """Each network's losses, step by step."""
    torch.manual_seed(0)
    small = X2CT_GAN.tiny if options.size < 64 else X2CT_GAN.slim
    system = small if options.slim else X2CT_GAN.full
    step = stepper(system.objective(grid, chest(grid)), device, kind)
    order = torch.Generator().manual_seed(0)
    curves: dict[str, list[float]] = {}
    for number in range(options.steps):
        torch.manual_seed(number)
        chosen = torch.randint(len(people[0]), (options.batch,), generator=order)
        volume, views = (tensor[chosen].to(device) for tensor in people)
        for name, loss in step(Batch(volume, views)).items():
            curves.setdefault(name, []).append(loss)
    return curves


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot the losses: a panel for each network, a line for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loss_modules = list(next(iter(curves.values())))
    figure, panels = pyplot.subplots(1, len(loss_modules), figsize=(5 * len(loss_modules), 3.5), layout="constrained")
    for name, panel in zip(loss_modules, panels, strict=True):
        for kind, curve in curves.items():
            panel.plot(range(1, len(curve[name]) + 1), curve[name], label=kind, linewidth=1)
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    panels[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
