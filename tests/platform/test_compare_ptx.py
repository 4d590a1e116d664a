"""`compare --ptx`: pneumothorax in the volumes of every method compared with that in the CT."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from raylift.datasets import ptx_seg
from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.ptx_seg import SIDES, Hemithorax
from raylift.datasets.scans.resample import archive_image
from raylift.datasets.segmentation import Label
from raylift.platform import cli
from raylift.platform.evaluation import ptx
from raylift.platform.evaluation.cases import read_ground_truth
from raylift.platform.evaluation.plots_ptx import plot_agreement
from raylift.platform.evaluation.ptx_table import PneumothoraxTable
from raylift.platform.evaluation.tables import MetricTable

GRID = Grid(64, 5.0)
AGREEMENT = ("pearson", "spearman", "icc", "mean_absolute_error", "bias", "lower", "upper")
LUNG_HU = -850


def ingest(url, grid, **settings):
    ingest_phantoms(str(url), grid, chest(grid), split_fractions=(0, 0, 1), **settings)
    return Archive(str(url))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Four phantoms, three of them with pneumothorax."""
    return ingest(tmp_path_factory.mktemp("archive"), GRID, count=4, seed=7, pneumothorax_fraction=0.8)


def write(folder, archive, change):
    """A folder of volumes, each changed from the CT by a function of volume and labels."""
    folder.mkdir()
    for entry in archive.entries("test"):
        hu, labels = (archive.read_array(entry, name) for name in ("volumes", "labels"))
        changed = change(hu.astype(np.float32), labels)
        sitk.WriteImage(archive_image(changed, archive.manifest.grid), str(folder / f"{entry.id}.nii.gz"))
    return folder


def expanded(hu, labels):
    """The pneumothorax gone: lung in its place."""
    return np.where(labels == Label.PNEUMOTHORAX, LUNG_HU, hu)


def smaller(hu, labels):
    """Less of it: lung in its posterior part."""
    air = labels == Label.PNEUMOTHORAX
    middle = np.median(np.nonzero(air)[1]) if air.any() else 0
    behind = np.arange(hu.shape[1])[None, :, None] > middle
    return np.where(air & behind, LUNG_HU, hu)


def compare(archive, output, *folders):
    words = ["--archive", archive.url, "--protocols", "volume", "--ptx", "--output", str(output)]
    return cli.main(["compare", *map(str, folders), *words])


@pytest.fixture(scope="module")
def result(archive, tmp_path_factory):
    home, output = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("comparison")
    kinds = {"same": lambda hu, _: hu, "smaller": smaller, "expanded": expanded}
    folders = [write(home / name, archive, change) for name, change in kinds.items()]
    assert compare(archive, output, *folders) == 0
    return output


@pytest.fixture(scope="module")
def rows(result):
    with (result / "metrics.csv").open() as file:
        found = [{"method": row.pop("method"), **row} for row in csv.DictReader(file)]
    return {
        method: {
            name: np.array([float(row[f"pneumothorax.{name}"]) for row in found if row["method"] == method])
            for name in ("pneumothorax_ml", "ct_pneumothorax_ml", "occupancy_percent", "ct_occupancy_percent")
        }
        for method in ("same", "smaller", "expanded")
    }


def test_volume_and_occupancy_of_the_ct_are_those_of_the_labels(rows, archive):
    labels = [archive.read_array(entry, "labels") for entry in archive.entries("test")]
    air = [int((of == Label.PNEUMOTHORAX).sum()) for of in labels]
    assert [ml > 0 for ml in air].count(False) == 1
    for method in rows.values():
        errors = method["ct_pneumothorax_ml"] - np.array(air) * GRID.spacing_mm**3 / 1000
        assert np.abs(errors).max() < 200
        assert np.corrcoef(method["ct_pneumothorax_ml"], air)[0, 1] > 0.98
    assert rows["same"]["ct_occupancy_percent"].max() < 80


def test_every_method_is_measured_by_itself(rows):
    same, reduced, expanded = (rows[name] for name in ("same", "smaller", "expanded"))
    for name in ("pneumothorax_ml", "occupancy_percent"):
        np.testing.assert_allclose(same[name], same[f"ct_{name}"])
        assert not expanded[name].any()
        affected = same[name] > 0
        assert (reduced[name] < same[name])[affected].all()
        assert not reduced[name][~affected].any()


@pytest.mark.parametrize(("quantity", "metric"), [("volume", "pneumothorax_ml"), ("occupancy", "occupancy_percent")])
def test_agreement_is_that_of_the_rows(result, rows, quantity, metric):
    found = json.loads((result / "metrics.json").read_text())["pneumothorax"][quantity]
    assert found["same"]["pearson"] == pytest.approx(1)
    assert found["same"]["icc"] == pytest.approx(1)
    measured, true = rows["smaller"][metric], rows["smaller"][f"ct_{metric}"]
    differences, agreed = measured - true, found["smaller"]
    spread = 1.96 * differences.std(ddof=1)
    expected = {
        "pearson": np.corrcoef(measured, true)[0, 1], "spearman": stats.spearmanr(measured, true).statistic,
        "mean_absolute_error": np.abs(differences).mean(), "bias": differences.mean(),
        "lower": differences.mean() - spread, "upper": differences.mean() + spread,
    }  # fmt: skip
    assert {name: agreed[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=0.01)
    assert agreed["count"] == 4
    assert agreed["icc"] < agreed["pearson"], "smaller volumes agree less than they correlate"
    assert [found["expanded"][name] for name in ("pearson", "spearman")] == [None, None]
    assert found["expanded"]["bias"] == pytest.approx(-true.mean(), rel=1e-3)


def test_the_report_has_tables_figures_and_the_limits_in_words(result):
    page, text = ((result / f"report.{kind}").read_text() for kind in ("html", "md"))
    for shown in (page, text):
        assert "Pneumothorax: agreement of volume with the CT" in shown
        assert "Pneumothorax: agreement of occupancy with the CT" in shown
        assert "A pneumothorax was found in the CT of 3 of 4 subjects: too few for correlations" in shown
        assert "and in no volume of expanded" in shown
        assert "no compact gas below -960 HU" in shown
    assert "same, expanded" not in text
    assert "| method | Pearson | Spearman | ICC(2,1) | MAE, ml | bias, ml | limits of agreement, ml |" in text
    assert "| expanded | undefined | undefined |" in text
    for name in ("same", "smaller", "expanded"):
        assert f"Pneumothorax of {name}: agreement with the CT" in page
        pixels = np.asarray(Image.open(result / "figures" / f"{name}-pneumothorax.png").convert("RGB"), dtype=int)
        assert (np.ptp(pixels, axis=2) > 60).mean() > 0.001


def test_without_the_option_nothing_of_it_is_written(archive, tmp_path):
    folder = write(tmp_path / "theirs", archive, expanded)
    words = ["--archive", archive.url, "--protocols", "volume", "--output", str(tmp_path / "out")]
    assert cli.main(["compare", str(folder), *words]) == 0
    for name in ("report.html", "report.md", "metrics.csv", "metrics.json"):
        assert "neumothorax_ml" not in (tmp_path / "out" / name).read_text()
        assert "Pneumothorax" not in (tmp_path / "out" / name).read_text()


def test_scans_of_a_subject_count_as_their_mean_and_healthy_ct_are_stated():
    def scan(found, true):
        return {"m": {"pneumothorax": {
            "pneumothorax_ml": found, "ct_pneumothorax_ml": true, "occupancy_percent": found / 10,
            "ct_occupancy_percent": true / 10,
        }}}  # fmt: skip

    table = MetricTable({"a": scan(100.0, 50.0), "b": scan(300.0, 150.0), "c": scan(20.0, 40.0)}, {"pneumothorax": ""})
    measured = PneumothoraxTable(table, {"a": "one", "b": "one", "c": "two"})
    found, true = measured.pairs("m")["volume"]
    assert (found.tolist(), true.tolist()) == ([200.0, 20.0], [100.0, 40.0])
    assert measured.agreements["occupancy"]["m"].bias == pytest.approx((10 - 2) / 2)
    healthy = PneumothoraxTable(MetricTable({"a": scan(0.0, 0.0)}, {"pneumothorax": ""}), {"a": "one"})
    stated = "no pneumothorax was found in the CT of 1 subject, so no correlation is defined"
    assert healthy.sentences == [stated]
    invented = MetricTable({"a": scan(0.0, 0.0), "b": scan(475.0, 0.0)}, {"pneumothorax": ""})
    assert PneumothoraxTable(invented, {"a": "one", "b": "two"}).sentences == [
        stated.replace("1 subject", "2 subjects"),
        "a pneumothorax was found in volumes whose CT has none: up to 475 ml in those of m",
    ]
    assert all("undefined" in row for section in healthy.sections() for row in section.body)
    of_known, unknown = scan(300.0, 150.0), scan(math.nan, math.nan)
    partly = PneumothoraxTable(
        MetricTable({"a": of_known, "b": unknown}, {"pneumothorax": ""}), {"a": "one", "b": "two"}
    )
    assert [of["m"].count for of in partly.agreements.values()] == [1, 1]
    assert partly.agreements["volume"]["m"].bias == 150
    stated = "no lungs were found in the CT of b: pneumothorax is not measured"
    assert partly.sentences[0] == stated
    unmeasured = PneumothoraxTable(MetricTable({"b": unknown}, {"pneumothorax": ""}), {"b": "two"})
    assert (unmeasured.sections(), unmeasured.to_json(), unmeasured.sentences) == ([], {}, [stated])


@pytest.mark.parametrize("side", SIDES)
def test_a_pneumothorax_that_the_ct_does_not_have_counts_with_its_occupancy_on_either_side(side, monkeypatch):
    nothing, invented = Hemithorax(0.0, 1500.0), Hemithorax(500.0, 1500.0)
    measured = iter([{**dict.fromkeys(SIDES, nothing), side: invented}, dict.fromkeys(SIDES, nothing)])
    monkeypatch.setattr(ptx, "_of_archive", lambda *_: next(measured))
    found = ptx.compare(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.float32), GRID)
    assert (found["occupancy_percent"], found["occupancy_absolute_error_percent"]) == (25.0, 25.0)
    both = ptx.Measurements(
        {"a": {**dict.fromkeys(SIDES, nothing), side: invented}}, {"a": dict.fromkeys(SIDES, nothing)}, []
    )
    assert both.pairs()["occupancy"][0].tolist() == [25.0]


def test_a_volume_without_lungs_has_no_pneumothorax_and_voxels_outside_the_field_of_view_are_air(archive):
    entry = max(archive.entries("test"), key=lambda e: (archive.read_array(e, "labels") == Label.PNEUMOTHORAX).sum())
    true = read_ground_truth(archive, entry)
    found = ptx.compare(np.full_like(true, 40), true, GRID)
    assert found["pneumothorax_ml"] == found["occupancy_percent"] == 0
    assert found["pneumothorax_absolute_error_ml"] == found["ct_pneumothorax_ml"] > 500
    assert all(math.isnan(value) for value in ptx.compare(true, np.full_like(true, 40), GRID).values())
    masked = true.copy()
    masked[:, -3:] = np.nan
    assert ptx.compare(true, masked, GRID)["ct_pneumothorax_ml"] == pytest.approx(found["ct_pneumothorax_ml"], rel=0.05)


@pytest.mark.parametrize(("spacing_mm", "wall_mm"), [(2.0, 5.0), (2.5, 5.0), (3.0, 7.5), (5.0, 7.5)])
def test_the_distance_to_the_wall_is_longer_on_coarse_voxels_alone(spacing_mm, wall_mm, monkeypatch):
    used, segment = [], ptx_seg.segment
    monkeypatch.setattr(
        ptx_seg, "segment", lambda hu, mm, wall, *rest: used.append((mm, wall)) or segment(hu, mm, wall, *rest)
    )
    size = round(160 / spacing_mm)
    volume = np.full((size,) * 3, 40, dtype=np.float32)
    ptx.compare(volume, volume, replace(GRID, size=size, spacing_mm=spacing_mm))
    assert used == [(2.5, wall_mm)] * 2


def test_archives_of_coarser_voxels_and_without_ct_are_refused(tmp_path, capsys):
    coarse = ingest(tmp_path / "coarse", Grid(32, 10.0), count=1, seed=1)
    folder = write(tmp_path / "theirs", coarse, lambda hu, _: hu)
    assert compare(coarse, tmp_path / "out", folder) == 2
    assert f"--ptx needs voxels of 5 mm or less, and those of {coarse.url} are 10 mm" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


def test_the_line_of_identity_is_the_diagonal_of_the_figure(tmp_path, monkeypatch):
    shown, saved = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: shown.append(figure) or saved(figure, path))
    zeros, some = np.zeros(3), np.array([0.0, 300.0, 20.0])
    plot_agreement({"volume": (some, 5 * some), "occupancy": (zeros, zeros)}, tmp_path / "agreement.png")
    scatters = shown[0].axes[::2]
    for axes, largest in zip(scatters, (1500.0, 10.0), strict=True):
        assert axes.get_xlim() == axes.get_ylim() == pytest.approx((-0.05 * largest, 1.05 * largest))
