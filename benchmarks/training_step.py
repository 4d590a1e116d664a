"""Time and peak memory of one whole training step (generator and discriminator) of the published X2CT-GAN.

Each case runs in a process of its own, so that the peak is its own: resident memory on a CPU, the allocator's peak on
a GPU. CPU seconds are user and system time, steadier than wall time on a shared machine. "finest" computes the
decoder's activations at full size again in the backward pass; "channels-last" lays channels innermost. Operations are
counted by torch, two for each multiplication and addition. With --gpu bf16 also runs through torch.compile, and with
--peak-tflops, the card's dense bf16 peak by its data sheet, the table has the share of it that a step reaches. The
profile lists the operators of an fp32 step at the last size by their time.

    python benchmarks/training_step.py [--sizes 64 128] [--threads 2] [--steps 2] [--gpu] [--peak-tflops T] [--profile]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from raylift.datasets.geometry import Grid, chest
from raylift.models.systems.x2ct import X2CT_GAN

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stepping import random_batch, stepper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(json.loads(options.case))))
        return
    from conditions import header, table

    header("training_step")
    kinds = [f"{precision}{rest}" for precision in ("fp32", "bf16") for rest in ("", " finest", " channels-last")]
    kinds += ["bf16 compiled", "bf16 channels-last compiled"] if options.gpu else []
    rows = []
    for size in options.sizes:
        operations = 0.0
        for kind in kinds:
            got = run_in_process({**vars(options), "size": size, "kind": kind, "profile": False})
            # A compiled step's operations are its eager one's.
            operations = got["tflop"] or operations
            wall = got["wall_s"]
            cells = [f"{wall:.3g}", f"{got['cpu_s']:.1f}", f"{options.batch / wall:.3g}", f"{got['peak_gib']:.2f}"]
            throughput = operations / wall
            cells += [
                f"{throughput:.3g}",
                *([f"{throughput / options.peak_tflops:.1%}"] if options.peak_tflops else []),
            ]
            rows.append([f"{size}^3", kind, *cells])
    where = "GPU" if options.gpu else f"{options.threads} CPU threads"
    columns = ["size", "precision", "wall s/step", "CPU s/step", "volumes/s", "peak GiB", "TFLOP/s"]
    columns += ["share of peak"] if options.peak_tflops else []
    table(f"published X2CT-GAN, batch {options.batch}, {where}, mean of {options.steps} steps after one", columns, rows)
    if options.profile:
        size = options.sizes[-1]
        got = run_in_process({**vars(options), "size": size, "kind": "fp32"})
        rows = [[name, str(calls), f"{seconds:.2f}", f"{share:.0%}"] for name, calls, seconds, share in got["profile"]]
        table(f"where an fp32 step at {size}^3 goes", ["operator", "calls", "self s", "share"], rows)


def run_in_process(case: dict) -> dict:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def run_case(case: dict) -> dict:
    """One size and precision: a step to warm up, then the mean of the counted ones."""
    torch.set_num_threads(case["threads"])
    device = torch.device("cuda" if case["gpu"] else "cpu")
    torch.manual_seed(0)
    size, batch = case["size"], case["batch"]
    system = replace(X2CT_GAN.full, checkpointing="finest" if "finest" in case["kind"] else "none")
    objective = system.objective(Grid(size), chest(Grid(size)))
    data = random_batch(system, size, batch, device)
    take = stepper(objective, device, case["kind"])

    def step() -> None:
        take(data)

    with FlopCounterMode(display=False) if "compiled" not in case["kind"] else nullcontext() as counted:
        step()
    if case["gpu"]:
        torch.cuda.reset_peak_memory_stats()
    if case["profile"]:
        return {"profile": profiled(step, case["gpu"])}
    started, cpu = time.perf_counter(), sum(os.times()[:2])
    for _ in range(case["steps"]):
        step()
    wall, cpu = time.perf_counter() - started, sum(os.times()[:2]) - cpu
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() / 2**30 if case["gpu"] else kib / 2**20
    return {
        "wall_s": wall / case["steps"],
        "cpu_s": cpu / case["steps"],
        "peak_gib": peak,
        "tflop": counted and counted.get_total_flops() / 1e12,
    }


def profiled(step: Callable[[], None], gpu: bool) -> list[tuple[str, int, float, float]]:
    """The ten operators that take the most time by themselves: name, calls, seconds, share of all."""
    activities = [torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    events = profile.key_averages()
    spent = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6 for e in events}
    counts = {e.key: e.count for e in events}
    whole = sum(spent.values())
    longest = sorted(spent, key=lambda name: -spent[name])[:10]
    return [(name, counts[name], spent[name], spent[name] / whole) for name in longest]


if __name__ == "__main__":
    main()
