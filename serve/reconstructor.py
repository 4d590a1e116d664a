"""Radiographs to a volume in HU, and that volume as a NIfTI file that a viewer opens the right way up."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float32, Int16

from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Grid
from raylift.datasets.radiograph import prepare
from raylift.models import consistency, weights
from raylift.models.weights import Model


@dataclass(frozen=True)
class Reconstruction:
    """A volume, and how well it explains the radiographs it was made of."""

    hu: Int16[np.ndarray, "d h w"]
    """In volume order."""
    residuals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By view, before and after the consistency fit; empty where there was none."""


class Reconstructor:
    """A model that takes prepared radiographs, and fits its volumes to them in `consistency_steps` steps."""

    def __init__(self, model: Model, device: str = "cpu", consistency_steps: int = 0) -> None:
        consistency.require_steps(consistency_steps)
        self.description = model.description
        self.sha256 = model.sha256
        self._steps = consistency_steps
        self._device = torch.device(device)
        self._network = model.network.to(self._device)

    @classmethod
    def load(cls, url: str, device: str = "cpu", consistency_steps: int = 0) -> Reconstructor:
        """From an exported folder or a checkpoint."""
        return cls(weights.load(url), device, consistency_steps)

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
        size = self.description.geometry.detector_px
        return np.stack([prepare(images[view], size) for view in self.views])

    @torch.no_grad()
    def reconstruct(self, radiographs: list[Float32[np.ndarray, "views rows columns"]]) -> list[Reconstruction]:
        """A volume in HU for each set of prepared radiographs."""
        batch = torch.from_numpy(np.stack(radiographs)).to(self._device)
        unit = self._network(batch).float()
        residuals: list[dict[str, tuple[float, float]]] = [{} for _ in radiographs]
        if self._steps:
            made = self.description
            fit = consistency.fit(unit, batch, made.window, made.grid, made.geometry, self._steps)
            unit, residuals = fit.volume, fit.by_view(made.geometry)
        hu = self.description.window.to_hu(unit)[:, 0].round().cpu().numpy().astype(np.int16)
        return [Reconstruction(*one) for one in zip(hu, residuals, strict=True)]


def told(residuals: dict[str, tuple[float, float]]) -> str:
    """What the fit did, for a person: each view's residual before and after it."""
    return ", ".join(f"{view} {before:.3f} -> {after:.3f}" for view, (before, after) in residuals.items())


def nifti(hu: Int16[np.ndarray, "d h w"], grid: Grid, note: str = "") -> bytes:
    """A gzipped NIfTI: HU as int16, spacing in mm, axes along the patient's (LPS), centred on the origin."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(hu[::-1]))
    image.SetSpacing((grid.spacing_mm,) * 3)
    image.SetOrigin([-(n - 1) / 2 * grid.spacing_mm for n in image.GetSize()])
    image.SetMetaData("ITK_FileNotes", note[:79])
    with tempfile.TemporaryDirectory(prefix="raylift-nifti-") as folder:
        path = Path(folder) / "volume.nii.gz"
        sitk.WriteImage(image, str(path))
        return path.read_bytes()
