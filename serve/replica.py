"""The deployment that holds the model."""

from __future__ import annotations

import asyncio

import numpy as np
import torch
from jaxtyping import Float32
from ray import serve

from raylift.serve.reconstructor import Reconstruction, Reconstructor
from raylift.serve.settings import ServeSettings


class ModelReplica:
    """One copy of the model, which reconstructs the requests that arrive together as one batch."""

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.threads_per_replica)
        device = "cuda" if settings.gpus_per_replica else "cpu"
        self._reconstructor = Reconstructor.load(settings.model, device, settings.consistency_steps, settings.draw)
        self.reconstruct.set_max_batch_size(settings.max_batch)  # type: ignore[attr-defined]
        self.reconstruct.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.02)
    async def reconstruct(
        self, asked: list[tuple[Float32[np.ndarray, "views rows columns"], int]]
    ) -> list[Reconstruction]:
        """Volumes in HU for sets of prepared radiographs, each with the number of draws that it is the mean of."""
        # In a thread: a batch that outlasts Serve's health check would otherwise end the replica.
        radiographs, samples = [one for one, _ in asked], [count for _, count in asked]
        return await asyncio.to_thread(self._reconstructor.reconstruct, radiographs, samples)

    def ready(self) -> bool:
        """That the model is loaded."""
        return True
