"""The application that a browser or a program meets: the API, and the page over it."""

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

from raylift.datasets.radiographs.decoding import RadiographLimits
from raylift.models.generative import SamplingConfig
from raylift.models.weights import Description
from raylift.serve.api import routes
from raylift.serve.page import layout, theme
from raylift.serve.reconstructor import Reconstruction
from raylift.serve.settings import ServeSettings

READY_TIMEOUT_S = 5.0


def build(
    settings: ServeSettings, description: Description, sha256: str, draw: SamplingConfig | None, model: str
) -> FastAPI:
    """API and page in front of the deployment named `model`, which draws as `draw` says or computes."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Uploads are for this user's eyes alone, and do not outlive the service.
    uploads = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="raylift-page-")

    async def reconstruct(radiographs: Float32[np.ndarray, "views rows columns"], samples: int) -> Reconstruction:
        try:
            handle = serve.get_deployment_handle(model)
            made: Reconstruction = await handle.reconstruct.remote((radiographs, samples))
        except BackPressureError as error:
            raise routes.Unavailable("too many reconstructions are waiting: try again in a few seconds") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise routes.Unavailable("the model is being restarted: try again in a few seconds") from error
        return made

    async def ready() -> bool:
        try:
            answer = serve.get_deployment_handle(model).ready.remote()
            return bool(await asyncio.wait_for(answer, READY_TIMEOUT_S))
        except Exception:
            logging.getLogger("ray.serve").exception("the model does not answer")
            return False

    limits = RadiographLimits(max_bytes=settings.max_upload_mib * 2**20)
    backend = routes.Backend(
        description, sha256, reconstruct, ready, settings.consistency_steps, draw, settings.max_samples if draw else 1
    )
    app = routes.build(backend, limits)
    gr.mount_gradio_app(
        app,
        layout.build(backend, limits),
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
        async with running(app) as state:
            yield state
        shutil.rmtree(uploads, ignore_errors=True)

    app.router.lifespan_context = lifespan
    return app
