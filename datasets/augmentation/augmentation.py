"""Augmentation of a CT and its radiographs: deformation, projection in a jittered geometry, simulated acquisition.

Parameters are a pure function of (seed, epoch, position), so that any number of workers and a resumed run make the
same pairs; the arithmetic runs by the batch on the device of the volumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from torch import Tensor

from raylift.datasets.augmentation.acquisition import (
    AcquisitionParameters,
    RadiographAugmentation,
    simulate_acquisition,
)
from raylift.datasets.augmentation.deformation import Deformation, VolumeAugmentation, deform, deform_labels
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Normalization, hu_to_attenuation, normalize_by_percentiles
from raylift.datasets.projector import Poses, project_batch

BONE_HU = 150.0
"""HU above which a voxel's excess counts as bone in the two-material model."""


@dataclass(frozen=True)
class GeometryJitter:
    """Standard deviations of a radiograph's geometry about the archive's."""

    probability: float = 0.6
    """Fraction of samples whose geometry is jittered."""
    angle_deg: float = 2.0
    """Standard deviation of azimuth, elevation and roll."""
    offset_mm: float = 5.0
    """Standard deviation of the point imaged at the detector's center, along each axis."""
    distance: float = 0.04
    """Relative standard deviation of source-isocenter and source-detector distance."""
    detector_pitch: float = 0.04
    """Relative standard deviation of the detector pitch, because the pixel size of a radiograph is often unknown."""

    def __post_init__(self) -> None:
        if (
            not 0 <= self.probability <= 1
            or min(self.angle_deg, self.offset_mm, self.distance, self.detector_pitch) < 0
        ):
            raise ConfigError(f"{self}: give a fraction from 0 to 1 and deviations of 0 or more")

    def sample(self, rng: np.random.Generator, geometry: Geometry) -> list[Geometry]:
        """For every view a geometry that has this view alone."""
        jittered = rng.random() < self.probability
        results = []
        for view in geometry.views:
            if not jittered:
                results.append(replace(geometry, views=(view,)))
                continue
            azimuth, elevation, roll = rng.normal(0, self.angle_deg, 3)
            x, y, z = rng.normal(0, self.offset_mm, 3)
            stretch = np.exp(rng.normal(0, self.distance))
            scale = np.exp(rng.normal(0, self.detector_pitch))
            moved = replace(
                view,
                azimuth_deg=view.azimuth_deg + azimuth,
                elevation_deg=view.elevation_deg + elevation,
                roll_deg=view.roll_deg + roll,
                offset_mm=(view.offset_mm[0] + x, view.offset_mm[1] + y, view.offset_mm[2] + z),
            )
            results.append(
                replace(
                    geometry,
                    source_isocenter_mm=geometry.source_isocenter_mm * stretch,
                    source_detector_mm=geometry.source_detector_mm * stretch,
                    detector_pitch_mm=geometry.detector_pitch_mm * scale,
                    views=(moved,),
                )
            )
        return results


@dataclass(frozen=True)
class Augmentation:
    """Random pairs of a volume and its radiographs from one CT; training alone uses them."""

    enabled: bool = False
    """Whether training takes a new pair from each CT in every epoch instead of the stored one."""
    volume: VolumeAugmentation = field(default_factory=VolumeAugmentation)
    geometry: GeometryJitter = field(default_factory=GeometryJitter)
    radiograph: RadiographAugmentation = field(default_factory=RadiographAugmentation)

    def sample(self, seed: int, epoch: int, position: int, geometry: Geometry) -> Parameters:
        """The parameters of the sample at a position of the stream."""
        rng = np.random.default_rng([seed, epoch, position])
        deformation = self.volume.sample(rng)
        geometries = self.geometry.sample(rng, geometry)
        return Parameters(deformation, geometries, self.radiograph.sample(rng, len(geometries), geometry.detector_px))


@dataclass(frozen=True)
class Parameters:
    """Everything that is random about one sample."""

    deformation: Deformation
    geometries: list[Geometry]
    """A geometry of a single view for each view."""
    acquisition: AcquisitionParameters


@dataclass(frozen=True)
class Augmenter:
    """Augments each sample of a stream by its position alone, whatever the batch and the number of workers."""

    augmentation: Augmentation
    seed: int
    grid: Grid
    geometry: Geometry
    """Its views are those of the result."""
    device: torch.device
    normalization: Normalization = "percentiles"

    def __call__(
        self,
        volume: Int16[np.ndarray, "d h w"],
        labels: UInt8[np.ndarray, "d h w"] | None,
        epoch: int,
        position: int,
    ) -> tuple[Float[Tensor, "1 1 d h w"], Float[Tensor, "1 views s s"], UInt8[Tensor, "1 1 d h w"] | None]:
        """A volume in HU on the augmenter's grid, its normalized radiographs and its labels, on the device."""
        parameters = self.augmentation.sample(self.seed, epoch, position, self.geometry)
        hu = torch.from_numpy(volume)[None, None].to(self.device).float()
        ground_truth, views = augment(hu, self.grid.spacing_mm, self.grid, [parameters], self.normalization)
        if labels is None:
            return ground_truth, views, None
        labeled = torch.from_numpy(labels)[None, None].to(self.device)
        return ground_truth, views, deform_labels(labeled, self.grid.spacing_mm, self.grid, [parameters.deformation])


def augment(
    hu: Float[Tensor, "n 1 d h w"],
    spacing_mm: float,
    grid: Grid,
    parameters: Sequence[Parameters],
    normalization: Normalization = "percentiles",
) -> tuple[Float[Tensor, "n 1 s s s"], Float[Tensor, "n views s s"]]:
    """Deformed volumes in HU on `grid`, and their radiographs, bone bright and normalized.

    Args:
        hu: volumes with a margin, if there is one, at `spacing_mm`.
        spacing_mm: edge of their voxels.
        grid: of the results.
        parameters: one per volume.
        normalization: how radiographs are scaled to [0, 1].
    """
    ground_truth = deform(hu, spacing_mm, grid, [sample.deformation for sample in parameters])
    soft, bone = line_integrals(ground_truth, grid, [sample.geometries for sample in parameters])
    radiographs = simulate_acquisition(soft, bone, [sample.acquisition for sample in parameters])
    return ground_truth, normalize_batch(radiographs, normalization)


def line_integrals(
    hu: Float[Tensor, "n 1 d h w"], grid: Grid, geometries: Sequence[Sequence[Geometry]]
) -> tuple[Float[Tensor, "n views s s"], Float[Tensor, "n views s s"]]:
    """Line integrals of soft tissue, and of the attenuation that bone adds to it, without unit.

    Args:
        hu: volumes in HU.
        grid: their voxels.
        geometries: of each volume, a geometry of a single view for each view.
    """
    bone_hu = (hu - BONE_HU).clamp_min(0)
    # Bone's share is attenuation above that of soft tissue, so no threshold applies to it.
    soft = hu_to_attenuation(hu - bone_hu, geometries[0][0].attenuation)
    both = torch.cat([soft, hu_to_attenuation(bone_hu - 1000.0)], dim=1)
    projected = [
        project_batch(both, grid.spacing_mm, poses_of(of_view, hu.device)) for of_view in zip(*geometries, strict=True)
    ]
    images = torch.stack(projected, dim=1)
    return images[:, :, 0], images[:, :, 1]


def require_cone_beam(geometry: Geometry) -> None:
    """Raise a ConfigError if the beam is parallel."""
    if geometry.beam != "cone":
        raise ConfigError(
            "augmentation projects cone beams only, and this geometry is parallel: use an archive with geometry chest "
            "or x2ct, or pass --data.augmentation.no-enabled"
        )


def poses_of(geometries: Sequence[Geometry], device: torch.device) -> Poses:
    """Geometries of one view each as a batch of poses.

    Raises:
        ConfigError: a beam is parallel.
    """
    for geometry in geometries:
        require_cone_beam(geometry)

    def stacked(values: list[object]) -> Tensor:
        return torch.as_tensor(np.array(values), dtype=torch.float32).to(device, non_blocking=True)

    return Poses(
        axes=stacked([geometry.views[0].axes() for geometry in geometries]),
        offset_mm=stacked([geometry.views[0].offset_mm for geometry in geometries]),
        source_isocenter_mm=stacked([geometry.source_isocenter_mm for geometry in geometries]),
        source_detector_mm=stacked([geometry.source_detector_mm for geometry in geometries]),
        detector_pitch_mm=stacked([geometry.detector_pitch_mm for geometry in geometries]),
        detector_px=geometries[0].detector_px,
    )


def normalize_batch(
    images: Float[Tensor, "n views s s"], normalization: Normalization = "percentiles"
) -> Float[Tensor, "n views s s"]:
    """`intensity.normalize` of each image, on the images' device."""
    if normalization == "maximum":
        highest = images.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return ((images / highest).clamp(0, 1) * 255 + 1e-4).floor() / 255
    return normalize_by_percentiles(images)[0]
