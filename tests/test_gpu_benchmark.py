"""The measurements for a GPU: what they would do can be listed without one, and no published system is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from raylift.models.zoo import SYSTEMS

ROOT = Path(__file__).parents[1]


def listed(*words: str) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--list", "--output", os.devnull, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout.splitlines()


def test_parts_and_published_systems_are_in_the_plan() -> None:
    lines = listed()
    parts = {line.split(":")[0] for line in lines if not line.startswith("steps ")}
    assert parts >= {"ceilings", "projectors", "parity", "compiled"}
    sizes = {words[1]: int(words[2]) for line in lines if (words := line.split())[0] == "steps"}
    assert set(sizes) == set(SYSTEMS)
    assert all(sizes[name] == entry.training.size for name, entry in SYSTEMS.items())
    assert "fp32, bf16, bf16 channels-last" in next(line for line in lines if line.startswith("steps psr "))


def test_trial_has_every_system() -> None:
    assert {line.split()[1] for line in listed("--tiny") if line.startswith("steps ")} == set(SYSTEMS)
