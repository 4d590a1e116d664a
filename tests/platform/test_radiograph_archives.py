"""From radiograph files to a reconstruction, with a system that is trained without CT of the same patients."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
import safetensors.torch
import SimpleITK as sitk
import torch

from raylift.datasets.archive.archive import Archive
from raylift.models import weights
from raylift.models.zoo import SYSTEMS
from raylift.platform import cli

REPROJECTION_METRICS = ["val_reprojection_psnr_db", "val_reprojection_residual"]


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    """A file of settings: four steps with a checkpoint every two, radiographs matched to DRRs."""
    system = SYSTEMS["cyclegan-b"].tiny
    train = replace(tiny.train, steps=4, validate_every=2, log_every=1)
    run = replace(tiny, system=system, train=train, data=replace(tiny.data, match_histograms=True))
    path = tmp_path_factory.mktemp("config") / "pairs.yaml"
    path.write_text(run.to_yaml())
    return path


@pytest.fixture(scope="module")
def pairs(pairs_folder, tmp_path_factory, request):
    """Phantoms' radiographs and, where there are some, real ones."""
    url, sources = tmp_path_factory.mktemp("pairs"), [pairs_folder]
    with suppress(pytest.skip.Exception):
        sources.append(request.getfixturevalue("real_data") / "xray")
    words = ["--archive", str(url), "--size", "32", "--spacing-mm", "10", "--split-fractions", "0.6", "0.2", "0.2"]
    assert cli.main(["ingest-xray", *map(str, sources), *words]) == 0
    return url


@pytest.fixture(scope="module")
def run(config, pairs, archive32, ray_cluster, tmp_path_factory):
    url = tmp_path_factory.mktemp("runs") / "pairs"
    words = ["--data.archive", str(pairs), "--data.unpaired", str(archive32), "--output", str(url)]
    assert cli.main(["train", str(config), *words]) == 0
    return url


def test_it_is_validated_by_reprojection_and_receives_unpaired_ct(run, archive32):
    checkpoint = run / "checkpoints/step-00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    assert list(state["metrics"]) == REPROJECTION_METRICS
    assert all(entry["generator/unpaired_is_ct"] == 1 for entry in state["history"] if "lr" in entry)
    provenance = weights.load(checkpoint).description.provenance
    assert provenance["archive_contents"] == "radiographs"
    assert provenance["unpaired"]["archive"] == str(archive32)


def test_cut_in_half_and_resumed_it_ends_in_the_weights_of_the_whole(run, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoints/step-00000004")
    assert cli.main(["train", "--resume", str(half)]) == 0
    output = capsys.readouterr().out
    assert "validation: reprojection PSNR" in output
    for file in (run / "checkpoints/step-00000004").rglob("*.safetensors"):
        ours = safetensors.torch.load_file(file)
        theirs = safetensors.torch.load_file(half / file.relative_to(run))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), file


def test_it_is_evaluated_by_reprojections_or_with_ct_by_volumes(run, pairs, archive32, tmp_path):
    for url, name in ((pairs, "pairs"), (archive32, "volumes")):
        report = tmp_path / name
        assert cli.main(["evaluate", str(run), "--archive", str(url), "--output", str(report)]) == 0
        metrics = json.loads((report / "metrics.json").read_text())
        assert set(metrics["mean"]) == {"model", "mean volume", "back-projection"}
        assert metrics["summary"].startswith("No volume was compared") == (url == pairs)


def test_it_is_exported_with_a_card_that_states_it_and_reconstructs_a_pair(run, pairs, pairs_folder, tmp_path):
    model, output = tmp_path / "model", tmp_path / "volume.nii.gz"
    assert cli.main(["export", str(run), str(model)]) == 0
    card = (model / "README.md").read_text()
    trained = len(Archive(str(pairs)).entries("train"))
    for part in (
        f"{trained} pairs of radiographs of",
        "(protocol `reprojection`)",
        "matched to DRRs",
        "were not compared with CT",
    ):
        assert part in card
    files = [
        "--frontal",
        str(pairs_folder / "person-100_pa.png"),
        "--lateral",
        str(pairs_folder / "person-100_lat.png"),
    ]
    assert cli.main(["reconstruct", str(model), *files, "-o", str(output)]) == 0
    assert sitk.ReadImage(str(output)).GetSize() == (32, 32, 32)


def test_a_search_is_scored_by_reprojection_too(config, pairs, archive32, ray_cluster, tmp_path, capsys):
    space = tmp_path / "space.yaml"
    space.write_text("space:\n  optimizer.lr:\n    log_uniform: [1.0e-4, 1.0e-3]\n")
    words = ["--data.archive", str(pairs), "--data.unpaired", str(archive32), "--output", str(tmp_path / "search")]
    words += ["--trials", "2", "--train.steps", "2", "--train.validate-every", "1", "--cluster.workers", "1"]
    assert cli.main(["tune", str(space), "--preset", str(config), *words]) == 0
    assert "step 2: reprojection PSNR" in capsys.readouterr().out
    trials = json.loads((tmp_path / "search/trials.json").read_text())["trials"]
    assert len(trials) == 2
    assert all(trial["best_psnr_db"] is not None for trial in trials)
