"""A function in child processes that are killed at its first, second, third ... file operation."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "faults"), str(TESTS.parent)]),
}

Operations = list[tuple[Any, str]]
"""Modules and the names of their functions, before whose calls a process is killed."""


def kill_at_each_operation(module: str, root: Path) -> list[int]:
    """Run `write(url)` of a module on copies of `root/base`, killed before each of its OPERATIONS in turn.

    Returns:
        The numbers of the operations, which name the copies in `root`; the last copy's process was not killed.
    """
    command = [sys.executable, __file__, module, str(root)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    outcomes = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    numbers = [number for number, _ in outcomes]
    assert numbers == list(range(1, len(outcomes) + 1)), run.stderr
    assert [status for _, status in outcomes] == [signal.SIGKILL] * (len(outcomes) - 1) + [0], run.stderr
    return numbers


def _kill_before(operations: Operations, number: int) -> None:
    """Kill this process before the call of that number."""
    count = 0

    def killing(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for owner, name in operations:
        setattr(owner, name, killing(getattr(owner, name)))


def _main(module_name: str, root: Path) -> None:
    module = importlib.import_module(module_name)
    status, number = signal.SIGKILL, 0
    while status == signal.SIGKILL:
        number += 1
        shutil.copytree(root / "base", root / str(number))
        child = os.fork()
        if child == 0:
            _kill_before(module.OPERATIONS, number)
            module.write(str(root / str(number)))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(number, status, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
