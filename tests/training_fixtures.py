"""One archive, one Ray and one finished run for all tests that train."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.intensity import normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.platform import cluster
from raylift.platform.config import RunConfig
from raylift.platform.presets import PRESETS
from raylift.platform.training import runs


@pytest.fixture(scope="session")
def archive32(tmp_path_factory) -> Path:
    """Twelve phantoms at 32^3, in all three splits."""
    url = tmp_path_factory.mktemp("archive32")
    grid = Grid(32, 10.0)
    ingest_phantoms(str(url), grid, chest(grid), count=12, seed=1, samples_per_shard=5)
    return url


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    """Radiographs of ten phantoms that are in no CT archive, with more contrast than their DRRs."""
    grid, folder = Grid(32, 10.0), tmp_path_factory.mktemp("pairs")
    for seed in range(100, 110):
        images = render_drrs(thorax(seed, grid)[0], grid, chest(grid))
        for image, view in zip(images, ("pa", "lat"), strict=True):
            contrasted = normalize(image) ** 1.5 * 65535
            Image.fromarray(contrasted.astype(np.uint16)).save(folder / f"person-{seed}_{view}.png")
    return folder


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray on this machine, with two CPUs whatever it has."""
    cluster.apply_environment()
    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(archive32) -> RunConfig:
    """Eight steps with a validation and a checkpoint every four."""
    preset = PRESETS["x2ct-gan-tiny"]
    return replace(
        preset,
        data=replace(preset.data, archive=str(archive32)),
        train=replace(preset.train, steps=8, validate_every=4, log_every=2, keep_checkpoints=2),
    )


@pytest.fixture(scope="session")
def finished_run(tiny, ray_cluster, tmp_path_factory) -> Path:
    """A run to its end with two workers."""
    url = tmp_path_factory.mktemp("runs") / "finished"
    runs.fit(runs.create(tiny, str(url)), str(url))
    return url
