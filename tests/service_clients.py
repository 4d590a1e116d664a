"""The HTTP API in the process of a test, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient

from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.inference import Step
from raylift.serve.api import routes
from raylift.serve.api.jobs import Jobs
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.reconstructor import HUVolume, Reconstructor
from raylift.serve.served_model import ReconstructionSettings, ServedModel


async def ready() -> bool:
    return True


def backend_of(
    model: ServedModel, reconstruct: Callable[[np.ndarray, ReconstructionSettings], HUVolume], **options: Any
) -> Backend:
    """A backend that calls a function of prepared radiographs and settings in a thread."""

    async def in_thread(prepared: np.ndarray, settings: ReconstructionSettings) -> HUVolume:
        return await asyncio.to_thread(reconstruct, prepared, settings)

    return Backend(model, in_thread, ready, **options)


def real_backend(reconstructor: Reconstructor, **options: Any) -> Backend:
    """A backend with a real network; options are those of its `ServedModel`."""
    model = ServedModel(reconstructor.description, reconstructor.sha256, sampling=reconstructor.sampling, **options)
    return backend_of(model, lambda prepared, settings: reconstructor.reconstruct([prepared], [settings])[0])


def api_of(backend: Backend, decoder: ImageDecoder | None = None) -> FastAPI:
    """The API of a backend; jobs have no steps, and no results."""

    async def reconstruct(prepared: np.ndarray, settings: ReconstructionSettings) -> AsyncIterator[Step | HUVolume]:
        yield await backend.reconstruct(prepared, settings)

    jobs = Jobs(reconstruct, asyncio.create_task, Path("none"), 60.0, max_jobs=4, max_client_jobs=4, max_bytes=0)
    return routes.build(backend, decoder or ImageDecoder(backend.description, RadiographLimits()), jobs)


def client_of(backend: Backend) -> TestClient:
    """The API of a backend."""
    return TestClient(api_of(backend))
