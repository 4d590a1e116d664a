"""Memory, threads and open files of a worker over many steps, validations and checkpoints."""

from dataclasses import replace

import psutil
from processes import run_ranks

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.platform.presets import PRESETS
from raylift.platform.training import runs
from raylift.platform.training.loop import train
from raylift.platform.training.tracking import Reporter

STEPS, EVERY = 600, 60


class Measures(Reporter):
    """Resources at each validation: bytes of resident memory, threads, open files."""

    def __init__(self) -> None:
        super().__init__(None, STEPS)
        self.values: list[tuple[int, int, int]] = []

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        process = psutil.Process()
        self.values.append((process.memory_info().rss, process.num_threads(), process.num_fds()))


def resources(rank, run, url):
    """The resources of a worker during a run."""
    measures = Measures()
    train(run, url, measures)
    return measures.values


def test_memory_threads_and_open_files_stay_constant_over_hundreds_of_steps(tmp_path):
    grid, preset, url = Grid(16, 20.0), PRESETS["psr-tiny"], str(tmp_path / "run")
    ingest_phantoms(str(tmp_path / "archive"), grid, chest(grid), count=12, seed=1)
    run = replace(
        preset,
        data=replace(preset.data, archive=str(tmp_path / "archive"), size=16),
        cluster=replace(preset.cluster, workers=1),
        train=replace(
            preset.train,
            steps=STEPS,
            batch_size=1,
            log_every=EVERY,
            validate_every=EVERY,
            validation_samples=1,
            keep_checkpoints=1,
        ),
    )
    (values,) = run_ranks(1, resources, runs.create(run, url), url)
    memory, threads, files = zip(*values[2:], strict=True)
    assert len(memory) == STEPS // EVERY - 2
    assert len(set(threads)) == len(set(files)) == 1
    # A volume of 16^3 in float32 kept for each step would take 7 MiB.
    assert max(memory) - memory[0] < 4 * 2**20
