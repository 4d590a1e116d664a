"""What the card does at best: copies, matrix products, and the 3-D convolution that the networks are made of."""

from __future__ import annotations

import torch
from gpu_report import Report, arithmetic, milliseconds
from torch import Tensor
from torch.nn import functional as F


def copies(report: Report, tiny: bool) -> None:
    """Bytes read and written a second by a copy on the device."""
    source = torch.rand(2**18 if tiny else 2**28, device=report.device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), report.device)
    throughput = 2 * source.numel() * 4 / ms / 1e9
    cells = ["copy on the device", f"{source.numel() * 4 / 2**20:.0f} MiB", f"{ms:.3g}", f"{throughput:.3g} TB/s"]
    report.row(TITLE, COLUMNS, cells, {"what": "copy", "ms": ms, "tb_s": throughput})


def products(report: Report, tiny: bool) -> None:
    """A square matrix product in bf16, TF32 and fp32."""
    size = 256 if tiny else 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, True),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        a, b = (torch.randn(size, size, device=report.device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        ms = milliseconds(lambda a=a, b=b: a @ b, report.device, most=20)
        torch.backends.cuda.matmul.allow_tf32 = False
        throughput = 2 * size**3 / ms / 1e9
        cells = [f"matrix product, {name}", f"{size}^3", f"{ms:.3g}", f"{throughput:.3g} TFLOP/s"]
        report.row(TITLE, COLUMNS, cells, {"what": f"matmul {name}", "ms": ms, "tflop_s": throughput})


def convolutions(report: Report, tiny: bool) -> dict[str, float]:
    """64 to 64 channels, 3 x 3 x 3, forward alone and with backward; the best throughput with backward by precision."""
    best: dict[str, float] = {}
    for size in (4, 8) if tiny else (64, 128):
        for name in CONVOLUTIONS:
            for search in (False, True):
                if report.left() < 0:
                    return best
                with report.guarded(f"convolution {name} at {size}^3"), arithmetic("strict" in name, search):
                    forward, both = convolution(report, name, size)
                    flop = 2 * 64 * 64 * 27 * size**3
                    rates = [flop / forward / 1e9, 3 * flop / both / 1e9]
                    best[name.split()[0]] = max(best.get(name.split()[0], 0.0), rates[1])
                    cells = [f"{name}{', algorithms tried' * search}", f"{size}^3", f"{forward:.3g}", f"{both:.3g}"]
                    results = {"what": name, "search": search, "size": size, "forward_ms": forward, "both_ms": both}
                    report.row(
                        CONVOLUTION,
                        CONVOLUTION_COLUMNS,
                        [*cells, *(f"{throughput:.3g}" for throughput in rates)],
                        results,
                    )
    return best


def convolution(report: Report, name: str, size: int) -> tuple[float, float]:
    """Milliseconds forward, and forward and backward with respect to input and weights."""
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    layout = torch.channels_last_3d if "channels-last" in name else torch.contiguous_format
    x = torch.randn(1, 64, size, size, size, device=report.device, dtype=dtype).to(memory_format=layout)
    weight = torch.randn(64, 64, 3, 3, 3, device=report.device, dtype=dtype).to(memory_format=layout)
    upstream = torch.randn_like(x)
    x.requires_grad_(True)
    weight.requires_grad_(True)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.conv3d(x, weight, padding=1), (x, weight), upstream)

    with torch.no_grad():
        forward = milliseconds(lambda: F.conv3d(x, weight, padding=1), report.device)
    return forward, milliseconds(both, report.device)


TITLE = "ceilings of the card"
COLUMNS = ["what", "size", "ms", "throughput"]
CONVOLUTION = "3-D convolution, 64 to 64 channels, 3 x 3 x 3, batch 1"
CONVOLUTION_COLUMNS = ["kind", "size", "forward, ms", "with backward, ms", "forward, TFLOP/s", "with backward, TFLOP/s"]
CONVOLUTIONS = ("bf16 channels-last", "bf16", "fp32", "fp32 channels-last", "fp32 strict")
"""fp32 computes in TF32, as torch does by default; strict does not."""
