"""--segmenter of ingest, compare and ptx: the lungs of a network, which records and reports name."""

import json
import shutil
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from lungmask_package import LOWER_HU, UPPER_HU, install
from samples import thorax_hu, thorax_image, write_image

from raylift.datasets.archive.archive import Archive
from raylift.datasets.lung_segmenter import Lungmask, segmenter_of
from raylift.datasets.scans.resample import archive_image
from raylift.datasets.segmentation import Label
from raylift.platform import cli
from raylift.platform.evaluation.cases import CaseEvaluator


@pytest.fixture
def weights(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "lungmask", raising=False)
    return install(package)


def test_ingest_labels_the_lungs_of_the_network_and_records_it(weights, tmp_path, capsys):
    write_image(thorax_image((40, 30, 40), (9.0, 9.0, 9.0), hu=thorax_hu), tmp_path / "p.nii.gz")
    words = ["ingest", str(tmp_path / "p.nii.gz"), "--size", "32", "--spacing-mm", "12"]
    words += ["--segmenter", f"lungmask:{weights}"]
    for workers in (1, 2):
        url = str(tmp_path / f"archive-{workers}")
        assert cli.main([*words, "--archive", url, "--workers", str(workers)]) == 0
        archive = Archive(url)
        (entry,) = archive.entries()
        sample = archive.read(entry)
        assert entry.label_method == "network"
        assert entry.record["segmenter"].startswith("lungmask 0.2.22, unet.pth, SHA-256 ")
        expected = (sample.volume > LOWER_HU) & (sample.volume < UPPER_HU)
        assert np.array_equal(sample.labels != Label.OTHER, expected)
    capsys.readouterr()
    assert cli.main(["archive", "ls", url]) == 0
    assert "label_method network 1, segmenter lungmask 0.2.22" in capsys.readouterr().out


def test_a_comparison_measures_and_names_the_lungs_of_the_network(weights, archive32, tmp_path):
    archive = Archive(str(archive32))
    (tmp_path / "theirs").mkdir()
    for entry in archive.entries()[:2]:
        hu = archive.read_array(entry, "volumes").astype(np.float32)
        hu[:, :, :16] = 400  # beyond the network's lungs
        sitk.WriteImage(archive_image(hu, archive.manifest.grid), str(tmp_path / "theirs" / f"{entry.id}.nii.gz"))
    words = [
        "compare",
        str(tmp_path / "theirs"),
        "--archive",
        str(archive32),
        "--split",
        "all",
        "--protocols",
        "volume",
    ]
    words += ["--output", str(tmp_path / "out"), "--segmenter"]
    assert cli.main([*words, f"lungmask:{weights}"]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    name = metrics["provenance"]["segmenter"]
    assert name.startswith("lungmask 0.2.22, unet.pth")
    assert f"the lungs of protocol segmentation are those of {name}" in metrics["notes"]
    assert name in (tmp_path / "out/report.html").read_text()
    entry = archive.entries()[0]
    true = archive.read_array(entry, "volumes")
    lung = (true > LOWER_HU) & (true < UPPER_HU)
    kept = lung.copy()
    kept[:, :, :16] = False
    dice = 2 * kept.sum() / (lung.sum() + kept.sum())
    assert metrics["cases"][entry.id]["theirs"]["segmentation"]["lung_dice"] == pytest.approx(dice, abs=1e-3)
    assert cli.main([*words, "thresholds"]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["provenance"]["segmenter"] == "thresholds"


def test_finished_scans_are_those_of_a_version_and_of_weights_wherever_their_file_is(weights, archive32, tmp_path):
    archive = Archive(str(archive32))
    scans = [(entry.id, archive, entry) for entry in archive.entries()[:1]]

    def keys(segmenter):
        return CaseEvaluator(scans, frozenset(), [], [], ("volume",), True, segmenter=segmenter).keys()

    segmenter = segmenter_of(f"lungmask:{weights}")
    first = keys(segmenter)
    (tmp_path / "moved").mkdir()
    assert keys(segmenter_of(f"lungmask:{shutil.copy(weights, tmp_path / 'moved')}")) == first
    # The name has the first twelve digits only.
    other = Lungmask(weights, segmenter.sha256[:12] + "0" * 52)
    assert other.name == segmenter.name
    assert keys(other) != first
    metadata = weights.parent / "lungmask-0.2.22.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("0.2.22", "0.2.23"))
    assert keys(segmenter) != first


def test_score_and_ptx_measure_and_name_the_lungs_of_the_network(weights, tmp_path, capsys):
    for folder, hu in (
        ("ground-truth", thorax_hu),
        ("other", lambda x, y, z: np.where(x < 0, 400.0, thorax_hu(x, y, z))),
    ):
        (tmp_path / folder).mkdir()
        image = thorax_image((120, 90, 120), (2.5, 2.5, 2.5), hu=hu)
        write_image(image, tmp_path / folder / "p.nii.gz")
    choice = ["--segmenter", f"lungmask:{weights}"]
    words = [
        "score",
        str(tmp_path / "other"),
        "--ground-truth",
        str(tmp_path / "ground-truth"),
        "--protocols",
        "volume",
    ]
    dice = {}
    for name, segmenter in (("network", choice), ("thresholds", [])):
        assert cli.main([*words, "--output", str(tmp_path / name), *segmenter]) == 0
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        dice[name] = scores["cases"]["p"]["prediction"]["segmentation"]["lung_dice"]
        assert scores["segmenter"].startswith("lungmask 0.2.22, unet" if segmenter else "thresholds")
    hu = sitk.GetArrayFromImage(thorax_image((120, 90, 120), (2.5, 2.5, 2.5), hu=thorax_hu))
    lung = (hu > LOWER_HU) & (hu < UPPER_HU)
    assert dice["network"] == pytest.approx(2 * 0.5 / 1.5, abs=0.05) != dice["thresholds"]
    words = ["ptx", str(tmp_path / "ground-truth"), "--output", str(tmp_path / "ptx"), *choice]
    assert cli.main(words) == 0
    assert "1 volumes by lungmask 0.2.22, unet.pth" in capsys.readouterr().out
    regions = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "ptx/p-mask.nii.gz")))
    assert (regions[lung] > 0).mean() > 0.95


def test_commands_name_what_is_missing(tmp_path, archive32, capsys):
    choice = ["--segmenter", f"lungmask:{tmp_path / 'unet.pth'}"]
    (tmp_path / "theirs").mkdir()
    for words in (
        ["ingest", str(tmp_path), "--archive", str(tmp_path / "a")],
        ["ptx", str(tmp_path)],
        ["score", str(tmp_path), "--ground-truth", str(tmp_path)],
        ["compare", "models:chest-64", "--archive", str(archive32)],
    ):
        assert cli.main([*words, *choice]) == 2
        assert "needs the package lungmask: pip install 'raylift[lungmask]'" in capsys.readouterr().err
