"""Image-quality metrics of reconstructed volumes, under named protocols.

Published values of the same metric differ by five decibels between definitions. Every number therefore belongs to a
protocol: the HU window, the maximum of PSNR, and whether a metric is computed over the volume or slice by slice.

| protocol | window, HU | PSNR | SSIM |
| --- | --- | --- | --- |
| `volume` | [-1024, 1476] | whole volume, maximum = window | 3-D, Gaussian of 1.5 voxels |
| `x2ct` | [-1024, 1476] | volume and mean of slices, maximum **4095** on a scale of 2500 | mean of slices, 7 x 7 |
| `cvaa` | [-1000, 4096] | whole volume, maximum = window | 3-D, Gaussian of 1.5 voxels |

`x2ct` is the arithmetic of X2CT-GAN's published evaluation; its PSNR is 4.29 dB above that of the same error with the
window as maximum. `cvaa` has CVAA-GAN's window and scale; its paper does not define SSIM; it is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from skimage.metrics import structural_similarity

from raylift.datasets import segmentation
from raylift.datasets.intensity import HU_MAX, HU_MIN, Window

Metrics = dict[str, float]
Unit = Float[np.ndarray, "d h w"]
ZERO_ERROR_DB = 100.0
"""PSNR of a slice without error."""


@dataclass(frozen=True)
class VolumeProtocol:
    """A window and the metrics computed inside it."""

    window: Window
    scores: str
    """Definition of PSNR and SSIM, for a report."""
    compute: Callable[[Unit, Unit], Metrics]

    @property
    def definition(self) -> str:
        """Window and definition of the metrics, for a report."""
        return f"{self.window.low_hu:g} to {self.window.high_hu:g} HU. {self.scores}."

    def evaluate(
        self, prediction_hu: Float[np.ndarray, "d h w"], ground_truth_hu: Float[np.ndarray, "d h w"]
    ) -> Metrics:
        """The protocol's metrics for one volume; both are clipped to the window first."""
        prediction = self.window.to_unit(prediction_hu.astype(np.float64))
        ground_truth = self.window.to_unit(ground_truth_hu.astype(np.float64))
        return {
            "mae_hu": _mae(prediction, ground_truth) * self.window.width_hu,
            **self.compute(prediction, ground_truth),
        }


def psnr_db(mean_squared_error: float, maximum: float) -> float:
    """Peak signal-to-noise ratio; infinite without error."""
    return float("inf") if mean_squared_error == 0 else float(10 * np.log10(maximum**2 / mean_squared_error))


def cosine(prediction: Unit, ground_truth: Unit) -> float:
    """Cosine of the angle between the flattened volumes, not centered, as X2CT-GAN reports it."""
    # Sums of NumPy itself, because the last digit of BLAS depends on its number of threads.
    norms = np.sqrt(np.square(prediction).sum() * np.square(ground_truth).sum())
    return float((prediction * ground_truth).sum() / norms) if norms else 0.0


def compare_lungs(
    prediction_hu: Float[np.ndarray, "d h w"], ground_truth_hu: Float[np.ndarray, "d h w"], spacing_mm: float
) -> Metrics:
    """Dice of the lungs, both segmented by the same threshold (`segmentation.lungs`), and their volumes.

    `lung_dice` is 0 where only one volume has lungs, `lung_volume_ml` is the prediction's, and `lung_volume_error_ml`
    the prediction's minus that of the ground truth. Where voxels are not cubes, `spacing_mm` is the edge of a cube of
    their volume.
    """
    masks = [
        segmentation.lungs(np.rint(hu.clip(HU_MIN, HU_MAX)).astype(np.int16), spacing_mm)
        for hu in (prediction_hu, ground_truth_hu)
    ]
    predicted_ml, ground_truth_ml = (float(mask.sum()) * spacing_mm**3 / 1000 for mask in masks)
    total = int(masks[0].sum()) + int(masks[1].sum())
    return {
        "lung_dice": float(2 * (masks[0] & masks[1]).sum() / total) if total else 1.0,
        "lung_volume_ml": predicted_ml,
        "lung_volume_error_ml": predicted_ml - ground_truth_ml,
    }


def _mae(prediction: Unit, ground_truth: Unit) -> float:
    return float(np.abs(prediction - ground_truth).mean())


def _volume_metrics(prediction: Unit, ground_truth: Unit) -> Metrics:
    mean_squared_error = float(np.square(prediction - ground_truth).mean())
    return {
        "mse": mean_squared_error,
        "psnr_db": psnr_db(mean_squared_error, 1.0),
        "ssim": float(
            structural_similarity(
                ground_truth, prediction, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        ),
        "cosine": cosine(prediction, ground_truth),
    }


def _x2ct_metrics(prediction: Unit, ground_truth: Unit) -> Metrics:
    scaled = [np.asarray(volume * 2500).astype(np.int32).astype(np.float64) for volume in (prediction, ground_truth)]
    squared = np.square(scaled[0] - scaled[1])
    slices, similarities = [], []
    for axis in range(3):
        errors = np.moveaxis(squared, axis, 0).reshape(squared.shape[axis], -1).mean(axis=1)
        slices.append(np.mean([ZERO_ERROR_DB if error == 0 else psnr_db(error, 4095.0) for error in errors]))
        planes = [np.moveaxis(volume, axis, -1) for volume in (ground_truth, prediction)]
        similarities.append(structural_similarity(planes[0], planes[1], data_range=1.0, channel_axis=-1))
    return {
        "mse": float(np.square(prediction - ground_truth).mean()),
        "psnr_3d_db": psnr_db(float(squared.mean()), 4095.0),
        "psnr_slices_db": float(np.mean(slices)),
        "ssim_slices": float(np.mean(similarities)),
        "cosine": cosine(prediction, ground_truth),
    }


_WHOLE_VOLUME = "PSNR over the volume against the window's width; SSIM in 3-D with a Gaussian of 1.5 voxels"
_SLICES = (
    "PSNR against 4095 on a scale of 2500, over the volume and as a mean of slices; SSIM as a mean of slices, 7 x 7"
)
VOLUME = VolumeProtocol(Window(-1024, 1476), _WHOLE_VOLUME, _volume_metrics)
X2CT = VolumeProtocol(Window(-1024, 1476), _SLICES, _x2ct_metrics)
CVAA = VolumeProtocol(Window(-1000, 4096), _WHOLE_VOLUME, _volume_metrics)
