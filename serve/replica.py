"""The Ray Serve replica of the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import torch
from jaxtyping import Float32
from ray import serve

from raylift.models.inference import Step
from raylift.serve.reconstructor import HUVolume, Reconstructor
from raylift.serve.served_model import ReconstructionSettings
from raylift.serve.settings import ServeSettings


class ModelReplica:
    """One copy of the model; reconstructs concurrent requests as one batch, and jobs one at a time."""

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.threads_per_replica)
        device = "cuda" if settings.gpus_per_replica else "cpu"
        self._reconstructor = Reconstructor.load(settings.model, device, settings.consistency_steps, settings.sampling)
        self._is_free = asyncio.Lock()
        self.reconstruct.set_max_batch_size(settings.max_batch_size)  # type: ignore[attr-defined]
        self.reconstruct.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)  # type: ignore[attr-defined]

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.02)
    async def reconstruct(
        self, requests: list[tuple[Float32[np.ndarray, "views rows columns"], ReconstructionSettings]]
    ) -> list[HUVolume]:
        """Volumes in HU for sets of prepared radiographs, each with the settings of its request."""
        # In a thread, because a batch longer than Serve's health check would otherwise end the replica.
        radiographs, settings = [views for views, _ in requests], [one for _, one in requests]
        async with self._is_free:
            return await asyncio.to_thread(self._reconstructor.reconstruct, radiographs, settings)

    async def reconstruct_in_steps(
        self, radiographs: Float32[np.ndarray, "views rows columns"], settings: ReconstructionSettings
    ) -> AsyncIterator[Step | HUVolume]:
        """Each step when it begins, then the volume. A call that is canceled ends before the next step."""
        loop, steps, canceled = asyncio.get_running_loop(), asyncio.Queue[Step | None](), threading.Event()

        def begin(step: Step) -> None:
            if canceled.is_set():
                raise asyncio.CancelledError
            loop.call_soon_threadsafe(steps.put_nowait, step)

        async with self._is_free:
            work = asyncio.create_task(
                asyncio.to_thread(self._reconstructor.reconstruct, [radiographs], [settings], begin)
            )
            work.add_done_callback(lambda _: steps.put_nowait(None))
            try:
                while step := await steps.get():
                    yield step
                (volume,) = await work
                yield volume
            finally:
                canceled.set()
                # The thread computes until its next step, and others wait for it.
                await asyncio.wait([work])
