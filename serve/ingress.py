"""The web application: the API with the page mounted on it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from html import escape
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from jaxtyping import Float32
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from raylift.datasets import process_folder
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.inference import Step
from raylift.serve.api import routes
from raylift.serve.api.access import AccessControl
from raylift.serve.api.credentials import Credentials
from raylift.serve.api.jobs import Jobs
from raylift.serve.api.measured_requests import Measured
from raylift.serve.api.request_limits import BodyTimeout, RootPath
from raylift.serve.backend import Backend
from raylift.serve.failures import ServiceUnavailableError
from raylift.serve.gate import Admission, Gate, Queue
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.page import layout, theme, viewer, volume_downloads
from raylift.serve.page.upload_guard import KnownEvents
from raylift.serve.page.upload_quota import UploadQuota
from raylift.serve.reconstructor import HUVolume
from raylift.serve.served_model import ReconstructionSettings, ServedModel
from raylift.serve.service_metrics import Metrics
from raylift.serve.settings import ServeSettings

READY_TIMEOUT_S = 5.0
STATUS_S = 0.5
"""How long the state of the replicas is kept."""


class _ReplicaState:
    """Whether a replica of the model runs, as Ray Serve's controller has it: a busy one does."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._is_running, self._read_at = False, -math.inf

    async def is_running(self) -> bool:
        if time.monotonic() - self._read_at > STATUS_S:
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    status = await asyncio.to_thread(serve.status)
                application = status.applications[serve.get_replica_context().app_name]
                states = application.deployments[self._model].replica_states
                running = sum(count for state, count in states.items() if state == "RUNNING")
                self._is_running, self._read_at = running > 0, time.monotonic()
            except (TimeoutError, RayError, KeyError) as error:
                logging.getLogger("ray.serve").warning("the state of the model is unknown: %s", error)
                return False
        return self._is_running


@contextmanager
def _unavailable() -> Iterator[None]:
    """Raise failures of Ray Serve as ServiceUnavailableError."""
    try:
        yield
    except BackPressureError as error:
        raise ServiceUnavailableError("the queue is full: try again in a few seconds") from error
    except (RayActorError, DeploymentUnavailableError) as error:
        raise ServiceUnavailableError("the model is restarting: try again in a few seconds") from error


def other_models(backend: Backend) -> str:
    """A line in HTML with the models of a service, of which all but this page's are links; empty for one model."""
    items = [
        f"<b>{escape(one.label)}</b>"
        if one.path == backend.model.path
        else f'<a href="{one.path}/">{escape(one.label)}</a>'
        for one in backend.models
    ]
    return f"Models: {' · '.join(items)}" if len(items) > 1 else ""


def build(
    model: str,
    gate: Gate,
    settings: ServeSettings,
    served: ServedModel,
    required: Credentials | None,
    models: tuple[ServedModel, ...] = (),
) -> FastAPI:
    """API and page for the deployment named `model`.

    `required` is None without authentication; `models` are all models of the service.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Only this user can read the uploads, and they are deleted with the service.
    folders = ExitStack()
    uploads = folders.enter_context(process_folder.make("page"))
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)

    metrics = Metrics()
    ongoing = settings.max_batch_size * settings.replicas
    queue = Queue(settings.queue_deadline_s, ongoing, 4 * ongoing + settings.max_queued_requests)

    async def reconstruct(
        radiographs: Float32[np.ndarray, "views rows columns"], given: ReconstructionSettings
    ) -> HUVolume:
        async def call() -> HUVolume:
            volume: HUVolume = await serve.get_deployment_handle(model).reconstruct.remote((radiographs, given))
            return volume

        begun = time.perf_counter()
        with _unavailable():
            result = await queue.complete(call(), served.weight(given))
        metrics.add_reconstruction(time.perf_counter() - begun, result.prediction_time_s, result.fit_time_s)
        return result

    async def reconstruct_in_steps(
        radiographs: Float32[np.ndarray, "views rows columns"], given: ReconstructionSettings
    ) -> AsyncIterator[Step | HUVolume]:
        begun = time.perf_counter()
        with _unavailable():
            streaming = serve.get_deployment_handle(model).options(stream=True)
            response = streaming.reconstruct_in_steps.remote(radiographs, given)
            assert isinstance(response, DeploymentResponseGenerator)
            try:
                async for item in response:
                    if isinstance(item, HUVolume):
                        total_s = time.perf_counter() - begun
                        metrics.add_reconstruction(total_s, item.prediction_time_s, item.fit_time_s)
                    yield item
            except asyncio.CancelledError:
                response.cancel()  # type: ignore[no-untyped-call]
                raise

    loaded = _ReplicaState(model)

    async def ready() -> bool:
        return gate.is_open and await loaded.is_running()

    limits = RadiographLimits(max_bytes=settings.max_upload_mib * 2**20)
    decoder = ImageDecoder(served.description, limits, settings.decoding_limits, metrics)
    backend = Backend(served, reconstruct, ready, queue.slot, settings.strict, models, metrics)
    max_stored_bytes = settings.max_stored_mib * 2**20
    jobs = Jobs(
        reconstruct_in_steps,
        gate.start,
        folders.enter_context(process_folder.make("jobs")),
        retention_s=settings.retention_s,
        max_jobs=settings.max_jobs,
        max_client_jobs=settings.max_client_jobs,
        max_bytes=max_stored_bytes,
    )
    app = routes.build(backend, decoder, jobs)
    viewer.add_routes(app)
    volume_downloads.add_routes(app, backend, uploads)
    page = layout.build(backend, decoder, settings.retention_s, other_models(backend), max_stored_bytes)
    app.add_middleware(
        UploadQuota,
        folder=uploads,
        max_bytes=max_stored_bytes,
        max_client_bytes=settings.max_client_uploads_mib * 2**20,
        retention_s=settings.retention_s,
    )
    app.add_middleware(KnownEvents, functions=frozenset(page.fns))
    app.add_middleware(BodyTimeout, timeout_s=settings.body_timeout_s)
    app.add_middleware(Admission, gate=gate, queue=queue)
    app.add_middleware(AccessControl, hosts=settings.hosts, proxied_hosts=settings.allowed_hosts, credentials=required)
    metrics.watch(lambda: queue.in_use, lambda: queue.waiting, name=served.name, sha256=served.sha256)
    app.add_middleware(Measured, metrics=metrics)
    app.add_middleware(RootPath, root_path=settings.root_path)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        root_path=settings.root_path or None,
        allowed_paths=[],
        max_file_size=f"{settings.max_upload_mib}mb",
        show_error=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        css=theme.CSS,
        head=viewer.head(settings.root_path),
        theme=theme.THEME,
    )
    running = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        await decoder.start()
        async with running(app) as state:
            yield state
        folders.close()
        decoder.stop()

    app.router.lifespan_context = lifespan
    return app
