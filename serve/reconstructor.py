"""Radiographs to a volume in HU, and that volume as a NIfTI file that a viewer opens the right way up."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float, Float32, Int16
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid
from raylift.datasets.radiographs.decoding import prepare
from raylift.models import consistency, generative, weights
from raylift.models.generative import RunningStatistics, SamplingFlags
from raylift.models.weights import Description, Model


def prepared(
    images: Mapping[str, Float32[np.ndarray, "_ _"]], description: Description
) -> Float32[np.ndarray, "views rows columns"]:
    """Bone-bright radiographs of any size, one for each of the model's views, as it was trained on them."""
    return np.stack([prepared_one(images[view.name], view.name, description) for view in description.geometry.views])


def prepared_one(
    image: Float32[np.ndarray, "_ _"], view: str, description: Description
) -> Float32[np.ndarray, "rows columns"]:
    """The same of one view."""
    return prepare(image, description.geometry.detector_px, description.histograms.get(view))


@dataclass(frozen=True)
class Reconstruction:
    """A volume, and how well it explains the radiographs it was made of."""

    hu: Int16[np.ndarray, "d h w"]
    """In volume order; the mean where several were drawn."""
    deviation: Int16[np.ndarray, "d h w"] | None = None
    """The standard deviation over draws in HU, voxel by voxel; None where there was one volume."""
    residuals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By view, before and after the consistency fit, averaged over draws; empty where there was none."""


class Reconstructor:
    """A model that takes prepared radiographs, and fits its volumes to them in `consistency_steps` steps.

    Attributes:
        draw: how the model draws; None if it computes its volume.

    Raises:
        ConfigError: steps are negative, or something was asked of the drawing that the model cannot do.
    """

    def __init__(
        self, model: Model, device: str = "cpu", consistency_steps: int = 0, draw: SamplingFlags | None = None
    ) -> None:
        consistency.require_steps(consistency_steps)
        self.draw = (draw or SamplingFlags()).resolve(model.network)
        self.description = model.description
        self.sha256 = model.sha256
        self._steps = consistency_steps
        self._device = torch.device(device)
        self._network = model.network.to(self._device)

    @classmethod
    def load(
        cls, url: str, device: str = "cpu", consistency_steps: int = 0, draw: SamplingFlags | None = None
    ) -> Reconstructor:
        """From an exported folder or a checkpoint."""
        return cls(weights.load(url), device, consistency_steps, draw)

    @property
    def views(self) -> list[str]:
        """Names of the views it wants, in order."""
        return [view.name for view in self.description.geometry.views]

    def prepare(self, images: dict[str, Float32[np.ndarray, "_ _"]]) -> Float32[np.ndarray, "views rows columns"]:
        """Bone-bright radiographs of any size, by view, as the network wants them.

        Raises:
            ConfigError: a view is missing or too many.
        """
        if set(images) != set(self.views):
            raise ConfigError(
                f"this model wants {' and '.join(self.views)}, given were {' and '.join(images) or 'none'}"
            )
        return prepared(images, self.description)

    @torch.no_grad()
    def reconstruct(
        self, radiographs: list[Float32[np.ndarray, "views rows columns"]], samples: list[int] | None = None
    ) -> list[Reconstruction]:
        """A volume in HU for each set of prepared radiographs.

        With more than one sample it is the mean of so many draws, each fitted by itself, and their standard deviation
        comes with it. The seeds of the draws count from the settings' seed on.

        Raises:
            ConfigError: samples are fewer than one, or more of a model that computes its volume.
        """
        counts = samples or [1] * len(radiographs)
        for count in set(counts):
            SamplingFlags().resolve(self._network, count)
        batch = torch.from_numpy(np.stack(radiographs)).to(self._device)
        spreads = [RunningStatistics() for _ in counts]
        residuals: list[list[dict[str, tuple[float, float]]]] = [[] for _ in counts]
        for k in range(max(counts)):
            wanted = [place for place, count in enumerate(counts) if count > k]
            unit, told = self._draw(batch[wanted], k)
            for place, one, pairs in zip(wanted, unit, told, strict=True):
                spreads[place].add(one)
                residuals[place].append(pairs)
        return [
            self._reconstruction(spread, consistency.mean_residuals(told))
            for spread, told in zip(spreads, residuals, strict=True)
        ]

    def _draw(self, batch: Tensor, k: int) -> tuple[Tensor, list[dict[str, tuple[float, float]]]]:
        """The k-th volumes of a batch, fitted if that was asked for, and their residuals."""
        unit = generative.predict(self._network, batch, self.draw, k)
        if not self._steps:
            return unit, [{} for _ in unit]
        made = self.description
        fit = consistency.fit(unit, batch, made.window, made.grid, made.geometry, self._steps)
        return fit.volume, fit.by_view(made.geometry)

    def _reconstruction(self, spread: RunningStatistics, residuals: dict[str, tuple[float, float]]) -> Reconstruction:
        window, deviation = self.description.window, spread.std
        return Reconstruction(
            _int16(window.to_hu(spread.mean)),
            None if deviation is None else _int16(deviation * window.width_hu),
            residuals,
        )


def _int16(volume: Float[Tensor, "1 d h w"]) -> Int16[np.ndarray, "d h w"]:
    return volume[0].round().cpu().numpy().astype(np.int16)


def told(residuals: dict[str, tuple[float, float]]) -> str:
    """What the fit did, for a person: each view's residual before and after it."""
    return ", ".join(f"{view} {before:.3f} -> {after:.3f}" for view, (before, after) in residuals.items())


def nifti(hu: Int16[np.ndarray, "d h w"], grid: Grid, note: str = "") -> bytes:
    """A gzipped NIfTI: HU as int16, spacing in mm, axes along the patient's (LPS), centered on the origin."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(hu[::-1]))
    image.SetSpacing((grid.spacing_mm,) * 3)
    image.SetOrigin([-(n - 1) / 2 * grid.spacing_mm for n in image.GetSize()])
    image.SetMetaData("ITK_FileNotes", note[:79])
    with tempfile.TemporaryDirectory(prefix="raylift-nifti-") as folder:
        path = Path(folder) / "volume.nii.gz"
        sitk.WriteImage(image, str(path))
        return path.read_bytes()
