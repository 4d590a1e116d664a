"""Pneumothorax in acquired CT and in reconstructed volumes by PTX-Seg: files, and volumes of an archive's grid."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float32, Float64, Int16, UInt8

from raylift.datasets import ptx_seg
from raylift.datasets.archive.archive import Archive
from raylift.datasets.errors import ConfigError, FileError
from raylift.datasets.geometry import Grid
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.datasets.ptx_seg import SIDES, Hemithorax, Side
from raylift.datasets.scans import reader, resample
from raylift.datasets.scans.header_checks import DEFAULT_LIMITS, ScanLimits
from raylift.datasets.scans.reader import Scan
from raylift.datasets.sources import Source, refuse_together
from raylift.models.metrics import Metrics, inside_field_of_view

COARSEST_MM = (2.5, 2.5, 5.0)
"""Largest spacing from left to right, anterior to posterior and superior to inferior. On cubes of 3 mm, hardly any
pneumothorax of a phantom is found, whatever its size: the gas below -960 HU is too far from the chest wall."""
COARSEST_CUBE_MM = 5.0
"""Largest voxels of two volumes on one grid that are compared."""
COLUMNS = (
    "scan",
    *(f"{side}_{name}" for side in SIDES for name in ("pneumothorax_ml", "lung_ml", "occupancy_percent")),
)


@dataclass(frozen=True)
class Segmented:
    """A volume on isotropic voxels of 2.5 mm, and its regions."""

    hu: Int16[np.ndarray, "d h w"]
    regions: UInt8[np.ndarray, "d h w"]
    region_image: sitk.Image
    """The same regions in patient coordinates."""

    @property
    def sides(self) -> dict[Side, Hemithorax]:
        """Volumes by side."""
        return ptx_seg.measure(self.regions, ptx_seg.SPACING_MM**3 / 1000)

    def mask(self, image: sitk.Image) -> sitk.Image:
        """Regions on the grid of `image`, by the nearest voxel."""
        return sitk.Resample(self.region_image, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0, sitk.sitkUInt8)


def segment_scan(scan: Scan, segmenter: Segmenter = THRESHOLDS) -> Segmented:
    """PTX-Seg of a scan.

    Raises:
        FileError: it is coarser than `COARSEST_MM`, too thin, or has no lungs.
    """
    spacing_mm = sitk.DICOMOrient(scan.image, "LPS").GetSpacing()
    if any(mm > limit * 1.001 for mm, limit in zip(spacing_mm, COARSEST_MM, strict=True)):
        raise FileError(
            f"{scan.source.where}: voxels of {' x '.join(f'{mm:g}' for mm in spacing_mm)} mm are too coarse for a "
            f"pneumothorax: use axial slices of {COARSEST_MM[0]:g} mm voxels or less, {COARSEST_MM[2]:g} mm apart or "
            "less"
        )
    try:
        image = resample.whole_scan(scan.image, ptx_seg.SPACING_MM)
        hu = sitk.GetArrayFromImage(image).round().astype(np.int16)
        regions = ptx_seg.segment(hu, ptx_seg.SPACING_MM, segmenter=segmenter)
    except FileError as error:
        raise FileError(f"{scan.source.where}: {error}") from error
    except RuntimeError as error:
        raise FileError(f"{scan.source.where}: cannot be resampled to {ptx_seg.SPACING_MM:g} mm: {error}") from error
    region_image = sitk.GetImageFromArray(regions)
    region_image.CopyInformation(image)
    return Segmented(hu, regions, region_image)


def require_comparable(archives: Sequence[Archive]) -> None:
    """Raise a ConfigError if PTX-Seg cannot compare volumes on an archive's grid with its CT."""
    for archive in archives:
        archive.require_volumes("--ptx")
        if archive.manifest.grid.spacing_mm > COARSEST_CUBE_MM:
            raise ConfigError(
                f"--ptx needs voxels of {COARSEST_CUBE_MM:g} mm or less, and those of {archive.url} are "
                f"{archive.manifest.grid.spacing_mm:g} mm: ingest the CT with a smaller --spacing-mm"
            )


def compare(
    prediction_hu: Float32[np.ndarray, "d h w"],
    ground_truth_hu: Float32[np.ndarray, "d h w"],
    grid: Grid,
    segmenter: Segmenter = THRESHOLDS,
) -> Metrics:
    """Pneumothorax of a volume and of the CT on the same grid: volume of both sides in ml, occupancy in %.

    The occupancy is that of the side with more pneumothorax in the CT, or, if it has none, in the volume. A volume
    without lungs has no pneumothorax; a CT without lungs cannot be measured, and all values are NaN.
    """
    _, *volumes = inside_field_of_view(prediction_hu, ground_truth_hu)
    found, in_ct = (_of_archive(hu, grid, segmenter) for hu in volumes)
    ml, percent = [math.nan] * 2, [math.nan] * 2
    if in_ct is not None:
        found = found or dict.fromkeys(SIDES, Hemithorax(0.0, 0.0))
        side = _larger(in_ct, found)
        ml = [sum(side.pneumothorax_ml for side in sides.values()) for sides in (found, in_ct)]
        percent = [sides[side].occupancy_percent for sides in (found, in_ct)]
    return {
        "pneumothorax_ml": ml[0],
        "ct_pneumothorax_ml": ml[1],
        "pneumothorax_absolute_error_ml": abs(ml[0] - ml[1]),
        "occupancy_percent": percent[0],
        "ct_occupancy_percent": percent[1],
        "occupancy_absolute_error_percent": abs(percent[0] - percent[1]),
    }


def _of_archive(hu: Float32[np.ndarray, "d h w"], grid: Grid, segmenter: Segmenter) -> dict[Side, Hemithorax] | None:
    """Volumes by side of a volume in volume order; None without lungs."""
    image = resample.whole_scan(resample.archive_image(hu, grid), ptx_seg.SPACING_MM)
    fine = sitk.GetArrayFromImage(image).round().astype(np.int16)
    wall_mm = ptx_seg.WALL_MM if grid.spacing_mm <= ptx_seg.SPACING_MM else ptx_seg.COARSE_WALL_MM
    try:
        regions = ptx_seg.segment(fine, ptx_seg.SPACING_MM, wall_mm, segmenter)
    except FileError:
        return None
    return ptx_seg.measure(regions, ptx_seg.SPACING_MM**3 / 1000)


def _larger(ground_truth: dict[Side, Hemithorax], found: dict[Side, Hemithorax]) -> Side:
    """The side with more pneumothorax in the ground truth; where that has none, in the other measurement."""
    return max(SIDES, key=lambda side: (ground_truth[side].pneumothorax_ml, found[side].pneumothorax_ml))


@dataclass(frozen=True)
class Volumes:
    """Volumes of files and folders, and their ground truth, by name."""

    sources: dict[str, Source]
    ground_truth: dict[str, Source]
    refused: list[FileError]
    """Files that cannot be read, and volumes without ground truth where there is some."""


def matched(volumes: Sequence[Path], ground_truth: Path | None = None) -> Volumes:
    """The volumes under files and folders, and the ground truth of each.

    A name is the path inside the folder without suffix, and that of a DICOM series alone in a folder is this folder's.

    Raises:
        FileError: a path holds no volume.
        ConfigError: two volumes have one name.
    """
    sources, refused = _by_name(volumes)
    if ground_truth is None:
        return Volumes(sources, {}, refused)
    true, refused_true = _by_name([ground_truth])
    refused += refused_true
    alone = [sources.pop(name).files[0] for name in sources.keys() - true.keys()]
    refuse_together(refused, sorted(alone), f"no ground truth of that name in {ground_truth}: rename it")
    return Volumes(sources, true, refused)


@dataclass
class Measurements:
    """Volumes by side of everything that could be measured, by name, and what was refused."""

    found: dict[str, dict[Side, Hemithorax]]
    ground_truth: dict[str, dict[Side, Hemithorax]]
    """Those of the ground truth, in ml too."""
    refused: list[FileError]

    def rows(self) -> list[tuple[str | float, ...]]:
        """Values of `COLUMNS` for each volume."""
        return [
            (
                name,
                *(
                    round(value, 2)
                    for side in sides.values()
                    for value in (side.pneumothorax_ml, side.lung_ml, side.occupancy_percent)
                ),
            )
            for name, sides in self.found.items()
        ]

    def pairs(self) -> dict[str, tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
        """Measured and ground-truth values: ml of both sides, occupancy in % of the side of `_larger`."""
        volumes, occupancies = [], []
        for name, sides in self.ground_truth.items():
            volumes.append([sum(side.pneumothorax_ml for side in of.values()) for of in (self.found[name], sides)])
            larger = _larger(sides, self.found[name])
            occupancies.append([of[larger].occupancy_percent for of in (self.found[name], sides)])
        return {
            name: (columns[0], columns[1])
            for name, rows in (("volume", volumes), ("occupancy", occupancies))
            for columns in [np.array(rows, dtype=np.float64).T]
        }


def measure(
    volumes: Volumes,
    use: Callable[[str, Scan, Segmented], None],
    *,
    limits: ScanLimits = DEFAULT_LIMITS,
    assume_spacing_mm: Sequence[float] | None = None,
    segmenter: Segmenter = THRESHOLDS,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Measurements:
    """Segment and measure every volume and its ground truth, one after the other; what fails is refused.

    Args:
        volumes: with ground truth, a volume need not be plausible as a CT.
        use: called with the name, the scan and the regions of each volume that was measured.
        limits: largest volume accepted.
        assume_spacing_mm: spacing of NRRD and MetaImage files that state none.
        segmenter: finds lungs that thresholds miss.
        progress: called with the number of finished volumes, the number of all, and the next one's name.
    """
    read = reader.read_values if volumes.ground_truth else reader.read
    result = Measurements({}, {}, list(volumes.refused))
    for done, (name, source) in enumerate(volumes.sources.items()):
        progress(done, len(volumes.sources), name)
        try:
            scan = read(source, limits, assume_spacing_mm)
            segmented = segment_scan(scan, segmenter)
            use(name, scan, segmented)
            result.found[name] = segmented.sides
            if true := volumes.ground_truth.get(name):
                result.ground_truth[name] = segment_scan(reader.read(true, limits, assume_spacing_mm), segmenter).sides
        except FileError as error:
            result.refused.append(error)
    progress(len(volumes.sources), len(volumes.sources), "")
    return result


def _by_name(paths: Sequence[Path]) -> tuple[dict[str, Source], list[FileError]]:
    roots = [Path(os.path.abspath(path)) for path in paths]
    listing = reader.find(roots)
    named: dict[str, Source] = {}
    for source in listing.sources:
        name = _name(source, roots)
        if name in named:
            raise ConfigError(f"{source.where} and {named[name].where} have one name: rename one")
        named[name] = source
    if not named and not listing.refused:
        where = f" in {', '.join(map(str, paths))}" if paths else ""
        raise FileError(f"no volume{where}: give NIfTI, NRRD, MetaImage or DICOM files")
    return named, listing.refused


def _name(source: Source, roots: Sequence[Path]) -> str:
    path = source.files[0]
    if not source.is_dicom:
        path = path.with_name(source.subject)
    elif "/" not in source.name:
        path = path.parent
    elif path.suffix.lower() in reader.DICOM_SUFFIXES:
        path = path.with_suffix("")
    root = next((root for root in roots if root in path.parents), path.parent)
    return path.relative_to(root).as_posix()
