import asyncio
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from service_clients import api_of
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from raylift.datasets.radiographs.gray_image import RadiographLimits
from raylift.models.weights import Description
from raylift.serve.api import request_limits
from raylift.serve.api.request_limits import BodyLimit, BodyTimeout
from raylift.serve.backend import Backend
from raylift.serve.image_decoder import ImageDecoder
from raylift.serve.served_model import ReconstructionSettings, ServedModel

MAX_BYTES = 200_000
URL = "/v1/reconstructions"


@pytest.fixture(scope="session")
def api(description: Description) -> TestClient:
    """The API with small limits, and a backend that must not be called."""

    async def reconstruct(_: np.ndarray, __: ReconstructionSettings) -> np.ndarray:
        raise AssertionError("an invalid request reached the backend")

    async def ready() -> bool:
        return True

    backend = Backend(ServedModel(description, "0" * 64), reconstruct, ready)
    limits = RadiographLimits(max_bytes=MAX_BYTES, max_pixels=10_000_000)
    return TestClient(api_of(backend, ImageDecoder(description, limits)))


def refused(response: Any, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    detail = problem["detail"]
    assert all(word in detail for word in words), detail
    assert "Traceback" not in detail
    assert len(detail) < 300


def noise(kind: str, rows: int = 64, columns: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (rows, columns), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def png_declaring(width: int, height: int) -> bytes:
    """A valid header that declares far more pixels than follow."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 9999)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    """An image of one color: a small file, huge in memory."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG", optimize=True)
    return file.getvalue()


def dicom(rows: int, columns: int, pixels: bytes, modality: str = "DX") -> bytes:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.Modality, ds.Rows, ds.Columns, ds.SamplesPerPixel = modality, rows, columns, 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = pixels
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "status", "words"),
    [
        pytest.param(b"", 422, ["lateral", "empty file"], id="empty"),
        pytest.param(b"not an image", 415, ["lateral", "not an image raylift reads", "PNG"], id="text"),
        pytest.param(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", 415, ["not an image raylift reads"], id="PDF"),
        pytest.param(b"GIF89a" + b"\0" * 200, 415, ["not an image raylift reads"], id="GIF"),
        pytest.param(noise("JPEG")[:900], 415, ["lateral", "damaged"], id="truncated JPEG"),
        pytest.param(noise("PNG")[:900], 415, ["damaged"], id="truncated PNG"),
        pytest.param(noise("PNG", 20, 64), 415, ["20 x 64 pixels", "under 32"], id="too small"),
        pytest.param(bomb(5000), 415, ["5000 x 5000 pixels", "over the limit of 10000000"], id="bomb"),
        pytest.param(png_declaring(60000, 60000), 415, ["lateral"], id="huge declared size"),
        pytest.param(png_declaring(2**31 - 1, 2**31 - 1), 415, ["lateral"], id="absurd declared size"),
        pytest.param(png_declaring(1000, 1000), 415, ["damaged"], id="pixels missing"),
        pytest.param(dicom(65535, 65535, b"\0" * 64), 415, ["65535 x 65535", "over the limit"], id="huge DICOM"),
        pytest.param(dicom(64, 64, b"\0" * 64), 415, ["pixels cannot be decoded"], id="short DICOM"),
        pytest.param(dicom(64, 64, b"\1" * 4096), 415, ["constant"], id="constant DICOM"),
        pytest.param(dicom(64, 64, b"\0" * 4096, "CT"), 415, ["lateral: modality CT is not that"], id="CT"),
        pytest.param(b"\0" * 128 + b"DICM" + b"\xff" * 64, 415, ["lateral"], id="DICOM of noise"),
        pytest.param(bytes(MAX_BYTES + 1), 413, ["lateral: 200001 bytes, over the limit of 200000"], id="large"),
    ],
)
def test_a_file_that_is_not_a_radiograph_is_refused_with_a_sentence(
    api: TestClient, file: bytes, status: int, words: list[str]
) -> None:
    refused(api.post(URL, files={"frontal": noise("PNG"), "lateral": file}), status, *words)


@pytest.mark.parametrize(
    ("files", "fields", "words"),
    [
        pytest.param(["frontal"], {}, ["requires frontal and lateral", "missing: lateral"], id="missing"),
        pytest.param(["frontal", "lateral", "oblique"], {}, ["unknown field oblique", "flip_lateral"], id="unknown"),
        pytest.param(["frontal", "lateral"], {"flp_lateral": "true"}, ["unknown field flp_lateral"], id="misspelled"),
        pytest.param(["frontal"], {"lateral": "a.png"}, ["field lateral is text: send a file"], id="text"),
        pytest.param(["frontal", "lateral"], {"invert": "maybe"}, ["'maybe'", "'auto', 'yes' or 'no'"], id="invert"),
        pytest.param(
            ["frontal", "lateral"],
            {"flip_lateral": "1"},
            ["flip_lateral is '1'", "'auto', 'true' or 'false'"],
            id="flip",
        ),
        pytest.param(["frontal", "lateral", "invert"], {}, ["invert is a file"], id="file instead of text"),
        pytest.param(["frontal", "lateral"], {"invert": ""}, ["field invert is empty"], id="empty text"),
        pytest.param(["frontal", "lateral"], {"x" * 500: "1"}, ["unknown field xxx"], id="long name"),
    ],
)
def test_missing_unknown_and_invalid_fields_are_named(
    api: TestClient, files: list[str], fields: dict[str, str], words: list[str]
) -> None:
    body = {name: ("a.png", noise("PNG")) for name in files}
    refused(api.post(URL, files=body, data=fields), 422, *words)


def test_a_field_that_is_sent_twice_is_refused(api: TestClient) -> None:
    twice = [("frontal", noise("PNG")), ("lateral", noise("PNG")), ("lateral", noise("PNG", 80, 80))]
    refused(api.post(URL, files=twice), 422, "field lateral was sent more than once")


def test_a_form_with_too_many_files_is_refused_while_it_is_parsed(api: TestClient) -> None:
    many = [(f"view{k}", noise("PNG")) for k in range(9)]
    refused(api.post(URL, files=many), 422, "cannot be read", "Too many files")


@pytest.mark.parametrize(
    ("headers", "body", "status", "word"),
    [
        ({"content-type": "application/json"}, b"{}", 415, "multipart/form-data"),
        ({}, b"", 415, "multipart/form-data"),
        ({"content-type": "image/png"}, noise("PNG"), 415, "multipart/form-data"),
        ({"content-type": "multipart/form-data"}, b"x", 422, "boundary"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"not a form at all", 422, "cannot be read"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"--b--", 422, "missing: frontal, lateral"),
    ],
)
def test_a_body_that_is_not_a_multipart_form_is_refused(
    api: TestClient, headers: dict[str, str], body: bytes, status: int, word: str
) -> None:
    refused(api.post(URL, content=body, headers=headers), status, word)


def test_a_declared_length_over_the_limit_is_refused_without_reading(api: TestClient) -> None:
    refused(api.post(URL, content=b"x", headers={"content-length": "999999999"}), 413, "over the limit")
    refused(api.post(URL, content=b"x", headers={"content-length": "-1"}), 400, "not a number")


def chunked(app: Any, chunks: int, size: int) -> tuple[int, bytes, int]:
    """Send a body without a content-length; returns status, response body and the number of chunks received."""
    received, sent = 0, []

    async def receive() -> Message:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"x" * size, "more_body": received < chunks}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), received


async def length(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


async def swallows_errors(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await length(scope, receive, send)
    except Exception:
        await PlainTextResponse("ok")(scope, receive, send)


@pytest.mark.parametrize("app", [length, swallows_errors])
def test_a_body_of_unknown_length_is_refused_at_the_limit(app: Any) -> None:
    status, response, received = chunked(BodyLimit(app, 1000), 1000, 100)
    assert status == 413
    assert "over the limit of 1000 bytes" in json.loads(response)["detail"]
    assert received == 11


@pytest.mark.parametrize("app", [length, swallows_errors])
def test_bodies_in_progress_are_bounded_together_and_their_bytes_freed_with_the_request(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_limits, "MAX_TOTAL_BYTES", 2500)

    async def run() -> list[tuple[int, bytes]]:
        limited = BodyLimit(app, 1000)
        held = [asyncio.Event() for _ in range(4)]

        async def one(k: int) -> tuple[int, bytes]:
            sent: list[Message] = []

            async def receive() -> Message:
                if not held[k].is_set():
                    held[k].set()
                    return {"type": "http.request", "body": bytes(900), "more_body": True}
                await asyncio.sleep(0.1)
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message: Message) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
            await limited(scope, receive, send)
            return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

        return [*await asyncio.gather(*(one(k) for k in range(3))), await one(3)]

    responses = asyncio.run(run())
    assert [status for status, _ in responses] == [200, 200, 503, 200]
    assert json.loads(responses[2][1])["detail"].startswith("too many bytes of requests at a time")


def test_a_body_at_the_limit_passes() -> None:
    assert chunked(BodyLimit(length, 1000), 10, 100) == (200, b"1000", 10)


def test_a_streamed_response_passes_unchanged() -> None:
    async def stream(scope: Scope, _: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for k in range(3):
            await send({"type": "http.response.body", "body": b"%d" % k, "more_body": k < 2})

    assert chunked(BodyLimit(stream, 1), 1, 0)[:2] == (200, b"012")


@pytest.mark.parametrize("app", [length, swallows_errors])
def test_a_body_that_does_not_arrive_in_time_is_refused(app: Any) -> None:
    async def run(gap_s: float) -> list[Message]:
        sent, chunks = [], 0

        async def receive() -> Message:
            nonlocal chunks
            chunks += 1
            await asyncio.sleep(gap_s)
            return {"type": "http.request", "body": b"x", "more_body": chunks < 10}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
        await BodyTimeout(app, 0.5)(scope, receive, send)
        return sent

    late, early = asyncio.run(run(0.2)), asyncio.run(run(0.0))
    assert (late[0]["status"], json.loads(late[1]["body"])["detail"]) == (408, "the body did not arrive within 0.5 s")
    assert (early[0]["status"], early[1]["body"]) == (200, b"10")


def test_other_protocols_than_http_pass_unchanged() -> None:
    scopes = []

    async def app(scope: Scope, _: Receive, __: Send) -> None:
        scopes.append(scope["type"])

    async def nothing() -> AsyncIterator[Any]:
        yield None

    for kind in ("lifespan", "websocket"):
        asyncio.run(BodyLimit(app, 1)({"type": kind}, nothing, nothing))  # type: ignore[arg-type]
    assert scopes == ["lifespan", "websocket"]
