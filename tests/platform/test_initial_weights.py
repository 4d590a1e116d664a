"""Runs that start with trained weights: a refiner, whose base stays frozen and is exported with it, and fine-tuning."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.models import weights
from raylift.platform import cli
from raylift.platform.config import RunConfig
from raylift.platform.export import export
from raylift.platform.model_store import package_folder
from raylift.platform.presets import PRESETS
from raylift.platform.training import initial_weights, runs
from raylift.platform.training.checkpoint import Checkpoints, resolve_checkpoint


@pytest.fixture(scope="module")
def config(archive32) -> RunConfig:
    """Four steps, with a validation and a checkpoint after each two, sampled in two steps."""
    run = PRESETS["refiner-tiny"]
    return replace(
        run,
        system=replace(run.system, sampling=replace(run.system.sampling, steps=2)),
        data=replace(run.data, archive=str(archive32)),
        train=replace(run.train, steps=4, validate_every=2, log_every=1),
    )


def based_on(run: RunConfig, url: object) -> RunConfig:
    return initial_weights.resolve(replace(run, system=replace(run.system, base_model=str(url))))


@pytest.fixture(scope="module")
def refined(config, finished_run, tmp_path_factory) -> Path:
    """A run whose base is deleted after its first checkpoint, and that resumed without it."""
    home = tmp_path_factory.mktemp("refined")
    shutil.copytree(resolve_checkpoint(str(finished_run)), home / "base")
    url, run = str(home / "run"), based_on(config, home / "base")
    runs.fit(runs.create(replace(run, train=replace(run.train, steps=2)), url), url)
    shutil.rmtree(home / "base")
    runs.fit(run, url)
    return home / "run"


def test_a_run_takes_its_bases_settings_and_carries_its_weights_unchanged(refined, finished_run):
    base = weights.load(resolve_checkpoint(str(finished_run)))
    ends = [weights.load(f"{refined}/checkpoints/{name}") for name, _ in Checkpoints(str(refined)).published()]
    assert len(ends) == 2
    for end in ends:
        assert end.description.system.base == base.description.system
        state = end.network.state_dict()
        for name, tensor in base.network.state_dict().items():
            assert torch.equal(state[f"base.{name}"], tensor), name
    first, last = (end.network.denoiser.state_dict() for end in ends)
    assert any(not torch.equal(first[name], tensor) for name, tensor in last.items())


def test_the_commands_accept_a_refiner_by_the_same_names(refined, archive32, tmp_path, capsys):
    options = ["--archive", str(archive32), "--output", str(tmp_path / "report"), "--protocols", "volume"]
    sampling = ["--steps", "3", "--sampler", "ddim", "--seed", "4", "--samples", "2"]
    assert cli.main(["evaluate", str(refined), *options, *sampling, "--consistency-steps", "2"]) == 0
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["provenance"]["sampling"] == {"sampler": "ddim", "steps": 3, "seed": 4, "samples": 2}
    residuals = metrics["projection_residuals"]["mean"]
    assert all(after < before for before, after in residuals.values())
    assert cli.main(["evaluate", str(refined), *options]) == 0
    own = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert own["provenance"]["sampling"] == {"sampler": "dpm_solver", "steps": 2, "seed": 0, "samples": 1}
    assert own["mean"]["model"] != metrics["mean"]["model"]

    assert cli.main(["export", str(refined), str(tmp_path / "model")]) == 0
    model = weights.load(tmp_path / "model")
    assert model.description.system.name == "refiner"
    card = (tmp_path / "model" / "README.md").read_text()
    assert model.sha256 in card
    assert "| prediction | sampled: dpm_solver, 2 steps, seed 0; other seeds give other samples |" in card
    capsys.readouterr()


def test_a_deterministic_model_is_not_evaluated_with_samples(finished_run, archive32, capsys):
    arguments = ["evaluate", str(finished_run), "--archive", str(archive32), "--samples", "4", "--seed", "1"]
    assert cli.main(arguments) == 2
    assert "this model is deterministic: leave out --seed, --samples" in capsys.readouterr().err


def test_the_command_line_reads_the_bases_settings(finished_run, archive32, capsys):
    arguments = ["train", "refiner-tiny", "--data.archive", str(archive32), "--dry-run"]
    assert cli.main([*arguments, "--system.base-model", str(finished_run), "--system.base.fusion.kind", "sum"]) == 0
    output = capsys.readouterr().out
    base = weights.load(resolve_checkpoint(str(finished_run))).description.system
    assert f"base_model: {resolve_checkpoint(str(finished_run))}" in output
    assert f"kind: {base.fusion.kind}" in output
    assert "kind: sum" not in output
    assert cli.main([*arguments, "--system.base.fusion.kind", "sum"]) == 0
    assert "kind: sum" in capsys.readouterr().out


def test_a_base_that_is_missing_or_does_not_fit_is_refused_before_anything_starts(
    config, finished_run, archive32, tmp_path
):
    archive, good = Archive(str(archive32)), based_on(config, finished_run)
    initial_weights.check(good, archive)
    with pytest.raises(ConfigError, match=r"pass --system.base-model with a run"):
        initial_weights.check(config, archive)
    with pytest.raises(ConfigError, match=r"window from -1024 to 1476 HU.*--data.window.high-hu 1476"):
        initial_weights.check(
            replace(good, data=replace(good.data, window=replace(good.data.window, high_hu=400.0))), archive
        )
    with pytest.raises(ConfigError, match=r"size=32, .* would have to be Grid.size=16"):
        initial_weights.check(replace(good, system=replace(good.system, upsampling=2)), archive)
    with pytest.raises(ConfigError, match=r"the settings of system.base are not those of"):
        initial_weights.check(replace(good, system=replace(good.system, base=PRESETS["refiner-tiny"].system)), archive)
    grid = Grid(32, 10.0)
    ingest_phantoms(str(tmp_path), grid, replace(chest(grid), source_isocenter_mm=1000.0), count=1, seed=1)
    with pytest.raises(ConfigError, match=r"source_isocenter_mm=1650.*would have to be.*source_isocenter_mm=1000"):
        initial_weights.check(good, Archive(str(tmp_path)))
    with pytest.raises(weights.WeightsError, match="is not a model"):
        based_on(config, tmp_path)


def test_a_base_of_half_the_resolution_fits_an_archive_of_the_same_field_of_view(config, finished_run, tmp_path):
    grid = Grid(64, 5.0)
    ingest_phantoms(str(tmp_path), grid, chest(grid), count=1, seed=1)
    run = based_on(config, finished_run)
    initial_weights.check(replace(run, system=replace(run.system, upsampling=2)), Archive(str(tmp_path)))


def test_a_fine_tuned_run_starts_with_exactly_the_models_weights_and_its_provenance_names_them(
    finished_run, archive32, tmp_path
):
    shutil.copytree(resolve_checkpoint(str(finished_run)), tmp_path / "base")
    base, run = weights.load(tmp_path / "base"), tmp_path / "run"
    # Adam's step is smaller than the spacing of floats near every weight but exact zeros.
    words = ["--data.archive", str(archive32), "--output", str(run), "--optimizer.lr", "1e-30"]
    steps = ["--train.validate-every", "1", "--train.steps"]
    command = ["train", "x2ct-gan-tiny", "--from", str(tmp_path / "base"), *words, *steps, "1"]
    assert cli.main(command) == 0
    started_with = {"network": {"model": str(tmp_path / "base"), "sha256": base.sha256}}
    assert json.loads((run / "run.json").read_text())["initial_weights"] == started_with
    shutil.rmtree(tmp_path / "base")
    assert cli.main(["train", "--resume", str(run), *steps, "2", "--optimizer.lr", "1e-4"]) == 0
    first, last = (weights.load(run / f"checkpoints/step-0000000{step}") for step in (1, 2))
    for end in (first, last):
        assert end.description.provenance["initial_weights"] == started_with
    for name, tensor in base.network.state_dict().items():
        torch.testing.assert_close(first.network.state_dict()[name], tensor, rtol=0, atol=1e-25)
    moved = last.network.state_dict()
    assert any(not torch.equal(moved[name], tensor) for name, tensor in base.network.state_dict().items())
    export(last, tmp_path / "exported", {})
    card = (tmp_path / "exported/README.md").read_text()
    assert f"| initial weights (network) | {tmp_path / 'base'}, SHA-256 `{base.sha256}` |" in card


def test_a_resumed_run_keeps_its_initial_model(finished_run, capsys):
    assert cli.main(["train", "--resume", str(finished_run), "--from", "models:chest-64"]) == 2
    assert "keeps train.initial_model '', not 'models:chest-64': start a new run" in capsys.readouterr().err


def test_an_initial_model_that_does_not_fit_is_refused_with_names(tiny, finished_run, archive32):
    archive = Archive(str(archive32))

    def check(run: RunConfig, url: object = finished_run) -> None:
        initial_weights.check(
            initial_weights.resolve(replace(run, train=replace(run.train, initial_model=str(url)))), archive
        )

    check(tiny)
    with pytest.raises(ConfigError, match=r"of system x2ct-gan, this run trains psr: use a preset of x2ct-gan"):
        check(replace(tiny, system=PRESETS["psr-tiny"].system))
    with pytest.raises(ConfigError, match=r"window from -1024 to 1476 HU.*--data.window.high-hu 1476"):
        check(replace(tiny, data=replace(tiny.data, window=replace(tiny.data.window, high_hu=400.0))))
    with pytest.raises(ConfigError, match=r"has the views frontal, lateral, this run frontal: pass --system.views"):
        check(replace(tiny, system=replace(tiny.system, views=("frontal",))))
    with pytest.raises(ConfigError, match=r"this run lateral, frontal: pass --system.views frontal lateral"):
        check(replace(tiny, system=replace(tiny.system, views=("lateral", "frontal"))))
    with pytest.raises(ConfigError, match=r"this run has maximum: pass --data.normalization percentiles"):
        check(replace(tiny, data=replace(tiny.data, normalization="maximum")))
    wider = replace(tiny.system, encoder=replace(tiny.system.encoder, init_features=24))
    with pytest.raises(
        ConfigError, match=r"has shape \(.*\) there and \(.*\) here.*system\.encoder\.init_features 24, not"
    ):
        check(replace(tiny, system=wider))
    with pytest.raises(weights.WeightsError, match="is not a model"):
        check(tiny, archive32)


def test_the_models_of_the_package_fit_the_preset_that_the_guide_names(tmp_path):
    grid = Grid(64, 5.0)
    ingest_phantoms(str(tmp_path), grid, chest(grid), count=1, seed=1)
    for preset, fits in (("unrolled", True), ("unrolled-slim", False)):
        run = PRESETS[preset]
        run = initial_weights.resolve(replace(run, train=replace(run.train, initial_model="models:chest-64")))
        assert run.train.initial_model == "models:chest-64"
        if fits:
            initial_weights.check(run, Archive(str(tmp_path)))
            network = run.system.reconstruction_network(grid, chest(grid))
            initial_weights.load_weights(network, run)
            shipped = weights.load(package_folder("chest-64")).network.state_dict()
            assert all(torch.equal(tensor, shipped[name]) for name, tensor in network.state_dict().items())
        else:
            with pytest.raises(ConfigError, match=r"system\.iterations 2, not 3.*system\.volume_channels"):
                initial_weights.check(run, Archive(str(tmp_path)))
