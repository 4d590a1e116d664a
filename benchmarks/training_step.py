"""Time and peak memory of one whole training step (every player's turn) of the published X2CT-GAN, or of any preset.

Each case runs in a process of its own, so that the peak is its own: resident memory on a CPU, the allocator's peak on
a GPU. CPU seconds are user and system time, steadier than wall time on a shared machine. "finest" computes the
decoder's activations at full size again in the backward pass. With --gpu bf16 also runs through torch.compile. The
profile says which operators the time of an fp32 step at the last size goes to. With --presets those are measured in
fp32, each at its own size, instead.

    python benchmarks/training_step.py [--sizes 64 128] [--threads 2] [--steps 2] [--gpu] [--profile]
    python benchmarks/training_step.py --presets x2ct-gan-slim psr-slim [--threads 1]
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

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.stream import Batch
from raylift.models.objectives.turns import frozen
from raylift.platform.presets.catalogue import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(json.loads(options.case))))
        return
    from conditions import header, table

    header("training_step")
    kinds = ["fp32", "fp32 finest", "bf16", "bf16 finest", *(["bf16 compiled"] if options.gpu else [])]
    published = [("x2ct-gan", size, kind) for size in options.sizes for kind in kinds]
    own = [(preset, PRESETS[preset]().data.size, "fp32") for preset in options.presets or ()]
    rows = []
    for preset, size, kind in own or published:
        got = apart({**vars(options), "preset": preset, "size": size, "kind": kind, "profile": False})
        figures = [f"{got['wall_s']:.2f}", f"{got['cpu_s']:.2f}", f"{got['peak_gib']:.2f}"]
        rows.append([preset, f"{size}^3", kind, *figures])
    where = "GPU" if options.gpu else f"{options.threads} CPU threads"
    columns = ["preset", "size", "precision", "wall s a step", "CPU s a step", "peak GiB"]
    table(f"batch {options.batch}, {where}, mean of {options.steps} steps after one", columns, rows)
    if options.profile:
        size = options.sizes[-1]
        got = apart({**vars(options), "preset": "x2ct-gan", "size": size, "kind": "fp32"})
        rows = [[name, str(calls), f"{seconds:.2f}", f"{share:.0%}"] for name, calls, seconds, share in got["profile"]]
        table(f"where an fp32 step at {size}^3 goes", ["operator", "calls", "self s", "share"], rows)


def apart(asked: dict) -> dict:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asked)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(answer.strip().splitlines()[-1])


def case(asked: dict) -> dict:
    """One preset, size and precision: a step to warm up, then the mean of the counted ones."""
    torch.set_num_threads(asked["threads"])
    device = torch.device("cuda" if asked["gpu"] else "cpu")
    torch.manual_seed(0)
    size, batch = asked["size"], asked["batch"]
    system = PRESETS[asked["preset"]]().system
    if "finest" in asked["kind"]:
        system = replace(system, checkpointing="finest")
    objective = system.objective(Grid(size), chest(Grid(size)))
    players = {name: player.to(device) for name, player in objective.players.items()}
    if asked["kind"].endswith("compiled"):
        for player in players.values():
            player.network.compile()
    optimisers = {
        name: torch.optim.Adam(player.parameters(), lr=2e-4, betas=(0.5, 0.99)) for name, player in players.items()
    }
    volume = torch.rand(batch, 1, size, size, size, device=device)
    views = torch.rand(batch, len(system.views), size, size, device=device)
    data = Batch(volume, views, labels=(4 * volume).byte(), unpaired=volume)
    precision = torch.autocast(device.type, torch.bfloat16) if "bf16" in asked["kind"] else nullcontext()

    def step() -> None:
        carried: dict[str, torch.Tensor] = {}
        for name, player in players.items():
            others = [network for other, network in objective.networks().items() if other != name]
            optimisers[name].zero_grad()
            with frozen(others):
                with precision:
                    loss, _, kept = player(data, carried)
                loss.backward()
            optimisers[name].step()
            carried |= kept
        if asked["gpu"]:
            torch.cuda.synchronize()

    step()
    if asked["gpu"]:
        torch.cuda.reset_peak_memory_stats()
    if asked["profile"]:
        return {"profile": profiled(step, asked["gpu"])}
    began, cpu = time.perf_counter(), sum(os.times()[:2])
    for _ in range(asked["steps"]):
        step()
    wall, cpu = time.perf_counter() - began, sum(os.times()[:2]) - cpu
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() / 2**30 if asked["gpu"] else kib / 2**20
    return {"wall_s": wall / asked["steps"], "cpu_s": cpu / asked["steps"], "peak_gib": peak}


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
