"""Random changes of digitally reconstructed radiographs (DRRs): physics, detector and processing of a real one.

The inputs are the line integrals of soft tissue and of bone; the output is a bone-bright image of unknown scale, as
a real radiograph is. All random numbers of one sample come from a NumPy generator; images are computed by the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets.errors import ConfigError

FIELD_POINTS = 4
"""Control points of a smooth random field, along each side of the image."""

SHARPENING_CELLS = 16
"""Means along each side of the image from which its smooth version for unsharp masking is interpolated."""
LETTERS = {
    "L": ("#...", "#...", "#...", "#...", "####"),
    "R": ("###.", "#..#", "###.", "#.#.", "#..#"),
}
"""Side markers of lead."""


@dataclass(frozen=True)
class RadiographAugmentation:
    """Ranges of the random changes; 0 leaves a part out. Strengths are uniform between 0 and the value."""

    probability: float = 0.7
    """Fraction of samples whose radiographs are changed."""
    beam_hardening: float = 0.6
    """Fraction of a softer component in the beam: a two-material, two-energy model of beam hardening."""
    scatter: float = 0.3
    """Largest scatter-to-primary ratio: a smooth field times the locally averaged primary intensity is added to it."""
    photons: tuple[float, float] = (1e5, 1e7)
    """Incident photons per image pixel, log-uniform, for Poisson noise. An image pixel of 2.5 mm averages hundreds of
    detector pixels."""
    electronic_noise: float = 0.01
    """Standard deviation of the noise added to the finished image."""
    blur_px: float = 0.9
    """Standard deviation of the Gaussian blur."""
    gamma: tuple[float, float] = (0.6, 1.6)
    """Exponent of the tone curve, log-uniform."""
    sigmoid: float = 5.0
    """Slope of an S-shaped tone curve (Hurter and Driffield)."""
    sharpening: float = 2.0
    """Factor by which detail finer than a sixteenth of the image is enhanced (unsharp masking)."""
    gain: float = 0.25
    """Amplitude of a smooth gain of the finished image (heel effect, equalization)."""
    collimation: float = 0.3
    """Probability that up to an eighth of each side is covered."""
    markers: float = 0.3
    """Probability of up to three bright marks near the edges: side markers and bars."""
    clipping: float = 0.04
    """Fraction of pixels that may be saturated at either end."""
    quantization: float = 0.5
    """Probability of rounding to 8 bit."""

    def __post_init__(self) -> None:
        if not (0 < self.photons[0] <= self.photons[1] and 0 < self.gamma[0] <= self.gamma[1]):
            raise ConfigError("augmentation photons and gamma: give two numbers above 0, the lower first")
        for name in ("probability", "beam_hardening", "collimation", "markers", "quantization"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augmentation {name} is {getattr(self, name)}: give a fraction from 0 to 1")
        for name in ("scatter", "electronic_noise", "blur_px", "sigmoid", "sharpening", "gain", "clipping"):
            if getattr(self, name) < 0:
                raise ConfigError(f"augmentation {name} is {getattr(self, name)}: give 0 or more")

    def sample(self, rng: np.random.Generator, views: int, size: int) -> AcquisitionParameters:
        """The parameters of one sample; every view has its own, because views are separate exposures."""
        if rng.random() >= self.probability:
            return AcquisitionParameters.none(views, size)

        def upto(end: float) -> np.ndarray:
            return rng.uniform(0, end, views) * (rng.random(views) < 0.7)

        def between(low: float, high: float) -> np.ndarray:
            return np.asarray(np.exp(rng.uniform(np.log(low), np.log(high), views)))

        overlay = np.full((views, size, size), np.nan, dtype=np.float32)
        for view in range(views):
            self._marks(rng, overlay[view])
        return AcquisitionParameters(
            beam_hardening=upto(self.beam_hardening),
            scatter=upto(self.scatter)[:, None, None] * rng.uniform(0, 1, (views, FIELD_POINTS, FIELD_POINTS)),
            photons=between(*self.photons),
            noise=rng.standard_normal((2, views, size, size)).astype(np.float32),
            electronic_noise=upto(self.electronic_noise),
            blur_px=upto(self.blur_px),
            gamma=between(*self.gamma),
            sigmoid=upto(self.sigmoid),
            sharpening=upto(self.sharpening),
            gain=upto(self.gain)[:, None, None] * rng.uniform(-1, 1, (views, FIELD_POINTS, FIELD_POINTS)),
            clipping=rng.uniform(0, self.clipping, (2, views)),
            bits=np.where(rng.random(views) < self.quantization, 255.0, 0.0),
            overlay=overlay,
        )

    def _marks(self, rng: np.random.Generator, overlay: np.ndarray) -> None:
        """Collimated borders (dark) and marks (bright) into an image that is NaN elsewhere."""
        size = overlay.shape[0]
        if rng.random() < self.collimation:
            top, bottom, left, right = rng.integers(0, max(1, size // 8) + 1, 4) * (rng.random(4) < 0.6)
            overlay[:top], overlay[size - bottom :], overlay[:, :left], overlay[:, size - right :] = (0.0,) * 4
        if rng.random() < self.markers:
            for _ in range(rng.integers(1, 4)):
                mark = self._mark(rng, size)
                high, wide = mark.shape
                row = rng.integers(0, max(1, size - high + 1))
                column = rng.choice([rng.integers(0, size // 8), size - size // 8 - wide + rng.integers(0, size // 8)])
                overlay[row : row + high, column : column + wide][mark] = 1.0

    def _mark(self, rng: np.random.Generator, size: int) -> Bool[np.ndarray, "rows columns"]:
        """A letter or a bar."""
        if rng.random() < 0.7:
            rows = LETTERS["LR"[rng.integers(2)]]
            letter = np.array([[pixel == "#" for pixel in row] for row in rows])
            return np.kron(letter, np.ones((max(1, size // 64),) * 2, dtype=bool))
        high, wide = rng.integers(1, max(2, size // 12) + 1, 2)
        return np.ones((high, wide), dtype=bool)


@dataclass(frozen=True)
class AcquisitionParameters:
    """Parameters of the radiographs of one sample, by view."""

    beam_hardening: np.ndarray
    scatter: np.ndarray
    photons: np.ndarray
    noise: np.ndarray
    electronic_noise: np.ndarray
    blur_px: np.ndarray
    gamma: np.ndarray
    sigmoid: np.ndarray
    sharpening: np.ndarray
    gain: np.ndarray
    clipping: np.ndarray
    bits: np.ndarray
    overlay: np.ndarray

    @classmethod
    def none(cls, views: int, size: int) -> AcquisitionParameters:
        """Parameters that leave the line integrals as they are."""
        zeros, field = np.zeros(views), np.zeros((views, FIELD_POINTS, FIELD_POINTS))
        return cls(
            beam_hardening=zeros, scatter=field, photons=np.full(views, np.inf),
            noise=np.zeros((2, views, size, size), np.float32), electronic_noise=zeros, blur_px=zeros,
            gamma=np.ones(views), sigmoid=zeros, sharpening=zeros, gain=field, clipping=np.zeros((2, views)),
            bits=zeros, overlay=np.full((views, size, size), np.nan, np.float32),
        )  # fmt: skip


def simulate_acquisition(
    soft: Float[Tensor, "n views s s"], bone: Float[Tensor, "n views s s"], parameters: list[AcquisitionParameters]
) -> Float[Tensor, "n views s s"]:
    """Bone-bright images in [0, 1], not yet normalized; without any effect, line integrals divided by their maximum.

    Args:
        soft: line integrals of everything as if it were soft tissue, without unit.
        bone: line integrals of the attenuation that bone adds to them.
        parameters: one set for each sample.
    """
    device, size = soft.device, soft.shape[-1]

    def stacked(name: str) -> Tensor:
        values = np.stack([getattr(sample, name) for sample in parameters])
        return torch.as_tensor(values, dtype=torch.float32).to(device, non_blocking=True)

    def column(name: str) -> Tensor:
        return stacked(name)[..., None, None]

    def field(name: str) -> Tensor:
        return F.interpolate(stacked(name), size=(size, size), mode="bicubic", align_corners=True)

    total = soft + bone
    # Two energies: the softer one is attenuated more, bone more than soft tissue.
    share = column("beam_hardening")
    softer = torch.exp(-(1.35 * soft + 2.1 * bone))
    transmitted = (1 - share) * torch.exp(-total) + share * softer
    # Scatter is what arrives in the neighborhood, smoothed.
    around = F.interpolate(F.adaptive_avg_pool2d(transmitted, 8), size=(size, size), mode="bilinear")
    transmitted = transmitted + field("scatter").clamp_min(0) * around
    noise, photons = stacked("noise"), column("photons")
    # Poisson noise of many photons is Gaussian.
    transmitted = transmitted + noise[:, 0] * (transmitted / photons).sqrt()
    image = -transmitted.clamp_min(1e-6).log()
    image = _blurred(image, stacked("blur_px"))
    low, high = image.amin(dim=(2, 3), keepdim=True), image.amax(dim=(2, 3), keepdim=True)
    image = (image - low) / (high - low).clamp_min(1e-6)
    image = image ** column("gamma")
    slope = column("sigmoid")
    sigmoid = (torch.sigmoid(slope * (image - 0.5)) - torch.sigmoid(-slope / 2)) / (
        torch.sigmoid(slope / 2) - torch.sigmoid(-slope / 2)
    ).clamp_min(1e-6)
    image = torch.where(slope > 0.1, sigmoid, image)
    smooth = F.adaptive_avg_pool2d(image, min(SHARPENING_CELLS, size))
    smooth = F.interpolate(smooth, size=(size, size), mode="bicubic", align_corners=False)
    image = image + column("sharpening") * (image - smooth)
    image = image * (1 + field("gain")) + column("electronic_noise") * noise[:, 1]
    cut = stacked("clipping")[..., None, None]
    image = image.clamp(min=0.0).maximum(cut[:, 0]).minimum(1 - cut[:, 1])
    bits = column("bits")
    image = torch.where(bits > 0, (image * bits).round() / bits.clamp_min(1), image)
    # Normalization by the maximum keeps the offset of rays that all cross the patient.
    offset = total.amin(dim=(2, 3), keepdim=True) / total.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
    image = offset + image * (1 - offset)
    overlay = stacked("overlay")
    return torch.where(overlay.isnan(), image, overlay)


def _blurred(images: Float[Tensor, "n v s s"], sigma: Float[Tensor, "n v"]) -> Float[Tensor, "n v s s"]:
    """Each image with a Gaussian of its own, in pixels; 0 leaves it as it is."""
    n, v, s, _ = images.shape
    offsets = torch.arange(-3.0, 4.0, device=images.device)
    taps = torch.exp(-offsets.square() / (2 * sigma.reshape(-1, 1).clamp_min(1e-3).square()))
    taps = taps / taps.sum(dim=1, keepdim=True)
    flat = F.pad(images.reshape(1, n * v, s, s), (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(flat, taps[:, None, :, None], groups=n * v)
    return F.conv2d(flat, taps[:, None, None, :], groups=n * v).reshape(n, v, s, s)
