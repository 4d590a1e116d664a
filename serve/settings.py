"""What a service is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from raylift.datasets.errors import ConfigError
from raylift.models.consistency import require_steps
from raylift.models.generative import SamplingFlags


@dataclass(frozen=True)
class ServeSettings:
    """Serve a model over HTTP, with an API and a web page, until Ctrl-C."""

    model: tyro.conf.Positional[str]
    """An exported folder or a checkpoint; a folder or a URL."""
    host: str = "127.0.0.1"
    """Address to listen on. There is no login: put a proxy with one in front before opening it to others."""
    port: int = 8000
    replicas: int = 1
    """Copies of the model."""
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    threads_per_replica: int = 1
    """PyTorch threads of a replica."""
    max_batch: int = 4
    """Requests a replica reconstructs together."""
    batch_wait_s: float = 0.02
    """How long a request waits for others to join it."""
    max_waiting: int = 64
    """Requests that wait for a replica; more are answered 503."""
    max_upload_mib: int = 64
    """Largest radiograph."""
    consistency_steps: int = 0
    """Steps that fit a volume to its radiographs after the network; 0 leaves it as the network made it, 10 will do."""
    draw: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    max_samples: int = 8
    """Draws that a request may ask for at most, of a model that draws its volume. Requests that are
    reconstructed together are answered together, after the last draw."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"port {self.port} is outside 1 to 65535")
        counts = {
            "replicas": self.replicas,
            "threads-per-replica": self.threads_per_replica,
            "max-batch": self.max_batch,
            "max-waiting": self.max_waiting,
            "max-upload-mib": self.max_upload_mib,
            "max-samples": self.max_samples,
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"--{name} is {count}: give 1 or more")
        require_steps(self.consistency_steps)
        if min(self.cpus_per_replica, self.gpus_per_replica, self.batch_wait_s) < 0:
            raise ConfigError("CPUs, GPUs and waiting times are not negative")
