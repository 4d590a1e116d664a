"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)


class Meter:
    """Counts something up, drawn as a bar or told in lines."""

    def __init__(self, title: str, bar: Progress | None) -> None:
        self._title, self._bar = title, bar
        self._task = bar.add_task(title, total=None) if bar else None
        self._told = 0.0

    def at(self, done: int, total: int, text: str = "") -> None:
        """So much of so much is done; `text` says what comes next."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=f"{self._title} {text}")
        elif time.monotonic() - self._told > 5 or done == total:
            self._told = time.monotonic()
            print(f"{self._title}: {done}/{total} {text}".rstrip(), flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(f"{self._title}: {text}", flush=True)


@contextmanager
def meter(title: str) -> Iterator[Meter]:
    """A meter for the length of a context."""
    if not (sys.stdout.isatty() and console.is_terminal):
        yield Meter(title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(title, bar)


class Board:
    """Where workers leave lines for the driver; an actor."""

    def __init__(self) -> None:
        self._lines: list[tuple[int | None, int, str]] = []

    def put(self, line: tuple[int | None, int, str]) -> None:
        """A step (or None), the number of steps, and text."""
        self._lines.append(line)

    def take(self) -> list[tuple[int | None, int, str]]:
        """All lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def watched(title: str) -> Iterator[Any]:
    """A board whose lines are shown until the context ends."""
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    stop = threading.Event()
    with meter(title) as shown:

        def show() -> None:
            for step, steps, text in ray.get(board.take.remote()):
                if step is None:
                    shown.say(text)
                else:
                    shown.at(step, steps)
                    shown.say(f"step {step}: {text}")

        def follow() -> None:
            while not stop.wait(0.5):
                show()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield board
        finally:
            stop.set()
            thread.join()
            show()
            ray.kill(board)
