"""Pneumothorax of CT volumes in files, true or reconstructed, by PTX-Seg."""

from __future__ import annotations

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
from raylift.datasets.sources import Source

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
    grid: sitk.Image
    """The same regions in the patient frame."""

    @property
    def sides(self) -> dict[Side, Hemithorax]:
        """Volumes by side."""
        return ptx_seg.measure(self.regions, ptx_seg.SPACING_MM**3 / 1000)

    def mask(self, image: sitk.Image) -> sitk.Image:
        """Regions on the grid of `image`, by the nearest voxel."""
        return sitk.Resample(self.grid, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0, sitk.sitkUInt8)

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
    grid = sitk.GetImageFromArray(regions)
    grid.CopyInformation(image)
    return Segmented(hu, regions, grid)


def matched(volumes: Sequence[Path], ground_truth: Path | None = None) -> tuple[list[Source], dict[str, Source]]:
    """The volumes under files and folders, and by name the ground truth of each.

    Raises:
        FileError: a path holds no volume that can be read.
        ConfigError: two volumes have one name, or one has no ground truth.
    """
    sources = list(_by_name(volumes).values())
    if ground_truth is None:
        return sources, {}
    true = _by_name([ground_truth])
    if alone := sorted({source.subject for source in sources} - true.keys()):
        raise ConfigError(f"{alone[0]} has no ground truth of that name in {ground_truth}: rename it")
    return sources, true


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


def _by_name(paths: Sequence[Path]) -> dict[str, Source]:
    listing = reader.find(paths)
    if listing.refused:
        raise listing.refused[0]
    named: dict[str, Source] = {}
    for source in listing.sources:
        if source.subject in named:
            raise ConfigError(f"{source.where} and {named[source.subject].where} have one name: rename one")
        named[source.subject] = source
    if not named:
        where = f" in {', '.join(map(str, paths))}" if paths else ""
        raise FileError(f"no volume{where}: give NIfTI, NRRD, MetaImage or DICOM files")
    return named
