"""Progress of long commands: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)


class ProgressBar:
    """Shows a count as a rich progress bar or, without a terminal, as lines at most every five seconds."""

    def __init__(self, title: str, bar: Progress | None) -> None:
        self._title, self._bar = title, bar
        self._task = bar.add_task(title, total=None) if bar else None
        self._last_print_s = 0.0

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show `done` of `total`; `text` names the next item."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=f"{self._title} {text}")
        elif time.monotonic() - self._last_print_s > 5 or done == total:
            self._last_print_s = time.monotonic()
            print(f"{self._title}: {done}/{total} {text}".rstrip(), flush=True)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text)
        else:
            print(f"{self._title}: {text}", flush=True)


@contextmanager
def progress_bar(title: str) -> Iterator[ProgressBar]:
    """A progress bar for the length of a context."""
    if not (sys.stdout.isatty() and console.is_terminal):
        yield ProgressBar(title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressBar(title, bar)


class MessageQueue:
    """Messages of the workers to the driver; a Ray actor."""

    def __init__(self) -> None:
        self._messages: list[tuple[int | None, int, str]] = []
        self._step = 0
        self._stop_requested = self._stopped = False

    def put(self, message: tuple[int | None, int, str]) -> None:
        """Append a step (or None), the number of steps, and a text."""
        self._messages.append(message)
        self._step = message[0] or self._step

    def last_step(self) -> int:
        """The step of the newest message that has one; 0 before."""
        return self._step

    def request_stop(self) -> None:
        """Request a checkpoint and the end of the run from the workers."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        """Whether a checkpoint and the end of the run are requested."""
        return self._stop_requested

    def confirm_stop(self, step: int) -> None:
        """Record that a checkpoint of that step is published and the workers end."""
        self._step, self._stopped = step, True

    def stopped(self) -> bool:
        """Whether the workers have ended after a request."""
        return self._stopped

    def take(self) -> list[tuple[int | None, int, str]]:
        """Remove and return all messages."""
        messages, self._messages = self._messages, []
        return messages


@contextmanager
def worker_messages(title: str) -> Iterator[Any]:
    """Handle of a `MessageQueue` actor whose messages are shown on a progress bar until the context ends.

    The actor is on the driver's node, so that the loss of another node does not end it.
    """
    # Takes a second to import, which commands without Ray need not.
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue: Any = ray.remote(MessageQueue).options(num_cpus=0, scheduling_strategy=node).remote()
    stop = threading.Event()
    with progress_bar(title) as bar:

        def show() -> None:
            with suppress(ray.exceptions.RayActorError):  # the run goes on without its lines
                for step, steps, text in ray.get(queue.take.remote()):
                    if step is None:
                        bar.print(text)
                    else:
                        bar.update(step, steps)
                        bar.print(f"step {step}: {text}")

        def poll() -> None:
            while not stop.wait(0.5):
                show()

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield queue
        finally:
            stop.set()
            thread.join()
            show()
            ray.kill(queue)
