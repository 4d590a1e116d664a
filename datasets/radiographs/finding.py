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
class Finding:
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


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level; ok without findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def warnings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings that are not ok."""
    return tuple(finding for finding in findings if finding.level != "ok")
