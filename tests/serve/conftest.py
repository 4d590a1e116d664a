import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from s3_server import free_ports
from service_clients import client_of, real_backend

from raylift.datasets.geometry import Grid, chest
from raylift.datasets.intensity import Window
from raylift.models import weights
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.models.weights import Description
from raylift.platform.model_store import FRONTAL_MODEL
from raylift.platform.presets import PRESETS
from raylift.serve.page import example
from raylift.serve.reconstructor import Reconstructor

REPOSITORY = Path(__file__).resolve().parents[2]
GRID = Grid(32, 10.0)
SERVICE_OPTIONS = [
    "--max-batch-size",
    "4",
    "--batch-wait-timeout-s",
    "0.8",
    "--max-queued-requests",
    "4",
    "--max-upload-mib",
    "4",
    "--queue-deadline-s",
    "60",
]


@dataclass
class Service:
    """`raylift serve` as a subprocess: its own Ray cluster, one replica of the model, the API and the page."""

    port: int
    process: subprocess.Popen[str]
    scratch: Path
    """Folder for temporary files."""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @classmethod
    def start(cls, model: Path, *options: str, host: str = "127.0.0.1") -> "Service":
        (port,) = free_ports(1, host)
        # A short path, because Ray's sockets are in it.
        scratch = Path(tempfile.mkdtemp(prefix="rl-"))
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with (scratch / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "raylift", "serve", str(model), "--host", host, "--port", str(port), *options],
                cwd=REPOSITORY,
                env=environment | {"TMPDIR": str(scratch), "RAY_SERVE_SLOW_STARTUP_WARNING_S": "600"},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        assert process.stdout is not None
        line = process.stdout.readline()
        service = cls(port, process, scratch, host)
        if not line.startswith(f"serving {model} on {service.url} "):
            process.kill()
            pytest.fail(f"raylift serve did not start: {line}{(scratch / 'stderr').read_text()}")
        return service

    def replica(self, deployment: str) -> psutil.Process:
        """The process of the only replica of a deployment."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        # Ray adds the method to the name while one runs.
        name = f"ray::ServeReplica:raylift:{deployment}"
        (found,) = (one for one in processes if one.name().startswith(name))
        return found

    def stop(self) -> None:
        """Stop the service with SIGTERM, and by force what is left of it."""
        if self.process.poll() is not None:
            return
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        for process in psutil.wait_procs(children, timeout=15)[1]:
            process.kill()


@pytest.fixture(scope="session")
def description() -> Description:
    return Description(PRESETS["x2ct-gan-tiny"].system, GRID, chest(GRID), Window())


@pytest.fixture(scope="session")
def model_folder(description: Description, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network whose outputs depend on the input and exceed both ends of the window."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    state = description.system.reconstruction_network(description.grid, description.geometry).state_dict()
    weights.save(folder, state, description)
    return folder


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained diffusion network whose samples depend on the seed."""
    folder = tmp_path_factory.mktemp("diffusion")
    description = Description(PRESETS["refiner-tiny"].system, GRID, chest(GRID), Window())
    torch.manual_seed(5)
    network = description.system.reconstruction_network(description.grid, description.geometry)
    # The last layer of a new denoiser is zero.
    torch.nn.init.normal_(network.denoiser.conv_out[-1].weight, std=0.3)
    weights.save(folder, network.state_dict(), description)
    return folder


@pytest.fixture(scope="session")
def diffusion(diffusion_folder: Path) -> Reconstructor:
    return Reconstructor.load(str(diffusion_folder), sampling=SamplingFlags(steps=2))


@pytest.fixture(scope="session")
def reconstructor(model_folder: Path) -> Reconstructor:
    return Reconstructor.load(str(model_folder))


@pytest.fixture(scope="session")
def service_client(reconstructor: Reconstructor) -> TestClient:
    """The API with the real network, in this process."""
    return client_of(real_backend(reconstructor))


@pytest.fixture(scope="session")
def radiographs(description: Description) -> dict[str, bytes]:
    """PNG files of a synthetic thorax by view."""
    return example.files(description)


@pytest.fixture
def pair(radiographs: dict[str, bytes], tmp_path: Path) -> list[str]:
    """Options for both synthetic radiographs."""
    options = []
    for view, data in radiographs.items():
        (tmp_path / f"{view}.png").write_bytes(data)
        options += [f"--{view}", str(tmp_path / f"{view}.png")]
    return options


@pytest.fixture(scope="session")
def large() -> bytes:
    """A small PNG file of 30 million pixels, within the limits of a header, whose decoding takes seconds."""
    file = io.BytesIO()
    image = np.broadcast_to(12 * np.arange(5400, dtype=np.uint16)[:, None], (5400, 5600))
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture(scope="session")
def services() -> Iterator[list[Service]]:
    """All services that were started; only the last may still run."""
    started: list[Service] = []
    yield started
    for service in started:
        service.stop()
        shutil.rmtree(service.scratch, ignore_errors=True)


@pytest.fixture
def service(services: list[Service], model_folder: Path) -> Service:
    """A running service, shared by the tests and restarted if one of them stops it."""
    if not services or services[-1].process.poll() is not None:
        services.append(Service.start(model_folder, *SERVICE_OPTIONS))
    return services[-1]


@pytest.fixture
def fitting_url(services: list[Service], model_folder: Path) -> Iterator[str]:
    """URL of a service with a data-consistency fit, for one test, at an address of IPv6 if the machine has it."""
    for running in services:
        running.stop()
    host = "::1" if "::1" in {one.address for one in psutil.net_if_addrs().get("lo", [])} else "127.0.0.1"
    services.append(Service.start(model_folder, "--consistency-steps", "3", host=host))
    yield services[-1].url
    services[-1].stop()


@pytest.fixture
def diffusion_url(services: list[Service], diffusion_folder: Path) -> Iterator[str]:
    """URL of a service with a diffusion model, for one test."""
    for running in services:
        running.stop()
    services.append(Service.start(diffusion_folder, "--steps", "2", "--max-samples", "5"))
    yield services[-1].url
    services[-1].stop()


@pytest.fixture
def small_url(services: list[Service], diffusion_folder: Path) -> Iterator[str]:
    """URL of a service whose heaviest request takes under a second."""
    for running in services:
        running.stop()
    options = ["--steps", "1", "--max-steps", "2", "--max-samples", "2", "--max-consistency-steps", "2"]
    services.append(Service.start(diffusion_folder, *options, "--max-client-jobs", "100", "--queue-deadline-s", "60"))
    yield services[-1].url
    services[-1].stop()


@pytest.fixture
def two_models_url(services: list[Service], model_folder: Path) -> Iterator[str]:
    """URL of a service with a model of two views and one of a frontal view."""
    for running in services:
        running.stop()
    services.append(Service.start(model_folder, "--also", FRONTAL_MODEL, "--cpus-per-replica", "0.5"))
    yield services[-1].url
    services[-1].stop()


@pytest.fixture
def url(service: Service) -> str:
    """URL of the service."""
    return service.url
