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

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SplitRule:
    """Fractions of the splits (train, val, test), the salt of the hash, and subjects assigned by hand."""

    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    salt: int = 0
    assigned: Mapping[str, Split] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In this form NaN fails too.
        if not (min(self.shares) >= 0 and abs(sum(self.shares) - 1) <= 1e-6):
            raise ConfigError(f"split fractions {self.shares} are not three positive numbers that sum to 1")

    def split(self, subject: str) -> Split:
        """The split of a subject."""
        if subject in self.assigned:
            return self.assigned[subject]
        place = int.from_bytes(hashlib.sha256(f"{self.salt}/{subject}".encode()).digest()[:8], "big") / 2**64
        train, val, _ = self.shares
        return "train" if place < train else "val" if place < train + val else "test"


def balanced_split_rule(
    subjects: Iterable[str], shares: tuple[float, float, float], assigned: Mapping[str, Split]
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
        fractions = dict(zip(SPLITS, shares, strict=True))
        empty = sum(fractions[split] > 0 and counts[split] == 0 for split in SPLITS)
        return empty, sum(abs(counts[split] - fractions[split] * len(names)) for split in SPLITS)

    return min((SplitRule(shares, salt, assigned) for salt in range(100)), key=distance)


def read_assignments(path: Path) -> dict[str, Split]:
    """Subjects and splits from a CSV with the columns `subject` and `split`.

    Raises:
        ConfigError: not a CSV in UTF-8, a missing column, an unknown split, or two splits for one subject.
    """
    columns, given = read_rows(path)
    if not {"subject", "split"} <= set(columns):
        raise ConfigError(f"{path}: columns {columns}, needed are subject and split")
    assigned: dict[str, Split] = {}
    for row in given:
        subject, split = row["subject"], row["split"]
        if not subject:
            raise ConfigError(f"{path}: a row without subject, with split '{split}'")
        if split not in SPLITS:
            raise ConfigError(f"{path}: subject {subject} has split '{split}': use train, val or test")
        if assigned.setdefault(subject, split) != split:
            raise ConfigError(f"{path}: subject {subject} is in two splits, {assigned[subject]} and {split}")
    return assigned
