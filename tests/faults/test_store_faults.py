"""An object store that refuses, never responds, has no address or lacks the bucket: a sentence within a stated time."""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raylift.datasets.archive import s3, store
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import StoreUnreachable
from raylift.platform import cli


@pytest.mark.parametrize("fault", ["refuses", "never responds", "has no address"])
def test_a_store_that_does_not_respond_ends_a_command_in_ten_seconds_with_a_line_after_five(
    fault: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "ATTEMPT_S", 1.0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if fault == "never responds":
            server.listen()
        host = "no-such-host.invalid" if fault == "has no address" else "127.0.0.1"
        endpoint = f"http://{host}:{server.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        begun = time.monotonic()
        words = ["train", "x2ct-gan-tiny", "--data.archive", "s3://bucket/archive", "--output", str(tmp_path / "run")]
        assert cli.main(words) == 2
        assert 1.0 < time.monotonic() - begun < 4.0
        if fault == "never responds":
            server.settimeout(1)
            server.accept()[0].close()  # the fault fired: a client had connected
    waits, gives_up = capfd.readouterr().err.splitlines()
    assert waits == f"raylift: s3://bucket at {endpoint} does not respond, retrying (2 of 2)"
    assert gives_up.startswith(f"raylift: s3://bucket at {endpoint} does not respond within 2 s (")
    assert not (tmp_path / "run").exists()


def test_a_bucket_that_does_not_exist_is_named_before_anything_is_written(
    s3_bucket_url: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["phantom", "--count", "1", "--size", "16", "--archive", "s3://raylift-no-such-bucket/archive"]
    assert cli.main(words) == 2
    output = capfd.readouterr()
    assert "s3://raylift-no-such-bucket at http" in output.err
    assert "there is no such bucket" in output.err
    assert output.out == ""


@pytest.mark.parametrize(("attempts", "requests"), [(0, 1), (2, 3)])
def test_one_layer_repeats_a_request(attempts: int, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is too busy for each request counts them."""
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    response = b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    options = {"retries": {"max_attempts": attempts, "mode": "standard"}, "connect_timeout": 5}
    monkeypatch.setattr(store, "S3_OPTIONS", {"config_kwargs": options})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    connections = 0
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def respond() -> None:
            nonlocal connections
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(10_000)
                    connection.sendall(response)
                    connection.close()
                    connections += 1

        responding = pool.submit(respond)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(StoreUnreachable):
            Folder("s3://bucket/folder").read("a")
        server.shutdown(socket.SHUT_RDWR)
        responding.result(timeout=10)
    assert connections == requests
