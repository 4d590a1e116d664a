from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset
from samples import thorax_hu, thorax_image, write_image, write_series

from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ArchiveNotFoundError, ConfigError, FileError
from raylift.datasets.geometry import FRONTAL, LATERAL, Grid, chest
from raylift.datasets.ingest.ct import ingest_ct
from raylift.datasets.ingest.pipeline import IngestReport
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.intensity import hu_to_attenuation
from raylift.datasets.projector import project, render_drrs
from raylift.datasets.scans.header_checks import ScanLimits
from raylift.datasets.segmentation import Label
from raylift.models import segmentation_metrics

GRID = Grid(32, 12.0)
GEOMETRY = chest(GRID)


def person(folder: Path, name: str, mark: int = 0) -> Path:
    """A CT that differs from others by a mark."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_image(
        thorax_image((40, 30, 40), (9.0, 9.0, 9.0), hu=lambda x, y, z: thorax_hu(x, y, z) + (np.abs(z) < 20) * mark),
        folder / name,
    )


def run(sources: list[Path] | Path, url: Path, **options: Any) -> IngestReport:
    options = {"limits": ScanLimits(), **options}
    return ingest_ct(sources if isinstance(sources, list) else [sources], str(url), GRID, GEOMETRY, **options)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of three CT scans that can be used and four files that cannot."""
    folder = tmp_path / "scans"
    person(folder, "anna.nii.gz")
    person(folder, "bert.nrrd", 5)
    write_series(folder / "series", thorax_image((40, 30, 40), (9.0, 9.0, 9.0)), patient="carl")
    write_series(
        folder / "holed",
        thorax_image((40, 30, 40), (9, 9, 9)),
        patient="dora",
        change=lambda k, ds: None if k == 9 else ds,
    )
    (folder / "torn.nii.gz").write_bytes((folder / "anna.nii.gz").read_bytes()[:-500])
    (folder / "text.mha").write_text("no image at all")
    (folder / "notes.txt").write_text("next to them")
    return folder


def test_what_can_be_used_is_and_what_cannot_is_refused_by_name_and_counted(mixed: Path, tmp_path: Path) -> None:
    outcome = run(mixed, tmp_path / "archive")
    assert sorted(entry.source for entry in outcome.added) == ["anna.nii.gz", "bert.nrrd", "series"]
    refusals = sorted(str(error) for error in outcome.refused)
    assert len(refusals) == 3
    for path, refusal in zip((mixed / "holed", mixed / "text.mha", mixed / "torn.nii.gz"), refusals, strict=True):
        assert refusal.startswith(str(path))
    assert all(isinstance(error, FileError) for error in outcome.refused)
    assert (outcome.already_present, outcome.skipped) == (0, 1)
    assert outcome.summary().endswith("0 already present, 3 refused, 1 other files skipped")
    assert outcome.summary().startswith("3 added (")
    assert Archive(str(tmp_path / "archive")).entries() == sorted(outcome.added, key=lambda entry: entry.id)


def test_a_sample_is_the_resampled_ct_with_its_projections_and_labels(mixed: Path, tmp_path: Path) -> None:
    run(mixed, tmp_path / "archive", source_license="CC BY 4.0")
    archive = Archive(str(tmp_path / "archive"))
    [entry] = [entry for entry in archive.entries() if entry.source == "anna.nii.gz"]
    stored = archive.read(entry)
    assert (entry.license, entry.label_method) == ("CC BY 4.0", "threshold")
    assert entry.record["source_size"] == [40, 30, 40]
    assert stored.volume.shape == GRID.shape
    assert stored.volume.min() == -1024
    assert 400 < stored.volume.max() < 600
    d, h, w = ((np.arange(n) - (n - 1) / 2) * GRID.spacing_mm for n in GRID.shape)
    x, y, z = w[None, None], h[None, :, None], -d[:, None, None]
    right = ((x + 70) / 48) ** 2 + (y / 70) ** 2 + (z / 95) ** 2 < 1
    left = ((x - 70) / 42) ** 2 + (y / 65) ** 2 + ((z - 10) / 85) ** 2 < 1
    lung = (right | left) & (thorax_hu(x, y, z) < -400)
    assert segmentation_metrics.dice(stored.labels > 0, lung) > 0.93
    assert set(np.unique(stored.labels)) <= {Label.OTHER, Label.LUNG, Label.VESSEL}
    attenuation = hu_to_attenuation(torch.from_numpy(stored.volume.astype(np.float32)))[None, None]
    for image, view in zip(stored.radiographs, (FRONTAL, LATERAL), strict=True):
        np.testing.assert_allclose(image, project(attenuation, GRID.spacing_mm, GEOMETRY, view)[0, 0], rtol=1e-5)


def test_running_again_adds_nothing_and_a_new_file_alone_is_added(mixed: Path, tmp_path: Path) -> None:
    first = run(mixed, tmp_path / "archive")
    again = run(mixed, tmp_path / "archive")
    assert (len(again.added), again.already_present, len(again.refused)) == (0, 3, 3)
    person(mixed, "emil.mha", 9)
    third = run(mixed, tmp_path / "archive")
    assert ([entry.source for entry in third.added], third.already_present) == (["emil.mha"], 3)
    assert len(Archive(str(tmp_path / "archive")).entries()) == len(first.added) + 1


def test_one_scan_under_two_names_is_taken_once(tmp_path: Path) -> None:
    path = person(tmp_path / "scans", "anna.nii.gz")
    (path.parent / "copy.nii.gz").write_bytes(path.read_bytes())
    outcome = run(path.parent, tmp_path / "archive")
    assert (len(outcome.added), outcome.already_present) == (1, 1)


def test_a_file_that_vanishes_meanwhile_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for k, name in enumerate("abc"):
        person(folder, f"{name}.nii.gz", k)
    fired = []

    def remove(_: int, __: int, name: str) -> None:
        if name == "b.nii.gz":
            (folder / name).unlink()
            fired.append(name)

    outcome = run(folder, tmp_path / "archive", progress=remove)
    assert fired
    assert [entry.source for entry in outcome.added] == ["a.nii.gz", "c.nii.gz"]
    assert [str(error).partition(":")[0] for error in outcome.refused] == [str(folder / "b.nii.gz")]


def test_nothing_to_ingest_is_counted_and_makes_no_archive(tmp_path: Path) -> None:
    outcome = run([tmp_path / "nowhere"], tmp_path / "archive")
    assert outcome.summary() == "0 added, 0 already present, 1 refused"
    with pytest.raises(ArchiveNotFoundError):
        Archive(str(tmp_path / "archive"))


def test_files_of_one_subject_stay_in_one_split_also_when_they_come_later(tmp_path: Path) -> None:
    folder, url = tmp_path / "scans", tmp_path / "archive"
    pattern = r"^(patient\d+)_"
    for k in range(6):
        person(folder, f"patient{k}_day0.nii.gz", k)
    run(folder, url, subject_pattern=pattern, split_fractions=(0.4, 0.3, 0.3))
    for k in range(6):
        person(folder, f"patient{k}_day1.nii.gz", 10 + k)
        person(folder, f"patient{k + 6}_day0.nii.gz", 20 + k)
    run(folder, url, subject_pattern=pattern)
    entries = Archive(str(url)).entries()
    assert len(entries) == 18
    splits = {entry.subject: {other.split for other in entries if other.subject == entry.subject} for entry in entries}
    assert len(splits) == 12
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_a_subject_pattern_that_fits_no_name_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    person(tmp_path / "scans", "anna.nii.gz")
    for pattern in (r"LIDC-(\d+)", "anna"):
        with pytest.raises(ConfigError, match=r"subject pattern .* has no group that matches 'anna'"):
            run(tmp_path / "scans", tmp_path / "archive", subject_pattern=pattern)
    assert not (tmp_path / "archive").exists()


def test_a_subject_pattern_may_name_the_folder_where_all_files_have_one_name(tmp_path: Path) -> None:
    for k in range(3):
        person(tmp_path / "scans" / f"sub-{k}", "ct.nii.gz", k)
    outcome = run(tmp_path / "scans", tmp_path / "archive", subject_pattern=r"(sub-\d+)/")
    assert sorted(entry.subject for entry in outcome.added) == ["sub-0", "sub-1", "sub-2"]


def test_a_subject_pattern_that_is_no_expression_is_refused(tmp_path: Path) -> None:
    person(tmp_path / "scans", "anna.nii.gz")
    with pytest.raises(ConfigError, match=r"subject pattern '\(' is not a regular expression"):
        run(tmp_path / "scans", tmp_path / "archive", subject_pattern="(")


def test_assigned_subjects_go_where_they_were_put_and_stay_there(tmp_path: Path) -> None:
    folder, url = tmp_path / "scans", tmp_path / "archive"
    for k, name in enumerate(("anna", "bert", "carl")):
        person(folder, f"{name}.nii.gz", k)
    assigned = {"anna": "test", "bert": "val", "carl": "train"}
    run(folder, url, assigned=assigned)
    assert {entry.subject: entry.split for entry in Archive(str(url)).entries()} == assigned
    with pytest.raises(ConfigError, match="split by another assignment, which cannot change"):
        run(folder, url, assigned={"anna": "train"})
    assert run(folder, url, assigned=assigned).already_present == 3


def test_assigned_subjects_of_whom_there_is_no_scan_are_counted(tmp_path: Path) -> None:
    """A misspelled test subject would otherwise be trained on without a warning."""
    person(tmp_path / "scans", "anna.nii.gz")
    outcome = run(tmp_path / "scans", tmp_path / "archive", assigned={"anna": "train", "Bert": "test", "carl": "val"})
    assert outcome.absent_subjects == 2
    assert outcome.summary() == "1 added (1 train), 0 already present, 0 refused, 2 assigned subjects not found"


def test_only_whole_thoraces_are_ingested_where_they_are_required(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    person(folder, "whole.nii.gz")
    half = thorax_image((40, 30, 18), (9.0, 9.0, 9.0), hu=lambda x, y, z: thorax_hu(x, y, z - 60))
    write_image(half, folder / "half.nii.gz")
    outcome = run(folder, tmp_path / "strict", require_whole_thorax=True)
    assert [entry.source for entry in outcome.added] == ["whole.nii.gz"]
    assert "half.nii.gz: the lungs are truncated" in str(outcome.refused[0])
    assert len(run(folder, tmp_path / "lenient").added) == 2


def test_a_scan_too_thin_to_smooth_is_refused_and_not_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    person(folder, "anna.nii.gz")
    write_image(thorax_image((60, 50, 3), (6.0, 6.0, 3.0)), folder / "thin.nii.gz")
    outcome = run(folder, tmp_path / "archive", limits=ScanLimits(min_side=2))
    assert [entry.source for entry in outcome.added] == ["anna.nii.gz"]
    assert "thin.nii.gz: " in str(outcome.refused[0])


def test_masks_next_to_scans_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "s0001"
    person(folder, "ct.nii.gz")
    (folder / "segmentations").mkdir()
    for k in (1, 2):
        mask = thorax_image((40, 30, 40), (9, 9, 9), hu=lambda x, y, z, k=k: 1.0 * (thorax_hu(x, y, z) > 50 * k - 100))
        write_image(mask, folder / "segmentations" / f"organ{k}.nii.gz")
    outcome = run(folder, tmp_path / "archive")
    lines = outcome.lines()
    assert len(lines) == 1
    assert lines[0].startswith(f"refused: {folder}/segmentations/organ1.nii.gz: values 0 to 1 are not in HU but labels")
    assert lines[0].endswith("; and 1 more masks")
    assert outcome.summary().endswith("2 refused")


def test_what_was_changed_in_a_file_is_printed_and_kept(tmp_path: Path) -> None:
    for k, name in enumerate(("anna.mha", "bert.mha")):
        path = person(tmp_path / "scans", name, k)
        raw = path.read_bytes()
        start = raw.index(b"ElementSpacing")
        path.write_bytes(raw[:start] + raw[raw.index(b"\n", start) + 1 :])
    refused = run(tmp_path / "scans", tmp_path / "archive")
    assert (len(refused.added), len(refused.refused)) == (0, 2)
    outcome = run(tmp_path / "scans", tmp_path / "archive", assume_spacing_mm=(9.0, 9.0, 9.0))
    change = "no ElementSpacing: 9 x 9 x 9 mm and axes to the left, posterior and superior are assumed"
    assert outcome.lines() == [f"anna.mha and 1 more: {change}"]
    entries = Archive(str(tmp_path / "archive")).entries()
    assert [entry.record["changes"] for entry in entries] == [[change], [change]]
    assert [entry.record["source_spacing_mm"] for entry in entries] == [[9, 9, 9], [9, 9, 9]]


def test_files_of_one_name_in_different_folders_are_warned_of(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    for k in range(3):
        person(scans / f"s000{k}", "ct.nii.gz", k)
    outcome = run(scans, tmp_path / "archive")
    [warning] = outcome.lines()
    assert warning.startswith(
        f"warning: 1 subjects have several scans in different folders or studies, such as {scans}/s0000/ct.nii.gz and "
    )
    assert "pass --subject-pattern" in warning
    named = run(scans, tmp_path / "named", subject_pattern=r"/(s\d{4})/")
    assert named.lines() == []
    assert {entry.subject for entry in named.added} == {"s0000", "s0001", "s0002"}


def test_a_subject_that_the_archive_has_from_another_file_is_warned_of(tmp_path: Path) -> None:
    scans, url = tmp_path / "scans", tmp_path / "archive"
    for k in range(2):
        person(scans / f"s{k}", "ct.nii.gz", k)
    assert run(scans / "s0", url).lines() == []
    outcome = run(scans / "s1", url)
    assert outcome.lines() == [
        "warning: 1 subjects were in the archive before, such as ct, with ct.nii.gz and now ct.nii.gz: each subject is "
        "kept in one split. If they are different patients, make a new archive with --subject-pattern and a group that "
        "matches the patient in the path"
    ]
    assert run(scans / "s1", url).lines() == []


@pytest.mark.parametrize("blank", ["SeriesInstanceUID", "StudyInstanceUID", ""])
def test_series_of_one_patient_id_are_warned_of_and_named_by_the_pattern(blank: str, tmp_path: Path) -> None:
    def anonymous(_: int, ds: Dataset) -> Dataset:
        if blank:
            setattr(ds, blank, "")
        return ds

    scans = tmp_path / "scans"
    for k in range(3):
        image = thorax_image((40, 30, 40), (9, 9, 9), hu=lambda x, y, z, k=k: thorax_hu(x, y, z) + (np.abs(z) < 20) * k)
        write_series(scans / f"person{k}", image, patient="ANONYMOUS", change=anonymous)
    outcome = run(scans, tmp_path / "archive")
    assert len(outcome.added) == 3, outcome.lines()
    assert len({entry.subject for entry in outcome.added}) == 1
    assert outcome.lines()[0].startswith("warning: 1 subjects have several scans in different folders or studies")
    named = run(scans, tmp_path / "named", subject_pattern=r"/(person\d)/")
    assert {entry.subject for entry in named.added} == {"person0", "person1", "person2"}
    with pytest.raises(ConfigError, match="has no group that matches"):
        run(scans, tmp_path / "other", subject_pattern=r"(patient\d)")


@pytest.mark.parametrize(
    ("frames", "is_warned"),
    [
        pytest.param(("1.2.3", "1.2.3", "1.2.3"), False, id="reconstructions of one scan"),
        pytest.param(("1.2.3", "1.2.3", "1.2.4"), True, id="a copied StudyInstanceUID"),
        pytest.param(("", "", ""), True, id="no frame of reference"),
    ],
)
def test_series_of_one_study_are_one_person_and_warned_of_unless_they_share_a_frame_of_reference(
    frames: tuple[str, ...], is_warned: bool, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    for k, frame in enumerate(frames):

        def change(_: int, ds: Dataset, frame: str = frame) -> Dataset:
            ds.StudyInstanceUID, ds.FrameOfReferenceUID = "1.2.3.4", frame
            return ds

        image = thorax_image((40, 30, 40), (9, 9, 9), hu=lambda x, y, z, k=k: thorax_hu(x, y, z) + (np.abs(z) < 20) * k)
        write_series(scans / f"s{k}", image, change=change)
    outcome = run(scans, tmp_path / "archive")
    assert (len(outcome.added), len({entry.subject for entry in outcome.added})) == (3, 1)
    assert len(outcome.lines()) == is_warned
    if is_warned:
        other = next(k for k in (1, 2) if frames[k] != frames[0] or not frames[k])
        assert f"such as {scans}/s0/000.dcm and {scans}/s{other}/000.dcm: each" in outcome.lines()[0]


@pytest.mark.parametrize("tag", ["PatientID", "StudyInstanceUID"])
def test_a_series_of_several_patients_or_studies_is_warned_of(tag: str, tmp_path: Path) -> None:
    def renamed(k: int, ds: Dataset) -> Dataset:
        setattr(ds, tag, f"1.{k // 10}")
        return ds

    write_series(tmp_path / "scans", thorax_image((40, 30, 20), (9, 9, 18)), change=renamed)
    outcome = run(tmp_path / "scans", tmp_path / "archive")
    assert len(outcome.added) == 2
    assert outcome.lines()[0] == (
        "warning: 1 SeriesInstanceUIDs belong to several patients or studies, such as that of "
        f"{tmp_path}/scans/000.dcm and 9 more and {tmp_path}/scans/028.dcm and 9 more: they were read as different "
        "scans. If they are one, correct PatientID and StudyInstanceUID"
    )


@pytest.mark.parametrize("tag", ["StudyInstanceUID", "InstanceNumber"])
def test_a_series_in_several_folders_without_a_study_or_numbers_is_one_scan(tag: str, tmp_path: Path) -> None:
    def blank(_: int, ds: Dataset) -> Dataset:
        setattr(ds, tag, None)
        return ds

    paths = write_series(tmp_path / "scans" / "1", thorax_image((40, 30, 20), (9, 9, 18)), change=blank)
    (tmp_path / "scans" / "2").mkdir()
    for path in paths[10:]:
        path.rename(tmp_path / "scans" / "2" / path.name)
    outcome = run(tmp_path / "scans", tmp_path / "archive")
    assert (len(outcome.added), outcome.lines()) == (1, [])
    assert outcome.added[0].record["source_size"] == [40, 30, 20]


def test_progress_names_what_comes_next_and_ends_at_all(mixed: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    run(mixed, tmp_path / "archive", progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(len(calls)))
    assert {total for _, total, _ in calls} == {len(calls) - 1}
    assert calls[0][2] == "anna.nii.gz"
    assert calls[-1][2] == ""


def test_phantoms_are_added_once_and_more_of_them_later(tmp_path: Path) -> None:
    url, grid = str(tmp_path / "archive"), Grid(32, 10.0)
    geometry = chest(grid)
    first = ingest_phantoms(url, grid, geometry, count=3, seed=0)
    again = ingest_phantoms(url, grid, geometry, count=4, seed=0)
    assert (len(first.added), again.already_present, len(again.added)) == (3, 3, 1)
    archive = Archive(url)
    assert [entry.id for entry in archive.entries()] == [f"phantom-0-{k:04d}" for k in range(4)]
    assert {entry.label_method for entry in archive.entries()} == {"phantom"}
    volumes = [archive.read(entry).volume for entry in archive.entries()]
    assert len({volume.tobytes() for volume in volumes}) == 4
    other = ingest_phantoms(str(tmp_path / "other"), grid, geometry, count=3, seed=0)
    assert [entry.sha256 for entry in other.added] == [entry.sha256 for entry in first.added]


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (3, -1)])
def test_no_phantoms_or_a_negative_seed_are_refused(count: int, seed: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{count} phantoms from seed {seed}: give 1 or more"):
        ingest_phantoms(str(tmp_path / "archive"), GRID, GEOMETRY, count=count, seed=seed)
    assert not (tmp_path / "archive").exists()


def test_radiographs_of_air_are_empty_and_of_a_body_are_not() -> None:
    hu = np.full(GRID.shape, -1024, dtype=np.int16)
    assert not render_drrs(hu, GRID, GEOMETRY).any()
    hu[10:20, 10:20, 10:20] = 0
    images = render_drrs(hu, GRID, GEOMETRY)
    assert images.shape == (2, 32, 32)
    assert images.max() == pytest.approx(0.02 * 120, rel=0.01)


def test_real_scans_of_every_kind_become_one_archive(real_data: Path, tmp_path: Path) -> None:
    grid = Grid(64, 6.0)
    geometry = chest(grid)
    sources = [real_data / "ct" / "lidc_idri_0003_2mm.nii.gz", real_data / "ct" / "lung_pet_ct_dx_a0001.nii.gz"]
    outcome = ingest_ct([*sources, real_data / "raw"], str(tmp_path / "archive"), grid, geometry, limits=ScanLimits())
    assert sorted(entry.source for entry in outcome.added) == [
        "dicom_ct_lung_dx_a0002", "elastix_3DCT_lung.mha", "lidc_idri_0003_2mm.nii.gz", "lung_pet_ct_dx_a0001.nii.gz",
    ]  # fmt: skip
    assert [str(error).partition(": ")[2] for error in outcome.refused] == ["DICOM modality CR is not CT"]
    archive = Archive(str(tmp_path / "archive"))
    for entry in archive.entries():
        stored = archive.read(entry)
        assert -1024 == stored.volume.min() < stored.volume.max() <= 3071
        # A chest attenuates the beam some tens to some thousands of times.
        assert 2 < stored.radiographs[0].max() < 14
