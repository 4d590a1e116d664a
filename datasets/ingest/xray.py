"""Radiographs that were taken, frontal and lateral of one person, into an archive without CT.

Grid and geometry say for which volumes and poses they are meant. What is stored of a file is what serving makes of it,
bit for bit: both go through `radiograph.read_file` and `radiograph.prepare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raylift.datasets.archive.archive import Entry, Radiographs
from raylift.datasets.archive.splits import Split
from raylift.datasets.errors import ConfigError, RefusedFile
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.ct import Outcome, Progress, fill, open_writer, subject_of
from raylift.datasets.radiographs import csv_table, folder_search
from raylift.datasets.radiographs.decoding import Inversion, RadiographLimits, prepare, read_file
from raylift.datasets.radiographs.orientation import AskedFacing, hang
from raylift.datasets.radiographs.pairing import PairSource


def ingest_radiographs(
    sources: Sequence[Path],
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    limits: RadiographLimits,
    pairs: Path | None = None,
    exact: bool = False,
    facing: AskedFacing = "auto",
    invert: Inversion = "auto",
    source_license: str = "not stated",
    subject_pattern: str = "",
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    assigned: Mapping[str, Split] | None = None,
    per_part: int = 64,
    progress: Progress = lambda *_: None,
) -> Outcome:
    """Bring every pair under `sources` into the archive at `url`, skipping those whose bytes are already in it.

    Args:
        sources: files and folders; see `pair_search`.
        url: a folder or an object store; an archive that exists is added to.
        grid: of the volumes that the radiographs are meant for.
        geometry: of the poses; a lateral radiograph is mirrored where its patient faces the other way.
        limits: what is refused for its size, from the header.
        pairs: a table of pairs; see `pair_table`.
        exact: leave out who has more than one radiograph of a view.
        facing: where the patients of lateral radiographs face, for all; `auto` looks at each.
        invert: see `radiograph.read`.
        source_license: of the radiographs, kept with every sample.
        subject_pattern: see `ingest.ingest`.
        shares: of subjects that train, validate and test, in a new archive; one that exists keeps its rule.
        assigned: splits given by hand; an archive that exists takes no others than it was made with.
        per_part: pairs a shard; each full shard is published at once.
        progress: called before each pair and at the end.

    Raises:
        ConfigError: a table or pattern that means nothing, or a grid, geometry or assignment that is not the archive's.
        StoreUnreachable: the object store did not answer, after retries.
    """
    names = [view.name for view in geometry.views]
    if sorted(names) != ["frontal", "lateral"]:
        raise ConfigError(f"pairs of radiographs for the views {', '.join(names)}: use a frontal and a lateral one")
    found = (
        folder_search.search(sources, exact=exact) if pairs is None else csv_table.listed(pairs, sources, exact=exact)
    )
    people = [replace(source, subject=subject_of(source, subject_pattern)) for source in found.sources]
    subjects = {source.subject for source in people}
    writer = open_writer(url, grid, geometry, subjects, shares, assigned, per_part, "radiographs")
    outcome = Outcome(
        refused=list(found.refused),
        passed_over=found.passed_over,
        absent=len(set(assigned or {}) - subjects),
        alone=found.alone,
        inexact=found.inexact,
        missing=found.missing,
    )

    def make(source: PairSource, sha256: str) -> tuple[Entry, Radiographs]:
        asked = source.facing if source.facing != "auto" else facing
        paths = dict(zip(("frontal", "lateral"), source.files, strict=True))
        record: dict[str, Any] = {}
        images = []
        for view in geometry.views:
            path = paths[view.name]
            image = read_file(path, limits, view=view.name, invert=invert)
            hung = hang(image, view, asked)
            if hung is None:
                raise RefusedFile(
                    f"{path}: it does not show clearly where the patient faces: "
                    "pass --facing left or right, or list it with --pairs and a column facing"
                )
            record[view.name] = {"file": path.name, "size": list(image.shape), **hung.record()}
            images.append(prepare(hung.image, geometry.detector_px))
        entry = Entry(
            id=source.subject,
            subject=source.subject,
            source=source.name,
            source_sha256=sha256,
            license=source_license,
            label_method="none",
            record=record,
        )
        return entry, Radiographs(np.stack(images))

    fill(writer, people, make, outcome, progress)
    return outcome
