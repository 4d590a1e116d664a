"""The server process of the decoder: it forks a child for each file, which decodes under limits and then ends.

The kernel ends a child that exceeds its limits, and one whose client has left.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import resource
import signal
import socket
import socketserver
import struct
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import View
from raylift.datasets.intensity import Normalization
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.histogram import Quantiles
from raylift.datasets.radiographs.orientation import PatientFacingOption
from raylift.datasets.radiographs.preparation import load_radiograph, prepare
from raylift.datasets.serialization import from_plain, to_plain

HEADER = struct.Struct("<II")
"""Bytes of the JSON description and of the data that follow."""
READY = b"ready\n"
"""What the server writes when it accepts connections."""
BEGUN = b"\1"
"""What a child writes when it has a request."""


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
class DecodingRequest:
    """A file's view and options, and the network's input; see `load_radiograph` and `prepare`."""

    view: View
    file_limits: RadiographLimits
    limits: DecodingLimits
    invert: Inversion
    flip: bool
    patient_facing: PatientFacingOption | None
    size: int
    reference: Quantiles | None
    normalization: Normalization


def packed(fields: dict[str, Any], content: bytes = b"") -> bytes:
    """A reply of a description and data."""
    head = json.dumps(fields).encode()
    return HEADER.pack(len(head), len(content)) + head + content


class _ForkingServer(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks a child for each connection; ends with the process that started it."""

    request_queue_size = 128
    max_children = 64
    _parent = os.getppid()

    def service_actions(self) -> None:
        """Reap children, and end if the parent has ended."""
        super().service_actions()
        if os.getppid() != self._parent:
            os._exit(0)

    def handle_error(self, *request: Any) -> None:
        """Write the traceback of an error, unless the client has left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)


class _Handler(socketserver.StreamRequestHandler):
    """Decodes one file in a child of a child, which writes its result; the first one writes how the second ended."""

    def handle(self) -> None:
        """Read a request and write its result."""
        head = self.rfile.read(HEADER.size)
        if len(head) < HEADER.size:
            return
        lengths = HEADER.unpack(head)
        text, data = (self.rfile.read(length) for length in lengths)
        if len(data) < lengths[1]:
            return
        self.wfile.write(BEGUN)
        child = os.fork()
        if child == 0:
            try:
                self._decode(text, data)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            self.wfile.write(packed({"signal": os.WTERMSIG(status)}))

    def _decode(self, text: bytes, data: bytes) -> None:
        """Decode under the limits of a request and write the result."""
        fields: dict[str, Any]
        content = b""
        try:
            request = from_plain(DecodingRequest, json.loads(text), "request")
            _limit(request.limits)
            _end_with(self.connection)
            loaded = load_radiograph(
                data,
                request.view,
                limits=request.file_limits,
                invert=request.invert,
                flip=request.flip,
                patient_facing=request.patient_facing,
            )
            content = prepare(loaded.image, request.size, request.reference, request.normalization).tobytes()
            fields = {name: value for name, value in vars(loaded).items() if name != "image"}
            fields["checks"] = to_plain(loaded.checks)
        except Exception as error:
            if _is_of_memory(error) or _is_of_memory(error.__cause__):
                fields = {"signal": signal.SIGXCPU}
            elif isinstance(error, FileError):
                fields = {"refused": str(error)}
            else:
                fields = {"failed": traceback.format_exc()}
        # Writing would raise the signal too.
        flags = fcntl.fcntl(self.connection, fcntl.F_GETFL)
        fcntl.fcntl(self.connection, fcntl.F_SETFL, flags & ~os.O_ASYNC)
        self.wfile.write(packed(fields, content))


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed; PyTorch and libraries in C++ have no type for it."""
    return isinstance(error, MemoryError) or "allocate" in str(error) or getattr(error, "errno", 0) == errno.ENOMEM


def _limit(limits: DecodingLimits) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # At the soft limit of processor time a process gets SIGXCPU, at the hard one SIGKILL as by the system.
    wanted = {
        resource.RLIMIT_AS: (used + limits.memory_bytes,) * 2,
        resource.RLIMIT_CPU: (limits.cpu_s, limits.cpu_s + 1),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, (soft, hard) in wanted.items():
        _, highest = resource.getrlimit(kind)
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(kind, (soft, hard))


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
        sys.stdout.buffer.write(READY)
        sys.stdout.flush()
        server.serve_forever()
