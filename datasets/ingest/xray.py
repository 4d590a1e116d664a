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

from raylift.datasets.archive.archive import Entry, RadiographSample
from raylift.datasets.archive.splits import Split
from raylift.datasets.errors import ConfigError, RefusedFile
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.ct import IngestReport, Progress, add_samples, open_writer, subject_of
from raylift.datasets.radiographs import folder_search, pair_table
from raylift.datasets.radiographs.decoding import Inversion, RadiographLimits, prepare, read_file
from raylift.datasets.radiographs.orientation import PatientFacingOption, orient
from raylift.datasets.radiographs.pairing import RadiographPair


def ingest_radiographs(
    sources: Sequence[Path],
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    limits: RadiographLimits,
    pairs: Path | None = None,
    exact: bool = False,
    patient_facing: PatientFacingOption = "auto",
    invert: Inversion = "auto",
    source_license: str = "not stated",
    subject_pattern: str = "",
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    assigned: Mapping[str, Split] | None = None,
    samples_per_shard: int = 64,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Bring every pair under `sources` into the archive at `url`, skipping those whose bytes are already in it.

    Args:
        sources: files and folders; see `pair_search`.
        url: a folder or an object store; an archive that exists is added to.
        grid: of the volumes that the radiographs are meant for.
        geometry: of the poses; a lateral radiograph is mirrored where its patient faces the other way.
        limits: what is refused for its size, from the header.
        pairs: a table of pairs; see `pair_table`.
        exact: leave out who has more than one radiograph of a view.
        patient_facing: where the patients of all lateral radiographs face; `auto` detects it in each image.
        invert: see `radiograph.read`.
        source_license: of the radiographs, kept with every sample.
        subject_pattern: see `ingest.ingest`.
        shares: of subjects that train, validate and test, in a new archive; one that exists keeps its rule.
        assigned: splits given by hand; an archive that exists takes no others than it was made with.
        samples_per_shard: pairs a shard; each full shard is published at once.
        progress: called before each pair and at the end.

    Raises:
        ConfigError: a table or pattern that means nothing, or a grid, geometry or assignment that is not the archive's.
        StoreUnreachable: the object store did not answer, after retries.
    """
    names = [view.name for view in geometry.views]
    if sorted(names) != ["frontal", "lateral"]:
        raise ConfigError(f"pairs of radiographs for the views {', '.join(names)}: use a frontal and a lateral one")
    found = (
        folder_search.find_pairs(sources, exact=exact)
        if pairs is None
        else pair_table.read_pairs(pairs, sources, exact=exact)
    )
    people = [replace(source, subject=subject_of(source, subject_pattern)) for source in found.sources]
    subjects = {source.subject for source in people}
    writer = open_writer(url, grid, geometry, subjects, shares, assigned, samples_per_shard, "radiographs")
    outcome = IngestReport(
        refused=list(found.refused),
        skipped=found.skipped,
        absent_subjects=len(set(assigned or {}) - subjects),
        single_view=found.single_view,
        ambiguous=found.ambiguous,
        missing_files=found.missing_files,
    )

    def make(source: RadiographPair, sha256: str) -> tuple[Entry, RadiographSample]:
        asked = source.patient_facing if source.patient_facing != "auto" else patient_facing
        paths = dict(zip(("frontal", "lateral"), source.files, strict=True))
        record: dict[str, Any] = {}
        images = []
        for view in geometry.views:
            path = paths[view.name]
            image = read_file(path, limits, view=view.name, invert=invert)
            hung = orient(image, view, asked)
            if hung is None:
                raise RefusedFile(
                    f"{path}: it does not show clearly where the patient faces: "
                    "pass --patient-facing left or right, or list it with --pairs and a column patient_facing"
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
        return entry, RadiographSample(np.stack(images))

    add_samples(writer, people, make, outcome, progress)
    return outcome
