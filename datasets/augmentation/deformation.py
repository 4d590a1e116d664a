"""Random deformation of a CT volume: affine, elastic, and the HU of lung, soft tissue and bone.

Parameters of one sample come from a NumPy generator; the warp of a batch runs on the device of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN
from raylift.datasets.segmentation import Label

CONTROL_POINTS = 5
"""Control points of the elastic displacement, along each side of the volume."""


@dataclass(frozen=True)
class VolumeAugmentation:
    """Ranges of the random deformation; 0, and scales of 1, leave a part out."""

    probability: float = 0.9
    """Fraction of samples that are deformed."""
    rotation_deg: float = 10.0
    """Each of three angles is uniform within this to either side."""
    scale: tuple[float, float] = (0.85, 1.15)
    """Each axis is scaled by itself."""
    shift_mm: float = 15.0
    """Along each axis, uniform within this to either side."""
    elastic_mm: float = 8.0
    """Standard deviation of the displacement at the control points, a quarter of the volume apart."""
    lung_density: tuple[float, float] = (0.7, 1.5)
    """Factor of lung density, HU + 1000 below -500 HU, which simulates the depth of inspiration."""
    soft_tissue_hu: float = 25.0
    """Added to soft tissue, uniform within this to either side."""
    bone_contrast: tuple[float, float] = (0.7, 1.3)
    """Factor of HU - 150 above 150 HU."""
    flip: float = 0.0
    """Fraction of samples that are flipped left to right; the heart is then on the right."""

    def __post_init__(self) -> None:
        ranges = {"scale": self.scale, "lung_density": self.lung_density, "bone_contrast": self.bone_contrast}
        for name, (low, high) in ranges.items():
            if not 0 < low <= high:
                raise ConfigError(f"augmentation {name} is {(low, high)}: give two factors above 0, the lower first")
        for name in ("rotation_deg", "shift_mm", "elastic_mm", "soft_tissue_hu"):
            if getattr(self, name) < 0:
                raise ConfigError(f"augmentation {name} is {getattr(self, name)}: give 0 or more")
        if not (0 <= self.probability <= 1 and 0 <= self.flip <= 1):
            raise ConfigError("augmentation probability and flip: give fractions from 0 to 1")

    def sample(self, rng: np.random.Generator) -> Deformation:
        """The parameters of one sample."""
        matrix, shift = np.eye(3), np.zeros(3)
        elastic = np.zeros((3, *(CONTROL_POINTS,) * 3))
        tissue = np.array([1.0, 0.0, 1.0])
        if rng.random() < self.probability:
            angles = np.deg2rad(rng.uniform(-self.rotation_deg, self.rotation_deg, 3))
            matrix = _rotation(angles) @ np.diag(1 / rng.uniform(*self.scale, 3))
            shift = rng.uniform(-self.shift_mm, self.shift_mm, 3)
            elastic = rng.normal(0.0, self.elastic_mm, elastic.shape) if self.elastic_mm else elastic
            tissue = np.array(
                [
                    rng.uniform(*self.lung_density),
                    rng.uniform(-self.soft_tissue_hu, self.soft_tissue_hu),
                    rng.uniform(*self.bone_contrast),
                ]
            )
        if rng.random() < self.flip:
            matrix = matrix @ np.diag([1.0, 1.0, -1.0])
        return Deformation(matrix, shift, elastic, tissue)


@dataclass(frozen=True)
class Deformation:
    """Parameters of one sample, in volume order (d, h, w)."""

    matrix: Float[np.ndarray, "3 3"]
    """From the position in the result to the position in the source, about the center."""
    shift_mm: Float[np.ndarray, " 3"]
    elastic_mm: Float[np.ndarray, "3 k k k"]
    """Displacement at the control points, in the source."""
    tissue: Float[np.ndarray, " 3"]
    """Factor of lung density, HU added to soft tissue, factor of bone."""


def deform(
    hu: Float[Tensor, "n 1 d h w"], spacing_mm: float, grid: Grid, deformations: Sequence[Deformation]
) -> Float[Tensor, "n 1 s s s"]:
    """Volumes on `grid`, each deformed by its own parameters; beyond the source its outermost voxels continue.

    Args:
        hu: volumes of any resolution and extent, centered; smoothed by the caller if `grid` is much coarser.
        spacing_mm: edge of their voxels.
        grid: of the result.
        deformations: one per volume.
    """
    where = _sampling_grid(hu.shape[2:], spacing_mm, grid, deformations, hu.device)
    warped = F.grid_sample(hu.float(), where, mode="bilinear", padding_mode="border", align_corners=False)
    return change_tissue_hu(warped, _stacked([deformation.tissue for deformation in deformations], hu.device))


def deform_labels(
    labels: UInt8[Tensor, "n 1 d h w"], spacing_mm: float, grid: Grid, deformations: Sequence[Deformation]
) -> UInt8[Tensor, "n 1 s s s"]:
    """`deform` for labels: the label of the nearest voxel; outside the field of view wherever `deform` mixes it in."""
    where = _sampling_grid(labels.shape[2:], spacing_mm, grid, deformations, labels.device)
    nearest = F.grid_sample(labels.float(), where, mode="nearest", padding_mode="border", align_corners=False)
    outside = (labels == Label.OUTSIDE_FIELD_OF_VIEW).float()
    share = F.grid_sample(outside, where, mode="bilinear", padding_mode="border", align_corners=False)
    # Rounding of the positions leaves a share of the neighbors.
    return nearest.to(torch.uint8).masked_fill(share > 1e-3, Label.OUTSIDE_FIELD_OF_VIEW)


def _sampling_grid(
    shape: Sequence[int], spacing_mm: float, grid: Grid, deformations: Sequence[Deformation], device: torch.device
) -> Float[Tensor, "n s s s 3"]:
    """Where each voxel of the result lies in the source, as `grid_sample` takes it."""
    matrix = _stacked([deformation.matrix for deformation in deformations], device)
    shift = _stacked([deformation.shift_mm for deformation in deformations], device)
    line = (torch.arange(grid.size, device=device) - (grid.size - 1) / 2) * grid.spacing_mm
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), dim=-1)
    source = torch.einsum("nij,dhwj->ndhwi", matrix, points) + shift[:, None, None, None]
    if any(deformation.elastic_mm.any() for deformation in deformations):
        elastic = _stacked([deformation.elastic_mm for deformation in deformations], device)
        # Twice linear interpolation is smoother than once.
        finer = F.interpolate(elastic, size=(4 * CONTROL_POINTS,) * 3, mode="trilinear", align_corners=True)
        finer = F.avg_pool3d(F.pad(finer, (1,) * 6, mode="replicate"), 3, stride=1)
        displacement = F.interpolate(finer, size=grid.shape, mode="trilinear", align_corners=True)
        source = source + displacement.movedim(1, -1)
    half = torch.tensor([n * spacing_mm / 2 for n in shape], device=device)
    return (source / half).flip(-1)


def _stacked(values: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """The arrays as one batch in float32 on a device."""
    return torch.as_tensor(np.stack(values), dtype=torch.float32).to(device, non_blocking=True)


def change_tissue_hu(hu: Float[Tensor, "n 1 d h w"], tissue: Float[Tensor, "n 3"]) -> Float[Tensor, "n 1 d h w"]:
    """HU with lung, soft tissue and bone changed by `Deformation.tissue` of each sample; continuous in HU."""
    lung, soft, bone = (tissue[:, k].reshape(-1, 1, 1, 1, 1) for k in range(3))
    # Full effect on lung from -1000 to -600 HU, none above -400; soft tissue between -150 and 150 HU.
    in_lung = ((-400 - hu) / 200).clamp(0, 1) * ((hu + 1000) / 50).clamp(0, 1)
    in_soft = ((hu + 250) / 100).clamp(0, 1) * ((300 - hu) / 150).clamp(0, 1)
    changed = hu + (lung - 1) * in_lung * (hu + 1000) + soft * in_soft + (bone - 1) * (hu - 150).clamp_min(0)
    return changed.clamp(HU_MIN, HU_MAX)


def _rotation(angles: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """Rotations about d, then h, then w, in radians."""
    (sd, sh, sw), (cd, ch, cw) = np.sin(angles), np.cos(angles)
    about_d = np.array([[1, 0, 0], [0, cd, -sd], [0, sd, cd]])
    about_h = np.array([[ch, 0, sh], [0, 1, 0], [-sh, 0, ch]])
    about_w = np.array([[cw, -sw, 0], [sw, cw, 0], [0, 0, 1]])
    product: Float[np.ndarray, "3 3"] = about_w @ about_h @ about_d
    return product
