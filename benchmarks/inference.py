"""Seconds per volume of the shipped models on the CPU: PyTorch in two layouts, torch.compile and ONNX Runtime.

    python benchmarks/inference.py [--threads 2] [--rounds 10] [--models models:chest-64 x2ct-gan-slim]

Each round runs all ways of one model, so that load of the machine affects them alike. ONNX Runtime needs
`pip install onnx onnxscript onnxruntime`; without them its rows state that. The output of each way is compared with the
network's as it is loaded, in HU; torch.compile and ONNX Runtime begin with that network.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raylift.datasets.geometry import Geometry, Grid, chest
from raylift.datasets.intensity import Normalization, Window
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import normalized_drrs
from raylift.platform import model_store
from raylift.platform.presets import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from stepping import channels_last

SHIPPED = [f"{model_store.PREFIX}{name}" for name in model_store.MODELS]
COLUMNS = ["model", "way", "median, s", "fastest, s", "ratio", "largest difference, HU", "until the first volume, s"]
Forward = Callable[[Tensor], Tensor]


def contiguous(network: nn.Module, _: Tensor) -> Forward:
    """PyTorch, with contiguous weights."""
    network = deepcopy(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    return network


def in_channels_last(network: nn.Module, _: Tensor) -> Forward:
    """PyTorch, with convolutions in channels-last layout."""
    network = deepcopy(network)
    channels_last(network)
    return network


def compiled(network: nn.Module, _: Tensor) -> Forward:
    """Through torch.compile (Inductor, C++)."""
    return torch.compile(deepcopy(network), dynamic=False)


def in_onnx_runtime(network: nn.Module, radiographs: Tensor) -> Forward:
    """Exported to ONNX and run by ONNX Runtime's CPU provider."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/network.onnx"
        torch.onnx.export(
            network, (radiographs,), path, dynamo=True, opset_version=20, external_data=False, verbose=False
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


WAYS: dict[str, Callable[[nn.Module, Tensor], Forward]] = {
    "contiguous": contiguous,
    "channels-last": in_channels_last,
    "torch.compile": compiled,
    "ONNX Runtime": in_onnx_runtime,
}


@dataclass(frozen=True)
class Candidate:
    """A network and the data that its input is made of."""

    name: str
    network: nn.Module
    grid: Grid
    geometry: Geometry
    normalization: Normalization
    window: Window

    @classmethod
    def of(cls, name: str) -> Candidate:
        """A shipped model, or a preset with the initial weights of seed 0."""
        if name.startswith(model_store.PREFIX):
            model = model_store.load(name)
            described = model.description
            return cls(
                name, model.network, described.grid, described.geometry, described.normalization, described.window
            )
        run = PRESETS[name]
        grid = Grid(run.data.size, 320 / run.data.size)
        torch.manual_seed(0)
        network = run.system.reconstruction_network(grid, chest(grid)).eval().requires_grad_(False)
        return cls(name, network, grid, chest(grid), run.data.normalization, run.data.window)

    def radiographs(self) -> Tensor:
        """DRRs of a phantom as the network's input."""
        volume, _ = thorax(20_000_000, self.grid)
        return torch.from_numpy(normalized_drrs(volume, self.grid, self.geometry, self.normalization))[None]


@torch.no_grad()
def rows(candidate: Candidate, ways: Sequence[str], rounds: int) -> list[list[str]]:
    """A row for each way of one model."""
    radiographs, width_hu = candidate.radiographs(), candidate.window.width_hu
    expected = candidate.network(radiographs)
    forwards: dict[str, Forward] = {}
    first_s, error_hu, failures = {}, {}, {}
    for way in ways:
        begun = time.perf_counter()
        try:
            forward = WAYS[way](candidate.network, radiographs)
            output = forward(radiographs)
        except Exception as error:  # A way that does not support a network has a row that states why.
            failures[way] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120] if str(error) else "fails"
            continue
        first_s[way] = time.perf_counter() - begun
        error_hu[way] = float((output - expected).abs().max()) * width_hu
        forwards[way] = forward
    seconds: dict[str, list[float]] = {way: [] for way in forwards}
    for _ in range(rounds):
        for way, forward in forwards.items():
            begun = time.perf_counter()
            forward(radiographs)
            seconds[way].append(time.perf_counter() - begun)
    base = seconds[ways[0]]
    return [
        [
            candidate.name,
            way,
            f"{statistics.median(seconds[way]):.3f}",
            f"{min(seconds[way]):.3f}",
            f"{statistics.median(a / b for a, b in zip(base, seconds[way], strict=True)):.2f}",
            f"{error_hu[way]:.4f}",
            f"{first_s[way]:.1f}",
        ]
        if way in forwards
        else [candidate.name, way, failures[way], "", "", "", ""]
        for way in ways
    ]


def main() -> None:
    """Print the conditions and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", nargs="+", default=SHIPPED, help="shipped models, and presets with initial weights")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    header("inference", ("torch", "numpy", "onnx", "onnxscript", "onnxruntime"))
    lines = [row for name in options.models for row in rows(Candidate.of(name), options.ways, options.rounds)]
    title = (
        f"One volume from DRRs of a phantom in fp32, {options.threads} threads, {options.rounds} rounds. The "
        "ratio is the median over rounds of the time of the first way over the time of the row."
    )
    table(title, COLUMNS, lines)


if __name__ == "__main__":
    main()
