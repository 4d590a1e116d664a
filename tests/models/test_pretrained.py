"""Weights in the package: small, whole, and better than the mean volume on phantoms they were not trained on."""

import json
import re
from pathlib import Path

import pytest
import torch

from raylift.datasets.intensity import hu_to_attenuation, normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import project
from raylift.models import weights

FOLDERS = sorted((Path(__file__).resolve().parents[2] / "models/pretrained").iterdir())
HELD_OUT = range(10_000_000, 10_000_002)


def psnr_db(prediction: torch.Tensor, target: torch.Tensor) -> float:
    return float(-10 * (prediction - target).square().mean().log10())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_model_of_the_package_is_small_and_reconstructs_held_out_phantoms(folder):
    assert weights.weights_file(folder).stat().st_size < 16 * 2**20
    model = weights.load(folder)
    description = model.description
    window, grid, geometry = description.window, description.grid, description.geometry
    others = torch.stack([window.to_unit(torch.from_numpy(thorax(seed, grid)[0]).float()) for seed in range(6)])
    for seed in HELD_OUT:
        hu = torch.from_numpy(thorax(seed, grid)[0]).float()[None, None]
        attenuation = hu_to_attenuation(hu)
        images = [project(attenuation, grid.spacing_mm, geometry, view)[0, 0].numpy() for view in geometry.views]
        views = torch.stack([torch.from_numpy(normalize(image)) for image in images])[None]
        target = window.to_unit(hu)
        reached = psnr_db(model.network(views).clip(0, 1), target)
        assert reached > (25 if len(geometry.views) == 2 else 21)
        assert reached > psnr_db(others.mean(dim=0)[None, None], target) + (3 if len(geometry.views) == 2 else 1)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_card_names_data_license_figures_and_limits(folder):
    card = (folder / "README.md").read_text()
    for words in ("not a medical device", "CC BY", "LIDC-IDRI", "psnr_db", "Limits", weights.load(folder).sha256):
        assert words in card


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_card_has_the_failures_of_the_measurement(folder):
    failures = (folder / "README.md").read_text().partition("## Failures")[2].partition("## Use")[0]
    measured = (folder.parents[2] / "benchmarks/results/2026-11-28-robustness-chest-64.md").read_text()
    rows = re.findall(r"^\| ([a-z].+) \| ([\d., ]+) \|$", failures, re.MULTILINE)
    assert len(rows) == 6
    for error, values in rows[1:]:
        for value in values.split(", "):
            assert any(error[:7] in line and f"| {value} (" in line for line in measured.splitlines()), (error, value)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_card_states_the_settings_of_its_training_and_system(folder):
    card, description = (folder / "README.md").read_text(), weights.load(folder).description
    settings = json.loads(card.partition("## Settings")[2].partition("```json")[2].partition("```")[0])
    stored = json.loads((folder / "model.json").read_text())["model"]
    assert settings["system"] == stored["system"]
    assert settings["steps"] == description.provenance["step"]
    result = (folder.parents[2] / description.provenance["result"]).read_text()
    assert settings["steps"] == sum(stage["steps"] for stage in settings["stages"])
    last = settings["stages"][-1]
    for words in (
        last["command"],
        f"{last['seed']} in stage {len(settings['stages'])}",
        f"batch {last['batch']}",
        last["precision"],
    ):
        assert words in result


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_keeps_the_digests_of_its_training_scans_and_the_fit_of_the_baselines(folder):
    model = weights.load(folder)
    scans = [name for name in model.description.provenance["training_samples"] if not name.startswith("phantom")]
    assert model.training_data is not None
    assert len(model.training_data.scans) == len(scans) == 14
    assert model.training_data.baselines is not None
    assert model.training_data.baselines.volumes == 14
