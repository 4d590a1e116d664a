"""The folder that one run on a GPU fills: a table a part, as Markdown and as JSON, and the time that is left."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conditions import conditions, table_lines

PACKAGES = ("torch", "triton", "numpy", "nanodrr", "flashdrr")


class Report:
    """Results, part by part; what is measured stays whatever happens to the rest.

    Args:
        folder: where `report.md` and `report.json` are written, again after every row.
        device: the one that measures.
        seconds: how long all parts together may take. At that time the process ends, with what is written.
        trial: that nothing is to be measured: everything is done once, and parts may take longer.
    """

    def __init__(self, folder: Path, device: torch.device, seconds: float, trial: bool) -> None:
        self.folder, self.device, self.trial = folder, device, trial
        self.began, self.end = time.monotonic(), time.monotonic() + seconds
        self.lines = conditions("gpu", PACKAGES)
        self.lines.insert(2, f"* card: {card(device)}")
        self.tables: dict[str, tuple[list[str], list[list[str]]]] = {}
        self.data: dict[str, Any] = {"card": card(device)}
        self.notes: list[str] = []
        self.closing = self.end
        folder.mkdir(parents=True, exist_ok=True)
        self.write()
        watch = threading.Timer(seconds, self._stop)
        watch.daemon = True
        watch.start()

    def left(self) -> float:
        """Seconds until the part that runs should end."""
        return self.closing - time.monotonic()

    def row(self, title: str, columns: list[str], cells: list[str], results: dict[str, Any]) -> None:
        """A row of the table of that title, and the same with all digits for the JSON."""
        self.tables.setdefault(title, (columns, []))[1].append(cells)
        self.data.setdefault(title, []).append(results)
        print(" | ".join(cells), flush=True)
        self.write()

    def note(self, text: str) -> None:
        """A line below the tables."""
        self.notes.append(text)
        print(text, flush=True)
        self.write()

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """A part with its own time, whose failure is written down and ends nothing else."""
        began = time.monotonic()
        self.closing = min(began + seconds * (10 if self.trial else 1), self.end)
        with self.guarded(name):
            yield
        self.note(f"{name}: {time.monotonic() - began:.0f} s")

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """A failure of what is inside becomes a note."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.data.setdefault("failures", []).append({"where": name, "error": traceback.format_exc()})
            self.note(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Both files, each replaced at once."""
        lines = list(self.lines)
        for title, (columns, rows) in list(self.tables.items()):
            lines += ["", *table_lines(title, columns, list(rows))]
        lines += ["", *(f"* {note}" for note in list(self.notes)), ""]
        for name, text in (("report.md", "\n".join(lines)), ("report.json", json.dumps(self.data, indent=1))):
            part = self.folder / f".{name}.{threading.get_ident()}"
            part.write_text(text, encoding="utf-8")
            part.replace(self.folder / name)

    def _stop(self) -> None:
        self.note(f"stopped after {time.monotonic() - self.began:.0f} s: what follows was not measured")
        os._exit(3)


def card(device: torch.device) -> str:
    """The accelerator's name and memory."""
    if device.type != "cuda":
        return "none, on the processor: no measurement"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], object], device: torch.device, seconds: float = 0.3, most: int = 50) -> float:
    """The median of as many calls as fit into `seconds`, three or more, after two to warm up."""
    for _ in range(2):
        step()
    wait(device)
    spent: list[float] = []
    began = time.perf_counter()
    while len(spent) < 3 or (len(spent) < most and time.perf_counter() - began < seconds):
        started = time.perf_counter()
        step()
        wait(device)
        spent.append(1e3 * (time.perf_counter() - started))
    return statistics.median(spent)


def peak_gib(device: torch.device) -> float:
    """The allocator's peak since it was last reset; 0 on a processor."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def reset_peak(device: torch.device) -> None:
    """The peak counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def arithmetic(strict: bool = False, search: bool = False) -> Iterator[None]:
    """How the card computes in fp32, and whether cuDNN tries its algorithms.

    Args:
        strict: fp32 throughout; otherwise TF32 in convolutions, torch's default.
        search: cuDNN times its algorithms for each new shape and takes the fastest.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = not strict, search
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
