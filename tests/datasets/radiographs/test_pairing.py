"""Which files are a pair: by name, by study, by a table, by Indiana's table."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from radiograph_samples import code, dicom, encoded

from raylift.datasets.errors import ConfigError
from raylift.datasets.radiographs.folder_search import find_pairs
from raylift.datasets.radiographs.pair_table import image_key, read_pairs
from raylift.datasets.radiographs.pairing import FoundPairs, LeftOut

REMEDY = "name it as anna_frontal or anna_lateral"
NO_TAG = f"no view in ViewPosition, ViewCodeSequence, descriptions or path: set one or {REMEDY}"


def touch(folder: Path, *names: str) -> None:
    """Files that a search by name need not open."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x89PNG")


def pairs(found: FoundPairs, folder: Path) -> dict[str, tuple[str, ...]]:
    """Subject to file names below the folder."""
    assert len({pair.subject for pair in found.sources}) == len(found.sources)
    return {pair.subject: tuple(path.relative_to(folder).as_posix() for path in pair.files) for pair in found.sources}


@pytest.mark.parametrize(
    ("frontal", "lateral", "subject"),
    [
        ("anna_frontal.png", "anna_lateral.jpg", "anna"),
        ("anna-PA.jpg", "anna-LAT.jpeg", "anna"),
        ("covid-19-15-PA-2.jpg", "covid-19-15-LAT-2.jpg", "covid-19-15-2"),
        ("AP anna.tif", "Lateral anna.tiff", "anna"),
        ("anna/pa.png", "anna/lat.png", "anna"),
        ("frontal/anna.png", "lateral/anna.png", "anna"),
        ("ward/anna/pa 1.png", "ward/anna/lat 1.png", "ward-anna-1"),
        ("frontal.png", "lateral.png", "xrays"),
        ("patient00001/study1/view1_frontal.jpg", "patient00001/study1/view2_lateral.jpg", "patient00001"),
        ("p1/study2/view1_PA.jpg", "p1/study2/view2_LAT.jpg", "p1"),
        ("anna_pa.png", "anna_left_lateral.png", "anna"),
        ("anna-PA.png", "anna-LAT-right.png", "anna"),
        ("frontal1.png", "Lateral1.png", "1"),
        ("pa02.png", "lat02.png", "02"),
    ],
)
def test_files_are_paired_by_what_their_names_have_in_common(
    frontal: str, lateral: str, subject: str, tmp_path: Path
) -> None:
    folder = tmp_path / "xrays"
    touch(folder, frontal, lateral)
    assert pairs(find_pairs([folder]), folder) == {subject: (frontal, lateral)}


def test_images_are_recognized_by_their_content(tmp_path: Path) -> None:
    for name, kind in (("anna_pa.dcm", "PNG"), ("anna_lat", "TIFF"), ("bert_pa.img", "JPEG"), ("bert_lat.dcm", "PNG")):
        (tmp_path / name).write_bytes(encoded(Image.new("L", (96, 96)), kind))
    found = find_pairs([tmp_path])
    wanted = {"anna": ("anna_pa.dcm", "anna_lat"), "bert": ("bert_pa.img", "bert_lat.dcm")}
    assert (pairs(found, tmp_path), found.left_out) == (wanted, [])


def test_the_studies_of_a_patient_are_pairs_of_one_subject(tmp_path: Path) -> None:
    for study in ("patient1/study1", "patient1/study2", "patient2/study1"):
        touch(tmp_path, f"{study}/view1_frontal.jpg", f"{study}/view2_lateral.jpg")
    found = find_pairs([tmp_path])
    assert [pair.subject for pair in found.sources] == ["patient1", "patient1", "patient2"]
    assert all(len({path.parent for path in pair.files}) == 1 for pair in found.sources)


def test_a_view_inside_a_longer_word_is_ignored_and_a_name_with_two_views_has_none(tmp_path: Path) -> None:
    touch(tmp_path, "papa.png", "lateralis.png", "flat.png", "pa_lateral.png", "lateral/anna_pa.png", "notes.txt")
    found = find_pairs([tmp_path])
    assert (found.sources, found.single_view, found.skipped, found.refused) == ([], 0, 6, [])


def test_subjects_with_one_view_or_several_images_of_a_view_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a_pa.png", "b_lat.png", "c_pa.png", "c_ap.png", "c_lat.png", "d_pa.png", "d_lat.png")
    found = find_pairs([tmp_path])
    assert pairs(found, tmp_path) == {"c": ("c_ap.png", "c_lat.png"), "d": ("d_pa.png", "d_lat.png")}
    assert (found.single_view, found.ambiguous) == (2, 0)
    exact = find_pairs([tmp_path], skip_ambiguous=True)
    assert pairs(exact, tmp_path) == {"d": ("d_pa.png", "d_lat.png")}
    assert (exact.single_view, exact.ambiguous) == (2, 1)


def test_a_file_of_no_view_that_was_named_is_refused_with_the_remedy(tmp_path: Path) -> None:
    touch(tmp_path, "anna.png")
    found = find_pairs([tmp_path / "anna.png", tmp_path / "nowhere"])
    assert [str(error) for error in found.refused] == [
        f"{tmp_path}/anna.png: no view in its path, or several: {REMEDY}",
        f"{tmp_path}/nowhere: no such file or folder",
    ]


def test_dicom_files_are_paired_by_study_and_view_whatever_their_names(tmp_path: Path) -> None:
    reported = {
        "IM1": ("one", "p1", "PA"), "IM2": ("one", "p1", "LL"), "IM3": ("two", "p2", "AP"), "IM4": ("two", "p2", "RL"),
        "IM5": ("three", "p1", "PA"), "IM6": ("three", "p1", "LLD"), "IM7": ("four", "p4", None),
        "IM8_pa": ("five", "p5", ""), "lat_IM9.dcm": ("five", "p5", None),
    }  # fmt: skip
    for name, (study, patient, position) in reported.items():
        tags = {"ViewPosition": position} if position is not None else {}
        uid = f"1.2.{len(study)}{ord(study[0])}"
        (tmp_path / name).write_bytes(dicom(StudyInstanceUID=uid, PatientID=patient, **tags))
    found = find_pairs([tmp_path])
    by_files = {files: subject for subject, files in pairs(found, tmp_path).items()}
    assert set(by_files) == {("IM1", "IM2"), ("IM3", "IM4"), ("IM8_pa", "lat_IM9.dcm")}
    assert all(subject.startswith("sub-") and "p1" not in subject for subject in by_files.values())
    # A decubitus image is no lateral view; IM7 has no description.
    assert (found.single_view, found.skipped, found.refused) == (1, 2, [])
    assert {path.name: reason for path, reason in found.left_out} == {
        "IM5": f"no lateral image of study 1.2.5{ord('t')}",
        "IM6": "ViewPosition LLD is neither frontal nor lateral",
        "IM7": NO_TAG,
    }
    assert all(pair.is_dicom for pair in found.sources)


def test_a_dicom_file_that_cannot_be_looked_into_is_refused_and_the_others_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "a_pa.png", "a_lat.png")
    (tmp_path / "bad_pa.dcm").write_bytes(dicom(syntax=DeflatedExplicitVRLittleEndian))
    found = find_pairs([tmp_path])
    assert len(found.sources) == 1
    assert "bad_pa.dcm: deflated DICOM" in str(found.refused[0])


FRONTAL_TAGS: list[dict[str, Any]] = [
    {"ViewPosition": "PA"}, {"ViewPosition": "AP"},
    {"ViewCodeSequence": [code("399348003", "SCT", "antero-posterior")]},
    {"ViewCodeSequence": [code("R-10206", "SRT", "antero-posterior")]},
    {"ViewCodeSequence": [code("X1", "99LOCAL", "Postero-Anterior")]},
    {"SeriesDescription": "Chest PA"}, {"SeriesDescription": "W033 Thorax p.a."},
    {"AcquisitionDeviceProcessingDescription": "CHEST, FRONTAL"},
    {"PatientOrientation": ["L", "F"]}, {"PatientOrientation": ["F", "R"]},
]  # fmt: skip
LATERAL_TAGS: list[dict[str, Any]] = [
    {"ViewPosition": "LATERAL"}, {"ViewPosition": "LL"}, {"ViewPosition": "RL"}, {"ViewPosition": "XTABLE"},
    {"ViewPosition": "XTABLE LATERAL"}, {"ViewPosition": "LAT"},
    {"ViewCodeSequence": [code("399173006", "SCT", "left lateral")]},
    {"ViewCodeSequence": [code("R-10236", "SRT", "left lateral")]}, {"ViewCodeSequence": [code("", "", "Lateral")]},
    {"ProtocolName": "Thorax lat."}, {"SeriesDescription": "Thorax seitlich"},
    {"PatientOrientation": ["P", "F"]}, {"PatientOrientation": ["F", "A"]},
]  # fmt: skip


@pytest.mark.parametrize("lateral", LATERAL_TAGS, ids=str)
@pytest.mark.parametrize("frontal", [FRONTAL_TAGS[0], FRONTAL_TAGS[3]], ids=str)
def test_a_lateral_is_known_by_its_header(frontal: dict[str, Any], lateral: dict[str, Any], tmp_path: Path) -> None:
    mimic = tmp_path / "files" / "p10" / "p10000032" / "s50414267"
    mimic.mkdir(parents=True)
    for name, tags in (("02aa804e-bde0afdd", frontal), ("174413ec-4ec4c1f7", lateral)):
        (mimic / f"{name}.dcm").write_bytes(dicom(StudyInstanceUID="1.2.3", PatientID="p", **tags))
    [pair] = find_pairs([tmp_path]).sources
    assert [path.stem for path in pair.files] == ["02aa804e-bde0afdd", "174413ec-4ec4c1f7"]


@pytest.mark.parametrize("study", ["1.2.3", ""])
def test_images_of_two_patients_are_no_pair(study: str, tmp_path: Path) -> None:
    (tmp_path / "IM1").write_bytes(dicom(StudyInstanceUID=study, PatientID="anna", ViewPosition="PA"))
    (tmp_path / "IM2").write_bytes(dicom(StudyInstanceUID=study, PatientID="bert", ViewPosition="LL"))
    found = find_pairs([tmp_path])
    assert (found.sources, found.single_view) == ([], 2)


def test_images_without_patient_and_study_are_paired_by_their_names(tmp_path: Path) -> None:
    for name, view in (("anna_pa", "PA"), ("bert_lat", "LL"), ("cleo_pa", "PA"), ("cleo_lat", "LL")):
        (tmp_path / f"{name}.dcm").write_bytes(dicom(StudyInstanceUID="", PatientID="", ViewPosition=view))
    found = find_pairs([tmp_path])
    assert pairs(found, tmp_path) == {"cleo": ("cleo_pa.dcm", "cleo_lat.dcm")}
    assert found.single_view == 2


@pytest.mark.parametrize("tags", FRONTAL_TAGS, ids=str)
def test_a_frontal_is_known_by_its_header(tags: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "IM1").write_bytes(dicom(StudyInstanceUID="1.2.3", **tags))
    (tmp_path / "IM2").write_bytes(dicom(StudyInstanceUID="1.2.3", ViewPosition="LL"))
    assert len(find_pairs([tmp_path]).sources) == 1


def modified(meaning: str) -> dict[str, Any]:
    """A frontal view with a modifier."""
    view = code("399348003", "SCT", "antero-posterior")
    view.ViewModifierCodeSequence = [code("X1", "99LOCAL", meaning)]
    return {"ViewCodeSequence": [view]}


def test_a_modifier_that_leaves_the_view_is_no_reason(tmp_path: Path) -> None:
    (tmp_path / "IM1").write_bytes(dicom(StudyInstanceUID="1.2.3", **modified("Cross-table")))
    (tmp_path / "IM2").write_bytes(dicom(StudyInstanceUID="1.2.3", ViewPosition="LL"))
    assert len(find_pairs([tmp_path]).sources) == 1


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"ViewPosition": "LLD"}, "ViewPosition LLD is neither frontal nor lateral"),
        ({"ViewPosition": "AP RLD"}, "ViewPosition AP RLD is neither frontal nor lateral"),
        ({"ViewPosition": "LAO"}, "ViewPosition LAO is neither frontal nor lateral"),
        *(
            ({"ViewPosition": position}, f"ViewPosition {position} is neither frontal nor lateral")
            for position in ("LAT DECUB", "LATERAL DECUB", "LAT OBL", "PA OBL", "AP LORDO")
        ),
        *(
            (tags, f"ViewModifierCodeSequence {meaning} is neither frontal nor lateral")
            for meaning in ("Lordotic", "Lateral decubitus", "Oblique")
            for tags in (modified(meaning), {"ViewPosition": "PA"} | modified(meaning))
        ),
        (
            {"ViewCodeSequence": [code("399135007", "SCT", "left anterior oblique")]},
            "ViewCodeSequence left anterior oblique is neither frontal nor lateral",
        ),
        (
            {"ViewPosition": "PA", "ViewCodeSequence": [code("399067008", "SCT", "lateral")]},
            "ViewPosition PA and ViewCodeSequence lateral contradict each other",
        ),
        ({}, NO_TAG),
        ({"SeriesDescription": "not lateral"}, NO_TAG),
    ],
    ids=str,
)
def test_a_dicom_file_of_no_view_is_left_out_with_the_reason(tags: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "IM1").write_bytes(dicom(StudyInstanceUID="1.2.3", **tags))
    found = find_pairs([tmp_path])
    assert found.left_out == [LeftOut(tmp_path / "IM1", reason)]
    [refusal] = find_pairs([tmp_path / "IM1"]).refused
    assert str(refusal) == f"{tmp_path / 'IM1'}: {reason}"


def test_other_objects_of_a_study_take_the_place_of_no_radiograph(tmp_path: Path) -> None:
    private = pydicom.Dataset()
    private.add_new(0x00090010, "LO", "RAYLIFT")
    private.add_new(0x00091001, "OB", bytes(1_200_000))
    remedy = "give a radiograph of the chest, or correct the tag"
    others: dict[str, tuple[dict[str, Any], str]] = {
        "a_pr": ({"Modality": "PR", "PixelData": None}, f"modality PR is not that of a radiograph: {remedy}"),
        "a_scout": ({"Modality": "CT"}, f"modality CT is not that of a radiograph: {remedy}"),
        "a_empty": ({"Rows": None, "Columns": None, "PixelData": None}, "no pixels: Rows and Columns are absent"),
        "a_hand": ({"BodyPartExamined": "HAND"}, f"BodyPartExamined HAND is not a chest: {remedy}"),
        "a_raw": ({"PresentationIntentType": "FOR PROCESSING"}, "b_pa is the frontal image of the study"),
    }
    radiographs = {"b_pa": {"PresentationIntentType": "FOR PRESENTATION"}, "c_lat": {"ViewPosition": "LL"}}
    for name, tags in {**{name: tags for name, (tags, _) in others.items()}, **radiographs}.items():
        data = dicom(StudyInstanceUID="1.2", PatientID="p", **({"ViewPosition": "PA"} | tags))
        dataset = pydicom.dcmread(io.BytesIO(data))
        dataset.update(private)
        dataset.save_as(tmp_path / name)
    found = find_pairs([tmp_path])
    assert [[path.name for path in pair.files] for pair in found.sources] == [["b_pa", "c_lat"]]
    assert found.refused == []
    assert {path.name: reason for path, reason in found.left_out} == {
        name: reason for name, (_, reason) in others.items()
    }


def test_an_image_computed_from_a_radiograph_comes_after_it(tmp_path: Path) -> None:
    computed: dict[str, dict[str, Any]] = {
        "a_bone": {"ImageType": ["DERIVED", "PRIMARY", "BONE"]}, "a_tube": {"DerivationDescription": "Tubes enhanced"},
        "a_soft": {"SeriesDescription": "PA, bone suppression"}, "a_copy": {"ImageType": ["DERIVED", "SECONDARY"]},
    }  # fmt: skip
    for name, tags in {
        **computed,
        "b_pa": {"ImageType": ["DERIVED", "PRIMARY"]},
        "c_lat": {"ViewPosition": "LL"},
    }.items():
        (tmp_path / name).write_bytes(dicom(StudyInstanceUID="1.2", PatientID="p", **({"ViewPosition": "PA"} | tags)))
    found = find_pairs([tmp_path])
    assert [[path.name for path in pair.files] for pair in found.sources] == [["b_pa", "c_lat"]]
    assert {path.name: reason for path, reason in found.left_out} == dict.fromkeys(
        computed, "b_pa is the frontal image of the study"
    )


@pytest.mark.parametrize(
    "word",
    [
        "decubitus",
        "decub",
        "lordotic",
        "oblique",
        "obl",
        "LLD",
        "LPO",
        "apical",
        "axial",
        "swimmers",
        "nonfrontal",
        "non-lateral",
        "not lateral",
    ],
)
def test_a_name_of_another_view_is_in_no_pair(word: str, tmp_path: Path) -> None:
    touch(tmp_path, f"anna_{word}_pa.png", f"{word}/anna_lat.png", f"{word}/anna_pa.png", "bert_pa.png", "bert_lat.png")
    found = find_pairs([tmp_path])
    assert pairs(found, tmp_path) == {"bert": ("bert_pa.png", "bert_lat.png")}
    assert {reason for _, reason in found.left_out} == {"neither frontal nor lateral by its name"}


def test_every_file_that_is_in_no_pair_is_named_with_its_reason(tmp_path: Path) -> None:
    touch(
        tmp_path, "a_pa.png", "b_pa.png", "b_pa_2.png", "c_ap.png", "c_pa.png", "c_lat.png", "masks/c_pa.png", "x.txt"
    )
    found = find_pairs([tmp_path])
    assert {path.relative_to(tmp_path).as_posix(): reason for path, reason in found.left_out} == {
        "a_pa.png": f"no lateral image of a in {tmp_path}", "b_pa.png": f"no lateral image of b in {tmp_path}",
        "b_pa_2.png": f"no lateral image of b_2 in {tmp_path}",
        "c_pa.png": "c_ap.png is the frontal image of the study",
        "masks/c_pa.png": "a segmentation by its name", "x.txt": "not DICOM, PNG, JPEG, TIFF or BMP",
    }  # fmt: skip
    exact = dict(find_pairs([tmp_path], skip_ambiguous=True).left_out)
    assert exact[tmp_path / "c_lat.png"] == "one of 2 frontal and 1 lateral images of a study"


# --- tables ---


MIMIC = """dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows
02aa804e,10000032,50414267,CHEST (PA AND LAT),PA,3056
174413ec,10000032,50414267,CHEST (PA AND LAT),LATERAL,3056
2a2277a9,10000032,53189527,CHEST (PA AND LAT),PA,3056
e084de3b,10000032,53189527,CHEST (PA AND LAT),LL,3056
68b5c4b1,10000764,57375967,CHEST (PORTABLE AP),AP,2544
096052b7,10000764,57375967,CHEST (PORTABLE AP),AP LLD,2544
ffffffff,10000935,50578979,CHEST (PA AND LAT),PA,2544
"""


def test_the_pairs_of_mimics_table_are_found_in_its_tree(tmp_path: Path) -> None:
    tree = tmp_path / "files" / "p10"
    rows = [line.split(",") for line in MIMIC.splitlines()[1:-1]]
    touch(tree, *(f"p{subject}/s{study}/{name}.jpg" for name, subject, study, *_ in rows))
    found = read_pairs(table(tmp_path, MIMIC), [tmp_path / "files"])
    assert [(pair.subject, [path.stem for path in pair.files]) for pair in found.sources] == [
        ("mimic-10000032", ["02aa804e", "174413ec"]), ("mimic-10000032", ["2a2277a9", "e084de3b"]),
    ]  # fmt: skip
    assert {path.stem: reason for path, reason in found.left_out} == {
        "68b5c4b1": "no lateral image of study 57375967",
        "096052b7": "ViewPosition AP LLD: neither frontal nor lateral",
    }  # fmt: skip


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "pairs.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_a_table_finds_files_next_to_it_by_their_path_and_by_their_name(tmp_path: Path) -> None:
    home, images = tmp_path / "home", tmp_path / "images"
    touch(home, "here 1.png", "here 2.png")
    touch(images, "deep/f.png", "deep/l.png", "x/only.png", "x/twice.png", "y/twice.png")
    csv = table(
        home,
        "subject,frontal,lateral,patient_facing\nanna,here 1.png,here 2.png,\nbert,deep/f.png,deep/l.png,Right\n"
        "carl,only.png,deep/l.png,auto\ndora,twice.png,deep/l.png,\nemil,gone.png,deep/l.png,\nfritz,only.png,,\n",
        "utf-8-sig",
    )
    found = read_pairs(csv, [images])
    assert pairs(found, tmp_path) == {
        "anna": ("home/here 1.png", "home/here 2.png"),
        "bert": ("images/deep/f.png", "images/deep/l.png"),
        "carl": ("images/x/only.png", "images/deep/l.png"),
    }
    assert [pair.patient_facing for pair in found.sources] == ["auto", "right", "auto"]
    # A name that two files have is as good as missing.
    assert found.missing_files == ["twice.png", "gone.png"]
    assert found.single_view == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frontal,lateral\na,b\n", r"columns \['frontal', 'lateral'\]; required are subject, frontal and lateral, or"),
        (
            "subject,frontal,lateral,patient_facing\nanna,a,b,up\n",
            "subject 'anna', patient_facing 'up': name a subject, and as patient_facing",
        ),
        ("subject,frontal,lateral\n,a,b\n", "subject '', patient_facing 'None': name a subject"),
        ("uid,filename,projection\n1,1_IM-1-1.png,Oblique\n", "uid '1' has projection 'Oblique': Frontal or Lateral"),
        ("", r"columns \[\]; required are"),
    ],
)
def test_a_table_that_means_nothing_is_refused_by_its_value(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pairs(table(tmp_path, text), [tmp_path])


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a CSV in UTF-8"):
        read_pairs(table(tmp_path, "subject,frontal,lateral\nJürgen,a,b\n", "latin-1"), [tmp_path])


# --- Indiana's table: a small one of the same make, with every odd case ---

INDIANA = """uid,filename,projection
1,1_IM-0001-4001.dcm.png,Frontal
1,1_IM-0001-3001.dcm.png,Lateral
2,2_IM-0652-1001.dcm.png,Frontal
2,2_IM-0652-2001.dcm.png,Lateral
3,3_IM-1384-1001.dcm.png,Frontal
4,4_IM-2050-2001.dcm.png,Lateral
5,5_IM-2117-1003002.dcm.png,Frontal
5,5_IM-2117-1001.dcm.png,Frontal
5,5_IM-2117-2001.dcm.png,Lateral
6,6_IM-2192-1001.dcm.png,Frontal
6,6_IM-2192-2001.dcm.png,Lateral
6,6_IM-2192-2002.dcm.png,Lateral
7,7_IM-2263-0001-0001.dcm.png,Frontal
7,7_IM-2263-0001-0002.dcm.png,Lateral
11,11_IM-0067-1001.dcm.png,Frontal
11,11_IM-0067-2001.dcm.png,Lateral
372,372_IM-1855-1001.dcm.png,Frontal
372,372_IM-1855-2001.dcm.png,Lateral
"""
"""For uid 1 both schemes differ twice; 3 and 4 have one view, 5 two frontals, 6 two laterals, 7 another group of
numbers; of 372 a file is missing."""
PRESENT = [line.split(",")[1] for line in INDIANA.splitlines()[1:] if "372_IM-1855-2001" not in line]


EXACT = [
    ("1", "0001-4001", "0001-3001"), ("2", "0652-1001", "0652-2001"), ("7", "2263-0001-0001", "2263-0001-0002"),
    ("11", "0067-1001", "0067-2001"),
]  # fmt: skip
SEVERAL = [("5", "2117-1003002", "2117-2001"), ("6", "2192-1001", "2192-2001")]


def at_open_i(name: str) -> str:
    """What Open-i calls a file of Kaggle's."""
    name = "CXR" + name.replace(".dcm", "")
    return name.replace("CXR1_IM", "CXR1_1_IM")


@pytest.mark.parametrize("scheme", [lambda name: name, at_open_i], ids=["Kaggle", "Open-i"])
@pytest.mark.parametrize("written", [lambda name: name, at_open_i], ids=["Kaggle's table", "renamed table"])
def test_the_pairs_of_indianas_table_are_found_under_both_names(
    scheme: Callable[[str], str], written: Callable[[str], str], tmp_path: Path
) -> None:
    images = tmp_path / "images" / "images_normalized"
    touch(images, *map(scheme, PRESENT), "unlisted.png")
    rows = [line.split(",") for line in INDIANA.splitlines()]
    text = "\n".join([",".join(rows[0]), *(f"{uid},{written(name)},{view}" for uid, name, view in rows[1:])])
    csv = table(tmp_path, text)
    found = read_pairs(csv, [tmp_path / "images"])
    wanted = {uid: (f"{uid}_IM-{f}", f"{uid}_IM-{t}") for uid, f, t in EXACT + SEVERAL}
    assert pairs(found, images) == {
        f"indiana-{uid}": tuple(scheme(f"{name}.dcm.png") for name in names) for uid, names in wanted.items()
    }
    assert (found.single_view, found.ambiguous) == (2, 0)
    assert found.missing_files == [written("372_IM-1855-2001.dcm.png")]
    exact = read_pairs(csv, [tmp_path / "images"], skip_ambiguous=True)
    assert {pair.subject for pair in exact.sources} == {f"indiana-{uid}" for uid, *_ in EXACT}
    assert (exact.single_view, exact.ambiguous) == (2, 2)


def test_names_of_one_image_are_the_same_and_others_are_not() -> None:
    one = image_key("1_IM-0001-4001.dcm.png")
    assert one == image_key("CXR1_1_IM-0001-4001.png") == image_key("CXR1_IM-0001-4001.png")
    assert one == image_key("1_IM-0001-4001.dcm")
    different = ["11_IM-0001-4001.dcm.png", "CXR1_IM-0001-4001-0001.png", "CXR1_2_IM-0001-4001.png", "1_IM-0001.png"]
    assert len({one, *map(image_key, different)}) == 5


def test_files_that_macos_writes_next_to_images_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "frontal.png", "lateral.png", "._frontal.png", "._lateral.png")
    found = find_pairs([tmp_path])
    assert [path.name for pair in found.sources for path in pair.files] == ["frontal.png", "lateral.png"]
    assert set(found.left_out) == {
        LeftOut(tmp_path / f"._{name}.png", "an AppleDouble file of macOS") for name in ("frontal", "lateral")
    }
