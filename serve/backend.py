"""The model as the HTTP API and the web page use it, independent of the process that runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int16

from raylift.models.weights import Description
from raylift.serve.reconstructor import HUVolume
from raylift.serve.served_model import ReconstructionSettings, ServedModel
from raylift.serve.service_metrics import Metrics
from raylift.serve.volume_formats import NIFTI, VolumeFormat

DISCLAIMER = "Research software, not a medical device: not for diagnosis."


@dataclass(frozen=True)
class Backend:
    """A served model: its description and the calls to it."""

    model: ServedModel
    reconstruct: Callable[[Float32[np.ndarray, "views rows columns"], ReconstructionSettings], Awaitable[HUVolume]]
    """Maps prepared radiographs and the settings of a request to a volume in HU; raises ServiceUnavailableError."""
    ready: Callable[[], Awaitable[bool]]
    """Whether the model is loaded and requests are accepted."""
    slot: Callable[[float], AbstractAsyncContextManager[object]] = nullcontext
    """A slot in the queue, of the weight of a request, while its files are decoded and used; raises
    ServiceUnavailableError."""
    strict: bool = False
    """Whether radiographs with a warning of the checks of the input are refused."""

    models_of_service: tuple[ServedModel, ...] = ()
    """All models of the service, each with routes of its own; this one alone if empty."""

    metrics: Metrics = field(default_factory=Metrics)

    @property
    def description(self) -> Description:
        """The model's system, grid, geometry and window."""
        return self.model.description

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """All models of the service."""
        return self.models_of_service or (self.model,)

    def encode(self, volume: Int16[np.ndarray, "d h w"], kind: VolumeFormat = NIFTI) -> bytes:
        """A volume in a format, with the digest of the weights in its header."""
        with self.metrics.timer("encoding"):
            return kind.encode(volume, self.description.grid, f"raylift {self.model.sha256[:12]}, research only")
