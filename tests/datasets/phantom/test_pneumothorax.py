"""Pneumothorax of phantoms: the fraction of air, the line of the pleura, and nothing else changes."""

from pathlib import Path

import numpy as np
import pytest

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.phantom.pneumothorax import LARGEST_COLLAPSE, Pneumothorax
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.segmentation import Label
from raylift.platform import cli

GRID = Grid(64, 5.0)
CAVITY = (Label.LUNG, Label.VESSEL, Label.PNEUMOTHORAX)


@pytest.mark.parametrize(("side", "collapse"), [("right", 0.1), ("left", 0.3), ("right", 0.6), ("left", 0.8)])
def test_air_takes_the_fraction_of_one_pleural_cavity_and_the_other_side_is_as_without_it(side, collapse):
    hu, labels = thorax(3, GRID, Pneumothorax(side, collapse))
    healthy_hu, healthy_labels = thorax(3, GRID)
    assert np.array_equal(np.isin(labels, CAVITY), np.isin(healthy_labels, CAVITY)), "the chest wall moved"
    half = np.arange(GRID.size) < GRID.size / 2
    this, other = (half, ~half) if side == "right" else (~half, half)
    air = labels == Label.PNEUMOTHORAX
    cavity = np.isin(labels, CAVITY)[..., this].sum()
    assert air[..., this].sum() / cavity == pytest.approx(collapse, abs=0.01)
    assert air[..., other].sum() < 0.005 * cavity
    unchanged = ~np.isin(labels, CAVITY)
    assert (hu == healthy_hu)[unchanged].mean() > 0.99
    assert np.array_equal(hu[..., other][:, :, 4:-4], healthy_hu[..., other][:, :, 4:-4])


def test_air_lies_in_front_and_a_collapsed_lung_is_denser_behind_a_visible_pleura():
    grid = Grid(128, 2.5)
    hu, labels = thorax(3, grid, Pneumothorax("left", 0.4))
    healthy, _ = thorax(3, grid)
    left = np.arange(grid.size) >= grid.size / 2
    air, lung = ((labels == label) & left for label in (Label.PNEUMOTHORAX, Label.LUNG))
    # The second axis goes from anterior to posterior.
    assert np.nonzero(air)[1].mean() + 15 < np.nonzero(lung)[1].mean()
    assert np.median(hu[air]) == pytest.approx(-990, abs=1)
    assert np.median(hu[lung]) > np.median(healthy[lung]) + 40
    deep, *_ = np.nonzero(lung)
    row = np.median(deep).astype(int)
    border = air[row] & np.roll(lung[row], -1, axis=0)
    y, x = np.nonzero(border)
    surface = np.maximum(hu[row, y, x], hu[row, y + 1, x])
    assert np.median(surface) > np.median(hu[lung]) + 50, "no line of the pleura"


def test_a_collapse_of_zero_is_the_healthy_phantom_and_one_above_the_limit_is_refused():
    hu, labels = thorax(1, GRID, Pneumothorax("right", 0.0))
    healthy, healthy_labels = thorax(1, GRID)
    assert np.array_equal(labels, healthy_labels)
    assert np.abs(hu.astype(int) - healthy).max() <= 1
    with pytest.raises(ValueError, match=r"a collapse of 0\.9: give 0 to 0\.8"):
        Pneumothorax("left", 0.9)


def test_seeds_have_either_side_and_any_collapse():
    sampled = [Pneumothorax.sample(seed, 0.5) for seed in range(400)]
    present = [one for one in sampled if one]
    assert 160 < len(present) < 240
    assert 0.4 < np.mean([one.side == "left" for one in present]) < 0.6
    assert np.ptp([one.collapse for one in present]) > 0.95 * LARGEST_COLLAPSE
    assert sampled == [Pneumothorax.sample(seed, 0.5) for seed in range(400)]


def test_an_archive_has_the_fraction_with_pneumothorax_in_labels_and_records(tmp_path: Path, capsys):
    url = str(tmp_path / "archive")
    words = ["--count", "6", "--size", "32", "--spacing-mm", "10", "--pneumothorax-fraction", "0.5"]
    assert cli.main(["phantom", "--archive", url, *words]) == 0
    archive = Archive(url)
    entries = archive.entries()
    affected = [entry for entry in entries if "pneumothorax" in entry.record]
    assert 0 < len(affected) < len(entries) == 6
    for entry in entries:
        air = (archive.read(entry).labels == Label.PNEUMOTHORAX).any()
        assert air == (entry in affected) == entry.id.endswith("-pneumothorax")
    assert cli.main(["phantom", "--archive", url, *words]) == 0
    assert "6 already there" in capsys.readouterr().out or len(Archive(url).entries()) == 6
    assert cli.main(["phantom", "--archive", url, "--count", "1", "--pneumothorax-fraction", "2"]) == 2
    grid = Grid(32, 10.0)
    ingest_phantoms(url, grid, chest(grid), count=6, seed=0)
    assert len(Archive(url).entries()) == 6 + len(affected), "healthy phantoms of the same seeds are others"
