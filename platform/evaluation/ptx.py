"""Pneumothorax of CT volumes in files, true or reconstructed, by PTX-Seg."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float64, Int16, UInt8

from raylift.datasets import ptx_seg
from raylift.datasets.errors import ConfigError, FileError
from raylift.datasets.ptx_seg import SIDES, Hemithorax, Side
from raylift.datasets.scans import reader, resample
from raylift.datasets.scans.reader import Scan
from raylift.datasets.sources import Source, refuse_together

COARSEST_MM = 5.0
"""Largest spacing of a file: a pneumothorax of 10 % is about this thick."""
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

    def row(self) -> tuple[float, ...]:
        """Values of `COLUMNS` after the name."""
        return tuple(
            round(value, 2)
            for side in self.sides.values()
            for value in (side.pneumothorax_ml, side.lung_ml, side.occupancy_percent)
        )


def segment_scan(scan: Scan) -> Segmented:
    """PTX-Seg of a scan.

    Raises:
        FileError: it is coarser than 5 mm, too thin, or has no lungs.
    """
    if max(scan.spacing_mm) > COARSEST_MM * 1.001:
        raise FileError(
            f"{scan.source.where}: voxels of {max(scan.spacing_mm):g} mm are too coarse for a pneumothorax: use a "
            f"volume with {COARSEST_MM:g} mm or less"
        )
    try:
        image = resample.whole_scan(scan.image, ptx_seg.SPACING_MM)
        hu = sitk.GetArrayFromImage(image).round().astype(np.int16)
        regions = ptx_seg.segment(hu, ptx_seg.SPACING_MM)
    except FileError as error:
        raise FileError(f"{scan.source.where}: {error}") from error
    except RuntimeError as error:
        raise FileError(f"{scan.source.where}: cannot be resampled to {ptx_seg.SPACING_MM:g} mm: {error}") from error
    region_image = sitk.GetImageFromArray(regions)
    region_image.CopyInformation(image)
    return Segmented(hu, regions, region_image)


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


def pairs(
    found: Mapping[str, Mapping[Side, Hemithorax]], true: Mapping[str, Mapping[Side, Hemithorax]]
) -> dict[str, tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Measured and true values of each subject: volume of both sides in ml, occupancy of the truly larger in %."""
    volumes, occupancies = [], []
    for name, sides in true.items():
        volumes.append([sum(side.pneumothorax_ml for side in of.values()) for of in (found[name], sides)])
        larger = max(SIDES, key=lambda side: sides[side].pneumothorax_ml)
        occupancies.append([found[name][larger].occupancy_percent, sides[larger].occupancy_percent])
    return {
        name: (columns[0], columns[1])
        for name, rows in (("volume", volumes), ("occupancy", occupancies))
        for columns in [np.array(rows, dtype=np.float64).T]
    }


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
