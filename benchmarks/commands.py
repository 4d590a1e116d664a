"""Seconds of every command with every slim system, on archives of real data.

A system supervised by volumes trains on the archive of CT, one supervised by radiographs on the archive of pairs. It
is trained, resumed for as many steps again, evaluated, exported, reconstructs a volume from two radiographs, and is
served: the page and the API get a request. The seconds are those of the whole command, including the start of Python
and Ray. The quality of the networks after so few steps is not measured.

    python benchmarks/commands.py --ct data/chest --pairs data/pairs --frontal pa.png --lateral lateral.png \
        --output runs/commands
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from raylift.platform.presets import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from systems import SLIM, required_options

COMMANDS = ("train", "resume", "evaluate", "export", "reconstruct", "serve")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--ct", "--pairs", "--frontal", "--lateral"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/commands"))
    parser.add_argument("--presets", nargs="+", default=SLIM)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    header("commands")
    rows = []
    for name in options.presets:
        cells = [name, PRESETS[name].system.supervision]
        for command, run in runs(name, options).items():
            log = options.output / f"{name}-{command}.log"
            began = time.perf_counter()
            with log.open("w") as output:
                passed = run(output.fileno())
            cells.append(f"{time.perf_counter() - began:.0f}" if passed else f"failed: {log}")
            print(f"{name}: {command}: {cells[-1]}", file=sys.stderr, flush=True)
            if not passed:
                break
        rows.append(cells + [""] * (2 + len(COMMANDS) - len(cells)))
    table("Seconds of each command", ["preset", "supervised by", *COMMANDS], rows)
    return 1 if any("failed" in cell for row in rows for cell in row) else 0


def runs(name: str, options: argparse.Namespace) -> dict[str, Callable[[int], bool]]:
    """A function for each command, which writes to a file descriptor and returns whether the command succeeded."""
    run, model, report = (options.output / f"{name}{suffix}" for suffix in ("", "-model", "-report"))
    volume = options.output / f"{name}.nii.gz"
    system = PRESETS[name].system
    archive = options.ct if system.supervision == "volumes" else options.pairs
    train = [name, "--data.archive", archive, "--output", str(run), "--train.steps", str(options.steps)]
    train += ["--train.validate-every", str(options.steps), "--train.validation-samples", "1"]
    train += required_options(name, options.ct, options.output)
    radiographs = [word for view in system.views for word in (f"--{view}", getattr(options, view))]
    words = {
        "train": ["train", *train],
        "resume": ["train", "--resume", str(run), "--train.steps", str(2 * options.steps)],
        "evaluate": ["evaluate", str(run), "--archive", archive, "--output", str(report)],
        "export": ["export", str(run), str(model)],
        "reconstruct": ["reconstruct", str(model), *radiographs, "--output", str(volume)],
    }

    def called(command: str) -> Callable[[int], bool]:
        return lambda output: subprocess.call(raylift(*words[command]), stdout=output, stderr=output) == 0

    files = {view: getattr(options, view) for view in system.views}
    return {command: called(command) for command in words} | {"serve": lambda output: served(model, files, output)}


def raylift(*words: str) -> list[str]:
    return [sys.executable, "-m", "raylift", *words]


def served(model: Path, files: dict[str, str], output: int) -> bool:
    """Whether the page and the API respond, the API with a volume, and the service ends when it is interrupted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = raylift("serve", str(model), "--port", str(port))
    with subprocess.Popen(words, stdout=output, stderr=output) as service:
        try:
            url = f"http://127.0.0.1:{port}"
            while service.poll() is None and not responds(f"{url}/readyz"):
                time.sleep(0.5)
            sent = {view: (Path(file).name, Path(file).read_bytes()) for view, file in files.items()}
            made = httpx.post(f"{url}/v1/reconstructions", files=sent, timeout=300)
            page = httpx.get(url, timeout=60)
            os.write(
                output, f"page {page.status_code}, API {made.status_code} {made.headers['content-type']}\n".encode()
            )
            right = page.is_success and made.is_success and made.headers["content-type"] == "application/gzip"
        except httpx.HTTPError as error:
            os.write(output, f"{error}\n".encode())
            right = False
        finally:
            service.send_signal(signal.SIGINT)
        try:
            return service.wait(120) == 0 and right
        except subprocess.TimeoutExpired:
            os.write(output, b"it does not end when it is interrupted\n")
            service.kill()
            return False


def responds(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
