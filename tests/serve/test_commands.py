import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from raylift.platform import cli

REPOSITORY = Path(__file__).resolve().parents[2]


def test_real_radiographs_are_reconstructed_to_a_nifti_file(
    real_data: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(real_data / "xray" / f"cc0_normal_{view}.jpg") for view in ("frontal", "lateral")]
    output = tmp_path / "new" / "volume.nii.gz"
    options = ["--frontal", pair[0], "--lateral", pair[1], "-o", str(output)]
    assert cli.main(["reconstruct", str(model_folder), *options]) == 0
    image = sitk.ReadImage(str(output))
    assert (image.GetSize(), image.GetSpacing()) == ((32, 32, 32), (10.0, 10.0, 10.0))
    printed = capsys.readouterr().out
    assert f"{output}: 32^3 voxels of 10 mm" in printed
    assert "not for diagnosis" in printed


def test_flip_frontal_equals_a_flipped_file(
    model_folder: Path, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def volume(name: str, *options: str) -> np.ndarray:
        output = tmp_path / f"{name}.nii.gz"
        command = ["reconstruct", str(model_folder), "-o", str(output), "--invert", "no", *pair, *options]
        assert cli.main(command) == 0, capsys.readouterr().err
        return sitk.GetArrayFromImage(sitk.ReadImage(str(output))).astype(np.int32)

    plain, flipped = volume("plain"), volume("flipped", "--flip-frontal")
    frontal = Path(pair[1])
    Image.fromarray(np.asarray(Image.open(frontal))[:, ::-1]).save(frontal)
    assert np.abs(volume("flipped") - flipped).max() <= 1
    assert np.abs(plain - flipped).mean() > 1


def test_a_lateral_is_flipped_if_the_patient_faces_right_as_detected_or_given(
    model_folder: Path, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def volume(*options: str) -> tuple[np.ndarray, str]:
        output = tmp_path / "volume.nii.gz"
        assert cli.main(["reconstruct", str(model_folder), "-o", str(output), *pair, *options]) == 0
        return sitk.GetArrayFromImage(sitk.ReadImage(str(output))).astype(np.int32), capsys.readouterr().out

    plain, printed = volume()
    assert "faces" not in printed
    assert np.array_equal(volume("--patient-facing", "left")[0], plain)
    lateral = Path(pair[3])
    image = np.asarray(Image.open(lateral))
    Image.fromarray(np.ascontiguousarray(image[:, ::-1])).save(lateral)
    flipped, printed = volume()
    assert "lateral: the patient faces right; the image is flipped: pass --patient-facing to override" in printed
    assert np.abs(flipped - plain).max() <= 1
    assert np.array_equal(volume("--patient-facing", "right")[0], flipped)
    assert np.abs(volume("--patient-facing", "left")[0] - plain).mean() > 1
    Image.fromarray(np.maximum(image, image[:, ::-1])).save(lateral)
    _, printed = volume()
    assert "lateral: cannot detect which edge the patient faces; assuming left: pass --patient-facing" in printed


def test_exchanged_radiographs_are_warned_of_and_strict_refuses_them(
    model_folder: Path, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "volume.nii.gz"
    command = ["reconstruct", str(model_folder), "-o", str(output)]
    assert cli.main([*command, *pair, "--strict"]) == 0
    assert capsys.readouterr().err == ""
    output.unlink()
    exchanged = ["--frontal", pair[3], "--lateral", pair[1]]
    assert cli.main([*command, *exchanged, "--strict"]) == 2
    refusal = capsys.readouterr().err
    assert refusal.startswith("raylift: frontal: stop: This looks like a lateral chest radiograph: the two may be")
    assert not output.exists()
    assert cli.main([*command, *exchanged]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "raylift: " + "; ".join(lines) == refusal.strip()
    assert [line.partition(": the two")[0] for line in lines] == [
        "frontal: stop: This looks like a lateral chest radiograph",
        "lateral: stop: This looks like a frontal chest radiograph",
    ]
    assert output.exists()
    assert cli.main([*command, "--frontal", pair[1], "--lateral", pair[1]]) == 0
    assert "all views: stop: Two of the views are the same image" in capsys.readouterr().err


def test_the_fit_prints_the_reprojection_residuals_before_and_after(
    model_folder: Path, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*options: str) -> str:
        command = ["reconstruct", str(model_folder), "-o", str(tmp_path / "volume.nii.gz"), *pair, *options]
        assert cli.main(command) == 0
        return capsys.readouterr().out

    assert "residual" not in printed()
    match = re.search(
        r"^reprojection residual before and after the data-consistency fit: "
        r"frontal (\d\.\d{3}) -> (\d\.\d{3}), lateral (\d\.\d{3}) -> (\d\.\d{3})$",
        printed("--consistency-steps", "3"),
        re.MULTILINE,
    )
    assert match is not None
    frontal, frontal_after, lateral, lateral_after = map(float, match.groups())
    assert frontal_after < frontal
    assert lateral_after < lateral


def test_without_a_model_the_shipped_ones_reconstruct_a_pair_and_a_frontal_radiograph(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ct.nii.gz"
    assert cli.main(["reconstruct", *pair, "-o", str(output)]) == 0
    volume = sitk.ReadImage(str(output))
    assert volume.GetSize() == (64, 64, 64)
    assert volume.GetSpacing() == pytest.approx((5.0, 5.0, 5.0))
    values = sitk.GetArrayFromImage(volume)
    assert np.percentile(values, 5) < -700
    assert np.percentile(values, 90) > -100
    assert cli.main(["reconstruct", "models:chest-64", *pair, "-o", str(tmp_path / "named.nii.gz")]) == 0
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "named.nii.gz"))), values)
    assert cli.main(["reconstruct", *pair[:2], "-o", str(tmp_path / "frontal.nii.gz")]) == 0
    frontal = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "frontal.nii.gz")))
    by_name = ["reconstruct", "models:chest-64-frontal", *pair[:2], "-o", str(tmp_path / "named.nii.gz")]
    assert cli.main(by_name) == 0
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "named.nii.gz"))), frontal)
    assert not np.array_equal(frontal, values)
    capsys.readouterr()
    for alone in (["models:chest-64", *pair[:2]], pair[2:]):
        assert cli.main(["reconstruct", *alone, "-o", str(output)]) == 2
        assert capsys.readouterr().err == (
            "raylift: models:chest-64 needs --frontal and --lateral: pass both, or use models:chest-64-frontal with "
            "--frontal\n"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--lateral": "nowhere.png"}, "nowhere.png: No such file or directory"),
        ({"--lateral": "."}, ".: Is a directory"),
        ({"--lateral": None}, "this model requires frontal and lateral, got frontal"),
        ({"--lateral": "text.png"}, "text.png: not an image raylift reads: give DICOM, PNG, JPEG, TIFF, BMP"),
        ({"-o": "volume.nii"}, "volume.nii: volumes are written as .nii.gz"),
        ({"-o": "text.png/volume.nii.gz"}, "text.png: File exists"),
        ({"model": "nowhere"}, "nowhere is not a model"),
        ({"model": "s3:/bucket/model"}, "write s3://bucket/model"),
        ({"model": "models:chest"}, "unknown model 'models:chest': use models:chest-64"),
        ({"-o": "s3://bucket/volume.nii.gz"}, "is not a path of this machine"),
    ],
)
def test_an_error_is_one_line_with_exit_status_2(
    change: dict[str, str | None],
    message: str,
    model_folder: Path,
    pair: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("not an image")
    arguments = {"-o": "volume.nii.gz", pair[0]: pair[1], pair[2]: pair[3], "model": str(model_folder)} | change
    model = arguments.pop("model")
    options = [word for name, value in arguments.items() if value is not None for word in (name, value)]
    assert cli.main(["reconstruct", str(model), *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("raylift: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port 70000 is outside 1 to 65535"),
        (["--max-batch-size", "0"], "--max-batch-size is 0: give 1 or more"),
        (["--batch-wait-timeout-s", "-1"], "must not be negative"),
        (["--consistency-steps", "-1"], "a data-consistency fit of -1 steps"),
    ],
)
def test_invalid_settings_are_refused_before_anything_starts(
    options: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", str(model_folder), *options])
    assert message in capsys.readouterr().err


def test_a_service_that_waits_for_cpus_prints_so_and_stops_with_ctrl_c(model_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = tmp_path / "log"
    with log.open("w") as log_file:
        options = ["--port", str(port), "--cpus-per-replica", "1000"]
        process = subprocess.Popen(
            [sys.executable, "-m", "raylift", "serve", str(model_folder), *options],
            cwd=REPOSITORY,
            env=environment | {"RAY_SERVE_SLOW_STARTUP_WARNING_S": "1"},
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 120
            while "raylift: waiting for model: " not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
    assert '"CPU": 1000.0' in log.read_text()
    assert not listens(port)


def test_ctrl_c_during_startup_stops_the_service(model_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = tmp_path / "log"
    with log.open("w") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "raylift", "serve", str(model_folder), "--port", str(port)],
            cwd=REPOSITORY,
            env=environment,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
        try:
            # The proxy listens while Serve waits for the deployments.
            until = time.monotonic() + 120
            while not listens(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()
    assert not listens(port)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
