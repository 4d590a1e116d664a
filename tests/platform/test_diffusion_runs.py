"""Train, resume, evaluate, export and memory estimate with a diffusion system."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raylift.datasets.archive.archive import Archive
from raylift.models import weights
from raylift.models.diffusion.diffusion_network import DiffusionNetwork
from raylift.platform.config import EngineConfig
from raylift.platform.evaluation.evaluate import evaluate
from raylift.platform.export import export
from raylift.platform.presets import PRESETS
from raylift.platform.training import runs
from raylift.platform.training.checkpoint import best_checkpoint, load_network, local_copy
from raylift.platform.training.memory import estimate

NAMES = ["diffux2ct", "latent-diffusion"]


@pytest.mark.parametrize(("name", "stages"), [("diffux2ct", (1, 3)), ("latent-diffusion", (3, 0))])
def test_it_trains_resumes_at_another_stage_evaluates_and_exports(name, stages, archive32, ray_cluster, tmp_path):
    preset = PRESETS[f"{name}-tiny"]
    run = replace(
        preset,
        system=replace(preset.system, sampling=replace(preset.system.sampling, steps=2)),
        data=replace(preset.data, archive=str(archive32)),
        engine=EngineConfig(stages[0]),
        train=replace(preset.train, steps=4, validate_every=2, log_every=1, validation_samples=2),
    )
    url = str(tmp_path / "run")
    runs.fit(runs.create(run, url), url)
    longer = replace(
        run,
        engine=EngineConfig(stages[1]),
        cluster=replace(run.cluster, workers=1),
        train=replace(run.train, steps=6),
    )
    metrics = runs.fit(longer, url)
    best, _ = best_checkpoint(url)
    history = runs.load_history(url + "/checkpoints/step-00000006")
    assert [entry["step"] for entry in history if "denoiser/loss" in entry] == [1, 2, 3, 4, 5, 6]

    with local_copy(url + "/checkpoints/step-00000006") as local:
        own, served = load_network(local, "denoiser", first=True), weights.load(local).network.state_dict()
    assert own.keys() == served.keys()
    moved = [key for key in own if own[key].is_floating_point() and not torch.equal(own[key], served[key])]
    assert len(moved) > 0.9 * len(own) - 10

    model = weights.load(best)
    assert isinstance(model.network, DiffusionNetwork)
    assert model.network.sampling == run.system.sampling
    result = evaluate(model, Archive(str(archive32)), protocols=("volume",))
    assert 0 < result.mean("model", "volume")["psnr_db"] < 40
    folder = tmp_path / "exported"
    assert export(model, folder, metrics) == weights.load(folder).sha256
    views = torch.rand(1, 2, 32, 32)
    assert torch.equal(weights.load(Path(folder)).network(views), model.network(views))


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_counts_the_ema_and_what_autograd_saves(name):
    run = PRESETS[f"{name}-tiny"]
    estimated = estimate(replace(run, cluster=replace(run.cluster, workers=1)))
    count = estimated.parameters["denoiser"]
    assert estimated.ema == 4 * count
    assert estimated.activations > 4 * run.train.batch_size * 32**3
    plain = replace(run, system=replace(run.system, ema_decay=0.0))
    assert estimate(plain).ema == 0
    sharded = estimate(replace(run, engine=EngineConfig(zero_stage=3)))
    assert sharded.ema == 4 * count // run.cluster.workers
    recomputed = estimate(
        replace(run, system=replace(run.system, checkpointing="all"), cluster=replace(run.cluster, workers=1))
    )
    assert recomputed.activations < 0.9 * estimated.activations
