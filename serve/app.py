"""The service on Ray Serve: replicas of the model behind one entrance with the API and the page."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import gradio as gr
import numpy as np
import torch
from fastapi import FastAPI
from jaxtyping import Float32, Int16
from ray import serve

from raylift.datasets.radiograph import RadiographLimits
from raylift.models import weights
from raylift.models.weights import Description
from raylift.serve import api, page
from raylift.serve.reconstructor import Reconstructor
from raylift.serve.settings import ServeSettings

APP = "raylift"
MODEL_DEPLOYMENT = "model"


class ModelReplica:
    """One copy of the model, which reconstructs the requests that arrive together as one batch."""

    def __init__(self, settings: ServeSettings) -> None:
        torch.set_num_threads(settings.threads_per_replica)
        self._reconstructor = Reconstructor.load(settings.model, "cuda" if settings.gpus_per_replica else "cpu")
        self.reconstruct.set_max_batch_size(settings.max_batch)  # type: ignore[attr-defined]
        self.reconstruct.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.02)
    async def reconstruct(
        self, radiographs: list[Float32[np.ndarray, "views rows columns"]]
    ) -> list[Int16[np.ndarray, "d h w"]]:
        """Volumes in HU for sets of prepared radiographs."""
        return self._reconstructor.reconstruct(radiographs)

    def ready(self) -> bool:
        """That the model is loaded."""
        return True


def application(settings: ServeSettings) -> serve.Application:
    """The Serve application; its entrance stays one replica, because the page's sessions live in its process."""
    model = serve.deployment(
        name=MODEL_DEPLOYMENT,
        num_replicas=settings.replicas,
        max_ongoing_requests=4 * settings.max_batch,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )(ModelReplica)
    loaded = weights.load(settings.model)
    builder = _Entrance(settings, loaded.description, loaded.sha256)

    @serve.deployment(name="entrance", num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1})
    @serve.ingress(builder)
    class Entrance:
        def __init__(self, handle: Any) -> None:
            self._handle = handle

    bound: serve.Application = Entrance.bind(model.bind(settings))  # type: ignore[attr-defined]
    return bound


class _Entrance:
    """Builds the FastAPI application with the page inside the replica: Gradio cannot be pickled."""

    def __init__(self, settings: ServeSettings, description: Description, sha256: str) -> None:
        self._settings, self._description, self._sha256 = settings, description, sha256

    def __call__(self) -> FastAPI:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

        async def reconstruct(radiographs: Float32[np.ndarray, "views rows columns"]) -> Int16[np.ndarray, "d h w"]:
            handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, APP)
            volume: Int16[np.ndarray, "d h w"] = await handle.reconstruct.remote(radiographs)
            return volume

        async def ready() -> bool:
            try:
                return bool(await serve.get_deployment_handle(MODEL_DEPLOYMENT, APP).ready.remote())
            except Exception:
                logging.getLogger("ray.serve").exception("the model does not answer")
                return False

        limits = RadiographLimits(max_bytes=self._settings.max_upload_mib * 2**20)
        app = api.build(api.Backend(self._description, self._sha256, reconstruct, ready), limits)
        blocks = page.build(self._description, self._sha256, reconstruct, limits)
        mounted: FastAPI = gr.mount_gradio_app(
            app,
            blocks,
            path="/",
            allowed_paths=[],
            max_file_size=f"{self._settings.max_upload_mib}mb",
            show_error=True,
            run_history=False,
            ssr_mode=False,
            css=page.CSS,
            theme=gr.themes.Soft(primary_hue="sky", neutral_hue="slate"),
        )
        return mounted


def start(settings: ServeSettings) -> str:
    """Start the service on the Ray that is connected and return its URL once it answers."""
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(application(settings), name=APP, route_prefix="/", logging_config={"log_level": "WARNING"})
    return f"http://{settings.host}:{settings.port}"


def wait() -> None:
    """Until Ctrl-C, then shut Serve down."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()  # type: ignore[no-untyped-call]
