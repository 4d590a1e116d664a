"""Image-quality metrics of reconstructed volumes, under named protocols.

Published values of the same metric differ by up to 7 dB between definitions. Every number therefore belongs to a
protocol: the HU window, the data range of PSNR, and whether a metric is computed over the volume or slice by slice.

| protocol | window, HU | PSNR | SSIM |
| --- | --- | --- | --- |
| `volume` | [-1024, 1476] | whole volume, data range = window | 3-D, Gaussian of 1.5 voxels |
| `x2ct` | [-1024, 1476] | volume and mean of slices, data range **4095**, not 2500 | mean of slices, 7 x 7 |
| `cvaa` | [-1000, 4096] | whole volume, data range = window | 3-D, Gaussian of 1.5 voxels |

Voxels that are NaN in the ground truth, outside its field of view, are left out: errors, PSNR and cosine similarity are
of the others, SSIM is the mean over windows centered on the others, with air in both volumes outside.

`x2ct` is the arithmetic of X2CT-GAN's published evaluation; its PSNR is 4.29 dB above that of the same error with the
window as data range. `cvaa` has CVAA-GAN's window and scale; its paper does not define SSIM; it is chosen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from skimage.metrics import structural_similarity

from raylift.datasets.intensity import HU_MIN, Window

Metrics = dict[str, float]
Unit = Float[np.ndarray, "d h w"]
Inside = Bool[np.ndarray, "d h w"]
ZERO_ERROR_DB = 100.0
"""PSNR of a slice without error."""
_GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


@dataclass(frozen=True)
class VolumeProtocol:
    """A window and the metrics computed inside it."""

    window: Window
    scores: str
    """Definition of PSNR and SSIM, for a report."""
    compute: Callable[[Unit, Unit, Inside], Metrics]

    @property
    def definition(self) -> str:
        """Window and definition of the metrics, for a report."""
        return f"{self.window.low_hu:g} to {self.window.high_hu:g} HU. {self.scores}."

    def evaluate(
        self, prediction_hu: Float[np.ndarray, "d h w"], ground_truth_hu: Float[np.ndarray, "d h w"]
    ) -> Metrics:
        """The protocol's metrics for one volume, where the ground truth is not NaN; both are clipped to the window."""
        inside, *volumes = inside_field_of_view(prediction_hu, ground_truth_hu)
        prediction, ground_truth = (self.window.to_unit(hu.astype(np.float64)) for hu in volumes)
        return {
            "mae_hu": _mean(np.abs(prediction - ground_truth), inside) * self.window.width_hu,
            **self.compute(prediction, ground_truth, inside),
        }


def psnr_db(mean_squared_error: float, data_range: float) -> float:
    """Peak signal-to-noise ratio; infinite without error."""
    return float("inf") if mean_squared_error == 0 else float(10 * np.log10(data_range**2 / mean_squared_error))


def cosine_similarity(prediction: Unit, ground_truth: Unit) -> float:
    """Cosine of the angle between the flattened volumes, not centered, as X2CT-GAN reports it."""
    # Sums of NumPy itself, because the last digit of BLAS depends on its number of threads.
    norms = np.sqrt(np.square(prediction).sum() * np.square(ground_truth).sum())
    return float((prediction * ground_truth).sum() / norms) if norms else 0.0


def inside_field_of_view(
    prediction_hu: Float[np.ndarray, "d h w"], ground_truth_hu: Float[np.ndarray, "d h w"]
) -> tuple[Inside, Float[np.ndarray, "d h w"], Float[np.ndarray, "d h w"]]:
    """The voxels with ground truth, and both volumes with air in the others."""
    inside = ~np.isnan(ground_truth_hu)
    if inside.all():
        return inside, prediction_hu, ground_truth_hu
    return inside, np.where(inside, prediction_hu, HU_MIN), np.where(inside, ground_truth_hu, HU_MIN)


def _mean(values: Float[np.ndarray, "*shape"], inside: Bool[np.ndarray, "*shape"]) -> float:
    return float(values.mean() if inside.all() else values[inside].mean())


def _ssim(prediction: Unit, ground_truth: Unit, inside: Inside, margin: tuple[int, int, int], **settings: Any) -> float:
    """Mean SSIM over windows centered inside, NaN without any; `margin`: half the window per axis, 0 along channels."""
    mean, windows = structural_similarity(ground_truth, prediction, data_range=1.0, full=True, **settings)
    if inside.all():
        return float(mean)
    whole = tuple(slice(m, n - m) for m, n in zip(margin, inside.shape, strict=True))
    return _mean(windows[whole], inside[whole]) if inside[whole].any() else np.nan


def _volume_metrics(prediction: Unit, ground_truth: Unit, inside: Inside) -> Metrics:
    mean_squared_error = _mean(np.square(prediction - ground_truth), inside)
    return {
        "mse": mean_squared_error,
        "psnr_db": psnr_db(mean_squared_error, 1.0),
        "ssim": _ssim(prediction, ground_truth, inside, (5, 5, 5), **_GAUSSIAN),
        "cosine_similarity": cosine_similarity(prediction, ground_truth),
    }


def _x2ct_metrics(prediction: Unit, ground_truth: Unit, inside: Inside) -> Metrics:
    scaled = [np.asarray(volume * 2500).astype(np.int32).astype(np.float64) for volume in (prediction, ground_truth)]
    squared = np.square(scaled[0] - scaled[1])
    slices, similarities = [], []
    for axis in range(3):
        planes = zip(np.moveaxis(squared, axis, 0), np.moveaxis(inside, axis, 0), strict=True)
        errors = [_mean(plane, visible) for plane, visible in planes if visible.any()]
        slices.append(np.mean([ZERO_ERROR_DB if error == 0 else psnr_db(error, 4095.0) for error in errors]))
        moved, reference, mask = (np.moveaxis(volume, axis, -1) for volume in (prediction, ground_truth, inside))
        similarities.append(_ssim(moved, reference, mask, (3, 3, 0), channel_axis=-1))
    return {
        "mse": _mean(np.square(prediction - ground_truth), inside),
        "psnr_3d_db": psnr_db(_mean(squared, inside), 4095.0),
        "psnr_slices_db": float(np.mean(slices)),
        "ssim_slices": float(np.mean(similarities)),
        "cosine_similarity": cosine_similarity(prediction, ground_truth),
    }


_WHOLE_VOLUME = "PSNR over the volume, data range = width of the window; SSIM in 3-D with a Gaussian of 1.5 voxels"
_SLICES = (
    "PSNR with a data range of 4095 on values of 0 to 2500, over the volume and as a mean of slices; "
    "SSIM as a mean of slices, 7 x 7"
)
VOLUME = VolumeProtocol(Window(-1024, 1476), _WHOLE_VOLUME, _volume_metrics)
X2CT = VolumeProtocol(Window(-1024, 1476), _SLICES, _x2ct_metrics)
CVAA = VolumeProtocol(Window(-1000, 4096), _WHOLE_VOLUME, _volume_metrics)
