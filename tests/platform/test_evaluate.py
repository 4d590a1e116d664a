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
from raylift.datasets.intensity import Window
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, weights
from raylift.models.metrics import VOLUME
from raylift.platform import cli
from raylift.platform.evaluation.evaluate import evaluate
from raylift.platform.evaluation.results import MODEL
from raylift.platform.export import export

GRID = Grid(32, 10.0)


@pytest.fixture(scope="module")
def report(finished_run, archive32, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert cli.main(["evaluate", str(finished_run), "--archive", str(archive32), "--output", str(folder)]) == 0
    return folder


def test_the_report_holds_every_predictor_under_every_protocol(report):
    metrics = json.loads((report / "metrics.json").read_text())
    assert set(metrics["mean"]) == {"model", "mean volume", "back-projection"}
    for values in metrics["mean"].values():
        assert {"volume", "x2ct", "cvaa", "segmentation"} == set(values)
        for group in values.values():
            for name, value in group.items():
                # Distances to lungs that a volume does not have are infinite.
                assert (value is None and name.endswith("_mm")) or np.isfinite(value), name


def test_the_report_states_where_its_numbers_come_from(report):
    provenance = json.loads((report / "metrics.json").read_text())["provenance"]
    assert {"date", "command", "seed", "versions", "machine", "archive", "model_sha256", "config_sha256"} <= set(
        provenance
    )
    assert provenance["command"].startswith("raylift evaluate ")
    assert provenance["training"] == {"steps": 8, "batch_size": 4, "volumes": 10}


def test_a_model_that_does_not_beat_the_mean_volume_states_it(report):
    summary = json.loads((report / "metrics.json").read_text())["summary"]
    # Eight steps of training cannot.
    assert "does not beat the mean volume" in summary
    assert "22,900 steps" in summary
    assert summary in (report / "report.html").read_text()


def test_the_page_is_self_contained_and_loads_nothing_over_the_network(report):
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 10
    assert not re.search(r"(src|href)=\"https?:", page)
    assert "not a medical device" in page


def test_no_figure_is_blank(report):
    figures = sorted((report / "figures").glob("*.png"))
    protocols = ("volume", "x2ct", "cvaa", "segmentation")
    boxes = [f"{protocol}-boxes" for protocol in protocols]
    assert {"training", "lung-volumes", *boxes} < {path.stem for path in figures}
    assert len(figures) == 8
    for path in figures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10, path


def test_the_metrics_of_exact_volumes_are_valid_json(finished_run, archive32):
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
    (entry,) = archive.entries("test")
    ground_truth = archive.read(entry).volume.astype(np.float32)
    with torch.no_grad():
        prediction = model.description.window.to_hu(model.network(torch.from_numpy(case.images.radiographs)[None]))[
            0, 0
        ].numpy()
    assert case.metrics[MODEL]["volume"] == VOLUME.evaluate(prediction, ground_truth)


def test_a_fit_to_the_radiographs_is_measured_with_the_model_and_its_effect_reported(
    finished_run, archive32, tmp_path, capsys
):
    options = ["--archive", str(archive32), "--output", str(tmp_path), "--consistency-steps", "4"]
    assert cli.main(["evaluate", str(finished_run), *options]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["mean"]) == ["model", "model + data-consistency fit", "mean volume", "back-projection"]
    assert set(metrics["mean"]["model + data-consistency fit"]) == set(metrics["mean"]["model"])
    assert metrics["mean"]["model + data-consistency fit"]["volume"] != metrics["mean"]["model"]["volume"]
    residuals = metrics["projection_residuals"]["mean"]
    assert list(residuals) == ["frontal", "lateral"]
    assert all(after < before for before, after in residuals.values())
    assert metrics["projection_residuals"]["cases"].keys() == metrics["cases"].keys()
    assert metrics["provenance"]["consistency"] == {"steps": 4, "strength": 1.0}
    output, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in ("model + data-consistency fit", f"{residuals['frontal'][0]:.4f}", f"{residuals['lateral'][1]:.4f}"):
        assert text in output
        assert text in page
    fitted = metrics["mean"]["model + data-consistency fit"]["volume"]["psnr_db"]
    assert metrics["summary"].endswith(f" After the data-consistency fit it reaches {fitted:.2f} dB.")
    assert "does not beat the mean volume" in metrics["summary"]


def test_without_a_fit_a_report_states_nothing_of_one(report):
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["projection_residuals"]["mean"] == {}
    assert "consistency" not in metrics["provenance"]
    assert "fitted" not in metrics["summary"].lower()
    assert "residual" not in (report / "report.html").read_text()


def test_a_fit_of_fewer_than_no_steps_is_refused(finished_run, archive32, capsys):
    options = ["--archive", str(archive32), "--consistency-steps", "-1"]
    assert cli.main(["evaluate", str(finished_run), *options]) == 2
    assert "a data-consistency fit of -1 steps" in capsys.readouterr().err


def test_an_archive_of_another_geometry_is_refused(finished_run, tmp_path):
    grid = Grid(32, 10.0)
    ingest_phantoms(str(tmp_path / "other"), grid, x2ct(grid), count=6, seed=1)
    model = weights.load(finished_run / "checkpoints/step-00000008")
    with pytest.raises(ConfigError, match="another geometry"):
        evaluate(model, Archive(str(tmp_path / "other")))


@pytest.fixture(scope="module")
def model(finished_run):
    return weights.load(finished_run / "checkpoints/step-00000008")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Two phantoms of other seeds, in the test split alone."""
    url, grid = str(tmp_path_factory.mktemp("held-out")), Grid(32, 10.0)
    ingest_phantoms(url, grid, chest(grid), count=2, seed=2, split_fractions=(0.0, 0.0, 1.0))
    return Archive(url)


def test_a_checkpoint_and_its_export_have_the_mean_and_the_digests_of_their_training_scans(model, archive32, tmp_path):
    export(model, tmp_path / "model", {})
    archive = Archive(str(archive32))
    trained = archive.entries("train")
    volumes = np.stack([archive.read_array(entry, "volumes") for entry in trained])
    for data in (model.training_data, weights.load(tmp_path / "model").training_data):
        assert data.scans == {entry.source_sha256 for entry in trained}
        assert data.baselines.volumes == len(trained)
        mean_hu = Window().to_hu(data.baselines.mean[0, 0]).numpy()
        np.testing.assert_allclose(mean_hu, volumes.clip(-1024, 1476).mean(axis=0), atol=0.51)
        fitted = baselines.fit(
            (load_batch(archive, [entry], Window(), [0, 1]) for entry in trained), archive.manifest.grid, chest(GRID)
        )
        assert (data.baselines.scale, data.baselines.offset) == pytest.approx((fitted.scale, fitted.offset))


def test_an_archive_of_test_scans_alone_is_compared_with_the_mean_of_the_training_volumes(model, held_out):
    result = evaluate(model, held_out, protocols=["volume"])
    mean = Window().to_hu(model.training_data.baselines.mean[0, 0]).numpy()
    for case, entry in zip(result.cases, held_out.entries(), strict=True):
        expected = VOLUME.evaluate(mean, held_out.read_array(entry, "volumes").astype(np.float32))
        assert case.metrics["mean volume"]["volume"] == pytest.approx(expected, rel=1e-5)
    assert result.notes == ()


def test_subjects_that_the_model_was_trained_on_are_named_and_left_out(model, archive32):
    archive = Archive(str(archive32))
    result = evaluate(model, archive, split="all", protocols=["volume"])
    trained = [entry.subject for entry in archive.entries("train")]
    assert {case.name for case in result.cases} == {entry.id for entry in archive.entries()} - set(trained)
    (note,) = result.notes
    assert note.endswith(f"was trained on are left out: {', '.join(trained)}")
    with pytest.raises(ConfigError, match=r"trained on every sample in the train split .* --include-training-scans"):
        evaluate(model, archive, split="train")
    result = evaluate(model, archive, split="train", include_training_scans=True, protocols=["volume"])
    assert len(result.cases) == len(trained)
    assert "are included" in result.notes[0]


def test_several_archives_are_evaluated_at_once_with_results_by_archive(finished_run, archive32, held_out, tmp_path):
    options = ["--archive", str(archive32), held_out.url, "--protocols", "volume", "--output", str(tmp_path)]
    assert cli.main(["evaluate", str(finished_run), *options]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["cases"]) == 3
    assert {name.split("/")[0] for name in metrics["cases"]} == {archive32.name, held_out.url.rsplit("/", 1)[-1]}
    assert list(metrics["archives"]) == [str(archive32), held_out.url]
    alone = metrics["archives"][str(archive32)]["mean"]["model"]["volume"]["psnr_db"]
    pair = metrics["archives"][held_out.url]["mean"]["model"]["volume"]["psnr_db"]
    assert metrics["mean"]["model"]["volume"]["psnr_db"] == pytest.approx((alone + 2 * pair) / 3)
    assert f"Protocol volume, {held_out.url}" in (tmp_path / "report.html").read_text()


def test_a_model_without_its_training_data_has_baselines_of_the_train_split_unless_that_is_evaluated(
    model, archive32, held_out
):
    unknown = replace(model, training_data=None)
    fitted = evaluate(unknown, Archive(str(archive32)), protocols=["volume"])
    assert "mean volume" in fitted.table.predictors
    assert f"are fitted to the train split of {archive32}" in fitted.notes[0]
    for archive, split in ((held_out, "test"), (Archive(str(archive32)), "all")):
        result = evaluate(unknown, archive, split=split, protocols=["volume"])
        assert "uniform volume" in result.table.predictors
        assert "are not fitted to any" in result.notes[0]
        assert "none of them could be left out" in result.notes[1]


def test_an_export_is_a_model_with_a_card_and_its_digest(finished_run, tmp_path, capsys):
    folder = tmp_path / "model"
    assert cli.main(["export", str(finished_run), str(folder)]) == 0
    model = weights.load(folder)
    card = (folder / "README.md").read_text()
    assert model.sha256 in card
    assert model.sha256 in capsys.readouterr().out
    for part in ("not a medical device", "236,357", "10 mm", "source-detector 1800 mm", "val_psnr_db"):
        assert part in card
    assert cli.main(["export", str(finished_run), str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err
