"""The frontal and the lateral radiograph of one person, chosen of what belongs together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from raylift.datasets.errors import RefusedFile
from raylift.datasets.files import Source
from raylift.datasets.radiographs.orientation import AskedFacing

ViewName = Literal["frontal", "lateral"]


@dataclass(frozen=True)
class PairSource(Source):
    """The two radiographs of one person: `files` are the frontal and the lateral one."""

    facing: AskedFacing = "auto"
    """Where a table says that the patient of the lateral one faces."""


@dataclass
class Group:
    """Radiographs of one person or study, by view."""

    subject: str
    frontal: list[Path] = field(default_factory=list)
    lateral: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What a table names and is not there."""
    facing: AskedFacing = "auto"
    is_dicom: bool = False

    def add(self, view: ViewName, path: Path) -> None:
        """One more radiograph of a view."""
        (self.frontal if view == "frontal" else self.lateral).append(path)


@dataclass(frozen=True)
class FoundPairs:
    """What a search brought up."""

    sources: list[PairSource]
    """In order of subject."""
    refused: list[RefusedFile] = field(default_factory=list)
    passed_over: int = 0
    """Files in searched folders that are no radiographs, or of which no view is known."""
    alone: int = 0
    """Persons or studies with one of the two views only."""
    inexact: int = 0
    """Those with several radiographs of a view, left out because exact pairs were asked for."""
    missing: list[str] = field(default_factory=list)
    """Files that a table names and that are not there."""


def paired(groups: Iterable[Group], exact: bool, refused: list[RefusedFile], passed_over: int = 0) -> FoundPairs:
    """The first frontal and the first lateral radiograph of each group, or with `exact` the only ones."""
    sources, alone, inexact = [], 0, 0
    missing = []
    for group in groups:
        missing += group.missing
        several = len(group.frontal) + len(group.lateral) + len(group.missing) > 2
        if exact and several and group.frontal and group.lateral:
            inexact += 1
        elif group.frontal and group.lateral:
            files = (group.frontal[0], group.lateral[0])
            name = " + ".join(path.name for path in files)
            sources.append(PairSource(name, group.subject, files, group.is_dicom, group.facing))
        elif not group.missing:
            alone += 1
    ordered = sorted(sources, key=lambda pair: (pair.subject, pair.name))
    return FoundPairs(ordered, refused, passed_over, alone, inexact, missing)
