"""Volumes of another program from the radiographs of an archive: SART of scikit-image, slice by slice, as NIfTI files.

    python benchmarks/sart_volumes.py archives/ct volumes/sart

Parallel rays stand for the cone beam, after each radiograph is scaled to its size at the isocenter. The archive has a
frontal and a lateral view.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage.transform import iradon_sart

from raylift.datasets.archive.archive import Archive
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN, WATER_PER_MM
from raylift.datasets.scans.resample import archive_image

ITERATIONS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    archive = Archive(options.archive)
    options.output.mkdir(parents=True, exist_ok=True)
    for entry in archive.entries():
        integrals = archive.read_array(entry, "radiographs")
        hu = reconstruct(integrals, archive.manifest.grid, archive.manifest.geometry)
        sitk.WriteImage(archive_image(hu, archive.manifest.grid), str(options.output / f"{entry.id}.nii.gz"))


def reconstruct(integrals: np.ndarray, grid: Grid, geometry: Geometry) -> np.ndarray:
    """A volume in HU from the line integrals of a frontal and a lateral view, (2, rows, columns)."""
    centers_mm = (np.arange(grid.size) - (grid.size - 1) / 2) * grid.spacing_mm
    magnification = geometry.source_detector_mm / geometry.source_isocenter_mm
    pixels = centers_mm * magnification / geometry.detector_pitch_mm + (geometry.detector_px - 1) / 2
    places = np.stack(np.meshgrid(pixels, pixels, indexing="ij"))
    frontal, lateral = (ndimage.map_coordinates(image, places, order=1) / grid.spacing_mm for image in integrals)
    limits = (0.0, WATER_PER_MM * (1 + HU_MAX / 1000))
    attenuation = np.zeros(grid.shape, np.float32)
    for plane, sinogram in zip(attenuation, np.stack([frontal, lateral[:, ::-1]], axis=-1), strict=True):
        for _ in range(ITERATIONS):
            plane[:] = iradon_sart(sinogram, np.array([0.0, 90.0]), image=plane, clip=limits)
    return np.clip(1000 * (attenuation / WATER_PER_MM - 1), HU_MIN, HU_MAX).astype(np.float32)


if __name__ == "__main__":
    main()
