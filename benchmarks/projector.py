"""The projector against plastimatch and diffdrr: time, and how far the images agree.

A CT is resampled to 128^3 at 2.5 mm and projected to a 128 x 128 detector in the chest geometry, PA. plastimatch runs
as its command line tool (its time is the one that it prints, without the start of the process); diffdrr needs an
environment of its own, because it installs 2.5 GB:

    python -m venv ~/diffdrr && ~/diffdrr/bin/pip install torch diffdrr
    python benchmarks/projector.py [--ct scan.nii.gz] [--diffdrr ~/diffdrr/bin/python]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from raylift.datasets import projector
from raylift.datasets.geometry import FRONTAL, Grid, chest
from raylift.datasets.intensity import hu_to_attenuation
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.scans import reader
from raylift.datasets.scans.resample import resample

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table

GRID = Grid(128, 2.5)
GEOMETRY = chest(GRID)

DIFFDRR = """
import sys, time
import numpy as np, torch
torch.set_num_threads(1)
from diffdrr.drr import DRR
from diffdrr.data import read
import torchio
folder, renderer, sad, sdd, px, pitch = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:7])
volume = torchio.ScalarImage(folder + "/mu.nii.gz")
subject = read(volume, orientation="PA", bone_attenuation_multiplier=1.0)
attenuation = torch.from_numpy(np.load(folder + "/mu.npy"))
drr = DRR(subject, sdd=sdd, height=int(px), delx=pitch, renderer=renderer)
drr.density = attenuation
rot = torch.zeros(1, 3); xyz = torch.tensor([[0.0, -sad, 0.0]])
kwargs = dict(n_points=128) if renderer == "trilinear" else {}
from diffdrr.pose import convert
pose = convert(rot, xyz, parameterization="euler_angles", convention="ZXY")
source, target = drr.detector(pose, None)
def forward(x):
    return drr.render(x, source, target, **kwargs)
def timed(f):
    best = 1e9
    for _ in range(5):
        began = time.perf_counter(); f(); best = min(best, time.perf_counter() - began)
    return best
plain = timed(lambda: forward(attenuation))
def both():
    x = attenuation.clone().requires_grad_(True)
    forward(x).sum().backward()
both_time = timed(both)
np.save(folder + "/diffdrr.npy", forward(attenuation).detach().numpy().reshape(int(px), int(px)))
print(plain, both_time)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ct", type=Path, help="a CT file; a phantom otherwise")
    parser.add_argument("--diffdrr", help="a Python that has diffdrr")
    options = parser.parse_args()
    torch.set_num_threads(1)
    header("projector")
    if options.ct:
        (source,) = reader.find([options.ct]).sources
        hu = resample(reader.read(source), GRID)[0]
    else:
        hu = thorax(1, GRID)[0]
    attenuation = hu_to_attenuation(torch.from_numpy(hu.astype(np.float32)))[None, None]
    axes = projector._axes(FRONTAL, attenuation)

    def by_slices(x: torch.Tensor) -> torch.Tensor:
        return projector.project(x, GRID.spacing_mm, GEOMETRY, FRONTAL)

    def by_frustum(x: torch.Tensor) -> torch.Tensor:
        return projector._project_frustum(x, GRID.spacing_mm, GEOMETRY, FRONTAL, axes)

    ours = by_slices(attenuation)[0, 0].numpy()
    rows = [
        row("raylift, slices", *times(by_slices, attenuation), 0.0),
        row(
            "raylift, frustum", *times(by_frustum, attenuation), difference(by_frustum(attenuation)[0, 0].numpy(), ours)
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for algorithm in ("exact", "uniform"):
            image, seconds = plastimatch(attenuation[0, 0].numpy(), algorithm, Path(folder))
            rows.append(row(f"plastimatch {algorithm}", seconds, None, difference(image, ours)))
        if options.diffdrr:
            for renderer in ("siddon", "trilinear"):
                image, forward, both = diffdrr(attenuation[0, 0].numpy(), options.diffdrr, renderer, Path(folder))
                rows.append(row(f"diffdrr {renderer}", forward, both, difference(image, ours)))
    base = float(rows[0][1])
    for line in rows:
        line.insert(2, f"{float(line[1]) / base:.1f}")
    title = f"{options.ct.name if options.ct else 'phantom 1'} at 128^3, 128 x 128 detector, one thread, best of 5"
    columns = ["projector", "forward, ms", "ratio", "forward and backward, ms", "relative L2 to raylift's slices"]
    table(title, columns, rows)


def times(project: Callable[[torch.Tensor], torch.Tensor], attenuation: torch.Tensor) -> tuple[float, float]:
    def both() -> None:
        x = attenuation.clone().requires_grad_(True)
        project(x).sum().backward()

    return best(lambda: project(attenuation)), best(both)


def best(step: Callable[[], object], repeats: int = 5) -> float:
    results = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        results.append(time.perf_counter() - began)
    return min(results)


def row(name: str, forward: float, both: float | None, relative: float) -> list[str]:
    return [
        name,
        f"{1e3 * forward:.1f}",
        "not differentiable" if both is None else f"{1e3 * both:.1f}",
        f"{relative:.4f}",
    ]


def difference(image: np.ndarray, ours: np.ndarray) -> float:
    return float(np.linalg.norm(image - ours) / np.linalg.norm(ours))


def plastimatch(attenuation: np.ndarray, algorithm: str, folder: Path) -> tuple[np.ndarray, float]:
    image = sitk.GetImageFromArray(np.ascontiguousarray(attenuation[::-1]))
    image.SetSpacing((GRID.spacing_mm,) * 3)
    image.SetOrigin([-(n - 1) / 2 * GRID.spacing_mm for n in image.GetSize()])
    sitk.WriteImage(image, str(folder / "in.mha"))
    width = GEOMETRY.detector_px * GEOMETRY.detector_pitch_mm
    tool = Path(sys.executable).with_name("plastimatch")
    command = [str(tool), "drr", "-t", "pfm", "-i", algorithm, "-P", "none", "--sad", "1650", "--sid", "1800"]
    command += ["-n", "0 1 0", "--vup", "0 0 1", "-r", "128 128", "-z", f"{width} {width}", "-o", "0 0 0"]
    command += ["-I", str(folder / "in.mha"), "-O", str(folder / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (path,) = folder.glob("*.pfm")
    *_, raw = path.read_bytes().split(b"\n", 3)
    path.unlink()
    # Its unit is a tenth of a millimeter's, and its columns run the other way.
    drr = 10 * np.frombuffer(raw, "<f4").reshape(128, 128)[:, ::-1]
    found = re.search(r"(?:Total|DRR)[^\d]*([\d.]+) sec", output) or re.search(r"([\d.]+) *(?:sec|s)\b", output)
    return drr, float(found.group(1)) if found else float("nan")


def diffdrr(attenuation: np.ndarray, python: str, renderer: str, folder: Path) -> tuple[np.ndarray, float, float]:
    # diffdrr indexes (x, y, z) as the file does: towards left, posterior, superior.
    volume = np.ascontiguousarray(attenuation[::-1].transpose(2, 1, 0))
    np.save(folder / "mu.npy", volume)
    image = sitk.GetImageFromArray(np.ascontiguousarray(attenuation[::-1]))
    image.SetSpacing((GRID.spacing_mm,) * 3)
    image.SetOrigin([-(n - 1) / 2 * GRID.spacing_mm for n in image.GetSize()])
    sitk.WriteImage(image, str(folder / "mu.nii.gz"))
    words = [
        GEOMETRY.source_isocenter_mm,
        GEOMETRY.source_detector_mm,
        GEOMETRY.detector_px,
        GEOMETRY.detector_pitch_mm,
    ]
    command = [python, "-c", DIFFDRR, str(folder), renderer, *map(str, words)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return np.load(folder / "diffdrr.npy"), float(output[-2]), float(output[-1])


if __name__ == "__main__":
    main()
