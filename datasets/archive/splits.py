"""Train, validation and test splits by a hash of the subject.

A subject's split depends on its name and the rule only. So all scans of a subject are in one split, an archive can be
extended without a test subject entering training, and two archives with the same rule agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raylift.datasets.csv_file import read_rows
from raylift.datasets.errors import ConfigError
from raylift.datasets.sources import pseudonym

Split = Literal["train", "val", "test"]
SplitChoice = Literal[Split, "all"]
"""A split, or all of them."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
IDENTIFIERS = ("subject", "patient", "series_uid")
"""Columns that name whom a row of a list is about; patients and series are compared by their pseudonyms."""
LISTS = Path(__file__).parent / "split_lists"
PUBLISHED = {
    "x2ct-lidc": "X2CT-GAN: LIDC-IDRI, 916 train and 102 test scans; 3DGAN/data of kylekma/X2CT at a9f0473",
    "luna16": "C2RV: LUNA16, 738 train, 50 val, 100 test scans; data/LUNA16/splits.json of xmed-lab/C2RV-CBCT",
}
"""Published lists and their source; `split_lists/NAME.csv` holds patients' numbers or series UIDs, and splits."""


@dataclass(frozen=True)
class SplitRule:
    """Fractions of the splits (train, val, test), the salt of the hash, and subjects assigned by hand."""

    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    salt: int = 0
    assigned: Mapping[str, Split] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In this form NaN fails too.
        if not (min(self.fractions) >= 0 and abs(sum(self.fractions) - 1) <= 1e-6):
            raise ConfigError(f"split fractions {self.fractions} are not three positive numbers that sum to 1")

    def split(self, subject: str) -> Split:
        """The split of a subject."""
        if subject in self.assigned:
            return self.assigned[subject]
        # Files named by a patient's number match a list of pseudonyms, as DICOM series do.
        if self.assigned and (name := pseudonym(subject)) in self.assigned:
            return self.assigned[name]
        place = int.from_bytes(hashlib.sha256(f"{self.salt}/{subject}".encode()).digest()[:8], "big") / 2**64
        train, val, _ = self.fractions
        return "train" if place < train else "val" if place < train + val else "test"


def balanced_split_rule(
    subjects: Iterable[str], fractions: tuple[float, float, float], assigned: Mapping[str, Split]
) -> SplitRule:
    """The rule of a new archive: of 100 salts the first whose counts are closest to the fractions.

    With a fixed salt, eight subjects leave the test split empty four times in ten. The salt is chosen by the counts
    only, before any volume is read, and never changes afterwards.
    """
    names = set(subjects)

    def distance(rule: SplitRule) -> tuple[int, float]:
        counts = dict.fromkeys(SPLITS, 0)
        for name in names:
            counts[rule.split(name)] += 1
        expected = dict(zip(SPLITS, fractions, strict=True))
        empty = sum(expected[split] > 0 and counts[split] == 0 for split in SPLITS)
        return empty, sum(abs(counts[split] - expected[split] * len(names)) for split in SPLITS)

    return min((SplitRule(fractions, salt, assigned) for salt in range(100)), key=distance)


@dataclass(frozen=True)
class Assignments:
    """Subjects assigned to splits by a list."""

    splits: dict[str, Split]
    """By subject, or by the pseudonym of a patient or series."""
    notes: tuple[str, ...] = ()
    """What differs from the list as published, in sentences."""


def absent(assigned: Iterable[str], subjects: Iterable[str]) -> int:
    """The number of assigned subjects or pseudonyms that match none of the subjects."""
    names = set(subjects)
    return len(set(assigned) - names - {pseudonym(name) for name in names})


def read_assignments(source: str | Path) -> Assignments:
    """The assignments of a published list by its name in `PUBLISHED`, or of a CSV."""
    name = str(source)
    return published_assignments(name) if name in PUBLISHED else Assignments(_read_table(Path(source)))


def published_assignments(name: str) -> Assignments:
    """The assignments of a published list, by pseudonym.

    A patient in several splits stays in test. Where a list has no validation split, every tenth training patient by
    name becomes validation.
    """
    _, rows = read_rows(LISTS / f"{name}.csv")
    listed: dict[str, set[str]] = {}
    for row in rows:
        identifier, split = row.values()
        listed.setdefault(identifier, set()).add(split)
    notes = []
    for identifier in sorted(name for name, splits in listed.items() if len(splits) > 1):
        notes.append(
            f"{name} lists {identifier} in {' and '.join(sorted(listed[identifier]))}: it is kept in test alone"
        )
        listed[identifier] = {"test"}
    splits: dict[str, Split] = {
        identifier: split for identifier, (only,) in listed.items() for split in SPLITS if split == only
    }
    if "val" not in splits.values():
        training = sorted(identifier for identifier, split in splits.items() if split == "train")
        splits |= dict.fromkeys(training[::10], "val")
        notes.append(f"{name} has no validation split: every tenth training patient became validation")
    return Assignments({pseudonym(identifier): split for identifier, split in splits.items()}, tuple(notes))


def _read_table(path: Path) -> dict[str, Split]:
    """Subjects and splits from a CSV with the column `split` and one of `IDENTIFIERS`.

    Raises:
        ConfigError: not a CSV in UTF-8, a missing column, an unknown split, or two splits for one subject.
    """
    columns, given = read_rows(path)
    column = next((name for name in IDENTIFIERS if name in columns), "")
    if not column or "split" not in columns:
        raise ConfigError(f"{path}: columns {columns}, needed are split and one of {', '.join(IDENTIFIERS)}")
    assigned: dict[str, Split] = {}
    for row in given:
        subject, split = row[column], row["split"]
        if not subject:
            raise ConfigError(f"{path}: a row without {column}, with split '{split}'")
        if split not in SPLITS:
            raise ConfigError(f"{path}: {column} {subject} has split '{split}': use train, val or test")
        key = subject if column == "subject" else pseudonym(subject)
        if assigned.setdefault(key, split) != split:
            raise ConfigError(f"{path}: {column} {subject} is in two splits, {assigned[key]} and {split}")
    return assigned
