"""The loop that trains any system of the zoo with torch alone, on a GPU or on one thread, for a given time."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stepping import channels_last
from torch import Tensor, nn

from raylift.datasets.batch import Batch
from raylift.models.objectives.objective import Objective, frozen
from raylift.models.system_entry import Training

Metrics = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How long and how to train."""

    seconds: float
    """Time by the clock, without measurements."""
    clock: Callable[[], float] = time.monotonic
    lr: float = 1e-3
    """After the warm-up; it decays along a cosine over the time limit."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    gradient_clipping: float = 1.0
    """Maximum L2 norm of a network's gradient; 0: no clipping."""
    warmup_steps: int = 200
    ema_decay: float = 0.999
    """Decay of the exponential moving average (EMA) of the reconstruction network's weights."""
    precision: str = "fp32"
    log_every_s: float = 10.0
    measure_every_s: float = 60.0

    @classmethod
    def of(cls, training: Training, **settings: Any) -> Settings:
        """A preset's optimizer, with further settings."""
        preset = {name: getattr(training, name) for name in ("lr", "betas", "weight_decay", "gradient_clipping")}
        return cls(**preset | settings)

    def lr_at(self, step: int, share: float) -> float:
        """The learning rate after a share of the time."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def autocast(self, device: torch.device) -> Any:
        """The context of forward passes."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Log:
    """Lines of JSON in a file, and on the screen after the label of a job."""

    def __init__(self, file: Path, label: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.label = file, label

    def __call__(self, row: dict[str, Any]) -> None:
        """A line."""
        print(self.label, json.dumps(row), flush=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Sums:
    """Means of the networks' losses since the last line of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """One step's values."""
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value

    def take(self) -> Metrics:
        """The means, which then start anew."""
        means = {name: round(float(value / self.count), 5) for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def train(
    objective: Objective,
    batches: Iterator[Batch],
    settings: Settings,
    log: Callable[[dict[str, Any]], None],
    measured: Callable[[nn.Module, Metrics], None],
) -> nn.Module:
    """Train until the time is over and return the EMA of the reconstruction network.

    Args:
        objective: its networks are on the device of the batches.
        batches: without end.
        settings: of the optimizers and of the clock.
        log: takes a row of step, seconds and mean losses from time to time.
        measured: takes the EMA, and step and seconds, from time to time and at the end; its time does not count.
    """
    loss_modules, network = objective.loss_modules, objective.reconstruction_network
    device = next(network.parameters()).device
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizers = {
        key: torch.optim.AdamW(
            loss_module.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        for key, loss_module in loss_modules.items()
    }
    sums = Sums()
    start, step, waited, skipped = settings.clock(), 0, 0.0, 0
    last_log, last_measure = -math.inf, start
    while (now := settings.clock()) - start < settings.seconds:
        lr = settings.lr_at(step, (now - start) / settings.seconds)
        batch = next(batches)
        waited += settings.clock() - now
        earlier: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for key, loss_module in loss_modules.items():
            for group in optimizers[key].param_groups:
                group["lr"] = lr
            optimizers[key].zero_grad(set_to_none=True)
            with frozen([other for name, other in objective.networks().items() if name != key]):
                with settings.autocast(device):
                    loss, logs, outputs = loss_module(batch, earlier)
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(loss_module.parameters(), settings.gradient_clipping or math.inf)
            if torch.isfinite(norm):
                optimizers[key].step()
            else:
                skipped += 1
            earlier |= outputs
            values |= {f"{key}_loss": loss.detach(), **logs}
        sums.add(values)
        step += 1
        update_ema(ema, network, min(settings.ema_decay, (1 + step) / (10 + step)))
        now = settings.clock()
        position = {"step": step, "seconds": round(now - start, 1)}
        if now - last_log > settings.log_every_s:
            pace = {
                "ms_a_step": round(1000 * (now - start) / step, 1),
                "waited_share": round(waited / (now - start), 3),
            }
            log({**position, "lr": lr, **sums.take(), "skipped": skipped, **pace})
            last_log = now
        if now - last_measure > settings.measure_every_s:
            measured(ema, position)
            last_measure = settings.clock()
            start, last_log = start + last_measure - now, last_log + last_measure - now
    measured(ema, {"step": step, "seconds": round(settings.clock() - start, 1)})
    return ema


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the present ones; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
    for kept, buffer in zip(ema.buffers(), network.buffers(), strict=True):
        kept.copy_(buffer)


def placed(objective: Objective, device: torch.device, layout: str = "") -> Objective:
    """The objective with its networks on a device, their convolutions in a layout."""
    for loss_module in objective.loss_modules.values():
        loss_module.to(device)
        if layout == "channels-last":
            channels_last(loss_module.network)
    return objective


def curves(folder: Path, plot: Path) -> None:
    """Print the measurements of every log in a folder as Markdown and plot loss and PSNR against seconds.

    Logs named `stage-1`, `stage-2` and so on are of one training and are plotted one after the other. Volumes extended
    beyond the field of view are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4))
    axes = figure.subplots(1, 2, width_ratios=(1, 1.4))
    colors: dict[str, str] = {}
    offset = 0.0
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [row for row in rows if "measured" not in row]
        values = [row["measured"] for row in rows if "measured" in row]
        axes[0].semilogy([offset + row["seconds"] for row in losses], [row["voxel_mse"] for row in losses], color="C0")
        keys = [key for key in values[-1] if key.endswith(("_psnr_db", "_ssim")) and "extended" not in key]
        for key in (key for key in keys if key.endswith("_psnr_db")):
            stage = path.stem.startswith("stage-")
            name = key.removesuffix("_psnr_db") if stage else f"{path.stem}, {key.removesuffix('_psnr_db')}"
            label = None if name in colors else name
            color = colors.setdefault(name, f"C{len(colors) % 10}")
            seconds = [offset + row["seconds"] for row in values]
            axes[1].plot(seconds, [row[key] for row in values], ".-", color=color, label=label)
        if path.stem.startswith("stage-"):
            offset += values[-1]["seconds"]
        print(f"{path.stem}\n")
        print("| step | seconds | " + " | ".join(keys) + " |")
        print("| --- | --- | " + " | ".join("---" for _ in keys) + " |")
        for row in values:
            cells = " | ".join(f"{row[key]:.3f}" if key.endswith("ssim") else f"{row[key]:.2f}" for key in keys)
            print(f"| {row['step']} | {row['seconds']:.0f} | {cells} |")
        print()
    axes[0].set(xlabel="seconds", ylabel="voxel MSE (training)")
    axes[1].set(xlabel="seconds", ylabel="PSNR, dB (protocol volume)")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(plot, dpi=110)
