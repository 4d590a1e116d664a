"""All measurements on one GPU in one call of minutes: ceilings, training steps, projectors, parity, compiled steps.

Each part has its own time and fails for itself; `report.md` and `report.json` are written again after every row, and
the whole ends after `--minutes`, whatever it is in. torch, Triton, numpy, scipy, scikit-image, jaxtyping and einops
must be there. attrs, cattrs, monai, nanodrr with roma and platformdirs, and flashdrr may come as wheels: `gpu.sh`
installs them from `.whl/`. Without a GPU, --tiny --device cpu goes through all of it at sizes that measure nothing.

    bash benchmarks/gpu.sh OUTPUT
    python benchmarks/gpu.py --tiny --device cpu --output OUTPUT
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_ceilings import convolutions, copies, products
from gpu_projectors import projectors
from gpu_report import Report
from gpu_steps import compiled, parity, plan, steps, system_of

PARTS = {"ceilings": 25.0, "steps": 110.0, "projectors": 35.0, "parity": 45.0, "compiled": 60.0}
"""Seconds of each part."""
COMPILED = ("x2ct-gan", "diffux2ct")
SECONDS_TO_COMPILE = 10.0
"""No compilation begins with less left."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, help="4.5; 15 for a trial")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--systems", nargs="+", help="step and compile these alone, for longer")
    parser.add_argument("--tiny", action="store_true", help="small systems and sizes: a trial, no measurement")
    parser.add_argument("--list", action="store_true", help="the parts and the systems that are stepped")
    parser.add_argument("--compiled", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    options.minutes = options.minutes or (15.0 if options.tiny else 4.5)
    if options.list:
        for name, seconds in PARTS.items():
            print(f"{name}: {seconds:.0f} s")
        for case in plan(options.tiny):
            views = " and ".join(system_of(case.name, options.tiny).views)
            print(f"steps {case.name} {case.size} batch {case.batch}, {views}: {', '.join(case.kinds)}")
        return
    if options.compiled:
        print(json.dumps(compiled(options.compiled, options.tiny, device)))
        return
    report = Report(options.output, device, 60 * options.minutes - 5, options.tiny)
    rates: dict[str, float] = {}
    for name in options.parts:
        with report.part(name, PARTS[name]):
            if name == "ceilings":
                copies(report, options.tiny)
                products(report, options.tiny)
                rates |= convolutions(report, options.tiny)
            elif name == "steps":
                steps(report, options.tiny, rates, options.systems)
            elif name == "projectors":
                projectors(report, options.tiny)
            elif name == "parity":
                parity(report, options.tiny)
            else:
                compiled_steps(report, options.tiny, options.systems or COMPILED)
    report.note(f"all: {time.monotonic() - report.began:.0f} s")


def compiled_steps(report: Report, tiny: bool, names: Sequence[str]) -> None:
    """Steps through torch.compile, each in a process of its own, which is ended when its time is over."""
    for name in names:
        if report.left() < SECONDS_TO_COMPILE:
            report.note(f"no time for {name}, compiled")
            continue
        with report.guarded(f"{name}, compiled"):
            command = [sys.executable, __file__, "--compiled", name, "--device", str(report.device)]
            command += ["--tiny"] if tiny else []
            share = report.left() if name == names[-1] else 0.6 * report.left()
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=share).stdout
            got = json.loads(output.strip().splitlines()[-1])
            cells = [name, f"{got['first_s']:.0f}", f"{1e3 * got['wall_s']:.1f}", f"{got['peak_gib']:.1f}"]
            report.row("steps in bf16 through torch.compile", COLUMNS, cells, {"system": name, **got})


COLUMNS = ["system", "first step with compilation, s", "ms", "peak GiB"]

if __name__ == "__main__":
    main()
