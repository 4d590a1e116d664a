from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylift.datasets.archive.splits import LISTS, SPLITS, SplitRule, absent, balanced_split_rule, read_assignments
from raylift.datasets.csv_file import read_rows
from raylift.datasets.errors import ConfigError
from raylift.datasets.sources import pseudonym

SHARES = (0.8, 0.1, 0.1)


@given(st.text(), st.integers(0, 1000))
def test_a_subject_always_falls_into_the_same_split(subject: str, salt: int) -> None:
    assert SplitRule(SHARES, salt).split(subject) == SplitRule(SHARES, salt).split(subject)


def test_the_split_of_a_subject_is_kept_across_versions() -> None:
    """Changing any of these moves people of every published archive between splits."""
    rule = SplitRule((0.6, 0.2, 0.2), salt=3)
    assert [rule.split(f"subject-{k}") for k in range(12)] == [
        "val", "train", "train", "train", "test", "train", "train", "train", "train", "val", "test", "train",
    ]  # fmt: skip


def test_many_subjects_are_split_in_the_requested_fractions() -> None:
    counts = Counter(SplitRule(SHARES).split(f"person {k}") for k in range(5000))
    for split, share in zip(SPLITS, SHARES, strict=True):
        assert counts[split] / 5000 == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("fractions", "split"), [((1, 0, 0), "train"), ((0, 1, 0), "val"), ((0, 0, 1), "test")])
def test_a_fraction_of_one_takes_everyone(fractions: tuple[float, float, float], split: str) -> None:
    assert {SplitRule(fractions).split(f"s{k}") for k in range(300)} == {split}


def test_another_salt_shuffles_the_subjects() -> None:
    one, other = ([SplitRule(SHARES, salt).split(f"s{k}") for k in range(200)] for salt in (0, 1))
    assert one != other


def test_subjects_assigned_by_hand_stay_where_they_were_put() -> None:
    rule = SplitRule((1, 0, 0), assigned={"a": "test", "b": "val"})
    assert [rule.split(subject) for subject in "abc"] == ["test", "val", "train"]


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.2), (1.1, -0.1, 0), (0, 0, 0), (float("nan"), 0.5, 0.5), (0.5, 0.5, float("nan"))]
)
def test_fractions_that_are_none_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="not three positive numbers that sum to 1"):
        SplitRule(fractions)


@given(st.sets(st.text(min_size=1, max_size=8), min_size=8, max_size=12))
def test_a_few_subjects_are_spread_over_all_splits(subjects: set[str]) -> None:
    rule = balanced_split_rule(subjects, SHARES, {})
    counts = Counter(rule.split(subject) for subject in subjects)
    assert set(counts) == set(SPLITS)
    assert counts["train"] >= len(subjects) - 4


def test_the_balance_depends_neither_on_the_order_of_subjects_nor_on_how_often_they_come() -> None:
    names = [f"s{k}" for k in range(9)]
    assert balanced_split_rule(names, SHARES, {}) == balanced_split_rule(names[::-1] * 3, SHARES, {})


def test_the_balance_counts_those_assigned_by_hand() -> None:
    names = [f"s{k}" for k in range(10)]
    rule = balanced_split_rule(names, SHARES, {"s0": "test", "s1": "val"})
    assert Counter(rule.split(name) for name in names) == {"train": 8, "val": 1, "test": 1}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "splits.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_assignments_are_read_from_a_table_in_any_order_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "split,age,subject\ntest,50,a\ntrain,60,b\ntest,50,a\n")
    assert read_assignments(path).splits == {"a": "test", "b": "train"}


def test_a_table_that_a_spreadsheet_has_saved_is_read(tmp_path: Path) -> None:
    assert read_assignments(write(tmp_path, "\ufeffsubject,split\r\na,test\r\n")).splits == {"a": "test"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns .., needed are split and one of subject, patient, series_uid"),
        ("subject,fold\na,test\n", "needed are split and one of subject"),
        ("subject,split\na,exam\n", "subject a has split 'exam': use train, val or test"),
        ("subject,split\na\n", "subject a has split ''"),
        ("subject,split\na,test\na,train\n", "subject a is in two splits, test and train"),
        ("subject,split\n,test\n", "a row without subject"),
    ],
)
def test_a_table_that_states_nothing_or_two_things_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_assignments(write(tmp_path, text))
    assert "splits.csv" in str(caught.value)


@pytest.mark.parametrize("data", ["subject,split\nMüller,test\n".encode("cp1252"), b"\xff\xfes\0u\0b\0"])
def test_a_table_in_another_encoding_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "splits.csv").write_bytes(data)
    with pytest.raises(ConfigError, match=r"splits\.csv: not a CSV in UTF-8"):
        read_assignments(tmp_path / "splits.csv")


def test_patients_of_a_table_are_hashed_as_those_of_dicom_files(tmp_path: Path) -> None:
    assigned = read_assignments(write(tmp_path, "patient,split\nLIDC-IDRI-0001,test\n")).splits
    assert assigned == {pseudonym("LIDC-IDRI-0001"): "test"}
    rule = SplitRule((1.0, 0.0, 0.0), assigned=assigned)
    # A DICOM series has the pseudonym, a file named by the patient the number itself.
    assert rule.split(pseudonym("LIDC-IDRI-0001")) == rule.split("LIDC-IDRI-0001") == "test"
    assert rule.split("LIDC-IDRI-0002") == "train"
    assert absent(assigned, ["LIDC-IDRI-0001"]) == absent(assigned, [pseudonym("LIDC-IDRI-0001")]) == 0
    assert absent(assigned, ["LIDC-IDRI-0002"]) == 1


def test_the_list_of_x2ct_keeps_the_patient_of_both_splits_in_test_alone_and_states_it() -> None:
    assignments = read_assignments("x2ct-lidc")
    assert assignments.splits[pseudonym("LIDC-IDRI-0442")] == "test"
    assert "LIDC-IDRI-0442 in test and train: it is kept in test alone" in assignments.notes[0]
    counts = Counter(assignments.splits.values())
    assert counts.total() == 1010
    assert counts["val"] == -(-(counts["val"] + counts["train"]) // 10)
    assert "no validation split" in assignments.notes[1]


def test_the_list_of_luna16_has_its_published_counts_and_is_taken_as_it_is() -> None:
    assignments = read_assignments("luna16")
    assert Counter(assignments.splits.values()) == {"train": 738, "val": 50, "test": 100}
    assert assignments.notes == ()


@pytest.mark.parametrize(
    ("name", "file", "column"),
    [("x2ct-lidc", "x2ct_lidc_916_102.csv", "patient_id"), ("luna16", "luna16_738_50_100.csv", "series_uid")],
)
def test_the_lists_in_the_package_are_those_that_were_published(real_data, name, file, column) -> None:
    _, published = read_rows(real_data / "splits" / file)
    _, ours = read_rows(LISTS / f"{name}.csv")
    assert {tuple(row.values()) for row in ours} == {(row[column], row["split"]) for row in published}
