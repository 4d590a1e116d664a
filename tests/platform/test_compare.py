"""`raylift compare`: models and volumes of other programs on the same scans, with paired intervals."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy import stats

from raylift.datasets.archive.archive import Archive
from raylift.datasets.intensity import Window
from raylift.datasets.scans.resample import archive_image
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, weights
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description
from raylift.platform import cli
from raylift.platform.evaluation.significance import difference
from raylift.platform.presets import PRESETS


@pytest.fixture(scope="module")
def home(archive32, tmp_path_factory):
    """Untrained models a and b with the same seven training scans, c with others, and volumes 25 HU above the CT."""
    home, archive = tmp_path_factory.mktemp("candidates"), Archive(str(archive32))
    entries, (grid, geometry) = archive.entries(), (archive.manifest.grid, archive.manifest.geometry)
    fits = [
        baselines.fit((load_batch(archive, [entry], Window(), [0, 1]) for entry in some), grid, geometry)
        for some in (entries[:7], entries[:2])
    ]
    scans = frozenset(entry.source_sha256 for entry in entries[:7])
    system = PRESETS["x2ct-gan-tiny"].system
    for seed, (name, fit) in enumerate(zip("abc", (fits[0], fits[0], fits[1]), strict=True)):
        torch.manual_seed(seed)
        description = Description(system, grid, geometry, Window())
        state = system.reconstruction_network(grid, geometry).state_dict()
        weights.save(home / name, state, description, training_data=TrainingData(scans, fit))
    (home / "theirs").mkdir()
    for entry in entries[7:]:
        hu = archive.read_array(entry, "volumes").astype(np.float32) + 25
        sitk.WriteImage(archive_image(hu, grid), str(home / "theirs" / f"{entry.id}.nii.gz"))
    return home


def compare(home, names, archive32, output, *options):
    words = ["--archive", str(archive32), "--split", "all", "--protocols", "volume", "--output", str(output)]
    return cli.main(["compare", *(str(home / name) for name in names), *words, *options])


@pytest.fixture(scope="module")
def result(home, archive32, tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison")
    assert compare(home, ("a", "b", "theirs"), archive32, output) == 0
    return output


def test_models_and_volumes_from_elsewhere_are_compared_on_the_same_subjects(result, archive32):
    metrics = json.loads((result / "metrics.json").read_text())
    assert list(metrics["mean"]) == ["a", "b", "theirs", "mean volume", "back-projection"]
    assert list(metrics["cases"]) == [entry.id for entry in Archive(str(archive32)).entries()[7:]]
    # Every voxel is 25 HU too high, which it would not be in another orientation.
    assert metrics["mean"]["theirs"]["volume"]["mae_hu"] == pytest.approx(25, abs=0.1)
    assert "was trained on are left out: phantom-1-0000" in metrics["notes"][0]
    with (result / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 5
    subjects = {entry.id: entry.subject for entry in Archive(str(archive32)).entries()}
    assert all(row["subject"] == subjects[row["scan"]] for row in rows)
    assert float(rows[2]["volume.psnr_db"]) == metrics["cases"]["phantom-1-0007"]["theirs"]["volume"]["psnr_db"]


def test_differences_to_the_mean_training_volume_have_intervals_and_p(result):
    metrics = json.loads((result / "metrics.json").read_text())
    found = metrics["differences"]["by_predictor"]
    assert metrics["differences"]["reference"] == "mean volume"
    assert set(found) == {"a", "b", "theirs", "back-projection"}
    pairs = [(case["theirs"]["volume"], case["mean volume"]["volume"]) for case in metrics["cases"].values()]
    differences = np.array([one["psnr_db"] - other["psnr_db"] for one, other in pairs])
    ours = found["theirs"]["volume"]["psnr_db"]
    assert ours["mean"] == pytest.approx(differences.mean())
    assert differences.min() < ours["low"] < ours["mean"] < ours["high"] < differences.max()
    # All five differences have one sign: two of the 2^5 assignments of signs are as extreme.
    assert ours["p"] == pytest.approx(2 / 2**5)


def test_the_report_warns_in_words_of_every_model_that_does_not_beat_the_baselines(result):
    summary = json.loads((result / "metrics.json").read_text())["summary"]
    page, text = (result / "report.html").read_text(), (result / "report.md").read_text()
    for sentence in ("a does not beat the mean volume", "b does not beat", "theirs beats both trivial baselines"):
        assert sentence in summary
        assert sentence in page
        assert sentence in text
    assert 'src="http' not in page
    assert "| theirs | +" in text
    assert "left out: phantom-1-0000" in page


def test_models_of_different_training_data_have_baselines_of_their_own(home, archive32, tmp_path):
    assert compare(home, "ac", archive32, tmp_path, "--reference", "a") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    own = [f"{baseline} of {name}" for name in "ac" for baseline in ("mean volume", "back-projection")]
    assert list(metrics["mean"]) == ["a", "c", *own]
    assert set(metrics["differences"]["by_predictor"]) == {"c", *own}
    assert len({metrics["mean"][name]["volume"]["psnr_db"] for name in own}) == 4


def test_a_model_without_baselines_is_compared_with_those_of_another(home, archive32, tmp_path):
    known = weights.load(home / "a")
    weights.save(tmp_path / "plain", known.network.state_dict(), known.description)
    assert compare(home, ("a", tmp_path / "plain"), archive32, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["mean"]) == ["a", "plain", "mean volume", "back-projection"]
    assert "the model plain has no baselines of its training data: it is compared with those of a" in metrics["notes"]


def test_models_in_folders_of_one_name_are_named_by_what_distinguishes_them(home, archive32, tmp_path):
    for name in "ab":
        (tmp_path / "runs" / name / "model").parent.mkdir(parents=True)
        (tmp_path / "runs" / name / "model").symlink_to(home / name)
    assert compare(tmp_path / "runs", ("a/model", "b/model"), archive32, tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert list(metrics["mean"])[:2] == ["a/model", "b/model"]


def test_volumes_alone_are_compared_and_missing_ones_are_named(home, archive32, tmp_path, capsys):
    some = tmp_path / "some"
    some.mkdir()
    files = sorted((home / "theirs").iterdir())
    for path in files[1:]:
        (some / path.name).symlink_to(path)
    words = ["--archive", str(archive32), "--protocols", "volume", "--output", str(tmp_path / "out")]
    assert cli.main(["compare", str(some), *words, "--split", "all"]) == 0
    assert "8 of 12 scans have no volume in" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert len(metrics["cases"]) == 4
    assert list(metrics["mean"]) == ["some", "uniform volume", "back-projection"]


def test_other_grids_other_names_and_unknown_references_are_refused(home, archive32, tmp_path, capsys):
    assert compare(home, "a", archive32, tmp_path / "out", "--reference", "z") == 2
    assert "no method 'z' to compare with: use one of a, mean volume, back-projection" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    grid = replace(Archive(str(archive32)).manifest.grid, spacing_mm=9.0)
    image = archive_image(np.full(grid.shape, -500, np.float32), grid)
    words = ["compare", str(other), "--archive", str(archive32), "--split", "all", "--output", str(tmp_path / "out")]
    sitk.WriteImage(image, str(other / "someone.mha"))
    assert cli.main(words) == 2
    assert "no volume with the name of a scan that is compared" in capsys.readouterr().err
    (other / "someone.mha").rename(other / "phantom-1-0003.mha")
    assert cli.main(words) == 2
    assert "pass --resample to resample" in capsys.readouterr().err


def test_a_difference_is_what_independent_code_gives():
    values = np.random.default_rng(3).normal(0.4, 1.0, 40)
    found = difference(values)
    assert found.mean == pytest.approx(values.mean())
    # The normal approximation, to which the bootstrap of a mean converges.
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.05)
    ranks = stats.rankdata(np.abs(values))
    statistic = min(ranks[values > 0].sum(), ranks[values < 0].sum())
    assert found.p == pytest.approx(stats.wilcoxon(values, method="exact").pvalue, abs=0.01)
    assert stats.wilcoxon(values).statistic == statistic
    assert difference(np.zeros(5)).p == 1
    assert np.isnan(difference(np.array([1.0, np.inf])).mean)
    assert (difference(np.array([2.0])).mean, np.isnan(difference(np.array([2.0])).p)) == (2.0, True)
