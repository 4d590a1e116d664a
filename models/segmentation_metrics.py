"""Comparison of the anatomy in two CT volumes, both segmented by the same thresholds (`raylift.datasets.segmentation`).

Overlap is from 0 to 1, distances are in mm, volumes in ml. Where neither volume has an organ, overlap is 1 and a
distance 0; where one has it alone, overlap is 0 and a distance infinite. Where the ground truth is NaN, outside its
field of view, both are air.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16
from skimage.morphology import skeletonize

from raylift.datasets import segmentation
from raylift.datasets.intensity import HU_MAX, HU_MIN
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.models.metrics import Metrics, inside_field_of_view

Mask = Bool[np.ndarray, "d h w"]
TOLERANCE_MM = 5.0
"""Distance up to which surfaces agree."""


@dataclass(frozen=True)
class Anatomy:
    """Organs of a volume."""

    lung: Mask
    right_lung: Mask
    left_lung: Mask
    trachea: Mask
    vessel: Mask
    bone: Mask
    mediastinum: Mask
    soft_tissue: Mask
    """The body without lungs and bone."""

    @classmethod
    def of(
        cls,
        hu: Int16[np.ndarray, "d h w"],
        spacing_mm: float,
        measured: Mask | None = None,
        segmenter: Segmenter = THRESHOLDS,
    ) -> Anatomy:
        """The organs of a volume in volume order; voxels are cubes of that edge, `measured` the field of view."""
        body = segmentation.body(hu, spacing_mm, measured)
        air = segmentation.lungs(hu, spacing_mm, body)
        lung = segmenter.lungs(hu, air)
        is_right = np.arange(hu.shape[2]) < int(segmentation.middle_column(body))
        bone = segmentation.bone(hu, body)
        return cls(
            lung,
            lung & is_right,
            lung & ~is_right,
            segmentation.trachea(air, body, spacing_mm),
            segmentation.vessels(hu, lung & air),
            bone,
            segmentation.mediastinum(hu, lung),
            body & ~lung & ~bone,
        )


def compare(
    prediction_hu: Float[np.ndarray, "d h w"],
    ground_truth_hu: Float[np.ndarray, "d h w"],
    spacing_mm: tuple[float, float, float],
    segmenter: Segmenter = THRESHOLDS,
) -> Metrics:
    """Metrics of all organs; those of HU are `bias_hu`.

    Args:
        prediction_hu: a volume in volume order.
        ground_truth_hu: the CT on the same grid.
        spacing_mm: of the axes. Thresholds of size are for cubes of the same volume.
        segmenter: finds the lungs of both volumes.
    """
    inside, prediction_hu, ground_truth_hu = inside_field_of_view(prediction_hu, ground_truth_hu)
    edge_mm = math.prod(spacing_mm) ** (1 / 3)
    found, true = (
        Anatomy.of(np.rint(hu.clip(HU_MIN, HU_MAX)).astype(np.int16), edge_mm, inside, segmenter)
        for hu in (prediction_hu, ground_truth_hu)
    )
    voxel_ml = math.prod(spacing_mm) / 1000
    volumes = {
        name: [float(getattr(anatomy, name).sum()) * voxel_ml for anatomy in (found, true)]
        for name in ("lung", "mediastinum")
    }
    return {
        "lung_dice": dice(found.lung, true.lung),
        "right_lung_dice": dice(found.right_lung, true.right_lung),
        "left_lung_dice": dice(found.left_lung, true.left_lung),
        **surface_metrics("lung", found.lung, true.lung, spacing_mm),
        "lung_volume_ml": volumes["lung"][0],
        "lung_volume_error_ml": volumes["lung"][0] - volumes["lung"][1],
        "mediastinum_dice": dice(found.mediastinum, true.mediastinum),
        "mediastinum_volume_error_ml": volumes["mediastinum"][0] - volumes["mediastinum"][1],
        "trachea_dice": dice(found.trachea, true.trachea),
        "vessel_cldice": cldice(found.vessel, true.vessel),
        "bone_dice": dice(found.bone, true.bone),
        "lung_bias_hu": bias_hu(prediction_hu, ground_truth_hu, true.lung),
        "soft_tissue_bias_hu": bias_hu(prediction_hu, ground_truth_hu, true.soft_tissue),
        "bone_bias_hu": bias_hu(prediction_hu, ground_truth_hu, true.bone),
    }


def dice(found: Mask, true: Mask) -> float:
    """Twice the intersection divided by the sum of both."""
    total = int(found.sum()) + int(true.sum())
    return float(2 * (found & true).sum() / total) if total else 1.0


def cldice(found: Mask, true: Mask) -> float:
    """Harmonic mean of the shares of each centerline that lie inside the other mask (clDice, arXiv 2003.07311).

    Thinning can remove a small mask completely: that mask is its own centerline.
    """
    if not found.any() or not true.any():
        return float(found.any() == true.any())
    thinned = [(skeletonize(mask), mask) for mask in (found, true)]
    lines = [line if line.any() else mask for line, mask in thinned]
    precision, sensitivity = (float(mask[line].mean()) for line, mask in zip(lines, (true, found), strict=True))
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0


def surface_metrics(name: str, found: Mask, true: Mask, spacing_mm: Sequence[float]) -> Metrics:
    """Surface Dice with a tolerance of 5 mm, 95th percentile of the Hausdorff distance and average symmetric distance.

    MONAI computes them; the Hausdorff distance is the larger of both directions' percentiles, and the average is over
    the voxels of both surfaces.
    """
    # Takes seconds to import.
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    if found.any() and true.any():
        first, second = (torch.from_numpy(mask)[None, None] for mask in (found, true))
        options: dict[str, Any] = {"include_background": True, "spacing": tuple(spacing_mm)}
        with warnings.catch_warnings():
            # MONAI 1.6 calls its own deprecated argument.
            warnings.simplefilter("ignore", FutureWarning)
            overlap = float(compute_surface_dice(first, second, class_thresholds=[TOLERANCE_MM], **options))
            largest = float(compute_hausdorff_distance(first, second, percentile=95, **options))
            average = float(compute_average_surface_distance(first, second, symmetric=True, **options))
    else:
        equal = bool(found.any() == true.any())
        overlap, largest = float(equal), 0.0 if equal else math.inf
        average = largest
    return {f"{name}_surface_dice": overlap, f"{name}_hd95_mm": largest, f"{name}_assd_mm": average}


def bias_hu(
    prediction_hu: Float[np.ndarray, "d h w"], ground_truth_hu: Float[np.ndarray, "d h w"], tissue: Mask
) -> float:
    """Mean of prediction minus ground truth inside a tissue of the ground truth; NaN where there is none."""
    return float((prediction_hu - ground_truth_hu)[tissue].mean(dtype=np.float64)) if tissue.any() else math.nan
