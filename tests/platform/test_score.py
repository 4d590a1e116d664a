"""`raylift score`: volumes of any program against their ground truth, with metrics that independent code gives."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from samples import thorax_image, turned, write_image
from skimage.metrics import structural_similarity

from raylift.platform import cli

SIZE, SPACING = (24, 20, 22), (16.0, 16.0, 16.0)


def noisy(image, seed=0):
    rng = np.random.default_rng(seed)
    values = sitk.GetArrayFromImage(image) + rng.normal(0, 60, image.GetSize()[::-1])
    other = sitk.GetImageFromArray(values.astype(np.float32))
    other.CopyInformation(image)
    return other


@pytest.fixture
def folders(tmp_path):
    """A thorax under three names as ground truth, and predictions of them in three formats."""
    ground_truth, predictions = tmp_path / "ct", tmp_path / "made"
    ground_truth.mkdir()
    predictions.mkdir()
    image = thorax_image(SIZE, SPACING)
    for number, suffix in enumerate((".nii.gz", ".mha", ".nrrd")):
        write_image(image, ground_truth / f"scan-{number}.nii.gz")
        write_image(noisy(image, number), predictions / f"scan-{number}{suffix}")
    return predictions, ground_truth


def score(predictions, ground_truth, output, *options):
    return cli.main(["score", str(predictions), "--ground-truth", str(ground_truth), "--output", str(output), *options])


def test_every_protocol_has_the_metrics_of_independent_code_in_table_csv_and_json(folders, tmp_path, capsys):
    assert score(*folders, tmp_path / "out") == 0
    content = json.loads((tmp_path / "out/scores.json").read_text())
    assert {"volume", "x2ct", "cvaa", "segmentation"} <= set(content["mean"]["prediction"])
    image = thorax_image(SIZE, SPACING)
    pair = [sitk.GetArrayFromImage(one).astype(np.float64) for one in (image, noisy(image, 1))]
    ours = content["cases"]["scan-1"]["prediction"]["volume"]
    unit = [(volume.clip(-1024, 1476) + 1024) / 2500 for volume in pair]
    mse = np.square(unit[0] - unit[1]).mean()
    assert ours["psnr_db"] == pytest.approx(-10 * np.log10(mse), rel=1e-6)
    assert ours["mae_hu"] == pytest.approx(np.abs(unit[0] - unit[1]).mean() * 2500, rel=1e-5)
    # SSIM has no direction, so the orientation of the axes does not matter.
    ssim = structural_similarity(*unit, data_range=1.0, gaussian_weights=True, use_sample_covariance=False)
    assert ours["ssim"] == pytest.approx(ssim, rel=1e-5)
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == ["scan-0", "scan-1", "scan-2"]
    assert float(rows[1]["volume.psnr_db"]) == ours["psnr_db"]
    mean = content["mean"]["prediction"]["volume"]["psnr_db"]
    assert mean == pytest.approx(np.mean([float(row["volume.psnr_db"]) for row in rows]))
    assert f"{mean:.2f} ±" in capsys.readouterr().out


def test_an_exact_volume_in_another_orientation_is_perfect_and_its_psnr_is_null_in_json(folders, tmp_path):
    predictions, ground_truth = folders
    for path in predictions.iterdir():
        path.unlink()
    image = thorax_image(SIZE, SPACING)
    write_image(sitk.DICOMOrient(image, "RAS"), predictions / "scan-0.mha")
    assert score(predictions, ground_truth, tmp_path / "out", "--protocols", "volume") == 0
    content = json.loads((tmp_path / "out/scores.json").read_text(), parse_constant=pytest.fail)
    values = content["cases"]["scan-0"]["prediction"]
    assert values["volume"]["psnr_db"] is None
    assert (values["volume"]["mae_hu"], values["volume"]["ssim"], values["segmentation"]["lung_dice"]) == (0, 1, 1)
    assert content["missing"] == ["scan-1", "scan-2"]


def test_another_grid_is_an_error_with_a_remedy_and_is_resampled_on_request(folders, tmp_path, capsys):
    predictions, ground_truth = folders
    coarse = thorax_image((48, 40, 44), (8.0, 8.0, 8.0))
    write_image(coarse, predictions / "scan-0.nii.gz")
    assert score(predictions, ground_truth, tmp_path / "out") == 2
    reported = capsys.readouterr().err
    assert "scan-0.nii.gz has 48x40x44 voxels of 8 x 8 x 8 mm" in reported
    assert "pass --resample" in reported
    assert score(predictions, ground_truth, tmp_path / "out", "--resample") == 0
    content = json.loads((tmp_path / "out/scores.json").read_text())
    assert content["cases"]["scan-0"]["prediction"]["volume"]["mae_hu"] < 20
    (note,) = content["notes"]["scan-0"]
    assert note.startswith("resampled from 48x40x44 voxels")
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("shift_mm", [0.5, 16.0])
def test_a_shift_of_the_grid_is_a_mismatch(folders, tmp_path, capsys, shift_mm):
    predictions, ground_truth = folders
    image = noisy(thorax_image(SIZE, SPACING))
    image.SetOrigin([value + shift_mm for value in image.GetOrigin()])
    write_image(image, predictions / "scan-0.nii.gz")
    assert score(predictions, ground_truth, tmp_path / "out") == 2
    assert "pass --resample" in capsys.readouterr().err


def test_a_turned_grid_is_a_mismatch(folders, tmp_path, capsys):
    predictions, ground_truth = folders
    write_image(thorax_image(SIZE, SPACING, turned(z_deg=5)), predictions / "scan-0.nii.gz")
    assert score(predictions, ground_truth, tmp_path / "out") == 2
    assert "pass --resample" in capsys.readouterr().err


def test_a_table_matches_files_of_other_names(folders, tmp_path, capsys):
    predictions, ground_truth = folders
    (predictions / "scan-1.mha").rename(predictions / "other.mha")
    assert score(predictions, ground_truth, tmp_path / "out") == 2
    assert "other.mha has no ground truth of that name" in capsys.readouterr().err
    table = tmp_path / "pairs.csv"
    table.write_text("prediction,ground_truth\nother.mha,scan-1.nii.gz\n")
    assert score(predictions, ground_truth, tmp_path / "out", "--pairs", str(table)) == 0
    assert list(json.loads((tmp_path / "out/scores.json").read_text())["cases"]) == ["other.mha"]


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda hu: (hu + 1024) / 2500, "in a network's range, not in HU"),
        (lambda hu: hu + 1024, "they may be HU + 1024"),
        (lambda hu: np.where(hu > 0, np.nan, hu), "NaN or infinite voxels"),
    ],
)
def test_predictions_that_are_not_in_hu_are_refused_by_name(folders, tmp_path, capsys, change, reported):
    predictions, ground_truth = folders
    image = thorax_image(SIZE, SPACING)
    wrong = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image).astype(np.float32)))
    wrong.CopyInformation(image)
    write_image(wrong, predictions / "scan-0.nii.gz")
    assert score(predictions, ground_truth, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "scan-0.nii.gz" in error
    assert reported in error
