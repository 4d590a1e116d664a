"""Selection of the frontal and the lateral radiograph of each subject or study."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from raylift.datasets.errors import FileError
from raylift.datasets.radiographs.orientation import PatientFacingOption
from raylift.datasets.sources import Source

ViewName = Literal["frontal", "lateral"]


class LeftOut(NamedTuple):
    """A file that became no part of a sample."""

    file: Path
    reason: str


@dataclass(frozen=True)
class RadiographPair(Source):
    """A pair of radiographs of one subject; `files` are the frontal and the lateral one."""

    patient_facing: PatientFacingOption = "auto"
    """The edge that the patient of the lateral one faces, from a table of pairs."""


@dataclass
class PairCandidates:
    """Radiographs of one subject or study, by view."""

    subject: str
    frontal: list[Path] = field(default_factory=list)
    lateral: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Files in a table of pairs that do not exist."""
    patient_facing: PatientFacingOption = "auto"
    is_dicom: bool = False
    key: str = ""
    """The study or path, in messages."""
    ranks: dict[Path, int] = field(default_factory=dict)
    """The place of each file among those of its view, see `dicom_view.rank`."""

    def add(self, view: ViewName, path: Path, rank: int = 0) -> None:
        """Add a radiograph of a view, after those of up to its rank."""
        paths = self.frontal if view == "frontal" else self.lateral
        self.ranks[path] = rank
        paths.append(path)
        paths.sort(key=self.ranks.__getitem__)


@dataclass(frozen=True)
class FoundPairs:
    """Result of a search for pairs."""

    sources: list[RadiographPair]
    """Sorted by subject."""
    refused: list[FileError] = field(default_factory=list)
    skipped: int = 0
    """Files in searched folders that are not radiographs, or have no known view."""
    single_view: int = 0
    """Subjects or studies with only one of the two views."""
    ambiguous: int = 0
    """Subjects or studies skipped for several radiographs of a view, where ambiguous ones are skipped."""
    missing_files: list[str] = field(default_factory=list)
    """Files in a table of pairs that do not exist."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Every file in a searched folder or table that is in no pair."""


def select_pairs(
    groups: Iterable[PairCandidates],
    skip_ambiguous: bool,
    refused: list[FileError],
    skipped: int = 0,
    left_out: Iterable[LeftOut] = (),
) -> FoundPairs:
    """The first frontal and the first lateral radiograph of each group, or of groups with one of each only."""
    sources, single_view, ambiguous = [], 0, 0
    missing, unused = [], list(left_out)
    for group in groups:
        missing += group.missing
        several = len(group.frontal) + len(group.lateral) + len(group.missing) > 2
        if skip_ambiguous and several and group.frontal and group.lateral:
            ambiguous += 1
            reason = f"one of {len(group.frontal)} frontal and {len(group.lateral)} lateral images of a study"
            unused += [LeftOut(path, reason) for path in (*group.frontal, *group.lateral)]
        elif group.frontal and group.lateral:
            files = (group.frontal[0], group.lateral[0])
            name = " + ".join(path.name for path in files)
            sources.append(RadiographPair(name, group.subject, files, group.is_dicom, group.patient_facing))
            for view, paths in (("frontal", group.frontal), ("lateral", group.lateral)):
                unused += [LeftOut(path, f"{paths[0].name} is the {view} image of the study") for path in paths[1:]]
        else:
            single_view += not group.missing
            other = "lateral" if group.frontal else "frontal"
            where = " and ".join(filter(None, (group.key, ", ".join(group.missing)))) or group.subject
            unused += [LeftOut(path, f"no {other} image of {where}") for path in (*group.frontal, *group.lateral)]
    ordered = sorted(sources, key=lambda pair: (pair.subject, pair.name))
    return FoundPairs(ordered, refused, skipped, single_view, ambiguous, missing, sorted(unused))
