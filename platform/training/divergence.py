"""Detection of a training run that diverges: losses and gradient norms far above their running medians."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from statistics import median

from raylift.datasets.errors import RayliftError

RECENT = 100
"""Values of each name whose median is compared."""
MINIMUM = 10
"""Values of a name before the first comparison."""
FLOOR = 1e-3
"""Least median: the loss of a discriminator may be exactly 0 for many steps."""
DIVERGED = "diverged"
"""Key of the history's entry of a step at which the training began to diverge."""


class DivergedLossError(RayliftError, ArithmeticError):
    """A loss or gradient norm far above its running median, in a run that stops for that."""


class DivergenceMonitor:
    """Compares losses and gradient norms with the medians of their recent values.

    A value that exceeds its median by the factor is not added to the recent ones, so a training that has diverged is
    not taken for normal after a while.

    Args:
        factor: how many times its running median a value may be.
        history: entries of the run so far; their means are the first values.
    """

    def __init__(self, factor: float, history: Iterable[Mapping[str, float]] = ()) -> None:
        self._factor = factor
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._diverging: set[str] = set()
        for entry in history:
            self.update({key: value for key, value in entry.items() if key.endswith(("/loss", "/grad_norm"))})

    def update(self, values: Mapping[str, float]) -> str:
        """Compare and add the values of a step, by name.

        Returns:
            The names that begin to diverge with value and median, for a message; empty if there is none.
        """
        begun = []
        for name, value in values.items():
            recent = self._recent[name]
            usual = max(median(map(abs, recent)), FLOOR) if len(recent) >= MINIMUM else math.inf
            if abs(value) <= self._factor * usual:
                recent.append(value)
                self._diverging.discard(name)
            elif name not in self._diverging:
                self._diverging.add(name)
                begun.append(f"{name} is {value:.3g}, its running median {usual:.3g}")
        return "; ".join(begun)


def diverged_at(history: Iterable[Mapping[str, float]]) -> int | None:
    """The step at which the training last began to diverge; None if it never did."""
    steps = [int(entry["step"]) for entry in history if DIVERGED in entry]
    return steps[-1] if steps else None
