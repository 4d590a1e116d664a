"""The service on Ray Serve: replicas of the model behind one ingress with the API and the page."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus
from ray.util import list_named_actors

from raylift.datasets import process_folder
from raylift.datasets.errors import ConfigError, RayliftError
from raylift.platform import model_store
from raylift.serve.api import credentials
from raylift.serve.gate import Gate
from raylift.serve.replica import ModelReplica
from raylift.serve.served_model import ServedModel
from raylift.serve.settings import ServeSettings, bracketed

if TYPE_CHECKING:
    from fastapi import FastAPI

APP = "raylift"
MODEL_DEPLOYMENT = "model"
INGRESS = "ingress"
RESPONSE_TIMEOUT_S = 10.0
POLL_TIMEOUT_S = 2.0
START_TIMEOUT_S = 120.0
HEALTH_CHECK_S = 2.0
"""How often Ray Serve checks a replica of the model, and so when it restarts one that ended."""
SHUTDOWN_S = 2.0
"""How long Ray Serve waits for requests after the grace."""


class ServiceNotReadyError(RayliftError, RuntimeError):
    """The service was deployed and does not respond."""


def applications(settings: ServeSettings) -> list[serve.RunTarget]:
    """The Serve applications, one per model."""
    models = {path: replace(own, model=model_store.resolve(own.model)) for path, own in settings.by_path.items()}
    served: dict[str, ServedModel] = {}
    for path, own in models.items():
        served[path] = ServedModel.load(own, path.rstrip("/"), [one.name for one in served.values()])
    return [
        serve.RunTarget(
            _application(own, served[path], tuple(served.values())),
            name=APP + path.rstrip("/").replace("/", "-"),
            route_prefix=path,
            logging_config={"log_level": "WARNING"},
        )
        for path, own in models.items()
    ]


def _application(settings: ServeSettings, served: ServedModel, models: tuple[ServedModel, ...]) -> serve.Application:
    """The Serve application of one model. The ingress is a single replica: the page's sessions are in its process.

    Args:
        settings: with the exact name of the model.
        served: the model with these settings.
        models: all models of the service.
    """
    ongoing = 4 * settings.max_batch_size
    model = serve.deployment(
        name=MODEL_DEPLOYMENT,
        num_replicas=settings.replicas,
        max_ongoing_requests=ongoing,
        # Serve counts a request as queued until a replica has it: an idle replica must get all that it takes at once.
        max_queued_requests=max(settings.max_queued_requests, ongoing),
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        health_check_period_s=HEALTH_CHECK_S,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )(ModelReplica)
    required = credentials.read(settings.auth_file, settings.token_file)
    # Every open page holds one request while it is open.
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=1,
        max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
        ray_actor_options={"num_cpus": 0.1},
    )(serve.ingress()(Ingress))
    bound: serve.Application = ingress.bind(model.bind(settings), settings, served, required, models)
    return bound


class Ingress:
    """The Ray Serve replica of the API and the page."""

    def __init__(self, _: object, *arguments: Any) -> None:
        """The replica; the first argument, the model's handle, makes Serve deploy the model with it."""
        # Gradio cannot be pickled and is imported only in the replica.
        from raylift.serve import ingress

        self._gate = Gate()
        self._app = ingress.build(MODEL_DEPLOYMENT, self._gate, *arguments)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def close(self, grace_s: float) -> int:
        """Refuse requests from now on; returns how many did not complete within the grace and were canceled."""
        return await self._gate.close(grace_s)


def require_free(host: str, port: int) -> None:
    """Raise a ConfigError if the address is not one of this machine, or the port is in use."""
    try:
        # As Ray Serve, which resolves names to IPv4.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {bracketed(host)}:{port}: {error.strerror}; choose another --port"
        ) from error


def start(settings: ServeSettings, deployed: Sequence[serve.RunTarget], interrupted: threading.Event) -> str:
    """Start the service on the connected Ray cluster and return its URL once it responds or the event is set.

    Args:
        settings: address and port.
        deployed: the applications of these settings.
        interrupted: ends the start when it is set.

    Raises:
        ConfigError: Ray Serve already runs on this cluster.
        ServiceNotReadyError: the deployment failed, or the service was deployed and does not respond.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in list_named_actors(all_namespaces=True)):
        raise ConfigError("Ray Serve already runs on this cluster: run `serve shutdown` first")
    if interrupted.is_set():
        return settings.url
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
    except RuntimeError as error:
        if "Failed to bind" not in str(error):
            raise
        raise ConfigError(
            f"cannot listen on {bracketed(settings.host)}:{settings.port}, which another program has just taken: "
            "choose another --port"
        ) from error
    if not interrupted.is_set():
        serve.run_many(deployed, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        for target in deployed:
            _wait_until_running(target.name, interrupted)
            prefix = target.route_prefix or "/"
            _wait_until_ready(settings.reachable_host, settings.port, interrupted, prefix)
    return settings.url


def interruption() -> threading.Event:
    """An event that Ctrl-C or SIGTERM sets from now on; a second signal ends the process at once.

    Call it before `start`, because Ray ignores signals that arrive while it starts.
    """
    interrupted = threading.Event()

    def end(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return interrupted


def wait(interrupted: threading.Event, grace_s: float) -> None:
    """Block until the event is set, complete the requests in progress within the grace, and end the service and Ray.

    `/readyz` has status 503 from then on, and new requests too.
    """
    interrupted.wait()
    canceled = _close(grace_s)
    if canceled:
        print(f"raylift: {canceled} requests did not complete in {grace_s:g} s", file=sys.stderr, flush=True)
    # Ray prints a message about the task that shuts Serve's controller down.
    with contextlib.redirect_stdout(io.StringIO()):
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    # A replica that was ended by force leaves its folders.
    process_folder.remove_abandoned()


def _close(grace_s: float) -> int:
    """Stop accepting requests; returns how many were canceled."""
    closing = []
    for name, application in serve.status().applications.items():
        states = application.deployments[INGRESS].replica_states if application.deployments else {}
        # A call would wait for a replica; the application also has another status while one of the model restarts.
        if any(state == "RUNNING" for state in states):
            closing.append(serve.get_app_handle(name).close.remote(grace_s))
    canceled = 0
    for response in closing:
        # A replica that ended ended its requests with it.
        with contextlib.suppress(RayError, TimeoutError):
            canceled += int(response.result(timeout_s=grace_s + RESPONSE_TIMEOUT_S))
    return canceled


def _wait_until_running(name: str, interrupted: threading.Event) -> None:
    """Wait for the replicas, which an autoscaling cluster may first need nodes for, and print what holds them up."""
    printed: set[str] = set()
    while not interrupted.wait(0.2):
        application = serve.status().applications[name]
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            serve.shutdown()  # type: ignore[no-untyped-call]
            raise ServiceNotReadyError(f"the service was not deployed: {application.message}")
        for part, deployment in application.deployments.items():
            if deployment.message and part not in printed:
                printed.add(part)
                print(f"raylift: waiting for {part}: {deployment.message}", file=sys.stderr, flush=True)


def _wait_until_ready(host: str, port: int, interrupted: threading.Event, prefix: str = "/") -> None:
    """Poll `/readyz`: Serve reports an application as running before its proxy has the routes."""
    path = f"{prefix.rstrip('/')}/readyz"
    until = time.monotonic() + START_TIMEOUT_S
    while not interrupted.wait(0.1):
        connection = http.client.HTTPConnection(host, port, timeout=POLL_TIMEOUT_S)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
            problem = f"responds with status {status}"
        except OSError as error:
            status, problem = 0, f"does not respond: {error}"
        finally:
            connection.close()
        if status == 200:
            return
        if time.monotonic() > until:
            serve.shutdown()  # type: ignore[no-untyped-call]
            raise ServiceNotReadyError(f"http://{host}:{port}{path} {problem}; see the logs of Ray Serve")
