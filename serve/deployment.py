"""The service on Ray Serve: replicas of the model behind one entrance with the API and the page."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import signal
import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.util import list_named_actors

from raylift.datasets.archive.store import absolute
from raylift.datasets.errors import ConfigError, RayliftError
from raylift.datasets.serialization import from_plain
from raylift.models import weights
from raylift.models.generative import SamplingConfig
from raylift.models.weights import Description
from raylift.serve.replica import ModelReplica
from raylift.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

APP = "raylift"
MODEL_DEPLOYMENT = "model"
ANSWER_TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0


class NotServing(RayliftError, RuntimeError):
    """A service that was started and does not answer."""


def application(settings: ServeSettings) -> serve.Application:
    """The Serve application; its entrance stays one replica, because the page's sessions live in its process."""
    settings = replace(settings, model=absolute(settings.model))
    model = serve.deployment(
        name=MODEL_DEPLOYMENT,
        num_replicas=settings.replicas,
        max_ongoing_requests=4 * settings.max_batch,
        max_queued_requests=settings.max_waiting,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )(ModelReplica)
    loaded = weights.load(settings.model)
    draw = settings.draw.resolve(loaded.network)
    # Every open page holds one request for as long as it is open.
    front = serve.deployment(
        name="entrance",
        num_replicas=1,
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0.1},
    )(serve.ingress(lambda: _entrance(settings, loaded.description, loaded.sha256, draw))())
    bound: serve.Application = front.bind(model.bind(settings))
    return bound


def _entrance(settings: ServeSettings, description: Description, sha256: str, draw: SamplingConfig | None) -> FastAPI:
    # Serve calls this in the replica: Gradio cannot be pickled, and is wanted and imported only there.
    from raylift.serve import ingress

    return ingress.build(settings, description, sha256, draw, MODEL_DEPLOYMENT)


def from_arguments(arguments: dict[str, Any]) -> serve.Application:
    """The application from the arguments of a Serve config file, by the names of `ServeSettings`."""
    return application(from_plain(ServeSettings, arguments, "args"))


def start(settings: ServeSettings) -> str:
    """Start the service on the Ray that is connected and return its URL once it answers.

    Raises:
        ConfigError: Serve already runs on this cluster, or the port is taken.
        NotServing: it was deployed and does not answer.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in list_named_actors(all_namespaces=True)):
        raise ConfigError("Ray Serve already runs on this cluster: end it with `serve shutdown`, then start again")
    _require_free(settings.host, settings.port)
    deployed = application(settings)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(deployed, name=APP, route_prefix="/", logging_config={"log_level": "WARNING"})
    _await_answer("127.0.0.1" if settings.host == "0.0.0.0" else settings.host, settings.port)  # noqa: S104
    return f"http://{settings.host}:{settings.port}"


def interruption() -> threading.Event:
    """Set by Ctrl-C or SIGTERM from now on; a second one ends the process where it stands.

    To be asked for before `start`: what comes while Ray is busy it would swallow.
    """
    ended = threading.Event()

    def end(*_: object) -> None:
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return ended


def wait(ended: threading.Event) -> None:
    """Until the service is to end, then leave Ray with nothing of it."""
    ended.wait()
    # Ray prints that the task which ends Serve's controller was ended with it.
    with contextlib.redirect_stdout(io.StringIO()):
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error


def _await_answer(host: str, port: int) -> None:
    """Serve calls an application running before its proxy has its routes."""
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request("GET", "/readyz")
            status = connection.getresponse().status
            problem = f"answers {status}"
        except OSError as error:
            status, problem = 0, f"does not answer: {error}"
        finally:
            connection.close()
        if status == 200:
            return
        if time.monotonic() > until:
            serve.shutdown()  # type: ignore[no-untyped-call]
            raise NotServing(f"http://{host}:{port}/readyz {problem}; the logs of Ray Serve say more")
        time.sleep(0.2)
