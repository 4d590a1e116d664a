"""The frontal and the lateral radiograph of one person, chosen of what belongs together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raylift.datasets.errors import RefusedFile
from raylift.datasets.radiographs.orientation import PatientFacingOption
from raylift.datasets.sources import Source

ViewName = Literal["frontal", "lateral"]


@dataclass(frozen=True)
class RadiographPair(Source):
    """The two radiographs of one person: `files` are the frontal and the lateral one."""

    patient_facing: PatientFacingOption = "auto"
    """Where a table says that the patient of the lateral one faces."""


@dataclass
class PairCandidates:
    """Radiographs of one person or study, by view."""

    subject: str
    frontal: list[Path] = field(default_factory=list)
    lateral: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What a table names and is not there."""
    patient_facing: PatientFacingOption = "auto"
    is_dicom: bool = False

    def add(self, view: ViewName, path: Path) -> None:
        """One more radiograph of a view."""
        (self.frontal if view == "frontal" else self.lateral).append(path)


@dataclass(frozen=True)
class FoundPairs:
    """What a search brought up."""

    sources: list[RadiographPair]
    """In order of subject."""
    refused: list[RefusedFile] = field(default_factory=list)
    skipped: int = 0
    """Files in searched folders that are no radiographs, or of which no view is known."""
    single_view: int = 0
    """Persons or studies with one of the two views only."""
    ambiguous: int = 0
    """Those with several radiographs of a view, left out because exact pairs were asked for."""
    missing_files: list[str] = field(default_factory=list)
    """Files that a table names and that are not there."""


def select_pairs(
    groups: Iterable[PairCandidates], exact: bool, refused: list[RefusedFile], skipped: int = 0
) -> FoundPairs:
    """The first frontal and the first lateral radiograph of each group, or with `exact` the only ones."""
    sources, single_view, ambiguous = [], 0, 0
    missing = []
    for group in groups:
        missing += group.missing
        several = len(group.frontal) + len(group.lateral) + len(group.missing) > 2
        if exact and several and group.frontal and group.lateral:
            ambiguous += 1
        elif group.frontal and group.lateral:
            files = (group.frontal[0], group.lateral[0])
            name = " + ".join(path.name for path in files)
            sources.append(RadiographPair(name, group.subject, files, group.is_dicom, group.patient_facing))
        elif not group.missing:
            single_view += 1
    ordered = sorted(sources, key=lambda pair: (pair.subject, pair.name))
    return FoundPairs(ordered, refused, skipped, single_view, ambiguous, missing)
