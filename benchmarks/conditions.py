"""What every benchmark prints around its figures: date, machine, versions, command."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def header(name: str) -> None:
    """The conditions, as Markdown."""
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "zarr", "numpy", "deepspeed", "ray"))
    print(f"## {name}, {datetime.now(UTC):%Y-%m-%d}\n")
    print(f"* machine: {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(f"* versions: Python {platform.python_version()}, {packages}")
    print(f"* command: `python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`\n", flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print(f"{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("| " + " | ".join("---" for _ in columns) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
