"""`--robustness`: metrics of models under perturbed radiographs, in tables, files and figures of a report."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from raylift.datasets.archive.archive import Archive
from raylift.datasets.augmentation.perturbation import PERTURBATIONS, UNPERTURBED, Perturbation, RadiographSimulator
from raylift.datasets.geometry import Grid, chest, parallel
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.intensity import Window, normalize
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, metrics, weights
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description
from raylift.platform import cli
from raylift.platform.evaluation import report
from raylift.platform.evaluation.robustness import label_of, seed_of, without_lateral
from raylift.platform.presets import PRESETS

ANGLE = Perturbation("angle", 5.0)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    url = tmp_path_factory.mktemp("archive")
    grid = Grid(32, 10.0)
    ingest_phantoms(str(url), grid, chest(grid), count=2, seed=5)
    return url


@pytest.fixture(scope="module")
def home(archive, tmp_path_factory):
    """Untrained models: of any number of views, and of two views; both with baselines."""
    home, opened = tmp_path_factory.mktemp("models"), Archive(str(archive))
    grid, geometry = opened.manifest.grid, opened.manifest.geometry
    fit = baselines.fit((load_batch(opened, [e], Window(), [0, 1]) for e in opened.entries()), grid, geometry)
    for name in ("unrolled", "x2ct-gan"):
        system = PRESETS[f"{name}-tiny"].system
        torch.manual_seed(1)
        # The last convolution of `unrolled` starts at zero, with which every volume is the same.
        state = {
            key: tensor + 0.05 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
            for key, tensor in system.reconstruction_network(grid, geometry).state_dict().items()
        }
        description = Description(system, grid, geometry, Window())
        weights.save(home / name, state, description, training_data=TrainingData(frozenset(), fit))
    return home


def compare(home, archive, output, *options, protocols=("volume",)):
    words = ["--archive", str(archive), "--split", "all", "--protocols", *protocols, "--output", str(output)]
    return cli.main(["compare", *(str(home / name) for name in ("unrolled", "x2ct-gan")), *words, *options])


@pytest.fixture(scope="module")
def result(home, archive, tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison")
    assert compare(home, archive, output, "--robustness") == 0
    return output


@pytest.fixture(scope="module")
def found(result):
    return json.loads((result / "metrics.json").read_text())


def direct(model, archive, perturbation, views=(0, 1)):
    """Mean PSNR of a model's volumes of perturbed radiographs, without the code of the comparison."""
    opened, values = Archive(str(archive)), []
    geometry = opened.manifest.geometry
    for entry in opened.entries():
        hu = opened.read_array(entry, "volumes").astype(np.float32)
        exposure = perturbation.exposure(geometry, seed_of(entry))
        images = RadiographSimulator(hu, opened.manifest.grid, geometry).expose(exposure)
        given = torch.from_numpy(np.stack([normalize(images[k]) for k in views]))[None]
        with torch.no_grad():
            volume = Window().to_hu(model.network(given).clip(0, 1))[0, 0].numpy()
        values.append(metrics.VOLUME.evaluate(volume, hu)["psnr_db"])
    return float(np.mean(values))


@pytest.mark.parametrize("name", ["unrolled", "x2ct-gan"])
@pytest.mark.parametrize("perturbation", [UNPERTURBED, ANGLE, Perturbation("noise", 1e4)], ids=lambda p: p.label)
def test_means_are_those_of_the_library(found, home, archive, name, perturbation):
    expected = direct(weights.load(home / name), archive, perturbation)
    row = found["robustness"]["by_perturbation"][label_of(perturbation)]
    assert row["mean"][name]["volume"]["psnr_db"] == pytest.approx(expected, abs=1e-4)
    unperturbed = direct(weights.load(home / name), archive, UNPERTURBED)
    assert row["difference"][name]["volume"]["psnr_db"] == pytest.approx(expected - unperturbed, abs=2e-4)


def test_a_missing_lateral_is_the_same_weights_with_the_frontal_alone(found, home, archive):
    reduced = without_lateral(weights.load(home / "unrolled"))
    assert [view.name for view in reduced.description.geometry.views] == ["frontal"]
    row = found["robustness"]["by_perturbation"]["missing lateral"]
    expected = direct(reduced, archive, UNPERTURBED, views=(0,))
    assert row["mean"]["unrolled"]["volume"]["psnr_db"] == pytest.approx(expected, abs=1e-4)
    assert set(row["mean"]) == {"unrolled", "back-projection"}


def test_a_system_whose_weights_need_both_views_is_stated_not_to_take_one(found, home, result):
    assert without_lateral(weights.load(home / "x2ct-gan")) is None
    sentence = "missing lateral is not possible for x2ct-gan, whose weights need the views frontal, lateral"
    assert any(sentence in note for note in found["notes"])
    section = (result / "report.md").read_text().split("## Robustness of ")[2]
    assert section.startswith("x2ct-gan (protocol volume)")
    (row,) = (line for line in section.splitlines() if line.startswith("| missing lateral"))
    assert set(row.split(" | ")[1:]) <= {"not possible", "not possible |"}


def test_a_frontal_model_and_its_baseline_are_unchanged_without_the_lateral(archive, tmp_path):
    opened = Archive(str(archive))
    grid, geometry = opened.manifest.grid, opened.manifest.geometry
    frontal = replace(geometry, views=geometry.views[:1])
    system = replace(PRESETS["unrolled-tiny"].system, views=("frontal",))
    torch.manual_seed(1)
    state = system.reconstruction_network(grid, frontal).state_dict()
    weights.save(tmp_path / "m", state, Description(system, grid, frontal, Window()))
    model, output = weights.load(tmp_path / "m"), tmp_path / "out"
    words = ["--archive", str(archive), "--split", "all", "--protocols", "volume", "--output", str(output)]
    assert cli.main(["evaluate", str(tmp_path / "m"), *words, "--robustness"]) == 0
    found = json.loads((output / "metrics.json").read_text())
    rows = found["robustness"]["by_perturbation"]
    assert list(rows["missing lateral"]["mean"]) == ["model", "back-projection"]
    assert rows["missing lateral"]["mean"] == rows["unperturbed"]["mean"]
    expected = direct(model, archive, UNPERTURBED, views=(0,))
    assert rows["missing lateral"]["mean"]["model"]["volume"]["psnr_db"] == pytest.approx(expected, abs=1e-4)
    assert not any("missing lateral" in note for note in found["notes"])
    assert "not possible" not in (output / "report.md").read_text()


@pytest.mark.parametrize(
    ("protocols", "shown"), [(["reprojection"], "volume"), (["reprojection", "x2ct"], "x2ct")], ids=["alone", "first"]
)
def test_robustness_is_shown_under_a_protocol_that_needs_ct(found, home, archive, tmp_path, protocols, shown):
    assert compare(home, archive, tmp_path, "--robustness", protocols=protocols) == 0
    rows = json.loads((tmp_path / "metrics.json").read_text())["robustness"]["by_perturbation"]
    assert set(rows["unperturbed"]["mean"]["unrolled"]) == {shown, "segmentation"}
    if shown == "volume":
        assert rows == found["robustness"]["by_perturbation"]
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert f"Robustness of unrolled (protocol {shown})" in text
    assert f"Robustness, protocol {shown}" in page
    assert "Scan by scan, PSNR, dB (protocol reprojection)" in page


def test_rows_columns_and_files_of_a_report(result, found):
    labels = [label_of(p) for p in (UNPERTURBED, *PERTURBATIONS)]
    rows = found["robustness"]["by_perturbation"]
    assert list(rows) == labels
    assert list(rows["unperturbed"]["mean"]) == ["unrolled", "x2ct-gan", "back-projection"]
    differences = rows["unperturbed"]["difference"].values()
    assert {
        value for by in differences for values in by.values() for value in values.values() if value is not None
    } == {0.0}
    with (result / "robustness.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * (3 * (len(labels) - 1) + 2)
    for label in labels:
        own = [float(r["volume.psnr_db"]) for r in table if (r["radiographs"], r["method"]) == (label, "unrolled")]
        assert np.mean(own) == pytest.approx(rows[label]["mean"]["unrolled"]["volume"]["psnr_db"])
    page, text = (result / "report.html").read_text(), (result / "report.md").read_text()
    row = rows[ANGLE.label]
    psnr, change = (row[key]["unrolled"]["volume"]["psnr_db"] for key in ("mean", "difference"))
    for written in (page, text):
        assert f"{psnr:.2f} ({change:+.2f})" in written
        assert written.count("Robustness of ") == 3
    assert "Robustness, protocol volume" in page
    with Image.open(result / "figures/robustness.png") as figure:
        assert figure.width > 800


def test_the_first_row_differs_from_the_stored_radiographs_by_the_projector_alone(found):
    stored = found["mean"]["unrolled"]["volume"]["psnr_db"]
    again = found["robustness"]["by_perturbation"]["unperturbed"]["mean"]["unrolled"]["volume"]["psnr_db"]
    assert again == pytest.approx(stored, abs=0.2)
    assert again != stored


def test_two_workers_give_every_row_bit_for_bit(ray_cluster, result, found, home, archive, tmp_path):
    assert compare(home, archive, tmp_path, "--robustness", "--workers", "2") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["robustness"] == found["robustness"]
    assert (tmp_path / "robustness.csv").read_bytes() == (result / "robustness.csv").read_bytes()


def test_an_interrupted_comparison_continues_with_the_rows_of_finished_scans(
    result, found, home, archive, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(report, "write", fail)
        assert compare(home, archive, tmp_path, "--robustness") == 130
    assert len(list((tmp_path / "finished-scans").iterdir())) == 2
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "finished-scans", plain / "finished-scans")
    assert compare(home, archive, tmp_path, "--robustness") == 0
    assert "2 of 2 scans were finished by a run that was interrupted" in capsys.readouterr().out
    assert (tmp_path / "robustness.csv").read_bytes() == (result / "robustness.csv").read_bytes()
    # Without the option, scans that were kept with it are others.
    assert compare(home, archive, plain) == 0
    assert "were finished by a run" not in capsys.readouterr().out
    assert "robustness" not in json.loads((plain / "metrics.json").read_text())


def test_evaluate_has_the_option_and_fits_get_the_perturbed_radiographs(found, home, archive, tmp_path):
    words = [str(home / "unrolled"), "--archive", str(archive), "--split", "all", "--protocols", "volume"]
    words += ["--output", str(tmp_path), "--robustness", "--consistency-steps", "2"]
    assert cli.main(["evaluate", *words]) == 0
    rows = json.loads((tmp_path / "metrics.json").read_text())["robustness"]["by_perturbation"]
    assert list(rows["unperturbed"]["mean"]) == ["model", "model + data-consistency fit", "back-projection"]
    for label, row in rows.items():
        assert row["mean"]["model"] == found["robustness"]["by_perturbation"][label]["mean"]["unrolled"]
    fitted = {row["mean"]["model + data-consistency fit"]["volume"]["psnr_db"] for row in rows.values()}
    assert len(fitted) == len(rows)


def test_parallel_beams_and_radiographs_without_ct_are_refused_in_a_sentence(home, tmp_path, capsys, pairs_folder):
    grid = Grid(32, 10.0)
    url = tmp_path / "parallel"
    ingest_phantoms(str(url), grid, parallel(grid), count=1, seed=5)
    system = PRESETS["unrolled-tiny"].system
    description = Description(system, grid, parallel(grid), Window())
    weights.save(tmp_path / "m", system.reconstruction_network(grid, parallel(grid)).state_dict(), description)
    words = ["--split", "all", "--robustness", "--output", str(tmp_path / "out")]
    assert cli.main(["evaluate", str(tmp_path / "m"), "--archive", str(url), *words]) == 2
    assert "--robustness projects cone beams only" in capsys.readouterr().err
    acquired = str(tmp_path / "acquired")
    size = ["--size", "32", "--spacing-mm", "10"]
    assert cli.main(["ingest-xray", str(pairs_folder), "--archive", acquired, *size]) == 0
    assert cli.main(["evaluate", str(home / "unrolled"), "--archive", acquired, *words]) == 2
    assert "holds radiographs without CT, and --robustness needs CT" in capsys.readouterr().err
