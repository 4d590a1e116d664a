"""Hounsfield units, linear attenuation, and the input range of networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from raylift.datasets.errors import ConfigError

HU_MIN, HU_MAX = -1024, 3071
"""Range of stored volumes: the 12 bits of the Hounsfield scale. Scanners pad with -2048 or -3024."""

WATER_PER_MM = 0.02
"""Linear attenuation of water in 1/mm at an effective energy of 60 to 70 keV."""

PLASTIMATCH_AIR_HU = -800.0
"""HU up to which plastimatch's `drr` has no attenuation."""

Attenuation = Literal["linear", "plastimatch"]
"""HU to attenuation. linear: `water * (1 + HU / 1000)`, not below zero. plastimatch: zero up to -800 HU, and the same
above, as in X2CT-GAN's radiographs; plastimatch's coefficient of water differs, which no normalization keeps."""

Normalization = Literal["percentiles", "maximum"]
"""Radiographs to [0, 1]. percentiles: by the image's 0.5 and 99.5 percentiles (`normalize`). maximum: divided by the
image's maximum, in 8 bits, as X2CT-GAN's are."""

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclass(frozen=True)
class Window:
    """The HU range that maps to [0, 1] for a network. The default is X2CT-GAN's, 2500 HU wide."""

    low_hu: float = -1024.0
    """HU that maps to 0."""
    high_hu: float = 1476.0
    """HU that maps to 1."""

    def __post_init__(self) -> None:
        if not self.low_hu < self.high_hu:
            raise ConfigError(f"window [{self.low_hu}, {self.high_hu}] HU is empty")

    @property
    def width_hu(self) -> float:
        """High minus low."""
        return self.high_hu - self.low_hu

    def to_unit(self, hu: Array) -> Array:
        """HU to [0, 1], clipped."""
        return ((hu - self.low_hu) / self.width_hu).clip(0.0, 1.0)

    def to_hu(self, unit: Array) -> Array:
        """[0, 1] to HU, clipped to the window."""
        return unit.clip(0.0, 1.0) * self.width_hu + self.low_hu


def hu_to_attenuation(hu: Float[Tensor, "*shape"], attenuation: Attenuation = "linear") -> Float[Tensor, "*shape"]:
    """HU to linear attenuation in 1/mm, with that of water `WATER_PER_MM`; see `Attenuation`."""
    linear = (WATER_PER_MM * (1.0 + hu / 1000.0)).clamp_min(0.0)
    return linear if attenuation == "linear" else torch.where(hu > PLASTIMATCH_AIR_HU, linear, torch.zeros_like(linear))


def normalize_by_percentiles(
    images: Float[Tensor, "n views rows columns"],
) -> tuple[Float[Tensor, "n views rows columns"], Float[Tensor, "n views"], Float[Tensor, "n views"]]:
    """`normalize` by percentiles of each image of a batch, and the two percentiles; gradients reach these too."""
    ordered = images.flatten(2).sort(dim=-1).values
    last = ordered.shape[-1] - 1
    # The percentiles are pixels: the next one above the low, the next one below the high.
    low, high = ordered[..., math.ceil(0.005 * last)], ordered[..., math.floor(0.995 * last)]
    # A constant image becomes zeros.
    scaled = (images - low[..., None, None]) / (high - low).clamp_min(1e-6)[..., None, None]
    return scaled.clip(0.0, 1.0), low, high


def normalize(
    image: Float[np.ndarray, "rows columns"], normalization: Normalization = "percentiles"
) -> Float[np.ndarray, "rows columns"]:
    """A bone-bright radiograph to [0, 1] as float32; see `Normalization`.

    Training and inference share this step: the scale of a real radiograph is unknown, so a digitally reconstructed
    one must not keep its own. Both are idempotent: percentiles are pixels of the image, and multiples of 1 / 255 remain
    as they are. A constant image becomes zeros by its percentiles, and one without a positive pixel by its maximum.
    """
    if normalization == "percentiles":
        low, high = np.percentile(image, 0.5, method="higher"), np.percentile(image, 99.5, method="lower")
        if not high > low:
            return np.zeros_like(image, dtype=np.float32)
        scaled: Float[np.ndarray, "rows columns"] = np.clip((image - low) / (high - low), 0.0, 1.0).astype(np.float32)
        return scaled
    highest = float(image.max())
    if not highest > 0:
        return np.zeros_like(image, dtype=np.float32)
    # Rounding must not move a value that is a multiple of 1 / 255 to the next lower one.
    eight_bit: Float[np.ndarray, "rows columns"] = np.floor(np.clip(image / highest, 0.0, 1.0) * 255 + 1e-4)
    return (eight_bit / 255).astype(np.float32)
