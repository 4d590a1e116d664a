"""Decoding in child processes: limits on processor time, memory and duration, and clients that leave."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import FRONTAL
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.preparation import load_radiograph
from raylift.models.weights import Description
from raylift.serve import image_decoder as decoder_module
from raylift.serve.failures import DecodingError, ServiceUnavailableError
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.image_decoder_server import DecodingLimits
from raylift.serve.reconstructor import prepare_radiograph


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    asyncio.run(ImageDecoder.start())
    yield
    assert psutil.wait_procs(children(), timeout=2)[1] == []


def children() -> list[psutil.Process]:
    """The children that decode."""
    return server().children(recursive=True)


def server() -> psutil.Process:
    """The process that forks them."""
    process = decoder_module._SERVER._process
    assert process is not None
    return psutil.Process(process.pid)


async def load(description: Description, data: bytes, limits: DecodingLimits) -> np.ndarray:
    decoder = ImageDecoder(description, RadiographLimits(), limits)
    return (await decoder.load(data, FRONTAL, "auto", False, None)).image


def test_a_child_prepares_a_file_as_this_process_does(description: Description, radiographs: dict[str, bytes]) -> None:
    image = asyncio.run(load(description, radiographs["frontal"], DecodingLimits()))
    loaded = load_radiograph(radiographs["frontal"], FRONTAL, patient_facing=None)
    np.testing.assert_array_equal(image, prepare_radiograph(loaded.image, "frontal", description))


@pytest.mark.parametrize(
    "limits",
    [DecodingLimits(cpu_s=1), DecodingLimits(duration_s=0.3), DecodingLimits(memory_bytes=2**26)],
    ids=["processor time", "duration", "memory"],
)
def test_a_file_over_a_limit_is_refused(limits: DecodingLimits, description: Description, large: bytes) -> None:
    begun = time.monotonic()
    with pytest.raises(FileError, match=r"^frontal: the file cannot be decoded in \d+ s and \d+ MiB: save it as PNG$"):
        asyncio.run(load(description, large, limits))
    assert time.monotonic() - begun < 10


def test_the_child_ends_before_the_slot_of_a_client_that_left_is_free(description: Description, large: bytes) -> None:
    async def leave() -> float:
        decoding = asyncio.create_task(load(description, large, DecodingLimits()))
        while not children():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding
        return time.monotonic() - begun

    assert asyncio.run(leave()) < 1


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (
            signal.SIGKILL,
            pytest.raises(ServiceUnavailableError, match=r"^the decoder of radiographs is unavailable: try again"),
        ),
        (signal.SIGABRT, pytest.raises(FileError, match=r"^frontal: the file cannot be decoded in 10 s")),
    ],
    ids=["the system without memory", "a library"],
)
def test_a_child_that_the_system_ended_is_no_fault_of_its_file(
    number: int,
    expected: AbstractContextManager[Any],
    description: Description,
    large: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def end() -> None:
        decoding = asyncio.create_task(load(description, large, DecodingLimits()))
        while len(children()) < 2:
            await asyncio.sleep(0.01)
        children()[-1].send_signal(number)
        await decoding

    with expected:
        asyncio.run(end())
    assert ("ended by SIGKILL" in caplog.text) == (number == signal.SIGKILL)


def test_a_server_that_does_not_start_or_ends_is_no_fault_of_a_file(
    description: Description, radiographs: dict[str, bytes], large: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end() -> None:
        decoding = asyncio.create_task(load(description, large, DecodingLimits()))
        while len(children()) < 2:
            await asyncio.sleep(0.01)
        for process in [server(), *children()]:
            process.kill()
        await decoding

    with pytest.raises(ServiceUnavailableError, match="is unavailable"):
        asyncio.run(end())
    with monkeypatch.context() as context:
        context.setattr(sys, "executable", "/bin/false")
        with pytest.raises(ServiceUnavailableError, match="is unavailable"):
            asyncio.run(load(description, radiographs["frontal"], DecodingLimits()))
    assert asyncio.run(load(description, radiographs["frontal"], DecodingLimits())).shape == (32, 32)


def test_a_server_whose_socket_was_removed_is_started_again(
    description: Description, radiographs: dict[str, bytes]
) -> None:
    Path(decoder_module._SERVER._socket).unlink()
    with pytest.raises(ServiceUnavailableError, match="is unavailable"):
        asyncio.run(load(description, radiographs["frontal"], DecodingLimits()))
    assert asyncio.run(load(description, radiographs["frontal"], DecodingLimits())).shape == (32, 32)


@pytest.mark.parametrize("stopped", ["server", "child"])
def test_a_process_that_was_stopped_is_ended_and_the_server_started_again(
    stopped: str,
    description: Description,
    radiographs: dict[str, bytes],
    large: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoder_module, "END_S", 0.5)
    before = server()

    async def stop() -> None:
        decoding = asyncio.create_task(load(description, large, DecodingLimits(duration_s=1.5)))
        while stopped == "child" and len(children()) < 2:
            await asyncio.sleep(0.01)
        (children()[-1] if stopped == "child" else before).suspend()
        await decoding

    begun = time.monotonic()
    with pytest.raises(ServiceUnavailableError if stopped == "server" else FileError):
        asyncio.run(stop())
    assert time.monotonic() - begun < 5
    assert not before.is_running()
    assert "it is started again" in caplog.text
    assert asyncio.run(load(description, radiographs["frontal"], DecodingLimits())).shape == (32, 32)


def test_limits_above_those_of_the_service_are_lowered_to_them(
    description: Description, radiographs: dict[str, bytes]
) -> None:
    resource.prlimit(server().pid, resource.RLIMIT_AS, (2**36, 2**36))
    resource.prlimit(server().pid, resource.RLIMIT_CPU, (50, 50))
    limits = DecodingLimits(cpu_s=60, memory_bytes=2**37)
    assert asyncio.run(load(description, radiographs["frontal"], limits)).shape == (32, 32)
    server().kill()


def test_a_fault_of_the_decoder_is_reported_as_one(description: Description, radiographs: dict[str, bytes]) -> None:
    empty = replace(description, histograms={"frontal": ()})
    with pytest.raises(DecodingError, match=r"(?s)^the frontal radiograph was not decoded:\nTraceback .*in prepare"):
        asyncio.run(load(empty, radiographs["frontal"], DecodingLimits()))


def test_a_server_process_that_ended_is_started_again(description: Description, radiographs: dict[str, bytes]) -> None:
    process = decoder_module._SERVER._process
    assert process is not None
    process.kill()
    process.wait()
    assert asyncio.run(load(description, radiographs["frontal"], DecodingLimits())).shape == (32, 32)
