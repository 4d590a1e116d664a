"""The page of a comparison in a browser without network, and its figures."""

import json
import re
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from raylift.datasets.archive.archive import Archive
from raylift.datasets.intensity import Window
from raylift.datasets.scans.resample import archive_image
from raylift.datasets.streaming.stream import load_batch
from raylift.models import baselines, weights
from raylift.models.training_data import TrainingData
from raylift.models.weights import Description
from raylift.platform import cli
from raylift.platform.evaluation.plots import plot_boxes, plot_volume_agreement
from raylift.platform.evaluation.tables import MetricTable, cell
from raylift.platform.presets import PRESETS


@pytest.fixture(scope="module")
def home(archive32, tmp_path_factory):
    """An untrained model of two views, one of the frontal view with the same training volumes, and two folders.

    `theirs` holds volumes with more noise from scan to scan, `average` the mean training volume.
    """
    home, archive = tmp_path_factory.mktemp("candidates"), Archive(str(archive32))
    entries, grid = archive.entries(), archive.manifest.grid
    scans = frozenset(entry.source_sha256 for entry in entries[:7])
    for name, views in (("pair", (0, 1)), ("frontal", (0,))):
        chosen = tuple(archive.manifest.geometry.views[k] for k in views)
        geometry = replace(archive.manifest.geometry, views=chosen)
        batches = (load_batch(archive, [entry], Window(), list(views)) for entry in entries[:7])
        fit = baselines.fit(batches, grid, geometry)
        system = replace(PRESETS["unrolled-tiny"].system, views=tuple(view.name for view in chosen))
        torch.manual_seed(0)
        state = system.reconstruction_network(grid, geometry).state_dict()
        description = Description(system, grid, geometry, Window())
        weights.save(home / name, state, description, training_data=TrainingData(scans, fit))
    mean = Window().to_hu(fit.mean)[0, 0].numpy()
    for folder in ("theirs", "average"):
        (home / folder).mkdir()
    for k, entry in enumerate(entries[7:]):
        hu = archive.read_array(entry, "volumes").astype(np.float32)
        noise = np.random.default_rng(k).normal(0, 20 * (1 + (3 * k) % 5), hu.shape).astype(np.float32)
        sitk.WriteImage(archive_image(hu + noise, grid), str(home / "theirs" / f"{entry.id}.nii.gz"))
        sitk.WriteImage(archive_image(mean, grid), str(home / "average" / f"{entry.id}.nii.gz"))
    return home


@pytest.fixture(scope="module")
def result(home, archive32, tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison")
    names = [str(home / name) for name in ("theirs", "pair", "frontal", "average")]
    words = ["--archive", str(archive32), "--split", "all", "--protocols", "volume", "--output", str(output)]
    assert cli.main(["compare", *names, *words]) == 0
    return output


def test_equal_baselines_of_two_models_are_measured_once(result):
    metrics = json.loads((result / "metrics.json").read_text())
    own = ["mean volume", "back-projection of pair", "back-projection of frontal"]
    assert list(metrics["mean"]) == ["theirs", "pair", "frontal", "average", *own]


def test_the_mean_training_volume_of_another_program_does_not_beat_itself(result):
    metrics, page = json.loads((result / "metrics.json").read_text()), (result / "report.html").read_text()
    # In float32 files and by another path of rounding.
    ours, given = (metrics["mean"][name]["volume"]["psnr_db"] for name in ("mean volume", "average"))
    assert given == pytest.approx(ours, abs=1e-3)
    sentence = "average does not beat the mean volume in PSNR"
    assert sentence in metrics["summary"]
    assert re.search(rf'<p class="warning">{sentence}', page)
    assert re.search(r'<p class="summary">theirs beats all trivial baselines', page)


def test_thumbnails_are_of_every_scan_from_the_worst_to_the_best_of_the_first_candidate(result):
    metrics, page = json.loads((result / "metrics.json").read_text()), (result / "report.html").read_text()
    psnr = {name: case["theirs"]["volume"]["psnr_db"] for name, case in metrics["cases"].items()}
    ranked = sorted(psnr, key=psnr.__getitem__)
    assert ranked != list(psnr)
    assert re.findall(r"<figcaption>\d+\. (.+)</figcaption>", page) == ranked
    assert page.count("<br>") == len(ranked) * 5
    assert f"theirs<br>{psnr[ranked[0]]:.2f} dB" in page


def test_a_table_is_sorted_by_a_click_without_network(result, browser):
    browser.set_offline(True)
    page = browser.new_page()
    page.goto((result / "report.html").as_uri())
    table = page.locator("table").filter(has_text="phantom-1-0007")
    column = table.get_by_role("button", name="theirs")

    def shown():
        return [float(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]

    before = shown()
    column.click()
    assert shown() == sorted(before) != before
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "ascending"
    column.click()
    assert shown() == sorted(before, reverse=True)
    table.get_by_role("button", name="scan").click()
    assert shown() == before
    assert table.locator("th").nth(1).get_attribute("aria-sort") == "none"


def test_the_method_stays_in_view_while_a_table_is_scrolled_sideways(result, browser):
    page = browser.new_page()
    page.set_viewport_size({"width": 390, "height": 900})
    page.goto((result / "report.html").as_uri())
    table = page.locator(".scroll").filter(has_text="cosine similarity").first
    cells = [table.locator("th").first, table.locator("td").first]
    before = [cell.bounding_box()["x"] for cell in cells]
    table.evaluate("one => { one.scrollLeft = 200; }")
    assert table.evaluate("one => one.scrollLeft") > 0
    assert [cell.bounding_box()["x"] for cell in cells] == before


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_the_screen(result, browser, width):
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((result / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    heights = page.evaluate(
        "[...document.querySelectorAll('.figure')].map(one => [one.scrollHeight, one.clientHeight])"
    )
    assert len(heights) > 5
    assert all(whole == shown for whole, shown in heights)


def table_of(values):
    """Metrics of one predictor by scan."""
    return MetricTable(
        {str(k): {"theirs": {"segmentation": each}} for k, each in enumerate(values)}, {"segmentation": ""}
    )


def svg_of(plot, *arguments, path):
    with mpl.rc_context({"svg.fonttype": "none"}):
        plot(*arguments, path)
    return path.read_text()


def test_the_limits_of_agreement_are_the_mean_error_and_1_96_sample_deviations(tmp_path):
    errors = [-100.0, 20.0, 50.0, 130.0]
    values = [{"lung_volume_ml": 4000.0 + error, "lung_volume_error_ml": error} for error in errors]
    svg = svg_of(plot_volume_agreement, table_of(values), ["theirs"], path=tmp_path / "agreement.svg")
    half_width = 1.96 * np.std(errors, ddof=1)
    limits = f"±1.96 SD {25 - half_width:+.0f} to {25 + half_width:+.0f} ml"
    for text in ("mean +25 ml", limits, "prediction - ground truth, ml"):
        assert text in svg
    alone = svg_of(plot_volume_agreement, table_of(values[:1]), ["theirs"], path=tmp_path / "alone.svg")
    assert "-100 ml" in alone
    assert "SD" not in alone


def test_deviations_over_scans_are_of_a_sample_and_absent_for_one_scan():
    table = table_of([{"psnr_db": 20.0}, {"psnr_db": 23.0}])
    assert table.std("theirs", "segmentation") == {"psnr_db": pytest.approx(3 / np.sqrt(2))}
    assert table.sections()[0].body == [["theirs", "21.50 ± 2.12"]]
    alone = table_of([{"psnr_db": 20.0}])
    assert alone.means_to_json()["standard_deviation"] == {"theirs": {"segmentation": {"psnr_db": None}}}
    assert alone.sections()[0].body == [["theirs", "20.00"]]


def test_differences_have_the_error_of_the_lung_volume_once(result):
    metrics = json.loads((result / "metrics.json").read_text())
    assert metrics["mean"]["theirs"]["segmentation"]["lung_volume_ml"] > 0
    assert "lung_volume_error_ml" in (names := metrics["differences"]["by_predictor"]["theirs"]["segmentation"])
    assert "lung_volume_ml" not in names


def test_robustness_of_an_earlier_comparison_does_not_stay(home, archive32, tmp_path):
    (tmp_path / "robustness.csv").write_text("scan,subject,radiographs,method\n")
    words = ["--archive", str(archive32), "--split", "all", "--protocols", "volume", "--output", str(tmp_path)]
    assert cli.main(["compare", str(home / "average"), *words]) == 0
    assert not (tmp_path / "robustness.csv").exists()


def test_box_plots_have_a_panel_for_each_metric_with_its_unit_and_survive_an_infinite_one(tmp_path):
    values = [{"psnr_db": 20.0, "mae_hu": 50.0}, {"psnr_db": np.inf, "mae_hu": 0.0}]
    svg = svg_of(plot_boxes, table_of(values), "segmentation", path=tmp_path / "boxes.svg")
    assert svg.count(">theirs<") == 1
    for title in ("PSNR, dB", "MAE, HU"):
        assert svg.count(title) == 1


def test_a_cell_states_what_is_undefined_and_no_deviation_of_an_infinite_mean():
    assert cell("lung_hd95_mm", np.inf, np.nan, 3) == "inf"
    assert cell("ssim", np.nan, np.nan, 3) == "undefined"
    assert cell("psnr_db", 20.0, 1.5, 3) == "20.00 ± 1.50"


def test_a_candidate_that_may_beat_the_baselines_by_chance_is_reported_so(home, archive32, tmp_path):
    """One volume that is better than the mean training volume, and four that are worse."""
    archive, folder = Archive(str(archive32)), tmp_path / "unsteady"
    folder.mkdir()
    mean = Window().to_hu(weights.load(home / "pair").training_data.baselines.mean)[0, 0].numpy()
    for k, entry in enumerate(archive.entries()[7:]):
        hu = archive.read_array(entry, "volumes").astype(np.float32)
        shown = hu + 100 if k == 0 else mean + 80
        sitk.WriteImage(archive_image(shown, archive.manifest.grid), str(folder / f"{entry.id}.nii.gz"))
    words = ["--archive", str(archive32), "--split", "all", "--protocols", "volume", "--output", str(tmp_path / "out")]
    assert cli.main(["compare", str(folder), str(home / "pair"), *words]) == 0
    metrics, page = json.loads((tmp_path / "out/metrics.json").read_text()), (tmp_path / "out/report.html").read_text()
    found = metrics["differences"]["by_predictor"]["unsteady"]["volume"]["psnr_db"]
    assert found["low"] < 0 < found["mean"]
    reported = (
        f"the 95% interval of the difference over subjects, {found['low']:+.2f} to {found['high']:+.2f} dB, contains"
    )
    assert reported in metrics["summary"]
    assert re.search(r'<p class="warning">unsteady beats both trivial baselines', page)
