"""An object store that refuses, never responds, has no address or lacks the bucket: a sentence within a stated time."""

from __future__ import annotations

import contextlib
import re
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


def test_a_store_that_stops_responding_during_work_is_reported_and_given_up_within_the_stated_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3, "SLOW_S", 0.3)
    monkeypatch.setattr(s3, "REPORT_EVERY_S", 1.0)
    options = {"retries": {"max_attempts": 2, "mode": "standard"}, "connect_timeout": 1, "read_timeout": 1}
    monkeypatch.setattr(store, "S3_OPTIONS", {"config_kwargs": options})
    lines: list[str] = []
    monkeypatch.setattr(store, "report_stall", lines.append)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(StoreUnreachable):
            Folder("s3://bucket/folder").read("a")
        # Three attempts of a second, and pauses of at most one and two.
        assert 3 < time.monotonic() - begun < 7
    assert lines[0] == "s3://bucket does not respond for 0 s, retrying (1 of 3)"
    assert re.fullmatch(r"s3://bucket does not respond for [1-3] s, retrying \([12] of 3\)", lines[1])
    assert len(lines) < 8


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
