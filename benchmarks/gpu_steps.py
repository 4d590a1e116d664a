"""Training steps of the published systems on a card, and the losses of one in several precisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_report import Report, arithmetic, peak_gib, reset_peak, wait
from stepping import random_batch, stepper
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from raylift.datasets.batch import Batch
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.datasets.phantom.thorax import thorax
from raylift.models.composition import Composition
from raylift.models.drr import Reprojection
from raylift.models.slimming import slim, tiny
from raylift.models.system_config import SystemConfig
from raylift.models.systems.x2ct import X2CT_GAN
from raylift.models.zoo import SYSTEMS

KINDS = ("fp32", "bf16", "bf16 channels-last")
"""fp32 is torch's default: convolutions in TF32, the rest in fp32."""
MORE_KINDS = (*KINDS, "bf16 channels-last search", "bf16 search", "fp32 strict")
"""Strict is fp32 throughout; with search cuDNN times its algorithms first."""
FIRST = (
    "x2ct-gan",
    "x-recon",
    "duolift-gan",
    "diffux2ct",
    "psr",
    "3dcnn",
    "cvaa-gan",
    "trct-gan",
    "latent-diffusion",
    "refiner",
    "u-x2ctgan",
    "cgan-128",
    "cyclegan-b",
)
PEAKS_TFLOPS = {"H100": 989.4, "H200": 989.4}
"""Dense bf16 by the data sheets of the SXM cards; TF32 has half of it."""
TINY_SIZE = 32


@dataclass(frozen=True)
class Case:
    """A system to step."""

    name: str
    size: int
    extent_mm: float = 320.0
    batch: int = 1
    kinds: tuple[str, ...] = KINDS

    @property
    def grid(self) -> Grid:
        """Its voxels."""
        return Grid(self.size, self.extent_mm / self.size)


def plan(small: bool = False) -> list[Case]:
    """Every published system at its published size, the most important first; X2CT-GAN also at its batch of 4.

    `small` is the trial on a processor, where bf16 is slow: all kinds of one system, fp32 of most.
    """
    names = [*FIRST, *(name for name in SYSTEMS if name not in FIRST)]
    if small:
        kinds = {"psr": MORE_KINDS, "diffux2ct": KINDS, "latent-diffusion": KINDS}
        return [Case(name, TINY_SIZE, kinds=kinds.get(name, KINDS[:1])) for name in names]
    cases = []
    for name in names:
        size = SYSTEMS[name].training.size
        cases.append(Case(name, size, size * SYSTEMS[name].spacing_mm))
    widest = replace(cases[0], batch=4, kinds=KINDS[1:])
    return [replace(cases[0], kinds=MORE_KINDS), widest, *cases[1:]]


def system_of(name: str, small: bool) -> SystemConfig:
    """A system at its published settings, or so small that a step takes a fraction of a second on a processor."""
    return SYSTEMS[name].tiny if small else SYSTEMS[name].full


def steps(report: Report, small: bool, rates: dict[str, float], names: Collection[str] | None = None) -> None:
    """A row for each system and kind, as far as the time goes.

    Args:
        report: where the rows go.
        small: systems that a processor steps.
        rates: the card's own convolution in TFLOP/s, by precision.
        names: the systems, which then have as long as there is time.
    """
    for case in plan(small):
        if names and case.name not in names:
            continue
        if report.left() < 0:
            report.note(f"no time for {case.name}, batch {case.batch}")
            continue
        with report.guarded(f"steps of {case.name}, batch {case.batch}"):
            try:
                of_system(report, case, system_of(case.name, small), rates, bool(names))
            except torch.cuda.OutOfMemoryError:
                report.note(f"{case.name} at {case.size}^3, batch {case.batch}: does not fit without checkpointing")
                torch.cuda.empty_cache()
                system: Any = system_of(case.name, small)
                of_system(report, case, replace(system, checkpointing="all"), rates, bool(names))


def of_system(report: Report, case: Case, system: SystemConfig, rates: dict[str, float], unhurried: bool) -> None:
    """All kinds of one system, on one set of networks."""
    torch.manual_seed(0)
    objective = system.objective(case.grid, chest(case.grid))
    data = random_batch(system, case.size, case.batch, report.device)
    tflop, started = 0.0, time.monotonic()
    for kind in case.kinds:
        if report.left() < 0 or time.monotonic() - started > (60.0 if report.trial or unhurried else SECONDS_A_SYSTEM):
            report.note(f"no time for {case.name}, {kind}")
            continue
        take = stepper(objective, report.device, kind)
        with arithmetic("strict" in kind, "search" in kind):
            # Operations are the same in every kind: counted once, in the first step.
            with FlopCounterMode(display=False) if not tflop else nullcontext() as counted:
                take(data)
            tflop = tflop or counted.get_total_flops() / 1e12
            results = timed(lambda take=take: take(data), report.device, report.trial)
        row(report, case, kind, tflop, results, rates)


def timed(step: Callable[[], object], device: torch.device, once: bool) -> dict[str, float]:
    """Mean seconds of two to ten steps after one, or of one alone for a trial, and the peak of memory."""
    if not once:
        step()
        wait(device)
    reset_peak(device)
    count, started = 0, time.perf_counter()
    while count < (1 if once else 2) or (not once and count < 10 and time.perf_counter() - started < 0.8):
        step()
        wait(device)
        count += 1
    return {"wall_s": (time.perf_counter() - started) / count, "steps": count, "peak_gib": peak_gib(device)}


def row(
    report: Report, case: Case, kind: str, tflop: float, results: dict[str, float], rates: dict[str, float]
) -> None:
    """A row of the table of steps."""
    wall = results["wall_s"]
    throughput = tflop / wall
    sheet = next((peak for name, peak in PEAKS_TFLOPS.items() if name in report.data["card"]), None)
    peak = sheet and sheet * (1.0 if "bf16" in kind else 0.5)
    own = rates.get(kind.split()[0])
    cells = [case.name, f"{case.size}^3", str(case.batch), kind, f"{1e3 * wall:.1f}", f"{case.batch / wall:.3g}"]
    cells += [f"{results['peak_gib']:.1f}", f"{tflop:.3g}", f"{throughput:.3g}"]
    cells += [f"{throughput / peak:.1%}" if peak and "strict" not in kind else ""]
    cells += [f"{throughput / own:.1%}" if own and "strict" not in kind else ""]
    report.row(STEPS, COLUMNS, cells, {"system": case.name, "kind": kind, "tflop": tflop, **vars(case), **results})


def compiled(name: str, small: bool, device: torch.device) -> dict[str, float]:
    """A step through torch.compile in bf16, and the seconds that the first takes; for a process of its own."""
    if small:
        torch._dynamo.config.disable = True
    case = next(case for case in plan(small) if case.name == name)
    torch.manual_seed(0)
    system = system_of(name, small)
    take = stepper(system.objective(case.grid, chest(case.grid)), device, "bf16 compiled")
    data = random_batch(system, case.size, 1, device)
    started = time.perf_counter()
    take(data)
    first = time.perf_counter() - started
    return {**timed(lambda: take(data), device, small), "first_s": first}


def parity(report: Report, small: bool) -> None:
    """Losses of the slim X2CT-GAN from one start on the same thoraces, in four kinds of arithmetic."""
    size, count, batch = (TINY_SIZE, 2, 1) if small else (64, 60, 4)
    grid = Grid(size, 320.0 / size)
    system = (tiny if small else slim)(X2CT_GAN.full)
    people = phantom_pairs(2 * batch, grid, system, report.device)
    curves: dict[str, dict[str, list[float]]] = {}
    for kind in ("fp32 strict", "fp32", "bf16", "bf16 channels-last"):
        if report.left() < 0:
            report.note(f"no time for the curve of {kind}")
            continue
        with report.guarded(f"curve of {kind}"), arithmetic(strict="strict" in kind):
            curves[kind] = curve(kind, system, grid, people, count)
            report.data["curves"] = curves
            exact = curves["fp32 strict"]
            apart = {
                name: [abs(a / b - 1) for a, b in zip(curves[kind][name], exact[name], strict=True)] for name in exact
            }
            last = max(1, count // 4)
            for name in exact:
                first, all_of_them = apart[name][0], sum(apart[name]) / count
                end = sum(curves[kind][name][-last:]) / last
                cells = [kind, name, f"{first:.2e}", f"{all_of_them:.2e}", f"{max(apart[name]):.2e}", f"{end:.4f}"]
                results = {"kind": kind, "network": name, "first": first, "mean": all_of_them, "end": end}
                report.row(PARITY, PARITY_COLUMNS, cells, results)


def phantom_pairs(count: int, grid: Grid, system: Composition, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thoraces in the window's [0, 1], and their normalized radiographs."""
    window = Window()
    volumes = [window.to_unit(torch.from_numpy(thorax(seed, grid)[0]).float())[None] for seed in range(count)]
    volume = torch.stack(volumes).to(device)
    return volume, Reprojection(grid, chest(grid), window, system.views)(volume).images


def curve(
    kind: str, system: Composition, grid: Grid, people: tuple[Tensor, Tensor], count: int
) -> dict[str, list[float]]:
    """Each network's losses, step by step, of batches of half as many people as there are."""
    torch.manual_seed(0)
    step = stepper(system.objective(grid, chest(grid)), people[0].device, kind)
    order = torch.Generator().manual_seed(0)
    losses: dict[str, list[float]] = {}
    for number in range(count):
        torch.manual_seed(number)
        chosen = torch.randint(len(people[0]), (len(people[0]) // 2,), generator=order).to(people[0].device)
        for name, loss in step(Batch(people[0][chosen], people[1][chosen])).items():
            losses.setdefault(name, []).append(loss)
    return losses


SECONDS_A_SYSTEM = 7.0
STEPS = "training steps (optimizer steps of all networks) of the published systems"
COLUMNS = ["system", "size", "batch", "kind", "ms", "volumes/s", "peak GiB", "TFLOP per step", "TFLOP/s"]
COLUMNS += ["share of the data sheet's dense peak", "share of the card's own convolution"]
PARITY = "losses of the slim X2CT-GAN, relative distance from strict fp32"
PARITY_COLUMNS = [
    "kind",
    "network",
    "first step",
    "mean of the steps",
    "greatest",
    "loss, mean of the last quarter",
]
