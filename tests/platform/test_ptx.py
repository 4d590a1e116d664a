"""`raylift ptx`: masks, volumes and figures of files, and what it refuses."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from raylift.datasets.geometry import Grid
from raylift.datasets.phantom.pneumothorax import Pneumothorax
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.ptx_seg import Region
from raylift.datasets.scans.resample import archive_image
from raylift.datasets.segmentation import Label
from raylift.platform import cli

GRID = Grid(128, 2.5)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Two CT in a folder, the first with a pneumothorax, and the true mask of that one."""
    folder = tmp_path_factory.mktemp("ct")
    affected, labels = thorax(3, GRID, Pneumothorax("left", 0.3))
    for name, hu in (("affected", affected), ("healthy", thorax(3, GRID)[0])):
        sitk.WriteImage(archive_image(hu, GRID), str(folder / f"{name}.nii.gz"))
    return folder, sitk.GetArrayFromImage(archive_image((labels == Label.PNEUMOTHORAX).astype(np.uint8), GRID))


def rows(folder):
    with (folder / "ptx.csv").open() as file:
        return {row["scan"]: {name: float(row[name]) for name in row if name != "scan"} for row in csv.DictReader(file)}


def test_masks_table_figures_and_agreement_of_a_folder(phantoms, tmp_path, capsys):
    folder, true_mask = phantoms
    assert cli.main(["ptx", str(folder), "--ground-truth", str(folder), "--output", str(tmp_path)]) == 0
    written = rows(tmp_path)
    true_ml = true_mask.sum() * 2.5**3 / 1000
    assert written["affected"]["left_pneumothorax_ml"] == pytest.approx(true_ml, abs=25)
    assert written["affected"]["left_occupancy_percent"] == pytest.approx(30, abs=1)
    assert written["affected"]["right_pneumothorax_ml"] == written["healthy"]["left_pneumothorax_ml"] == 0
    assert (
        f"affected, left: pneumothorax {written['affected']['left_pneumothorax_ml']:.0f} ml" in capsys.readouterr().out
    )
    mask = sitk.ReadImage(str(tmp_path / "affected-mask.nii.gz"))
    scan = sitk.ReadImage(str(folder / "affected.nii.gz"))
    assert (mask.GetSize(), mask.GetOrigin(), mask.GetDirection()) == (
        scan.GetSize(), pytest.approx(scan.GetOrigin()), scan.GetDirection()
    )  # fmt: skip
    found = sitk.GetArrayFromImage(mask) == Region.LEFT_PNEUMOTHORAX
    assert 2 * (found & (true_mask > 0)).sum() / (found.sum() + true_mask.sum()) > 0.93
    content = json.loads((tmp_path / "agreement.json").read_text())
    assert content["volume"]["pearson"] == pytest.approx(1)
    assert content["occupancy"]["mean_absolute_error"] == 0
    for name in ("affected.png", "healthy.png", "agreement.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"), dtype=int)
        assert (np.ptp(pixels, axis=2) > 60).mean() > 0.001, "the figure has no color"


def test_a_mask_lies_on_the_grid_of_its_file_in_any_orientation(phantoms, tmp_path):
    folder, _ = phantoms
    turned = sitk.DICOMOrient(sitk.ReadImage(str(folder / "affected.nii.gz")), "ARS")
    sitk.WriteImage(turned, str(tmp_path / "turned.mha"))
    for path in (folder / "affected.nii.gz", tmp_path / "turned.mha"):
        assert cli.main(["ptx", str(path), "--output", str(tmp_path / "out")]) == 0
    one, other = (sitk.ReadImage(str(tmp_path / f"out/{name}-mask.nii.gz")) for name in ("affected", "turned"))
    assert other.GetSize() == turned.GetSize()
    back = (sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS")) for image in (one, other))
    assert np.array_equal(*back)


def write(path, hu, spacing_mm):
    image = sitk.GetImageFromArray(hu.astype(np.int16))
    image.SetSpacing([spacing_mm] * 3)
    sitk.WriteImage(image, str(path))


def test_wrong_volumes_are_refused_in_a_sentence(tmp_path, capsys):
    def refusal(name):
        assert cli.main(["ptx", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    write(tmp_path / "coarse.nii.gz", thorax(0, Grid(32, 10.0))[0], 10.0)
    assert "voxels of 10 mm are too coarse for a pneumothorax: use a volume with 5 mm or less" in refusal(
        "coarse.nii.gz"
    )
    solid = np.full((40, 40, 40), -1000)
    solid[:, 8:32, 8:32] = np.random.default_rng(0).integers(20, 60, (40, 24, 24))
    write(tmp_path / "solid.nii.gz", solid, 5.0)
    assert "solid.nii.gz: no lungs: no air below -400 HU" in refusal("solid.nii.gz")
    (tmp_path / "text.txt").write_text("no volume")
    assert "not a volume raylift reads" in refusal("text.txt")
    (tmp_path / "damaged.nii.gz").write_bytes(b"no volume")
    assert "damaged.nii.gz" in refusal("damaged.nii.gz")
    (tmp_path / "empty").mkdir()
    assert "no volume in" in refusal("empty")
    assert "absent.nii.gz" in refusal("absent.nii.gz")
    assert cli.main(["ptx"]) == 2
    assert "no volume: give NIfTI" in capsys.readouterr().err
    assert not (tmp_path / "out/ptx.csv").exists()


def test_ground_truth_of_other_names_and_volumes_of_one_name_are_refused(phantoms, tmp_path, capsys):
    folder, _ = phantoms
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/another.nii.gz", thorax(0, Grid(64, 5.0))[0], 5.0)
    words = ["ptx", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--ground-truth", str(tmp_path / "other")]) == 2
    assert "affected has no ground truth of that name" in capsys.readouterr().err
    write(tmp_path / "other/affected.mha", thorax(0, Grid(64, 5.0))[0], 5.0)
    assert cli.main([*words[:2], str(tmp_path / "other"), *words[2:]]) == 2
    assert "have one name: rename one" in capsys.readouterr().err


def test_emphysema_of_a_patient_is_no_pneumothorax(real_data, tmp_path):
    # 851 ml of these lungs are below -960 HU.
    path = real_data / "ct_more/qin_lung_ct_qin_lsc_0003_2mm.nii.gz"
    assert cli.main(["ptx", str(path), "--output", str(tmp_path)]) == 0
    (row,) = rows(tmp_path).values()
    assert row["right_pneumothorax_ml"] == row["left_pneumothorax_ml"] == 0
    assert row["right_lung_ml"] == pytest.approx(3218, rel=0.02)
