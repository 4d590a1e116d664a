"""What every benchmark prints around its results: date, machine, versions, command."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSIONS = ("torch", "zarr", "numpy", "deepspeed", "ray")


def header(name: str, packages: Sequence[str] = VERSIONS) -> None:
    """The conditions, as Markdown."""
    print("\n".join(conditions(name, packages)) + "\n", flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print("\n".join(table_lines(title, columns, rows)) + "\n", flush=True)


def conditions(name: str, packages: Sequence[str] = VERSIONS) -> list[str]:
    """Lines of Markdown: title and date, machine, versions of the packages that are installed, command."""
    versions = [f"{package} {version}" for package in packages if (version := installed(package))]
    return [
        f"## {name}, {datetime.now(UTC):%Y-%m-%d}\n",
        f"* machine: {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start",
        f"* versions: {', '.join([f'Python {platform.python_version()}', *versions])}",
        f"* command: `python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`",
    ]


def table_lines(title: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"{title}\n", *("| " + " | ".join(line) + " |" for line in lines)]


def installed(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
