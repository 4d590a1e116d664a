"""The web application: the API with the page mounted on it."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from jaxtyping import Float32
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.generative import SamplingConfig
from raylift.models.weights import Description
from raylift.serve.api import routes
from raylift.serve.api.access import AccessControl
from raylift.serve.api.credentials import Credentials
from raylift.serve.backend import Backend, Unavailable
from raylift.serve.decoder import Decoder
from raylift.serve.page import layout, theme
from raylift.serve.page.upload_guard import KnownEvents
from raylift.serve.reconstructor import HUVolume
from raylift.serve.settings import ServeSettings

READY_TIMEOUT_S = 5.0


def build(
    settings: ServeSettings,
    description: Description,
    sha256: str,
    sampling: SamplingConfig | None,
    required: Credentials | None,
    model: str,
) -> FastAPI:
    """API and page for the deployment named `model`.

    `sampling` is None for a deterministic model, and `required` without authentication.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Only this user can read the uploads, and they are deleted with the service.
    uploads = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="raylift-page-")

    async def reconstruct(radiographs: Float32[np.ndarray, "views rows columns"], samples: int) -> HUVolume:
        try:
            handle = serve.get_deployment_handle(model)
            result: HUVolume = await handle.reconstruct.remote((radiographs, samples))
        except BackPressureError as error:
            raise Unavailable("the queue is full: try again in a few seconds") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise Unavailable("the model is restarting: try again in a few seconds") from error
        return result

    async def ready() -> bool:
        try:
            response = serve.get_deployment_handle(model).ready.remote()
            return bool(await asyncio.wait_for(response, READY_TIMEOUT_S))
        except Exception:
            logging.getLogger("ray.serve").exception("the model does not respond")
            return False

    limits = RadiographLimits(max_bytes=settings.max_upload_mib * 2**20)
    decoder = Decoder(description, limits, settings.decoding_limits)
    max_samples = settings.max_samples if sampling else 1
    backend = Backend(description, sha256, reconstruct, ready, settings.consistency_steps, sampling, max_samples)
    app = routes.build(backend, decoder)
    page = layout.build(backend, decoder)
    app.add_middleware(KnownEvents, functions=frozenset(page.fns))
    app.add_middleware(AccessControl, hosts=settings.hosts, proxied_hosts=settings.allowed_hosts, credentials=required)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[],
        max_file_size=f"{settings.max_upload_mib}mb",
        show_error=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        css=theme.CSS,
        theme=theme.THEME,
    )
    running = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        await decoder.start()
        async with running(app) as state:
            yield state
        shutil.rmtree(uploads, ignore_errors=True)

    app.router.lifespan_context = lifespan
    return app
