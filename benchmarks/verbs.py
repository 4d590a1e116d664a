"""Every slim system through every verb of the command line on archives of real data, and the seconds each takes.

A system that learns from CT trains on the archive of CT, one that learns from radiographs on the archive of pairs. It
trains, goes on for as many steps again, is evaluated, exported, makes a volume of two radiographs, and is served: the
page and the API are asked. The seconds are of the whole command, the start of Python and of Ray among them; what the
few steps make of the networks is not looked at here.

    python benchmarks/verbs.py --ct data/chest --pairs data/pairs --frontal pa.png --lateral lateral.png \
        --output runs/verbs
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

from raylift.platform.presets.catalog import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conditions import header, table
from systems import SLIM, beside

VERBS = ("train", "resume", "evaluate", "export", "reconstruct", "serve")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--ct", "--pairs", "--frontal", "--lateral"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/verbs"))
    parser.add_argument("--presets", nargs="+", default=SLIM)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    header("verbs")
    rows = []
    for name in options.presets:
        cells = [name, PRESETS[name]().system.learns_from]
        for verb, act in acts(name, options).items():
            log = options.output / f"{name}-{verb}.log"
            began = time.perf_counter()
            with log.open("w") as told:
                passed = act(told.fileno())
            cells.append(f"{time.perf_counter() - began:.0f}" if passed else f"failed: {log}")
            print(f"{name}: {verb}: {cells[-1]}", file=sys.stderr, flush=True)
            if not passed:
                break
        rows.append(cells + [""] * (2 + len(VERBS) - len(cells)))
    table("Seconds of each command", ["preset", "learns from", *VERBS], rows)
    return 1 if any("failed" in cell for row in rows for cell in row) else 0


def acts(name: str, options: argparse.Namespace) -> dict[str, Callable[[int], bool]]:
    """What to do for each verb; each writes to a file and says whether it came out right."""
    run, model, report = (options.output / f"{name}{suffix}" for suffix in ("", "-model", "-report"))
    volume = options.output / f"{name}.nii.gz"
    system = PRESETS[name]().system
    archive = options.ct if system.learns_from == "volumes" else options.pairs
    train = [name, "--data.archive", archive, "--output", str(run), "--train.steps", str(options.steps)]
    train += ["--train.validate-every", str(options.steps), "--train.validation-samples", "1"]
    train += beside(name, options.ct, options.output)
    radiographs = [word for view in system.views for word in (f"--{view}", getattr(options, view))]
    words = {
        "train": ["train", *train],
        "resume": ["train", "--resume", str(run), "--train.steps", str(2 * options.steps)],
        "evaluate": ["evaluate", str(run), "--archive", archive, "--output", str(report)],
        "export": ["export", str(run), str(model)],
        "reconstruct": ["reconstruct", str(model), *radiographs, "--output", str(volume)],
    }

    def command(verb: str) -> Callable[[int], bool]:
        return lambda told: subprocess.call(raylift(*words[verb]), stdout=told, stderr=told) == 0

    files = {view: getattr(options, view) for view in system.views}
    return {verb: command(verb) for verb in words} | {"serve": lambda told: served(model, files, told)}


def raylift(*words: str) -> list[str]:
    return [sys.executable, "-m", "raylift", *words]


def served(model: Path, files: dict[str, str], told: int) -> bool:
    """Whether the page shows and the API answers with a volume, and the service ends when it is interrupted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = raylift("serve", str(model), "--port", str(port))
    with subprocess.Popen(words, stdout=told, stderr=told) as service:
        try:
            url = f"http://127.0.0.1:{port}"
            while service.poll() is None and not answers(f"{url}/readyz"):
                time.sleep(0.5)
            sent = {view: (Path(file).name, Path(file).read_bytes()) for view, file in files.items()}
            made = httpx.post(f"{url}/v1/reconstructions", files=sent, timeout=300)
            page = httpx.get(url, timeout=60)
            os.write(told, f"page {page.status_code}, API {made.status_code} {made.headers['content-type']}\n".encode())
            right = page.is_success and made.is_success and made.headers["content-type"] == "application/gzip"
        except httpx.HTTPError as error:
            os.write(told, f"{error}\n".encode())
            right = False
        finally:
            service.send_signal(signal.SIGINT)
        try:
            return service.wait(120) == 0 and right
        except subprocess.TimeoutExpired:
            os.write(told, b"it does not end when it is interrupted\n")
            service.kill()
            return False


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
