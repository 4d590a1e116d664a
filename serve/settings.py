"""Settings of the service."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from raylift.datasets.errors import ConfigError
from raylift.models.consistency import require_steps
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.platform import model_store
from raylift.serve.image_decoder_server import DecodingLimits


@dataclass(frozen=True)
class ServeSettings:
    """Serve a model over HTTP with an API and a web page until Ctrl-C."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")] = model_store.DEFAULT_MODEL
    """models:NAME (see `raylift models`), or the path or URL of an exported folder or checkpoint."""
    also: tuple[str, ...] = ()
    """Further models, each with a page and an API of its own below /2, /3 and so on; the pages link to each other. Each
    has its own replicas and queue."""
    host: str = "127.0.0.1"
    """Address to listen on. Addresses other than 127.0.0.1, ::1 and localhost require --auth-file or --token-file."""
    port: int = 8000
    """Port to listen on."""
    auth_file: Path | None = None
    """File of user names and bcrypt hashes (`htpasswd -B`). The page and the API then require a login (HTTP Basic)."""
    token_file: Path | None = None
    """File of API tokens, one per line. The API then requires one of them (Bearer)."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which a proxy offers the service; other values of Host and Origin are refused."""
    root_path: str = ""
    """Path prefix under which a proxy offers the service, such as /ct; the proxy may strip it or pass it on."""
    replicas: int = 1
    """Number of copies of the model."""
    cpus_per_replica: float = 1.0
    """CPU cores that Ray reserves for a replica."""
    gpus_per_replica: float = 0.0
    """GPUs that Ray reserves for a replica; 0 computes on the CPU."""
    threads_per_replica: int = 1
    """PyTorch threads of each replica."""
    max_batch_size: int = 4
    """Largest number of requests that a replica reconstructs as one batch."""
    batch_wait_timeout_s: float = 0.02
    """How long a request waits for others to form a batch."""
    max_queued_requests: int = 64
    """Largest number of requests that wait; at least four times --max-batch-size. Others receive status 503."""
    queue_deadline_s: float = 10.0
    """Longest expected wait of a request, from the measured throughput; further requests receive status 503 with
    Retry-After. A request with more samples or steps than the service's own counts as several."""
    grace_s: float = 30.0
    """How long requests in progress may take after Ctrl-C or SIGTERM before they are canceled."""
    body_timeout_s: float = 120.0
    """Timeout for the body of a request."""
    max_upload_mib: int = 64
    """Largest radiograph file."""
    retention_s: float = 3600.0
    """How long the page keeps uploads and results, and the API jobs that have ended."""
    max_client_uploads_mib: int = 512
    """Largest size of all uploads of one client to the page within --retention-s."""
    max_stored_mib: int = 4096
    """Largest size of all uploads and results of the page, and of all results of jobs."""
    max_jobs: int = 256
    """Most jobs of the API, including those that have ended and are kept."""
    max_client_jobs: int = 32
    """Most of them of one client."""
    decoding_cpu_s: int = 10
    """Processor time for decoding one file, in seconds."""
    decoding_timeout_s: float = 30.0
    """Longest duration of decoding one file, in seconds."""
    decoding_memory_mib: int = 1536
    """Memory for decoding one file; up to four are decoded at a time."""
    strict: bool = False
    """Refuse radiographs with a warning of the checks of the input, with status 422; otherwise warnings are shown on
    the page and in headers."""
    consistency_steps: int = 0
    """Steps of the data-consistency fit after the network; 0 for none, 10 are usually enough."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = field(default_factory=SamplingFlags)
    max_samples: int = 8
    """Largest number of samples of a request to a diffusion model. The requests of one batch complete together,
    after the last sample."""
    max_steps: int = 100
    """Largest number of steps of the sampler that a request may set."""
    max_consistency_steps: int = 20
    """Most steps of the data-consistency fit that a request may set; 0: none may be set."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"port {self.port} is outside 1 to 65535")
        if self.root_path and not re.fullmatch(r"(/[\w.~@:%+-]+)+", self.root_path):
            raise ConfigError(f"--root-path {self.root_path} is not a path such as /ct")
        if self.root_path and self.also:
            raise ConfigError("--also and --root-path: serve each model on a port of its own behind a proxy")
        if not self._is_loopback and self.auth_file is None and self.token_file is None:
            raise ConfigError(
                f"--host {self.host} is open to other machines: pass --auth-file or --token-file, or leave --host out "
                "and use a proxy with authentication"
            )
        counts = {
            "replicas": self.replicas,
            "threads-per-replica": self.threads_per_replica,
            "max-batch-size": self.max_batch_size,
            "max-queued-requests": self.max_queued_requests,
            "max-upload-mib": self.max_upload_mib,
            "decoding-cpu-s": self.decoding_cpu_s,
            "decoding-memory-mib": self.decoding_memory_mib,
            "max-client-uploads-mib": self.max_client_uploads_mib,
            "max-stored-mib": self.max_stored_mib,
            "max-jobs": self.max_jobs,
            "max-client-jobs": self.max_client_jobs,
            "max-samples": self.max_samples,
            "max-steps": self.max_steps,
        }
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"--{name} is {count}: give 1 or more")
        require_steps(min(self.consistency_steps, self.max_consistency_steps))
        if self.retention_s < 60:
            raise ConfigError(f"--retention-s is {self.retention_s:g}: give 60 or more")
        durations = (
            self.batch_wait_timeout_s,
            self.decoding_timeout_s,
            self.queue_deadline_s,
            self.grace_s,
            self.body_timeout_s,
        )
        if min(self.cpus_per_replica, self.gpus_per_replica, *durations) < 0:
            raise ConfigError("CPUs, GPUs and waiting times must not be negative")
        if not (self.decoding_timeout_s and self.body_timeout_s):
            raise ConfigError("--decoding-timeout-s and --body-timeout-s of 0 refuse every request: give more")
        for name in self.allowed_hosts:
            if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", name):
                raise ConfigError(f"--allowed-hosts {name}: give a name or an address without scheme, port and path")

    @property
    def _is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def by_path(self) -> dict[str, ServeSettings]:
        """The settings of each model by the path of its page; all have the same links."""
        others = {f"/{number}": name for number, name in enumerate(self.also, start=2)}
        own = {path: replace(self, model=name, also=(), root_path=path) for path, name in others.items()}
        return {"/": replace(self, also=()), **own}

    @property
    def url(self) -> str:
        """Where the service listens."""
        return f"http://{bracketed(self.host)}:{self.port}"

    @property
    def reachable_host(self) -> str:
        """An address of this machine at which the service responds."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104

    @property
    def hosts(self) -> set[str]:
        """Values of Host without a proxy, without a port."""
        names = {"localhost", "127.0.0.1", "[::1]", bracketed(self.host)}
        if self._is_loopback:
            return names
        addresses = [entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries]
        return names | {bracketed(address) for address in addresses} | {socket.gethostname(), socket.getfqdn()}

    @property
    def decoding_limits(self) -> DecodingLimits:
        """What the decoding of one file may use."""
        return DecodingLimits(self.decoding_cpu_s, self.decoding_timeout_s, self.decoding_memory_mib * 2**20)


def bracketed(host: str) -> str:
    """A host as in a URL."""
    return f"[{host}]" if ":" in host else host
