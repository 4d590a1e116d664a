"""Evaluation, report and export of a trained checkpoint, by the commands."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid, chest, x2ct
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.models import weights
from raylift.models.metrics import PROTOCOLS
from raylift.platform import cli
from raylift.platform.evaluation.evaluate import evaluate
from raylift.platform.evaluation.results import MODEL


@pytest.fixture(scope="module")
def report(finished_run, archive32, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert cli.main(["evaluate", str(finished_run), "--archive", str(archive32), "--output", str(folder)]) == 0
    return folder


def test_the_report_holds_every_predictor_under_every_protocol(report):
    metrics = json.loads((report / "metrics.json").read_text())
    assert set(metrics["mean"]) == {"model", "mean volume", "back-projection"}
    for figures in metrics["mean"].values():
        assert {"volume", "x2ct", "cvaa", "segmentation"} == set(figures)
        assert all(np.isfinite(value) for group in figures.values() for value in group.values())


def test_the_report_says_where_its_numbers_come_from(report):
    provenance = json.loads((report / "metrics.json").read_text())["provenance"]
    assert {"date", "command", "seed", "versions", "machine", "archive", "model_sha256", "config_sha256"} <= set(
        provenance
    )
    assert provenance["command"].startswith("raylift evaluate ")
    assert provenance["training"] == {"steps": 8, "batch_size": 4, "volumes": 10}


def test_a_model_that_does_not_beat_the_mean_volume_says_so(report):
    summary = json.loads((report / "metrics.json").read_text())["summary"]
    # Eight steps of training cannot.
    assert "does NOT beat the mean volume" in summary
    assert "22,900 steps" in summary
    assert summary in (report / "report.html").read_text()


def test_the_page_is_self_contained_and_loads_nothing_over_the_network(report):
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"https?:", page)
    assert "not a medical device" in page


def test_the_figures_are_pictures_with_something_in_them(report):
    figures = sorted((report / "figures").glob("*.png"))
    assert len(figures) == 3
    for path in figures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10


def test_the_figures_of_exact_volumes_are_valid_json(finished_run, archive32):
    evaluation = evaluate(weights.load(finished_run / "checkpoints/step-00000008"), Archive(str(archive32)))
    exact = {
        p: {q: dict.fromkeys(row, np.inf) for q, row in rows.items()} for p, rows in evaluation.cases[0].metrics.items()
    }
    evaluation = replace(evaluation, cases=[replace(evaluation.cases[0], metrics=exact)])
    text = json.dumps(evaluation.to_json(), allow_nan=False)
    assert json.loads(text)["mean"][MODEL]["volume"]["psnr_db"] is None


def test_the_models_figures_are_those_of_its_own_reconstruction(finished_run, archive32):
    model = weights.load(finished_run / "checkpoints/step-00000008")
    archive = Archive(str(archive32))
    result = evaluate(model, archive, protocols=["volume"])
    case = result.cases[0]
    ground_truth = archive.read(case.entry).volume.astype(np.float32)
    with torch.no_grad():
        prediction = model.description.window.to_hu(model.network(torch.from_numpy(case.radiographs)[None]))[
            0, 0
        ].numpy()
    assert case.metrics[MODEL]["volume"] == PROTOCOLS["volume"].evaluate(prediction, ground_truth)


def test_a_fit_to_the_radiographs_is_measured_beside_the_model_and_its_effect_reported(
    finished_run, archive32, tmp_path, capsys
):
    options = ["--archive", str(archive32), "--output", str(tmp_path), "--consistency-steps", "4"]
    assert cli.main(["evaluate", str(finished_run), *options]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["mean"]) == ["model", "model, fitted", "mean volume", "back-projection"]
    assert set(metrics["mean"]["model, fitted"]) == set(metrics["mean"]["model"])
    assert metrics["mean"]["model, fitted"]["volume"] != metrics["mean"]["model"]["volume"]
    residuals = metrics["projection_residuals"]["mean"]
    assert list(residuals) == ["frontal", "lateral"]
    assert all(after < before for before, after in residuals.values())
    assert metrics["projection_residuals"]["cases"].keys() == metrics["cases"].keys()
    assert metrics["provenance"]["consistency"] == {"steps": 4, "strength": 1.0}
    said, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in ("model, fitted", f"{residuals['frontal'][0]:.4f}", f"{residuals['lateral'][1]:.4f}"):
        assert text in said
        assert text in page
    fitted = metrics["mean"]["model, fitted"]["volume"]["psnr_db"]
    assert metrics["summary"].endswith(f" Fitted to the radiographs it reaches {fitted:.2f} dB.")
    assert "does NOT beat the mean volume" in metrics["summary"]


def test_without_a_fit_a_report_says_nothing_of_one(report):
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["projection_residuals"]["mean"] == {}
    assert "consistency" not in metrics["provenance"]
    assert "fitted" not in metrics["summary"].lower()
    assert "residual" not in (report / "report.html").read_text()


def test_a_fit_of_fewer_than_no_steps_is_refused(finished_run, archive32, capsys):
    options = ["--archive", str(archive32), "--consistency-steps", "-1"]
    assert cli.main(["evaluate", str(finished_run), *options]) == 2
    assert "a consistency fit of -1 steps" in capsys.readouterr().err


def test_an_archive_of_another_geometry_is_refused(finished_run, tmp_path):
    grid = Grid(32, 10.0)
    ingest_phantoms(str(tmp_path / "other"), grid, x2ct(grid), count=6, seed=1)
    model = weights.load(finished_run / "checkpoints/step-00000008")
    with pytest.raises(ConfigError, match="another geometry"):
        evaluate(model, Archive(str(tmp_path / "other")))


def test_an_archive_without_training_scans_is_refused_because_baselines_are_fitted_to_them(finished_run, tmp_path):
    grid = Grid(32, 10.0)
    ingest_phantoms(str(tmp_path / "held-out"), grid, chest(grid), count=2, seed=1, shares=(0.0, 0.0, 1.0))
    model = weights.load(finished_run / "checkpoints/step-00000008")
    with pytest.raises(ConfigError, match="no sample in the train split, to which the trivial baselines are fitted"):
        evaluate(model, Archive(str(tmp_path / "held-out")))


def test_an_export_is_a_model_with_a_card_and_its_digest(finished_run, tmp_path, capsys):
    folder = tmp_path / "model"
    assert cli.main(["export", str(finished_run), str(folder)]) == 0
    model = weights.load(folder)
    card = (folder / "README.md").read_text()
    assert model.sha256 in card
    assert model.sha256 in capsys.readouterr().out
    for said in ("not a medical device", "236,357", "10 mm", "source-detector 1800 mm", "val_psnr_db"):
        assert said in card
    assert cli.main(["export", str(finished_run), str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
