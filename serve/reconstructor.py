"""Reconstruction of a CT volume in HU from radiographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16
from torch import Tensor

from raylift.datasets.errors import ConfigError
from raylift.datasets.radiographs.preparation import prepare
from raylift.models import consistency, inference
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.models.weights import Description, Model
from raylift.platform import model_store
from raylift.serve.served_model import ReconstructionSettings, resolve_sampling
from raylift.serve.view_text import in_words


def prepare_radiographs(
    images: Mapping[str, Float32[np.ndarray, "_ _"]], description: Description
) -> Float32[np.ndarray, "views rows columns"]:
    """Bone-bright radiographs of any size, one of each view, as the network's input."""
    return np.stack(
        [prepare_radiograph(images[view.name], view.name, description) for view in description.geometry.views]
    )


def prepare_radiograph(
    image: Float32[np.ndarray, "_ _"], view: str, description: Description
) -> Float32[np.ndarray, "rows columns"]:
    """A bone-bright radiograph of any size as the network's input for one view."""
    size, reference = description.geometry.detector_px, description.histograms.get(view)
    return prepare(image, size, reference, description.normalization)


@dataclass(frozen=True)
class HUVolume:
    """A reconstructed volume with its standard deviation over samples and its reprojection residuals."""

    hu: Int16[np.ndarray, "d h w"]
    """In volume order; the mean over samples if there are several."""
    std: Int16[np.ndarray, "d h w"] | None = None
    """Voxel-wise standard deviation over samples in HU; None for a single sample."""
    residuals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Reprojection residual of each view before and after the data-consistency fit, averaged over samples; empty
    without a fit."""
    prediction_time_s: float = 0.0
    """Time of the network for the batch of this volume, over all samples."""
    fit_time_s: float = 0.0
    """Time of the data-consistency fit for that batch."""


class Reconstructor:
    """A model that reconstructs volumes from prepared radiographs, with an optional data-consistency fit.

    Attributes:
        description: the model's system, grid, geometry and window.
        sha256: digest of the weights.
        sampling: sampler settings of a diffusion model; None for a deterministic one.

    Raises:
        ConfigError: `consistency_steps` is negative, or the model does not support the sampler settings.
    """

    def __init__(
        self, model: Model, device: str = "cpu", consistency_steps: int = 0, sampling: SamplingFlags | None = None
    ) -> None:
        consistency.require_steps(consistency_steps)
        self.sampling = (sampling or SamplingFlags()).resolve(model.network)
        self.description = model.description
        self.sha256 = model.sha256
        self._steps = consistency_steps
        self._device = torch.device(device)
        self._network = model.network.to(self._device)

    @classmethod
    def load(
        cls, url: str, device: str = "cpu", consistency_steps: int = 0, sampling: SamplingFlags | None = None
    ) -> Reconstructor:
        """Load an exported folder or a checkpoint."""
        return cls(model_store.load(url), device, consistency_steps, sampling)

    @property
    def views(self) -> list[str]:
        """Names of the required views, in the model's order."""
        return [view.name for view in self.description.geometry.views]

    def prepare(self, images: dict[str, Float32[np.ndarray, "_ _"]]) -> Float32[np.ndarray, "views rows columns"]:
        """Bone-bright radiographs of any size, by view, as the network's input.

        Raises:
            ConfigError: the views are not those of the model.
        """
        self.require_views(list(images))
        return prepare_radiographs(images, self.description)

    def require_views(self, names: Sequence[str]) -> None:
        """Raise a ConfigError if these are not the names of the model's views."""
        if set(names) != set(self.views):
            raise ConfigError(f"this model requires {in_words(self.views)}, got {in_words(names) or 'none'}")

    def reconstruct(
        self,
        radiographs: list[Float32[np.ndarray, "views rows columns"]],
        settings: list[ReconstructionSettings] | None = None,
        on_step: inference.OnStep | None = None,
    ) -> list[HUVolume]:
        """A volume in HU for each set of prepared radiographs.

        With more than one sample the volume is their mean, and the standard deviation is returned too. Each sample is
        fitted separately. Sample k has the seed `sampling.seed + k`.

        Sets with the same steps are computed as one batch. One with a seed of its own is computed alone, because the
        rounding of a volume depends on the size of its batch.

        Args:
            radiographs: one set for each volume.
            settings: of each volume; the defaults if omitted.
            on_step: is called before each step of a batch; what it raises ends the reconstruction.

        Raises:
            ConfigError: fewer than one sample, or a setting of a sampler for a deterministic model.
        """
        batches: dict[tuple[object, ...], list[int]] = {}
        given = settings or [ReconstructionSettings()] * len(radiographs)
        for item, one in enumerate(given):
            alone = None if one.seed is None else item
            batches.setdefault((one.steps, one.consistency_steps, alone), []).append(item)
        volumes: dict[int, HUVolume] = {}
        for items in batches.values():
            batch = self._reconstruct([radiographs[item] for item in items], [given[item] for item in items], on_step)
            volumes |= dict(zip(items, batch, strict=True))
        return [volumes[item] for item in range(len(given))]

    def _reconstruct(
        self,
        radiographs: list[Float32[np.ndarray, "views rows columns"]],
        settings: list[ReconstructionSettings],
        on_step: inference.OnStep | None,
    ) -> list[HUVolume]:
        """The volumes of one batch, whose settings differ only in the number of samples."""
        model, steps = self.description, settings[0].consistency_steps
        (sampling,) = {resolve_sampling(self.sampling, one) for one in settings}
        results = inference.reconstruct(
            self._network,
            torch.from_numpy(np.stack(radiographs)).to(self._device),
            model.window,
            model.grid,
            model.geometry,
            sampling=sampling,
            samples=[one.samples for one in settings],
            consistency_steps=self._steps if steps is None else steps,
            on_step=on_step,
        )
        return [self._in_hu(result) for result in results]

    def _in_hu(self, result: inference.Reconstruction) -> HUVolume:
        window, std = self.description.window, result.std
        return HUVolume(
            _int16(window.to_hu(result.volume)),
            None if std is None else _int16(std * window.width_hu),
            result.residuals,
            result.prediction_time_s,
            result.fit_time_s,
        )


def _int16(volume: Float[Tensor, "1 d h w"]) -> Int16[np.ndarray, "d h w"]:
    return volume[0].round().cpu().numpy().astype(np.int16)


def format_residuals(residuals: dict[str, tuple[float, float]]) -> str:
    """Text with the residual of each view before and after the data-consistency fit."""
    return ", ".join(f"{view} {before:.3f} -> {after:.3f}" for view, (before, after) in residuals.items())
