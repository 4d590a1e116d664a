"""What finds the lungs: thresholds, or a network with weights from a file, and the message if it is absent."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
from lungmask_package import LOWER_HU, UPPER_HU, install

from raylift.datasets import ptx_seg, segmentation
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid
from raylift.datasets.lung_segmenter import THRESHOLDS, segmenter_of
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.segmentation import Label
from raylift.models import segmentation_metrics

GRID = Grid(64, 5.0)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lungmask", raising=False)
    return install(tmp_path)


def test_thresholds_are_the_lungs_of_the_segmentation():
    hu, _ = thorax(3, GRID)
    air = segmentation.lungs(hu, GRID.spacing_mm)
    assert segmenter_of("thresholds") == THRESHOLDS
    assert np.array_equal(THRESHOLDS.lungs(hu, air), air)


def test_a_network_of_lungmask_finds_the_lungs_from_its_weights(weights):
    hu, _ = thorax(3, GRID)
    segmenter = segmenter_of(f"lungmask:{weights}")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert segmenter.name == f"lungmask 0.2.22, unet.pth, SHA-256 {digest[:12]}"
    expected = (hu > LOWER_HU) & (hu < UPPER_HU)
    assert np.array_equal(segmenter.lungs(hu, np.zeros(hu.shape, bool)), expected)
    labels = segmentation.labels(hu, GRID.spacing_mm, segmenter=segmenter)
    assert np.array_equal(labels != Label.OTHER, expected)
    # As in a worker, which loads the network by itself.
    assert np.array_equal(pickle.loads(pickle.dumps(segmenter)).lungs(hu, expected), expected)


def test_lungs_of_a_network_are_parts_of_the_pleural_cavities(weights):
    hu, labels = thorax(3, GRID)
    lung = np.isin(labels, (Label.LUNG, Label.VESSEL))
    consolidated = lung & (np.arange(GRID.size) < GRID.size / 2) & (np.arange(GRID.size)[:, None, None] > 36)
    hu[consolidated] = 40
    alone = ptx_seg.segment(hu, GRID.spacing_mm)
    found = ptx_seg.segment(hu, GRID.spacing_mm, segmenter=segmenter_of(f"lungmask:{weights}"))
    assert (found[consolidated] == ptx_seg.Region.RIGHT_LUNG).mean() > 0.95
    assert (alone[consolidated] == ptx_seg.Region.RIGHT_LUNG).mean() < 0.5


def test_consolidated_lung_is_lung_and_no_vessel(weights):
    hu, true = thorax(3, GRID)
    is_right = np.arange(GRID.size) < GRID.size / 2
    consolidated = np.isin(true, (Label.LUNG, Label.VESSEL)) & is_right & (np.arange(GRID.size)[:, None, None] > 36)
    hu[consolidated] = 40
    segmenter = segmenter_of(f"lungmask:{weights}")
    labels = segmentation.labels(hu, GRID.spacing_mm, segmenter=segmenter)
    anatomy = segmentation_metrics.Anatomy.of(hu, GRID.spacing_mm, segmenter=segmenter)
    assert (labels[consolidated] == Label.LUNG).mean() > 0.99
    assert anatomy.lung[consolidated].all()
    assert anatomy.vessel.any()
    assert np.array_equal(anatomy.vessel, labels == Label.VESSEL)


def test_a_node_without_the_file_or_with_another_one_is_an_error_with_a_remedy(weights):
    sent = pickle.dumps(segmenter_of(f"lungmask:{weights}"))
    hu, air = np.zeros((2, 2, 2), np.int16), np.zeros((2, 2, 2), bool)
    digest = pickle.loads(sent).sha256
    torch.save({"weight": torch.ones((1, 1, 1, 1)), "bias": torch.zeros(1)}, weights)
    with pytest.raises(ConfigError, match=rf"unet.pth has SHA-256 \w{{64}} on this node and not {digest}: copy"):
        pickle.loads(sent).lungs(hu, air)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"unet.pth cannot be read on this node \(No such file .*: copy it to every"):
        pickle.loads(sent).lungs(hu, air)


def test_what_is_absent_is_named_with_the_remedy(weights, tmp_path):
    with pytest.raises(ConfigError, match="segmenter 'nnunet': use thresholds, or lungmask:FILE"):
        segmenter_of("nnunet")
    with pytest.raises(ConfigError, match=r"lost.pth with weights of lungmask is missing: download unet_r231"):
        segmenter_of(f"lungmask:{tmp_path / 'lost.pth'}")
    for content in (b"", b"no weights", weights.read_bytes()[:300]):
        (tmp_path / "damaged.pth").write_bytes(content)
        segmenter = segmenter_of(f"lungmask:{tmp_path / 'damaged.pth'}")
        with pytest.raises(ConfigError, match=r"damaged.pth holds no weights of lungmask"):
            segmenter.lungs(np.zeros((2, 2, 2), np.int16), np.zeros((2, 2, 2), bool))
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"other.pth holds no weights of lungmask .*: give unet_r231"):
        segmenter_of(f"lungmask:{tmp_path / 'other.pth'}").lungs(
            np.zeros((2, 2, 2), np.int16), np.zeros((2, 2, 2), bool)
        )


def test_a_missing_package_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"needs the package lungmask: pip install 'raylift\[lungmask\]'"):
        segmenter_of(f"lungmask:{tmp_path / 'unet.pth'}")
