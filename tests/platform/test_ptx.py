"""`raylift ptx`: masks, volumes and figures of files, and what it refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from samples import write_series

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
    """Two CT in a folder, the first with a pneumothorax on the left, and the true mask of that one."""
    folder = tmp_path_factory.mktemp("ct")
    affected, labels = thorax(3, GRID, Pneumothorax("left", 0.3))
    for name, hu in (("affected", affected), ("healthy", thorax(3, GRID)[0])):
        sitk.WriteImage(archive_image(hu, GRID), str(folder / f"{name}.nii.gz"))
    return folder, sitk.GetArrayFromImage(archive_image((labels == Label.PNEUMOTHORAX).astype(np.uint8), GRID))


def rows(folder):
    with (folder / "ptx.csv").open() as file:
        return {row["scan"]: {name: float(row[name]) for name in row if name != "scan"} for row in csv.DictReader(file)}


def colored(path):
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return (np.ptp(pixels, axis=2) > 60).mean() > 0.001


def test_masks_table_and_figures_of_a_folder(phantoms, tmp_path, capsys):
    folder, true_mask = phantoms
    assert cli.main(["ptx", str(folder), "--output", str(tmp_path)]) == 0
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
    assert colored(tmp_path / "affected-regions.png")
    assert colored(tmp_path / "healthy-regions.png")


def test_agreement_of_reconstructions_with_ct_of_the_same_names(phantoms, tmp_path, capsys):
    folder, true_mask = phantoms
    made = tmp_path / "reconstructions"
    made.mkdir()
    smaller, labels = thorax(3, GRID, Pneumothorax("right", 0.15))
    # Denser than soft tissue of a CT.
    dense = np.where(smaller > -200, smaller + 600, smaller)
    sitk.WriteImage(archive_image(dense, GRID), str(made / "affected.nii.gz"))
    for name in ("healthy", "alone"):
        shutil.copy(folder / "healthy.nii.gz", made / f"{name}.nii.gz")
    out = tmp_path / "out"
    for _ in range(2):
        assert cli.main(["ptx", str(made), "--ground-truth", str(folder), "--output", str(out)]) == 0
        assert f"refused: {made / 'alone.nii.gz'}: no ground truth of that name" in capsys.readouterr().out
    assert list(rows(out)) == ["affected", "healthy"]
    found_ml = (labels == Label.PNEUMOTHORAX).sum() * 2.5**3 / 1000
    true_ml = true_mask.sum() * 2.5**3 / 1000
    assert true_ml - found_ml > 100
    content = json.loads((out / "agreement.json").read_text())
    assert content["volume"]["count"] == content["occupancy"]["count"] == 2
    assert content["volume"]["bias"] == pytest.approx((found_ml - true_ml) / 2, abs=15)
    assert content["occupancy"]["bias"] == pytest.approx((0 - 30) / 2, abs=1), "of the left side, where the CT has it"
    assert colored(out / "agreement.png")
    assert cli.main(["ptx", str(made / "affected.nii.gz"), "--output", str(tmp_path / "alone")]) == 1
    assert f"refused: {made / 'affected.nii.gz'}: values" in capsys.readouterr().out


def test_a_refused_volume_leaves_the_others_and_masks_of_an_earlier_run_are_refused(
    phantoms, tmp_path, capsys, monkeypatch
):
    shutil.copy(phantoms[0] / "affected.nii.gz", tmp_path / "good.nii.gz")
    (tmp_path / "absent-header.mhd").write_text("ElementDataFile = absent.raw")
    write(tmp_path / "coarse.nii.gz", thorax(0, Grid(32, 10.0))[0], 10.0)
    (tmp_path / "damaged.nii.gz").write_bytes(b"no volume")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ptx", "."]) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[1].rpartition("/")[2] for line in printed.splitlines() if line.startswith("refused: ")] == [
        "absent-header.mhd", "coarse.nii.gz", "damaged.nii.gz"
    ]  # fmt: skip
    assert "1 volumes by thresholds: ptx/ptx.csv" in printed
    first = rows(tmp_path / "ptx")
    assert list(first) == ["good"]
    assert first["good"]["left_occupancy_percent"] == pytest.approx(30, abs=1)
    assert cli.main(["ptx", "."]) == 0
    assert "good-mask.nii.gz: values 0 to 4 are not in HU but labels of a segmentation mask" in capsys.readouterr().out
    assert rows(tmp_path / "ptx") == first


def test_a_refused_ground_truth_leaves_the_measurement(phantoms, tmp_path, capsys):
    folder, _ = phantoms
    true = tmp_path / "ct"
    true.mkdir()
    shutil.copy(folder / "healthy.nii.gz", true)
    (true / "affected.nii.gz").write_bytes(b"no volume")
    assert cli.main(["ptx", str(folder), "--ground-truth", str(true), "--output", str(tmp_path / "out")]) == 0
    assert f"refused: {true / 'affected.nii.gz'}: " in capsys.readouterr().out
    assert list(rows(tmp_path / "out")) == ["affected", "healthy"]
    assert json.loads((tmp_path / "out/agreement.json").read_text())["volume"]["count"] == 1


def test_figures_of_an_earlier_run_do_not_stay(phantoms, tmp_path, capsys):
    folder, _ = phantoms
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "healthy.nii.gz", tmp_path / "other/another.nii.gz")
    words = ["ptx", str(folder / "affected.nii.gz"), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--ground-truth", str(folder)]) == 0
    assert (tmp_path / "out/agreement.png").is_file()
    assert cli.main(words) == 0
    assert list(rows(tmp_path / "out")) == ["affected"]
    assert not list((tmp_path / "out").glob("agreement*"))
    assert cli.main([*words, "--ground-truth", str(tmp_path / "other")]) == 1
    assert not (tmp_path / "out/ptx.csv").exists()


def test_a_pneumothorax_is_found_in_axial_slices_of_5_mm_and_other_axes_are_refused(phantoms, tmp_path, capsys):
    folder, true_mask = phantoms
    spacing_mm = (2.5, 2.5, 5.0)
    image = sitk.SmoothingRecursiveGaussian(
        sitk.ReadImage(str(folder / "affected.nii.gz")), [max(mm - 2.5, 0.01) / 2 for mm in spacing_mm]
    )
    size = [int(128 * 2.5 / mm) for mm in spacing_mm]
    coarse = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing_mm, image.GetDirection()
    )
    # Slices are the first axis of the file.
    sitk.WriteImage(sitk.PermuteAxes(coarse, [2, 0, 1]), str(tmp_path / "coarse.nii.gz"))
    assert cli.main(["ptx", str(tmp_path / "coarse.nii.gz"), "--output", str(tmp_path / "out")]) == 0
    measured = rows(tmp_path / "out")["coarse"]
    assert measured["left_pneumothorax_ml"] == pytest.approx(true_mask.sum() * 2.5**3 / 1000, rel=0.2)
    assert measured["right_pneumothorax_ml"] == 0
    coarse.SetSpacing((2.5, 3.0, 2.5))
    sitk.WriteImage(coarse, str(tmp_path / "coarse.nii.gz"))
    assert cli.main(["ptx", str(tmp_path / "coarse.nii.gz"), "--output", str(tmp_path / "out")]) == 1
    assert "voxels of 2.5 x 3 x 2.5 mm are too coarse for a pneumothorax: use axial slices" in capsys.readouterr().out


def test_dicom_series_of_one_patient_have_the_names_of_their_folders(phantoms, tmp_path):
    affected, volume = (sitk.ReadImage(str(phantoms[0] / f"{name}.nii.gz")) for name in ("affected", "healthy"))
    write_series(tmp_path / "series/before/ct", affected)
    write_series(tmp_path / "series/after/ct", volume)
    for name in ("agreement.nii.gz", "before/ct.nii.gz", "after/ct.nii.gz"):
        (tmp_path / "volumes" / name).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(volume, str(tmp_path / "volumes" / name))
    sitk.WriteImage(volume, str(tmp_path / "series/agreement.nii.gz"))
    words = ["--ground-truth", str(tmp_path / "series"), "--output", str(tmp_path / "out")]
    assert cli.main(["ptx", str(tmp_path / "series"), "--output", str(tmp_path / "true")]) == 0
    assert cli.main(["ptx", str(tmp_path / "volumes"), *words]) == 0
    true, found = rows(tmp_path / "true"), rows(tmp_path / "out")
    assert set(true) == set(found) == {"agreement", "before/ct", "after/ct"}
    assert true["before/ct"]["left_occupancy_percent"] == pytest.approx(30, abs=1)
    assert true["after/ct"]["left_pneumothorax_ml"] == 0
    assert (tmp_path / "true/before/ct-mask.nii.gz").is_file()
    bias = json.loads((tmp_path / "out/agreement.json").read_text())["volume"]["bias"]
    assert bias == pytest.approx(-true["before/ct"]["left_pneumothorax_ml"] / 3, abs=0.01)
    assert (tmp_path / "out/agreement.png").read_bytes() != (tmp_path / "out/agreement-regions.png").read_bytes()
    one = tmp_path / "series/before/ct"
    assert cli.main(["ptx", str(one), "--output", str(tmp_path / "one")]) == 0
    assert list(rows(tmp_path / "one")) == ["ct"]


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
        assert cli.main(["ptx", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().out

    write(tmp_path / "coarse.nii.gz", thorax(0, Grid(32, 10.0))[0], 10.0)
    assert "voxels of 10 x 10 x 10 mm are too coarse for a pneumothorax" in refusal("coarse.nii.gz")
    solid = np.full((80, 80, 80), -1000)
    solid[:, 16:64, 16:64] = np.random.default_rng(0).integers(20, 60, (80, 48, 48))
    write(tmp_path / "solid.nii.gz", solid, 2.5)
    assert "solid.nii.gz: no lungs: no air below -400 HU" in refusal("solid.nii.gz")
    (tmp_path / "text.txt").write_text("no volume")
    assert "not a volume raylift reads" in refusal("text.txt")
    (tmp_path / "damaged.nii.gz").write_bytes(b"no volume")
    assert "damaged.nii.gz" in refusal("damaged.nii.gz")
    (tmp_path / "empty").mkdir()
    assert "absent.nii.gz: no such file or folder" in refusal("absent.nii.gz")
    assert cli.main(["ptx", str(tmp_path / "empty")]) == 2
    assert f"no volume in {tmp_path / 'empty'}" in capsys.readouterr().err
    assert cli.main(["ptx"]) == 2
    assert "no volume: give NIfTI" in capsys.readouterr().err
    assert not (tmp_path / "out/ptx.csv").exists()


def test_ground_truth_of_other_names_and_volumes_of_one_name_are_refused(phantoms, tmp_path, capsys):
    folder, _ = phantoms
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/another.nii.gz", thorax(0, Grid(64, 5.0))[0], 5.0)
    words = ["ptx", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--ground-truth", str(tmp_path / "other")]) == 1
    assert "affected.nii.gz and 1 more: no ground truth of that name" in capsys.readouterr().out
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
