"""What a check of a radiograph found: a level as of a traffic light, a sentence, and the measured value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "caution", "stop"]
Bound = Literal["at least", "at most"]
LEVELS: tuple[Level, ...] = ("ok", "caution", "stop")
"""From the best to the worst: green, yellow and red."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    name: str
    """Name of the check."""
    level: Level
    text: str
    """A sentence on what is wrong, without the name of a file or view; empty for ok."""
    value: float
    """What was measured."""
    limit: float
    bound: Bound
    """Which side of the limit is ok."""

    def __str__(self) -> str:
        return f"{self.text} ({self.name} {self.value:.2f}, {self.bound} {self.limit:g})"


def worst(results: Iterable[CheckResult]) -> Level:
    """The worst level; ok without results."""
    return max((result.level for result in results), key=LEVELS.index, default="ok")


def warnings(results: Iterable[CheckResult]) -> tuple[CheckResult, ...]:
    """The results that are not ok."""
    return tuple(result for result in results if result.level != "ok")
