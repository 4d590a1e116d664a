"""Pairs of radiographs to an archive, by the function and by the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from radiograph_samples import dicom, encoded
from samples import write_archive

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, Geometry, Grid, View, fit_detector
from raylift.datasets.geometry import chest as chest_stand
from raylift.datasets.ingest.pipeline import IngestReport
from raylift.datasets.ingest.xray import ingest_radiographs
from raylift.datasets.intensity import normalize
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import render_drrs
from raylift.datasets.radiographs.decoding import read
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.input_checks import check_images
from raylift.datasets.radiographs.preparation import prepare
from raylift.platform import cli

GRID = Grid(32, 10.0)
GEOMETRY = chest_stand(GRID)


def pair_of(seed: int, px: int = 96) -> list[np.ndarray]:
    """A frontal and a left lateral image of a phantom, 0 to 255."""
    grid = Grid(64, 5.0)
    fine = fit_detector(grid, replace(chest_stand(grid), detector_px=px))
    views = render_drrs(thorax(seed, grid)[0], grid, fine)
    return [np.rint(normalize(view) * 255).astype(np.uint8) for view in views]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four people; b's lateral faces right, and d's is of another kind of file."""
    home = tmp_path_factory.mktemp("xrays")
    for seed, name in enumerate("abcd"):
        frontal, lateral = pair_of(seed)
        if name == "b":
            lateral = lateral[:, ::-1]
        Image.fromarray(frontal).save(home / f"{name}_pa.png")
        if name == "d":
            dark = 4000 - lateral.astype("<u2") * 15
            (home / "d_lat.png").write_bytes(encoded(Image.fromarray(lateral), "PNG"))
            (home / "extra").mkdir()
            (home / "extra" / "d_lat.dcm").write_bytes(dicom(dark, PhotometricInterpretation="MONOCHROME1"))
        else:
            Image.fromarray(np.ascontiguousarray(lateral)).save(home / f"{name}_lat.png")
    (home / "notes.txt").write_text("nothing")
    return home


def ingest(sources: list[Path], url: Path | str, geometry: Geometry = GEOMETRY, **options: Any) -> IngestReport:
    return ingest_radiographs(
        sources, str(url), GRID, geometry, limits=options.pop("limits", RadiographLimits()), **options
    )


def test_what_the_archive_holds_is_what_serving_makes_of_the_files_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    outcome = ingest([folder], tmp_path, source_license="CC0-1.0")
    assert outcome.refused == []
    assert {entry.subject for entry in outcome.added} == {"a", "b", "c", "d"}
    archive = Archive(str(tmp_path))
    assert (archive.manifest.contents, archive.manifest.grid, archive.manifest.geometry) == (
        "radiographs",
        GRID,
        GEOMETRY,
    )
    for entry in archive.entries():
        stored = archive.read_array(entry, "radiographs")
        assert stored.shape == (2, 32, 32)
        for view, image, suffix in zip(("frontal", "lateral"), stored, ("pa", "lat"), strict=True):
            data = (folder / f"{entry.subject}_{suffix}.png").read_bytes()
            decoded = read(data, "upload", view=view).pixels
            flip = entry.subject == "b" and view == "lateral"
            served = prepare(np.ascontiguousarray(decoded[:, ::-1]) if flip else decoded, GEOMETRY.detector_px)
            np.testing.assert_array_equal(image, served)
        assert (entry.license, entry.label_method) == ("CC0-1.0", "none")
        assert entry.source == f"{entry.subject}_pa.png + {entry.subject}_lat.png"


def test_the_patient_orientation_is_detected_recorded_and_matched_to_the_view(folder: Path, tmp_path: Path) -> None:
    ingest([folder], tmp_path / "left")
    right = replace(GEOMETRY, views=(FRONTAL, View("lateral", azimuth_deg=-90.0)))
    ingest([folder], tmp_path / "right", right)
    one, other = Archive(str(tmp_path / "left")), Archive(str(tmp_path / "right"))
    for entry, flipped in zip(one.entries(), other.entries(), strict=True):
        orientation = "right" if entry.subject == "b" else "left"
        reported = {"patient_facing": orientation, "patient_facing_detected": True}
        assert entry.record["lateral"].items() >= {**reported, "flipped": orientation == "right"}.items()
        assert flipped.record["lateral"].items() >= {**reported, "flipped": orientation == "left"}.items()
        assert entry.record["frontal"] == {"file": f"{entry.subject}_pa.png", "size": [96, 96]}
        np.testing.assert_allclose(
            other.read_array(flipped, "radiographs")[1], one.read_array(entry, "radiographs")[1][:, ::-1], atol=1e-6
        )


def test_a_given_patient_orientation_is_not_detected(folder: Path, tmp_path: Path) -> None:
    ingest([folder], tmp_path / "given", patient_facing="right")
    for entry in Archive(str(tmp_path / "given")).entries():
        assert (
            entry.record["lateral"].items()
            >= {"patient_facing": "right", "patient_facing_detected": False, "flipped": True}.items()
        )
    csv = tmp_path / "pairs.csv"
    csv.write_text("subject,frontal,lateral,patient_facing\na,a_pa.png,a_lat.png,left\nb,b_pa.png,b_lat.png,\n")
    ingest([folder], tmp_path / "listed", pairs=csv, patient_facing="right")
    recorded = [entry.record["lateral"]["patient_facing"] for entry in Archive(str(tmp_path / "listed")).entries()]
    assert recorded == ["left", "right"]


def test_a_lateral_that_does_not_show_its_facing_is_refused_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    frontal, lateral = pair_of(5)
    Image.fromarray(frontal).save(tmp_path / "z_pa.png")
    Image.fromarray(np.maximum(lateral, lateral[:, ::-1])).save(tmp_path / "z_lat.png")
    outcome = ingest([folder, tmp_path], tmp_path / "archive")
    [refusal] = outcome.refused
    assert str(refusal).startswith(f"{tmp_path / 'z_lat.png'}: the edge that the patient faces is not clear: pass")
    assert len(outcome.added) == 4
    again = ingest([tmp_path], tmp_path / "archive", patient_facing="left")
    assert [entry.subject for entry in again.added] == ["z"]


@pytest.mark.parametrize("patient_facing", ["auto", "left", "right"])
def test_a_given_facing_does_not_bypass_the_check_for_a_chest(
    patient_facing: Any, folder: Path, tmp_path: Path
) -> None:
    """Noise as either view, and a gradient."""
    frontal, lateral = pair_of(6)
    noise = np.random.default_rng(0).integers(0, 255, (96, 96), dtype=np.uint8)
    gradient = np.add.outer(np.arange(96), np.arange(96)).astype(np.uint8)
    for name, one, other in (("n", noise, lateral), ("m", frontal, noise), ("f", frontal, gradient)):
        Image.fromarray(one).save(tmp_path / f"{name}_pa.png")
        Image.fromarray(other).save(tmp_path / f"{name}_lat.png")
    outcome = ingest([tmp_path], tmp_path / "archive", patient_facing=patient_facing)
    assert outcome.added == []
    remedy = ": leave it out, or correct it"
    noisy = "Neighboring pixels differ as in noise: this is not a radiograph."
    unlike = (
        "This does not look like a lateral chest radiograph: shoulders and abdomen are not brighter than the upper "
        "corners."
    )
    refusals = [str(refusal) for refusal in outcome.refused]
    assert all(refusal.endswith(remedy) for refusal in refusals)
    assert [refusal.partition(" (")[0] for refusal in refusals] == [
        f"{tmp_path / 'f_lat.png'}: {unlike}",
        f"{tmp_path / 'm_lat.png'}: {noisy}",
        f"{tmp_path / 'n_pa.png'}: {noisy}",
    ]


def test_exchanged_views_and_one_image_twice_are_refused(tmp_path: Path) -> None:
    frontal, lateral = pair_of(7)
    for name, one, other in (("x", lateral, frontal), ("y", frontal, frontal), ("z", lateral, lateral)):
        Image.fromarray(one).save(tmp_path / f"{name}_pa.png")
        Image.fromarray(other).save(tmp_path / f"{name}_lat.png")
    outcome = ingest([tmp_path], tmp_path / "archive")
    assert outcome.added == []
    assert [str(refusal).partition(": the two may")[0] for refusal in outcome.refused] == [
        f"{tmp_path / 'x_pa.png'}: This looks like a lateral chest radiograph",
        f"{tmp_path / 'y_lat.png'}: This looks like a frontal chest radiograph",
        f"{tmp_path / 'z_pa.png'}: This looks like a lateral chest radiograph",
    ]
    # Cells of a table may name one file for both views; an image of neither layout can pass as both.
    same = np.rint((frontal.astype(np.float32) + lateral) / 2).astype(np.uint8)
    assert check_images(("frontal", "lateral"), [same / np.float32(255)] * 2).level == "stop"


def test_a_caution_is_a_warning_and_in_the_record_and_strict_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frontal, lateral = pair_of(50)
    Image.fromarray(np.ascontiguousarray(frontal[:, 16:])).save(tmp_path / "s_pa.png")
    Image.fromarray(lateral).save(tmp_path / "s_lat.png")
    assert ingest_xray(tmp_path, "--archive", tmp_path / "strict", "--strict") == 1
    caution = (
        "The mediastinum is not in the middle: a lung may be outside the image, or the patient rotated. (off center"
    )
    assert f"refused: {tmp_path / 's_pa.png'}: {caution} 0." in capsys.readouterr().out
    assert ingest_xray(tmp_path, "--archive", tmp_path / "archive") == 0
    assert f"warning: s_pa.png + s_lat.png: frontal: {caution} 0." in capsys.readouterr().out
    [entry] = Archive(str(tmp_path / "archive")).entries()
    [result] = entry.record["frontal"]["warnings"]
    assert result.startswith(caution)
    assert "warnings" not in entry.record["lateral"]


def test_what_was_left_out_is_printed_and_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e_pa.png").write_bytes((folder / "a_pa.png").read_bytes())
    (tmp_path / "y_pa.png").write_bytes(b"\x89PNG")
    (tmp_path / "y_lat.png").write_bytes((folder / "a_lat.png").read_bytes())
    csv = tmp_path / "left_out.csv"
    sources = [str(folder), str(tmp_path / "e_pa.png"), str(tmp_path / "y_pa.png"), str(tmp_path / "y_lat.png")]
    assert ingest_xray(*sources, "--archive", tmp_path / "archive", "--verbose", "--left-out", csv) == 0
    printed = capsys.readouterr().out
    assert f"left out: {tmp_path / 'e_pa.png'}: no lateral image of e in {tmp_path}" in printed
    assert "with only one of the two views" in printed
    lines = csv.read_text().splitlines()
    assert lines[0] == "file,reason"
    assert f'{folder / "notes.txt"},"not DICOM, PNG, JPEG, TIFF or BMP"' in lines
    assert any(line.startswith(f"{tmp_path / 'y_pa.png'},") and "raylift reads" in line for line in lines)
    assert ingest_xray(folder, "--archive", tmp_path / "archive") == 0
    assert "left out:" not in capsys.readouterr().out


def test_pairs_of_several_studies_of_one_patient_are_warned_of(tmp_path: Path) -> None:
    for seed, study in enumerate(("1.2.3", "1.2.4")):
        (tmp_path / study).mkdir()
        for view, pixels in zip(("PA", "LL"), pair_of(seed), strict=True):
            tags = {"StudyInstanceUID": study, "PatientID": "anonymous", "ViewPosition": view}
            (tmp_path / study / f"{view}.dcm").write_bytes(dicom(pixels.astype("<u2") * 15, **tags))
    outcome = ingest([tmp_path], tmp_path / "archive")
    (warning,) = outcome.lines()
    assert warning.startswith(
        f"warning: 1 subjects have pairs of several studies, such as {tmp_path / '1.2.3' / 'PA.dcm'} and "
        f"{tmp_path / '1.2.4' / 'PA.dcm'}: each subject is kept in one split"
    )
    assert len({entry.subject for entry in outcome.added}) == 1
    outcome = ingest([tmp_path], tmp_path / "people", subject_pattern=r"(1\.2\.\d)")
    assert (outcome.lines(), {entry.subject for entry in outcome.added}) == ([], {"1.2.3", "1.2.4"})


def test_a_pair_of_two_patients_is_refused(folder: Path, tmp_path: Path) -> None:
    for view, name, patient, pixels in zip(("PA", "LL"), ("frontal", "lateral"), "12", pair_of(7), strict=True):
        data = dicom(pixels.astype("<u2") * 15, PatientID=patient, ViewPosition=view)
        (tmp_path / f"{name}.dcm").write_bytes(data)
    table = tmp_path / "pairs.csv"
    table.write_text("subject,frontal,lateral\nanna,frontal.dcm,lateral.dcm\n")
    outcome = ingest([tmp_path], tmp_path / "archive", pairs=table)
    assert outcome.added == []
    assert "The files have different PatientIDs: give radiographs of one patient." in str(outcome.refused[0])


def test_limits_hold_from_the_header(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits, message in (
        (RadiographLimits(max_pixels=9215), "a_pa.png: 96 x 96 pixels, over the limit of 9215"),
        (RadiographLimits(min_side=97), "a_pa.png: 96 x 96 pixels, a side is under 97"),
    ):
        outcome = ingest([folder], tmp_path / "none", limits=limits)
        assert (len(outcome.refused), outcome.added) == (4, [])
        assert message in str(outcome.refused[0])
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    outcome = ingest([folder], tmp_path / "none", limits=RadiographLimits(max_bytes=100))
    assert "bytes, over the limit of 100" in str(outcome.refused[0])


def test_a_damaged_file_is_refused_by_name_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "y_pa.png").write_bytes((folder / "a_pa.png").read_bytes()[:300])
    (tmp_path / "y_lat.png").write_bytes((folder / "a_lat.png").read_bytes())
    outcome = ingest([tmp_path, folder], tmp_path / "archive")
    assert len(outcome.added) == 4
    assert str(outcome.refused[0]).startswith(f"{tmp_path / 'y_pa.png'}: the image is damaged")


@pytest.mark.parametrize(("views", "message"), [((FRONTAL,), "for the views frontal: use a frontal and a lateral one")])
def test_a_geometry_without_both_views_is_refused(views: Any, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ingest([folder], tmp_path, replace(GEOMETRY, views=views))


# --- the command ---


def ingest_xray(*words: str | Path) -> int:
    return cli.main(["ingest-xray", *map(str, words), "--size", "32", "--spacing-mm", "10"])


def test_a_second_run_does_only_what_is_missing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = tmp_path / "archive"
    csv = tmp_path / "pairs.csv"
    csv.write_text("subject,frontal,lateral\na,a_pa.png,a_lat.png\nq,q_pa.png,q_lat.png\n")
    assert ingest_xray(folder, "--archive", url, "--pairs", csv) == 0
    reported = capsys.readouterr().out
    assert "1 added (1 train), 0 already present, 0 refused, 2 listed files missing (q_pa.png, q_lat.png)" in reported
    parts = set((url / "parts").iterdir())
    assert ingest_xray(folder, "--archive", url) == 0
    assert "3 added" in (reported := capsys.readouterr().out)
    counts = "1 already present, 0 refused, 1 with only one of the two views, 2 files in no pair"
    assert f"{counts} (--verbose lists them)" in reported
    assert parts < set((url / "parts").iterdir())
    assert ingest_xray(folder, "--archive", url) == 0
    assert "0 added, 4 already present" in capsys.readouterr().out
    assert len(Archive(str(url)).entries()) == 4


def test_an_archive_of_ct_takes_no_radiographs_and_the_other_way_round(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(str(tmp_path / "ct"), [0])
    assert cli.main(["ingest-xray", str(folder), "--archive", str(tmp_path / "ct")]) == 2
    assert "holds volumes, not radiographs: use another URL" in capsys.readouterr().err
    assert ingest_xray(folder, "--archive", tmp_path / "xrays") == 0
    assert cli.main(["phantom", "--archive", str(tmp_path / "xrays"), "--count", "2"]) == 2
    assert "holds radiographs, not volumes: use another URL" in capsys.readouterr().err


def test_subjects_and_splits_can_be_given(folder: Path, tmp_path: Path) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text("subject,split\na_,test\nb_,val\n")
    assert (
        ingest_xray(folder, "--archive", tmp_path / "x", "--splits", splits, "--subject-pattern", "/([abcd]_)pa") == 0
    )
    split = {entry.subject: entry.split for entry in Archive(str(tmp_path / "x")).entries()}
    assert set(split) == {"a_", "b_", "c_", "d_"}
    assert (split["a_"], split["b_"]) == ("test", "val")


def test_the_real_pairs_become_an_archive_facing_left(real_data: Path, tmp_path: Path) -> None:
    assert ingest_xray(real_data / "xray", "--archive", tmp_path, "--license", "see MANIFEST.csv") == 0
    archive = Archive(str(tmp_path))
    assert {entry.subject for entry in archive.entries()} == {"cc0_normal", "eurorad_12325_d0", "rad_covid15"}
    for entry in archive.entries():
        reported = {"patient_facing": "left", "patient_facing_detected": True, "flipped": False}
        assert entry.record["lateral"].items() >= reported.items()
        files = [real_data / "xray" / entry.record[view]["file"] for view in ("frontal", "lateral")]
        served = [
            prepare(read(path.read_bytes(), "upload", view=view).pixels, 32)
            for path, view in zip(files, ("frontal", "lateral"), strict=True)
        ]
        np.testing.assert_array_equal(archive.read_array(entry, "radiographs"), served)
    assert archive.manifest.contents == "radiographs"


def test_a_folder_without_pairs_is_reported_with_the_remedy(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty", "alone"):
        (tmp_path / name).mkdir()
    (tmp_path / "alone" / "a_pa.png").write_bytes((folder / "a_pa.png").read_bytes())
    for name in ("empty", "alone"):
        assert ingest_xray(tmp_path / name, "--archive", tmp_path / "archive") == 1
        printed = capsys.readouterr().out
        assert f"warning: no pair of radiographs in {tmp_path / name}: name pairs as anna_frontal.png and" in printed
    assert not (tmp_path / "archive").exists()
