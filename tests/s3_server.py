"""A real S3-compatible server on loopback: OpenStack Swift with its s3api middleware.

Object stores are where acknowledged data gets lost, so the tests and benchmarks talk to a server that writes to disk,
survives kill -9 and checks signatures, not to a mock. `python tests/s3_server.py` runs one in the foreground.

Swift needs a Linux file system with user extended attributes and nothing else: no root, no /etc/swift, no memcached.
It has a Python environment of its own, and this file is also what each daemon runs there (see `_run_daemon`), so
the top of the file imports the standard library only.
"""

import argparse
import configparser
import contextlib
import ctypes
import fcntl
import http.client
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

SWIFT_VERSION = "2.38.3"
CONSTRAINTS = Path(__file__).with_name("s3_constraints.txt")
CACHE = Path(__file__).resolve().parent.parent / ".cache"
HOST = "127.0.0.1"
REGION = "us-east-1"
ACCESS_KEY = "raylift:admin"  # Swift writes an S3 key as account:user
DAEMONS = ("account", "container", "object", "proxy")


class S3ServerError(RuntimeError):
    """The S3 server could not be installed or started."""


def ensure_installed(cache: Path = CACHE) -> Path:
    """Return a Python interpreter that can import Swift, from an environment under `cache`, made if it is missing.

    Safe to call from several processes at once. Where packages come from is pip's own configuration.
    """
    venv = cache / f"swift-{SWIFT_VERSION}"
    python = venv / "bin" / "python"
    stamp = venv / "installed-constraints.txt"
    wanted = CONSTRAINTS.read_text()

    def is_complete() -> bool:
        return python.exists() and stamp.exists() and stamp.read_text() == wanted

    if is_complete():
        return python
    cache.mkdir(parents=True, exist_ok=True)
    with venv.with_name(f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_complete():
            if venv.exists():
                shutil.rmtree(venv)
            _install([sys.executable, "-I", "-m", "venv", str(venv)], venv)
            requirement = ["--constraint", str(CONSTRAINTS), f"swift=={SWIFT_VERSION}"]
            _install([str(python), "-I", "-m", "pip", "install", "--no-input", *requirement], venv)
            stamp.write_text(wanted)  # last: without it the next call starts over
    return python


def _install(command: Sequence[str], venv: Path) -> None:
    run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise S3ServerError(
            f"cannot install OpenStack Swift {SWIFT_VERSION} into {venv}: `{shlex.join(command)}` exited"
            f" {run.returncode}. Give pip a package index it can reach (network, PIP_INDEX_URL or pip.conf) and run"
            f" again. Its last words:\n{_last_lines(run.stdout, 15)}"
        )


class S3Server:
    """One S3 server over `folder`, which keeps the objects, the configuration and the logs.

    A context manager. Between `start` and `stop` the address and the secret stay the same, across any number of
    `kill` and `start`; a new S3Server over the same folder serves the same objects at a new address.
    The daemons end with this process, however it ends.

    Swift reads If-None-Match when a write begins, not when it ends. So of two writers that create one key at the
    same time both may get 200, where AWS returns 412 or 409 to one of them; the one that began last is kept.
    """

    def __init__(
        self, folder: Path, *, port: int | None = None, cache: Path = CACHE, start_timeout_s: float = 60.0
    ) -> None:
        self.folder = folder.resolve()
        self.start_timeout_s = start_timeout_s
        self.ports = dict(zip(DAEMONS, free_ports(len(DAEMONS)), strict=True))
        if port is not None:
            self.ports["proxy"] = port
        self.endpoint = f"http://{HOST}:{self.ports['proxy']}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._secret = secrets.token_hex(20)
        self._cache = cache
        # The kernel ends a daemon when the *thread* that made it ends, so a thread as old as this object makes them.
        self._launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="s3-server")

    @property
    def environment(self) -> dict[str, str]:
        """What s3fs, boto and pyarrow's `FileSystem.from_uri` need in their environment to use only this server.

        They use path-style URLs because the address has no host name. Only the constructor
        `pyarrow.fs.S3FileSystem` does not look here for the address: pass it `endpoint_override=server.endpoint`.
        """
        hosts_without_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), HOST]))
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": hosts_without_proxy,
            "no_proxy": hosts_without_proxy,
        }

    def start(self) -> None:
        """Start the daemons and wait until each of them responds."""
        running = [name for name, process in self.processes.items() if process.poll() is None]
        if running:
            raise S3ServerError(f"the S3 server at {self.endpoint} already runs ({', '.join(running)}): stop it first")
        self._require_ports()
        python = ensure_installed(self._cache)
        for name in ("config", "data/d1", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _require_user_xattrs(self.folder / "data")
        _write_config(self.folder, self.ports, self._secret)
        try:
            self._launcher.submit(self._launch, python).result()
            self._wait_until_healthy()
        except BaseException:
            self.kill()
            raise

    def _require_ports(self) -> None:
        for name, port in self.ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a killed server linger
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise S3ServerError(
                        f"port {port} on {HOST}, for Swift's {name} server, is not free ({error.strerror}): end what"
                        " listens there or use another port"
                    ) from error

    def _launch(self, python: Path) -> None:
        for name in DAEMONS:
            command = [python, "-I", __file__, "daemon", name, self.folder / "config", str(os.getpid())]
            with (self.folder / "logs" / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        for name in DAEMONS:
            while not _is_healthy(self.ports[name]):
                if (code := self.processes[name].poll()) is not None:
                    raise S3ServerError(f"Swift's {name} server exited with {code} at start.\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise S3ServerError(
                        f"Swift's {name} server did not respond on {HOST}:{self.ports[name]} within"
                        f" {self.start_timeout_s:g} s: pass a longer start_timeout_s if this machine is just slow.\n"
                        f"{self.log_tail()}"
                    )
                time.sleep(0.02)

    def kill(self) -> None:
        """Send SIGKILL to all daemons, as a power cut to the processes (not to the disk) would, and reap them."""
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()

    def stop(self) -> None:
        """End the daemons; the objects stay in the folder."""
        for process in self.processes.values():
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self.processes.values():
                process.wait(timeout=10)
        self.kill()

    def make_bucket(self, name: str) -> None:
        """Create the bucket `name`; one that exists already is left as it is."""
        from botocore.config import Config
        from botocore.session import Session

        client = Session().create_client(
            "s3",
            region_name=REGION,
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=self._secret,
            config=Config(proxies={}),
        )
        with contextlib.closing(client), contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=name)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of each daemon's log, for an error message."""
        tails = []
        for name in DAEMONS:
            log = self.folder / "logs" / f"{name}.log"
            text = log.read_text(errors="replace") if log.exists() else ""
            tails.append(f"--- {log}\n{_last_lines(text, lines) or '(empty)'}")
        return "\n".join(tails)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _last_lines(text: str, count: int) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


def free_ports(count: int, host: str = HOST) -> list[int]:
    """Choose ports on which nothing listens, above those of Ray's workers and outside the range of clients' ports.

    The kernel can give a port of that range to a client before the server listens on it. A client that retries a killed
    server can even be given the server's own port, connect to itself and keep the port taken.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(20_000, first_of_clients if first_of_clients > 22_000 else 65_536)
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in random.SystemRandom().sample(candidates, len(candidates)):
            probe = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise S3ServerError(f"no {count} free ports on {host} between {candidates[0]} and {candidates[-1]}")


def _require_user_xattrs(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=folder) as probe:
        try:
            os.setxattr(probe.fileno(), "user.raylift.probe", bytes(1024))
        except OSError as error:
            raise S3ServerError(
                f"{folder} is on a file system without user extended attributes ({error.strerror}), in which Swift"
                " keeps each object's metadata: use a folder on ext4, xfs or btrfs (tmpfs only from Linux 6.6 on)"
            ) from error


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/healthcheck")
        return connection.getresponse().status == 200
    return False


def _write_config(folder: Path, ports: dict[str, int], secret: str) -> None:
    """Write Swift's configuration, all but the rings, which need Swift's own code (see `_run_daemon`)."""
    config = folder / "config"
    config.chmod(0o700)  # it holds the secret
    where_objects_lie = {"swift_hash_path_prefix": "raylift", "swift_hash_path_suffix": "raylift"}  # never change them
    _write_ini(config / "swift.conf", {"swift-hash": where_objects_lie})
    for name in DAEMONS:
        defaults: dict[str, object] = {
            "bind_ip": HOST,
            "bind_port": ports[name],
            "bind_timeout": 5,
            "workers": 0,  # no forked worker that would outlive a kill of the main process
            "swift_dir": config,
            "devices": folder / "data",
            "mount_check": False,
            "fallocate_reserve": 0,
            "log_requests": False,
            "log_udp_host": HOST,  # keep out of the machine's syslog: port 9 discards, and stderr is the log file
            "log_udp_port": 9,
            # Swift's own time-outs are for a cluster with replicas; here they would turn a busy machine into errors.
            "conn_timeout": 10,
            "node_timeout": 60,
            # S3 lists an object as soon as its write is acknowledged; by itself Swift waits 1 s for the listing.
            "container_update_timeout": 60,
            # A storage server must not be shunned for a minute after a kill: there is no other.
            "error_suppression_limit": 1_000_000_000,
            "account_autocreate": True,
            **dict.fromkeys(("disk_chunk_size", "network_chunk_size", "object_chunk_size", "client_chunk_size"), 2**20),
        }
        filters = _proxy_filters(secret) if name == "proxy" else {"healthcheck": {}}
        sections: dict[str, dict[str, object]] = {
            "DEFAULT": defaults,
            "pipeline:main": {"pipeline": " ".join([*filters, f"{name}-server"])},
            f"app:{name}-server": {"use": f"egg:swift#{name}"},
        }
        for kind, options in filters.items():
            sections[f"filter:{kind}"] = {"use": f"egg:swift#{kind}", **options}
        _write_ini(config / f"{name}.conf", sections)


def _proxy_filters(secret: str) -> dict[str, dict[str, object]]:
    """The proxy's middleware in the order in which a request meets it, with S3's own limits on multipart uploads."""
    return {
        "catch_errors": {},
        "gatekeeper": {},
        "healthcheck": {},
        "listing_formats": {},
        "bulk": {},
        "s3api": {"location": REGION, "max_upload_part_num": 10_000},
        "tempauth": {f"user_{ACCESS_KEY.replace(':', '_')}": f"{secret} .admin"},
        "slo": {"max_manifest_segments": 10_000},
        "dlo": {},
        "copy": {},
        "versioned_writes": {},
        "symlink": {},
    }


def _write_ini(path: Path, sections: Mapping[str, Mapping[str, object]]) -> None:
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    with path.open("w") as file:
        parser.write(file)


def _run_daemon(name: str, config: str, parent: str) -> None:
    """Be one of the four Swift servers, in Swift's own environment, until the process that started this one ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(f"the process {parent} that started this {name} server has ended already")
    from swift.common.ring import RingBuilder
    from swift.common.wsgi import run_wsgi

    if name == "proxy":  # the only one that reads the rings, which hold the port on which which storage server listens
        for kind in ("account", "container", "object"):
            settings = configparser.RawConfigParser()
            settings.read(Path(config, f"{kind}.conf"))
            port = settings.getint("DEFAULT", "bind_port")
            builder = RingBuilder(part_power=6, replicas=1, min_part_hours=0)
            builder.add_dev({"region": 1, "zone": 1, "ip": HOST, "port": port, "device": "d1", "weight": 1})
            builder.rebalance()
            builder.get_ring().save(str(Path(config, f"{kind}.ring.gz")))
    # verbose: log to stderr, which is this daemon's log file
    sys.exit(run_wsgi(str(Path(config, f"{name}.conf")), f"{name}-server", verbose=True))


def _serve_in_foreground(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Run an S3 server on loopback until it is interrupted.")
    parser.add_argument("--folder", type=Path, help="keeps the objects; default: a new one that is deleted at the end")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--bucket", action="append", default=[], help="create this bucket; may be repeated")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    CACHE.mkdir(exist_ok=True)  # objects go there because /tmp may be a tmpfs
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-", dir=CACHE)))
        server = stack.enter_context(S3Server(folder, port=options.port))
        for bucket in options.bucket:
            server.make_bucket(bucket)
        for name, value in server.environment.items():
            print(f"export {name}={shlex.quote(value)}")
        print(f"# serving {folder}; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while all(process.poll() is None for process in server.processes.values()):
                time.sleep(0.5)
            raise S3ServerError(f"one of the daemons of {server.endpoint} ended by itself.\n{server.log_tail()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["daemon"]:
        _run_daemon(*sys.argv[2:])
    else:
        _serve_in_foreground(sys.argv[1:])
