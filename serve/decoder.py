"""Decoding of uploaded radiographs in child processes with limits on processor time, memory and duration.

A server process imports the readers once and forks a child for each file, so a child starts within milliseconds and
keeps nothing of another file. The kernel ends a child that exceeds its limits, and one whose client has left.
"""

from __future__ import annotations

import asyncio
import atexit
import fcntl
import gc
import json
import os
import resource
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import View
from raylift.datasets.intensity import Normalization
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.histogram import Quantiles
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption
from raylift.datasets.radiographs.preparation import load_radiograph, prepare
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models.weights import Description

HEADER = struct.Struct("<II")
"""Bytes of the JSON description and of the data that follow."""
MAX_CONCURRENT = 4
"""Requests of the API and the page whose files are decoded at a time; the uploads of others wait on disk."""


@dataclass(frozen=True)
class DecodingLimits:
    """What the decoding of one file may use."""

    cpu_s: int = 10
    """Seconds of processor time."""
    duration_s: float = 30.0
    """Seconds from the start to the result."""
    memory_bytes: int = 3 * 2**29
    """Memory beyond that of the imported libraries."""


@dataclass(frozen=True)
class _Request:
    """A file's name, view and options, and the network's input; see `load_radiograph` and `prepare`."""

    view: View
    file_limits: RadiographLimits
    limits: DecodingLimits
    invert: Inversion
    flip: bool
    patient_facing: PatientFacingOption | None
    size: int
    reference: Quantiles | None
    normalization: Normalization


class Decoder:
    """Decodes files to the input of one model's network.

    Attributes:
        file_limits: the largest file.
        slots: held while a request's files are in memory.
    """

    def __init__(
        self, description: Description, file_limits: RadiographLimits, limits: DecodingLimits | None = None
    ) -> None:
        self._description, self.file_limits = description, file_limits
        self._limits = limits or DecodingLimits()
        self.slots = asyncio.Semaphore(MAX_CONCURRENT)

    @staticmethod
    async def start() -> None:
        """Start the server process, so that the first file does not wait for its imports."""
        await asyncio.to_thread(_SERVER.path)

    async def load(
        self, data: bytes, view: View, invert: Inversion, flip: bool, patient_facing: PatientFacingOption | None
    ) -> OrientedRadiograph:
        """`load_radiograph` in a child process; the image is the network's input.

        The child has ended when this returns or raises, also if it is cancelled.

        Raises:
            FileError: not a readable radiograph, or its decoding exceeds the limits.
        """
        model = self._description
        size, reference = model.geometry.detector_px, model.histograms.get(view.name)
        request = _Request(
            view, self.file_limits, self._limits, invert, flip, patient_facing, size, reference, model.normalization
        )
        text = json.dumps(to_plain(request)).encode()
        reader, writer = await asyncio.open_unix_connection(await asyncio.to_thread(_SERVER.path))
        reply = b""
        try:
            async with asyncio.timeout(self._limits.duration_s):
                writer.write(HEADER.pack(len(text), len(data)) + text + data)
                reply = await reader.read()
        except (TimeoutError, ConnectionError):
            pass
        finally:
            await _end(reader, writer)
        if not reply:
            memory = self._limits.memory_bytes >> 20
            raise FileError(
                f"{view.name}: the file cannot be decoded in {self._limits.cpu_s} s and {memory} MB: save it as PNG"
            )
        length, _ = HEADER.unpack_from(reply)
        fields = json.loads(reply[HEADER.size : HEADER.size + length])
        if "refused" in fields:
            raise FileError(fields["refused"])
        image = np.frombuffer(reply, np.float32, offset=HEADER.size + length).reshape(size, size).copy()
        return OrientedRadiograph(image, **fields | {"notes": tuple(fields["notes"])})


async def _end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close a connection after its child has ended, which closes the other side."""
    try:
        writer.write_eof()
        while await reader.read(2**16):
            pass
    except OSError:
        pass
    finally:
        writer.close()


class _Server:
    """The server process, started when the first file is decoded and again if it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ""

    def path(self) -> str:
        """The socket of the running server."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.stop()
                self._folder = tempfile.mkdtemp(prefix="raylift-decoder-")
                command = [sys.executable, "-m", "raylift.serve.decoder", self._socket]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert self._process.stdout is not None
                if self._process.stdout.readline() != b"ready\n":
                    raise RuntimeError("the decoding process does not start")
            return self._socket

    @property
    def _socket(self) -> str:
        return str(Path(self._folder) / "socket")

    def stop(self) -> None:
        """End the server and remove its socket."""
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


_SERVER = _Server()
atexit.register(_SERVER.stop)


class _ForkingServer(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks a child for each connection; ends with the process that started it."""

    request_queue_size = 128
    max_children = 64
    _parent = os.getppid()

    def service_actions(self) -> None:
        """Reap children, and end if the parent has ended."""
        super().service_actions()
        if os.getppid() != self._parent:
            shutil.rmtree(Path(str(self.server_address)).parent, ignore_errors=True)
            os._exit(0)


class _Handler(socketserver.StreamRequestHandler):
    """Decodes one file, in a child."""

    def handle(self) -> None:
        """Read a request, decode under its limits and write the result."""
        lengths = HEADER.unpack(self.rfile.read(HEADER.size))
        text, data = (self.rfile.read(length) for length in lengths)
        if len(data) < lengths[1]:
            return
        request = from_plain(_Request, json.loads(text), "request")
        _limit(request.limits)
        _end_with(self.connection)
        try:
            loaded = load_radiograph(
                data,
                request.view,
                limits=request.file_limits,
                invert=request.invert,
                flip=request.flip,
                patient_facing=request.patient_facing,
            )
            image = prepare(loaded.image, request.size, request.reference, request.normalization)
            fields = {name: value for name, value in vars(loaded).items() if name != "image"}
        except FileError as error:
            if isinstance(error.__cause__, MemoryError):
                return
            fields, image = {"refused": str(error)}, np.empty(0, np.float32)
        except MemoryError:
            return
        # Writing would raise the signal too.
        flags = fcntl.fcntl(self.connection, fcntl.F_GETFL)
        fcntl.fcntl(self.connection, fcntl.F_SETFL, flags & ~os.O_ASYNC)
        head = json.dumps(fields).encode()
        self.wfile.write(HEADER.pack(len(head), image.nbytes) + head + image.tobytes())


def _limit(limits: DecodingLimits) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with(connection: socket.socket) -> None:
    """End this process when the other side of the connection closes: SIGIO ends a process that has no handler."""
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return
    os._exit(1)


if __name__ == "__main__":
    # A child has one thread; a pool of the server would not survive the fork.
    torch.set_num_threads(1)
    # Garbage collection in a child would copy every page with an object of the server.
    gc.freeze()
    with _ForkingServer(sys.argv[1], _Handler) as server:
        print("ready", flush=True)
        server.serve_forever()
