"""The model as the HTTP API and the web page use it, independent of the process that runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int16

from raylift.models.diffusion.diffusion_network import SamplingConfig
from raylift.models.weights import Description
from raylift.serve.reconstructor import HUVolume
from raylift.serve.volume_formats import NIFTI, VolumeFormat

DISCLAIMER = "Research software, not a medical device: not for diagnosis."


@dataclass(frozen=True)
class Backend:
    """A served model: its description and the calls to it."""

    description: Description
    sha256: str
    reconstruct: Callable[[Float32[np.ndarray, "views rows columns"], int], Awaitable[HUVolume]]
    """Maps prepared radiographs and the number of samples to a volume in HU; raises ServiceUnavailableError."""
    ready: Callable[[], Awaitable[bool]]
    """Whether the model is loaded and requests are accepted."""
    consistency_steps: int = 0
    """Steps of the data-consistency fit; 0 for none."""
    sampling: SamplingConfig | None = None
    """Sampler settings of a diffusion model; None for a deterministic one."""
    max_samples: int = 1
    """Largest number of samples of a request."""
    slot: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
    """A slot in the queue while the files of a request are decoded and used; raises ServiceUnavailableError."""
    strict: bool = False
    """Whether radiographs with a warning of the checks of the input are refused."""

    @property
    def multiple_samples(self) -> bool:
        """Whether a request may set a number of samples above 1."""
        return self.sampling is not None and self.max_samples > 1

    @property
    def views(self) -> list[str]:
        """Names of the required views, in the model's order."""
        return [view.name for view in self.description.geometry.views]

    def encode(self, volume: Int16[np.ndarray, "d h w"], kind: VolumeFormat = NIFTI) -> bytes:
        """A volume in a format, with the digest of the weights in its header."""
        return kind.encode(volume, self.description.grid, f"raylift {self.sha256[:12]}, research only")
