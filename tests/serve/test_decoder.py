"""Decoding in child processes: limits on processor time, memory and duration, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from raylift.datasets.errors import FileError
from raylift.datasets.geometry import FRONTAL
from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.datasets.radiographs.preparation import load_radiograph
from raylift.models.weights import Description
from raylift.serve import decoder as decoder_module
from raylift.serve.decoder import Decoder, DecodingLimits
from raylift.serve.reconstructor import prepare_radiograph


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    asyncio.run(Decoder.start())
    yield
    assert psutil.wait_procs(children(), timeout=2)[1] == []


def children() -> list[psutil.Process]:
    """The children that decode."""
    process = decoder_module._SERVER._process
    assert process is not None
    return psutil.Process(process.pid).children()


async def load(description: Description, data: bytes, limits: DecodingLimits) -> np.ndarray:
    decoder = Decoder(description, RadiographLimits(), limits)
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
    with pytest.raises(FileError, match=r"^frontal: the file cannot be decoded in \d+ s and \d+ MB: save it as PNG$"):
        asyncio.run(load(description, large, limits))
    assert time.monotonic() - begun < 10


def test_the_child_ends_before_the_place_of_a_client_that_left_is_free(description: Description, large: bytes) -> None:
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


def test_a_server_process_that_ended_is_started_again(description: Description, radiographs: dict[str, bytes]) -> None:
    process = decoder_module._SERVER._process
    assert process is not None
    process.kill()
    process.wait()
    assert asyncio.run(load(description, radiographs["frontal"], DecodingLimits())).shape == (32, 32)
