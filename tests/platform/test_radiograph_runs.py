"""A system of four networks goes through the same loop and the same commands."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from raylift.models import weights
from raylift.models.zoo import SYSTEMS
from raylift.platform import cli
from raylift.platform.training import runs


@pytest.fixture(scope="module")
def cycle(tiny):
    """Four steps with a checkpoint every two; the discriminators' turn comes in every second."""
    system = replace(SYSTEMS["cyclegan-b"].tiny, phantoms=2)
    return replace(tiny, system=system, train=replace(tiny.train, steps=4, validate_every=2, log_every=1))


@pytest.fixture(scope="module")
def cycle_run(cycle, ray_cluster, tmp_path_factory):
    url = tmp_path_factory.mktemp("runs") / "cycle"
    runs.fit(runs.create(cycle, str(url)), str(url))
    return url


def test_a_cyclegan_cut_in_half_ends_in_exactly_the_weights_of_the_whole_one(cycle, cycle_run, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(cycle_run, half)
    shutil.rmtree(half / "checkpoints/step-00000004")
    runs.fit(cycle, str(half))
    whole, again = (folder / "checkpoints/step-00000004" for folder in (cycle_run, half))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    # The model, three other networks, and Adam's moments of all four.
    assert len(files) == 8
    for file in files:
        ours, theirs = (safetensors.torch.load_file(folder / file) for folder in (whole, again))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file


def test_its_prior_is_in_its_description_and_its_turns_in_its_history(cycle_run):
    checkpoint = cycle_run / "checkpoints/step-00000004"
    model = weights.load(checkpoint)
    assert "2 procedural phantoms" in model.description.provenance["notes"][0]
    assert model.network(torch.rand(1, 2, 32, 32)).shape == (1, 1, 32, 32, 32)
    history = [e for e in json.loads((checkpoint / "state.json").read_text())["history"] if "lr" in e]
    assert all(entry["generator/unpaired_is_ct"] == 0 for entry in history)
    assert ["volume_discriminator/loss" in entry for entry in history] == [True, False, True, False]


def test_it_is_evaluated_and_exported_by_the_commands(cycle_run, archive32, tmp_path):
    report, folder = tmp_path / "report", tmp_path / "model"
    assert cli.main(["evaluate", str(cycle_run), "--archive", str(archive32), "--output", str(report)]) == 0
    assert set(json.loads((report / "metrics.json").read_text())["mean"]) == {"model", "mean volume", "back-projection"}
    assert cli.main(["export", str(cycle_run), str(folder)]) == 0
    assert "cyclegan-b" in (folder / "README.md").read_text()
