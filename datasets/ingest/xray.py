"""Add pairs of real radiographs, a frontal and a lateral one of the same subject, to an archive without CT.

Grid and geometry describe the volumes and poses that they are intended for. The stored image of a file equals the
network input at inference bit for bit: both use `preparation.load_radiograph` and `preparation.prepare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raylift.datasets.archive.archive import RadiographSample
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.splits import Split, absent
from raylift.datasets.errors import ConfigError, FileError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.ingest.pipeline import (
    IngestReport,
    Progress,
    Workers,
    add_samples,
    open_writer,
    shared_subjects,
    subject_of,
)
from raylift.datasets.radiographs import folder_search, pair_table
from raylift.datasets.radiographs.check_result import warnings
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.input_checks import ALL_VIEWS, check
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption
from raylift.datasets.radiographs.pairing import RadiographPair
from raylift.datasets.radiographs.preparation import load_radiograph, prepare


def ingest_radiographs(
    sources: Sequence[Path],
    url: str,
    grid: Grid,
    geometry: Geometry,
    *,
    limits: RadiographLimits,
    pairs: Path | None = None,
    skip_ambiguous: bool = False,
    patient_facing: PatientFacingOption = "auto",
    invert: Inversion = "auto",
    strict: bool = False,
    source_license: str = "not stated",
    subject_pattern: str = "",
    split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    assigned: Mapping[str, Split] | None = None,
    samples_per_shard: int = 64,
    workers: Workers | None = None,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Add every pair under `sources` to the archive at `url`, skipping those whose bytes are already in it.

    Args:
        sources: files and folders; see `folder_search`.
        url: folder or object store of a new or existing archive.
        grid: voxel grid of the volumes that the radiographs are intended for.
        geometry: poses; a lateral radiograph is flipped if its patient faces the other edge than in its view.
        limits: largest file and image accepted, checked from the header.
        pairs: CSV of pairs; see `pair_table`.
        skip_ambiguous: skip subjects with more than one radiograph of a view.
        patient_facing: edge that the patients of all lateral radiographs face; `auto` detects it in each image.
        invert: see `decoding.read`.
        strict: refuse radiographs with any warning of `input_checks`, not only those of level stop.
        source_license: license of the radiographs, stored with every sample.
        subject_pattern: see `ingest_ct`.
        split_fractions: of the train, validation and test split in a new archive; an existing one keeps its rule.
        assigned: splits of subjects assigned by hand; must equal those of an existing archive.
        samples_per_shard: pairs in a shard; each full shard is published at once.
        workers: see `ingest_ct`.
        progress: callback before each pair and at the end.

    Raises:
        ConfigError: an invalid table or pattern, or a grid, geometry or assignment that differs from the archive's.
        StoreError: the object store did not respond after retries.
    """
    names = [view.name for view in geometry.views]
    if sorted(names) != ["frontal", "lateral"]:
        raise ConfigError(f"pairs of radiographs for the views {', '.join(names)}: use a frontal and a lateral one")
    pairing = (
        folder_search.find_pairs(sources, skip_ambiguous=skip_ambiguous)
        if pairs is None
        else pair_table.read_pairs(pairs, sources, skip_ambiguous=skip_ambiguous)
    )
    sources_by_subject = [replace(source, subject=subject_of(source, subject_pattern)) for source in pairing.sources]
    subjects = {source.subject for source in sources_by_subject}
    writer = open_writer(url, grid, geometry, subjects, split_fractions, assigned, samples_per_shard, "radiographs")
    outcome = IngestReport(
        refused=list(pairing.refused),
        skipped=pairing.skipped,
        absent_subjects=absent(assigned or {}, subjects),
        single_view=pairing.single_view,
        ambiguous=pairing.ambiguous,
        missing_files=pairing.missing_files,
        left_out=pairing.left_out,
    )
    if not pairing.sources and not pairing.refused:
        outcome.warnings.append(
            f"no pair of radiographs in {', '.join(map(str, sources))}: name pairs as anna_frontal.png and "
            "anna_lateral.png, give DICOM files of one study, or list them with --pairs"
        )
    if not subject_pattern and (warning := _shared(pairing.sources)):
        outcome.warnings.append(warning)

    make = _MakeSample(geometry, limits, invert, patient_facing, source_license, strict)
    add_samples(
        writer, sources_by_subject, make, outcome, progress, workers=workers, subjects_are_named=bool(subject_pattern)
    )
    for entry in outcome.added:
        for view in geometry.views:
            outcome.warnings += [
                f"{entry.source}: {view.name}: {text}" for text in entry.record[view.name].get("warnings", ())
            ]
    return outcome


@dataclass(frozen=True)
class _MakeSample:
    """Reads and orients a pair of radiographs; its fields are arguments of `ingest_radiographs`."""

    geometry: Geometry
    limits: RadiographLimits
    invert: Inversion
    patient_facing: PatientFacingOption
    source_license: str
    strict: bool

    def __call__(self, pair: RadiographPair, sha256: str) -> tuple[Entry, RadiographSample]:
        facing = self.patient_facing if pair.patient_facing == "auto" else pair.patient_facing
        paths = dict(zip(("frontal", "lateral"), pair.files, strict=True))
        record: dict[str, Any] = {}
        radiographs: dict[str, OrientedRadiograph] = {}
        images = []
        for view in self.geometry.views:
            path = paths[view.name]
            loaded = load_radiograph(path, view, limits=self.limits, invert=self.invert, patient_facing=facing)
            for result in warnings(loaded.checks):
                if self.strict or result.level == "stop":
                    raise FileError(f"{path}: {result}: leave it out, or correct it")
            if not loaded.is_clear:
                raise FileError(
                    f"{path}: the edge that the patient faces is not clear: "
                    "pass --patient-facing left or right, or list it with --pairs and a column patient_facing"
                )
            radiographs[view.name] = loaded
            record[view.name] = {"file": path.name, "size": list(loaded.image.shape), **loaded.record()}
            images.append(prepare(loaded.image, self.geometry.detector_px))
        for result in warnings(check(radiographs, images)[ALL_VIEWS]):
            raise FileError(f"{pair.files[0]}: {result}: leave it out, or correct it")
        entry = Entry(
            id=pair.subject,
            subject=pair.subject,
            source=pair.name,
            source_sha256=sha256,
            license=self.source_license,
            label_method="none",
            record=record,
        )
        return entry, RadiographSample(np.stack(images))


def _shared(pairs: Sequence[RadiographPair]) -> str:
    """The warning about subjects with DICOM pairs of several studies; empty without any."""
    first: dict[str, RadiographPair] = {}
    several = {pair.subject: pair for pair in pairs if pair.is_dicom and first.setdefault(pair.subject, pair) != pair}
    if not several:
        return ""
    subject, other = next(iter(several.items()))
    return shared_subjects(len(several), "pairs of several studies", first[subject].files[0], other.files[0])
