"""`raylift evaluate` on an archive of radiographs without CT compares reprojections and reports so."""

import json

import pytest
import torch
from lungmask_package import install

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.xray import ingest_radiographs
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models import weights
from raylift.models.consistency import reprojection_metrics
from raylift.platform import cli
from raylift.serve.page import example

GRID = Grid(32, 10.0)


@pytest.fixture(scope="module")
def pairs(finished_run, tmp_path_factory):
    """Two pairs of radiographs, both to test on."""
    folder, url = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("pairs")
    description = weights.load(finished_run / "checkpoints/step-00000008").description
    for view, data in example.files(description).items():
        (folder / f"a_{view}.png").write_bytes(data)
        (folder / f"b_{view}.png").write_bytes(data + b" ")
    limits = RadiographLimits()
    ingest_radiographs([folder], str(url), GRID, chest(GRID), limits=limits, split_fractions=(0.0, 0.0, 1.0))
    return url


@pytest.fixture(scope="module")
def report(finished_run, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert cli.main(["evaluate", str(finished_run), "--archive", str(pairs), "--output", str(folder)]) == 0
    return folder


def test_the_metrics_are_of_reprojections_alone(finished_run, pairs, report):
    metrics = json.loads((report / "metrics.json").read_text())
    assert set(metrics["mean"]) == {"model", "mean volume", "back-projection"}
    assert {protocol for values in metrics["mean"].values() for protocol in values} == {"reprojection"}
    model = weights.load(finished_run / "checkpoints/step-00000008")
    archive = Archive(str(pairs))
    of = model.description
    for entry in archive.entries():
        views = torch.from_numpy(archive.read_array(entry, "radiographs"))[None]
        with torch.no_grad():
            found = reprojection_metrics(model.network(views).clip(0, 1), views, of.window, of.grid, of.geometry)
        values = metrics["cases"][entry.id]["model"]["reprojection"]
        assert values["psnr_db"] == pytest.approx(float(found.psnr_db.mean()), rel=1e-5)
        assert values["residual"] == pytest.approx(float(found.residual.mean()), rel=1e-5)
        assert values["residual_lateral"] == pytest.approx(float(found.residual[0, 1]), rel=1e-5)


def test_the_report_states_that_no_volume_was_compared(report, pairs):
    summary = json.loads((report / "metrics.json").read_text())["summary"]
    assert summary.startswith(f"No volume was compared: {pairs} holds radiographs without CT.")
    assert "(protocol reprojection) on 2 pairs of the test split" in summary
    page = (report / "report.html").read_text()
    assert summary in page
    assert "No volume is compared." in page
    assert page.count("data:image/png;base64,") == 8
    assert "HU</th>" not in page
    assert "Dice" not in page


def test_a_protocol_that_needs_ct_is_refused_where_there_is_none(finished_run, pairs, capsys):
    assert cli.main(["evaluate", str(finished_run), "--archive", str(pairs), "--protocols", "volume"]) == 2
    reported = capsys.readouterr().err
    assert f"{pairs} holds radiographs without CT, and protocol volume needs CT: give an archive made by" in reported


def test_a_report_without_ct_names_no_segmenter(finished_run, pairs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--archive", str(pairs), "--output", str(tmp_path / "out"), "--segmenter", f"lungmask:{install(tmp_path)}"]
    assert cli.main(["evaluate", str(finished_run), *words]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "segmenter" not in metrics["provenance"]
    assert not [note for note in metrics["notes"] if "lungs" in note]


def test_with_ct_reprojections_can_be_compared_in_addition_to_volumes(finished_run, archive32, tmp_path):
    words = ["--archive", str(archive32), "--output", str(tmp_path), "--protocols", "volume", "reprojection"]
    assert cli.main(["evaluate", str(finished_run), *words]) == 0
    mean = json.loads((tmp_path / "metrics.json").read_text())["mean"]
    assert set(mean) == {"model", "mean volume", "back-projection"}
    assert set(mean["model"]) == {"volume", "reprojection", "segmentation"}


def test_a_system_supervised_by_volumes_does_not_train_on_them(pairs, capsys, tmp_path):
    words = ["train", "x2ct-gan-tiny", "--data.archive", str(pairs), "--output", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert "system x2ct-gan is supervised by volumes and needs CT" in capsys.readouterr().err
