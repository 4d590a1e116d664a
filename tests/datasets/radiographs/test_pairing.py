"""Which files are a pair: by name, by study, by a table, by Indiana's table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian
from radiograph_samples import dicom

from raylift.datasets.errors import ConfigError
from raylift.datasets.radiographs.folder_search import find_pairs
from raylift.datasets.radiographs.pair_table import image_key, read_pairs
from raylift.datasets.radiographs.pairing import FoundPairs


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
    ],
)
def test_files_are_paired_by_what_their_names_have_in_common(
    frontal: str, lateral: str, subject: str, tmp_path: Path
) -> None:
    folder = tmp_path / "xrays"
    touch(folder, frontal, lateral)
    assert pairs(find_pairs([folder]), folder) == {subject: (frontal, lateral)}


def test_words_within_words_are_none_and_two_views_in_a_name_are_no_view(tmp_path: Path) -> None:
    touch(tmp_path, "papa.png", "lateralis.png", "flat.png", "pa_lateral.png", "lateral/anna_pa.png", "notes.txt")
    found = find_pairs([tmp_path])
    assert (found.sources, found.single_view, found.skipped, found.refused) == ([], 0, 6, [])


def test_who_has_one_view_or_several_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a_pa.png", "b_lat.png", "c_pa.png", "c_ap.png", "c_lat.png", "d_pa.png", "d_lat.png")
    found = find_pairs([tmp_path])
    assert pairs(found, tmp_path) == {"c": ("c_ap.png", "c_lat.png"), "d": ("d_pa.png", "d_lat.png")}
    assert (found.single_view, found.ambiguous) == (2, 0)
    exact = find_pairs([tmp_path], exact=True)
    assert pairs(exact, tmp_path) == {"d": ("d_pa.png", "d_lat.png")}
    assert (exact.single_view, exact.ambiguous) == (2, 1)


def test_a_file_of_no_view_that_was_named_is_refused_with_the_remedy(tmp_path: Path) -> None:
    touch(tmp_path, "anna.png")
    found = find_pairs([tmp_path / "anna.png", tmp_path / "nowhere"])
    assert [str(error) for error in found.refused] == [
        f"{tmp_path}/anna.png: no radiograph of a known view: name it frontal or lateral",
        f"{tmp_path}/nowhere: no such file or folder",
    ]


def test_dicom_files_are_paired_by_study_and_view_whatever_their_names(tmp_path: Path) -> None:
    said = {
        "IM1": ("one", "p1", "PA"), "IM2": ("one", "p1", "LL"), "IM3": ("two", "p2", "AP"), "IM4": ("two", "p2", "RL"),
        "IM5": ("three", "p1", "PA"), "IM6": ("three", "p1", "LLD"), "IM7": ("four", "p4", None),
        "IM8_pa": ("five", "p5", ""), "lat_IM9.dcm": ("five", "p5", None),
    }  # fmt: skip
    for name, (study, patient, position) in said.items():
        tags = {"ViewPosition": position} if position is not None else {}
        uid = f"1.2.{len(study)}{ord(study[0])}"
        (tmp_path / name).write_bytes(dicom(StudyInstanceUID=uid, PatientID=patient, **tags))
    found = find_pairs([tmp_path])
    by_files = {files: subject for subject, files in pairs(found, tmp_path).items()}
    assert set(by_files) == {("IM1", "IM2"), ("IM3", "IM4"), ("IM8_pa", "lat_IM9.dcm")}
    assert all(subject.startswith("sub-") and "p1" not in subject for subject in by_files.values())
    # A decubitus image is no lateral view; IM7 says nothing.
    assert (found.single_view, found.skipped, found.refused) == (1, 2, [])
    assert all(pair.is_dicom for pair in found.sources)


def test_a_dicom_file_that_cannot_be_looked_into_is_refused_and_the_others_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "a_pa.png", "a_lat.png")
    (tmp_path / "bad_pa.dcm").write_bytes(dicom(syntax=DeflatedExplicitVRLittleEndian))
    found = find_pairs([tmp_path])
    assert len(found.sources) == 1
    assert "bad_pa.dcm: deflated DICOM" in str(found.refused[0])


# --- tables ---


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "pairs.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_a_table_finds_files_beside_it_by_their_place_and_by_their_name(tmp_path: Path) -> None:
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
    exact = read_pairs(csv, [tmp_path / "images"], exact=True)
    assert {pair.subject for pair in exact.sources} == {f"indiana-{uid}" for uid, *_ in EXACT}
    assert (exact.single_view, exact.ambiguous) == (2, 2)


def test_names_of_one_image_are_the_same_and_others_are_not() -> None:
    one = image_key("1_IM-0001-4001.dcm.png")
    assert one == image_key("CXR1_1_IM-0001-4001.png") == image_key("CXR1_IM-0001-4001.png")
    assert one == image_key("1_IM-0001-4001.dcm")
    different = ["11_IM-0001-4001.dcm.png", "CXR1_IM-0001-4001-0001.png", "CXR1_2_IM-0001-4001.png", "1_IM-0001.png"]
    assert len({one, *map(image_key, different)}) == 5
