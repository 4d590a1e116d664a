"""Decoding of uploaded radiographs in child processes with limits on processor time, memory and duration.

A server process imports the readers once and forks a child for each file, so a child starts within milliseconds and
keeps nothing of another file.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np

from raylift.datasets import process_folder
from raylift.datasets.errors import FileError
from raylift.datasets.geometry import View
from raylift.datasets.radiographs.check_result import CheckResult
from raylift.datasets.radiographs.decoding import Inversion
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.orientation import OrientedRadiograph, PatientFacingOption
from raylift.datasets.serialization import from_plain, to_plain
from raylift.models.weights import Description
from raylift.serve.failures import DecodingError, ServiceUnavailableError
from raylift.serve.image_decoder_server import BEGUN, HEADER, READY, DecodingLimits, DecodingRequest, packed
from raylift.serve.service_metrics import Metrics

START_S = 120.0
"""How long the server may take to import its libraries."""
END_S = 5.0
"""How long a child may take to end after its client has left."""
MAX_CONCURRENT = 4
"""Requests of the API and the page whose files are decoded at a time; the uploads of others wait on disk."""


class ImageDecoder:
    """Decodes files to the input of one model's network.

    Attributes:
        file_limits: the largest file.
        slots: held while a request's files are in memory.
    """

    def __init__(
        self,
        description: Description,
        file_limits: RadiographLimits,
        limits: DecodingLimits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._description, self.file_limits = description, file_limits
        self._limits, self._metrics = limits or DecodingLimits(), metrics or Metrics()
        self.slots = asyncio.Semaphore(MAX_CONCURRENT)

    @staticmethod
    async def start() -> None:
        """Start the server process, so that the first file does not wait for its imports."""
        await asyncio.to_thread(_SERVER.path)

    @staticmethod
    def stop() -> None:
        """End the server process."""
        _SERVER.stop()

    async def load(
        self, data: bytes, view: View, invert: Inversion, flip: bool, patient_facing: PatientFacingOption | None
    ) -> OrientedRadiograph:
        """`load_radiograph` in a child process; the image is the network's input.

        The child has ended when this returns or raises, also if it is canceled.

        Raises:
            FileError: not a readable radiograph, or its decoding exceeds the limits.
            ServiceUnavailableError: the decoder does not start or respond, or was ended by the system.
            DecodingError: the decoder has a fault.
        """
        model = self._description
        size, reference = model.geometry.detector_px, model.histograms.get(view.name)
        request = DecodingRequest(
            view, self.file_limits, self._limits, invert, flip, patient_facing, size, reference, model.normalization
        )
        try:
            with self._metrics.timer("decoding"):
                begun, reply = await self._exchange(json.dumps(to_plain(request)).encode(), data)
        except OSError as error:
            raise _unavailable(repr(error)) from error
        if not begun:
            raise _unavailable("no response")
        fields, content = _parsed(reply)
        if "refused" in fields:
            raise FileError(fields["refused"])
        if "failed" in fields:
            raise DecodingError(f"the {view.name} radiograph was not decoded:\n{fields['failed']}")
        if fields.get("signal") == signal.SIGKILL:
            raise _unavailable("ended by SIGKILL, as by a system without free memory")
        if "signal" in fields:
            memory = self._limits.memory_bytes >> 20
            raise FileError(
                f"{view.name}: the file cannot be decoded in {self._limits.cpu_s} s and {memory} MiB: save it as PNG"
            )
        image = np.frombuffer(content, np.float32).reshape(size, size).copy()
        checks = tuple(from_plain(CheckResult, check, "check") for check in fields["checks"])
        return OrientedRadiograph(image, **fields | {"notes": tuple(fields["notes"]), "checks": checks})

    async def _exchange(self, request: bytes, data: bytes) -> tuple[bool, bytes]:
        """Whether the decoding began, and the reply."""
        path = await asyncio.to_thread(_SERVER.path)
        try:
            async with asyncio.timeout(END_S):
                reader, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.to_thread(_SERVER.end, path)
            raise
        begun = False
        try:
            async with asyncio.timeout(self._limits.duration_s):
                writer.write(HEADER.pack(len(request), len(data)) + request + data)
                begun = await reader.read(len(BEGUN)) == BEGUN
                return begun, await reader.read()
        except TimeoutError:
            return begun, packed({"signal": signal.SIGXCPU})
        finally:
            await _end(reader, writer, path)


def _unavailable(reason: str) -> ServiceUnavailableError:
    logging.getLogger("ray.serve").error("the decoder is unavailable: %s", reason)
    return ServiceUnavailableError("the decoder of radiographs is unavailable: try again in a few seconds")


def _parsed(reply: bytes) -> tuple[dict[str, Any], bytes]:
    """The description and the data of a complete reply."""
    if len(reply) >= HEADER.size:
        lengths = HEADER.unpack_from(reply)
        if len(reply) == HEADER.size + sum(lengths):
            return json.loads(reply[HEADER.size : HEADER.size + lengths[0]]), reply[HEADER.size + lengths[0] :]
    raise _unavailable(f"a reply of {len(reply)} bytes that is not complete")


async def _end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
    """Close a connection after its child has ended, which closes the other side."""
    try:
        writer.write_eof()
        async with asyncio.timeout(END_S):
            while await reader.read(2**16):
                pass
    except TimeoutError:
        # A stopped process gets no signal but SIGKILL.
        logging.getLogger("ray.serve").error("the decoder does not end a process: it is started again")
        await asyncio.to_thread(_SERVER.end, path)
    except OSError:
        pass
    finally:
        writer.close()


class _Server:
    """The server process, started when the first file is decoded and again if it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = ExitStack()
        self._socket = ""

    def path(self) -> str:
        """The socket of the running server.

        Raises:
            OSError: the server does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._socket

    def end(self, path: str) -> None:
        """End the server of a socket and its children by force; the next file starts another one."""
        with self._lock:
            if path == self._socket:
                self._stop()

    def stop(self) -> None:
        """End the server and its children, and remove its socket."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        self._socket = str(self._folder.enter_context(process_folder.make("decoder")) / "socket")
        command = [sys.executable, "-m", "raylift.serve.image_decoder_server", self._socket]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0)
        assert self._process.stdout is not None
        started, _, _ = select.select([self._process.stdout], [], [], START_S)
        if not started or self._process.stdout.readline() != READY:
            self._stop()
            raise OSError("the server process of the decoder does not start")

    def _stop(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None
        self._folder.close()


_SERVER = _Server()
atexit.register(_SERVER.stop)
