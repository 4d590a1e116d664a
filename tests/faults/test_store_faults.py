"""An object store that refuses, never responds, has no address or lacks the bucket: a sentence within a stated time."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import random
import re
import socket
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from s3_server import S3Server

from raylift.datasets.archive import s3, store
from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import StoreError
from raylift.datasets.geometry import Grid, chest
from raylift.datasets.ingest.synthetic import ingest_phantoms
from raylift.datasets.streaming.order import BatchPartition
from raylift.platform import cli
from raylift.platform.config import RunConfig
from raylift.platform.training.inputs import describe, open_stream


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
        with pytest.raises(StoreError):
            Folder("s3://bucket/folder").read("a")
        # Three attempts of a second, and pauses of at most one and two.
        assert 3 < time.monotonic() - begun < 7
    assert lines[0] == "s3://bucket does not respond for 0 s, retrying (1 of 3)"
    assert re.fullmatch(r"s3://bucket does not respond for [1-3] s, retrying \([12] of 3\)", lines[1])
    assert len(lines) < 8


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Forwards reads to an S3 server, and fails a share of them: status 500, status 503, or a second's silence."""

    protocol_version = "HTTP/1.1"
    upstream, share, fired = "", 0.0, Counter[str]()
    random, lock = random.Random(0), threading.Lock()

    def do_GET(self) -> None:
        """Forward or fail a request."""
        with self.lock:
            fault = self.random.choice(["500", "503", "stall"]) if self.random.random() < self.share else ""
            self.fired[fault] += 1
        if fault in ("500", "503"):
            self._respond(int(fault), {}, b"<Error><Code>InternalError</Code></Error>")
            return
        if fault == "stall":
            time.sleep(1.0)
        server = http.client.HTTPConnection(self.upstream)
        server.request(self.command, self.path, headers=dict(self.headers))
        response = server.getresponse()
        self._respond(response.status, dict(response.getheaders()), response.read())
        server.close()

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks up

    def _respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if name.lower() != "transfer-encoding":
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_a_store_that_fails_one_request_in_twenty_loses_no_sample_and_a_fifth_of_the_throughput_at_most(
    s3_server: S3Server, s3_bucket_url: str, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, grid = f"{s3_bucket_url}/{uuid.uuid4().hex}", Grid(16, 20.0)
    ingest_phantoms(url, grid, chest(grid), count=12, seed=1)
    monkeypatch.setattr(FaultyProxy, "upstream", s3_server.endpoint.removeprefix("http://"))
    # File systems of their own, of which none is open yet.
    options = {**store.S3_OPTIONS["config_kwargs"], "retries": {"max_attempts": 12, "mode": "standard"}}
    monkeypatch.setattr(store, "S3_OPTIONS", {"config_kwargs": {**options, "read_timeout": 29}})
    data = replace(tiny.data, archive=url, size=16, cache_gib=0.0, threads=8, prefetch_batches=8)
    run, steps, step_s = replace(tiny, data=data), 24, 0.25

    def read(share: float) -> tuple[list[float], float]:
        """The sum of each batch, and batches a second after the first for a step of 0.25 s, with a share of faults."""
        monkeypatch.setattr(FaultyProxy, "share", share)
        archive = Archive(url)
        stream = iter(open_stream(archive, run, describe(run, archive), BatchPartition(0, 1, 2, 1)))
        sums, begun = [float(batch.volume.sum()) for batch in next(stream)], time.monotonic()
        for micro_batches in islice(stream, steps):
            time.sleep(step_s)
            sums += [float(batch.volume.sum()) for batch in micro_batches]
        per_s = steps / (time.monotonic() - begun)
        stream.close()
        # Reads in progress end before the proxy does: without it they are repeated for minutes.
        for thread in threading.enumerate():
            if thread.name.startswith("raylift-read"):
                thread.join()
        return sums, per_s

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_address[1]}")
        clean, faulty, fired = [], [], Counter[str]()
        # By turns, and the faster of each: other work on the machine slows one reading and not the other.
        for _ in range(2):
            clean.append(read(0.0))
            monkeypatch.setattr(FaultyProxy, "fired", Counter())
            faulty.append(read(0.05))
            fired += FaultyProxy.fired
        proxy.shutdown()
    assert min(fired["500"], fired["503"], fired["stall"]) > 0
    assert 0.02 < (fired.total() - fired[""]) / fired.total() < 0.1
    assert all(sums == clean[0][0] for sums, _ in [*clean, *faulty])
    clean_per_s, faulty_per_s = (max(per_s for _, per_s in readings) for readings in (clean, faulty))
    print(f"{clean_per_s:.2f} and {faulty_per_s:.2f} batches a second, {dict(fired)}")
    assert faulty_per_s >= 0.8 * clean_per_s


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
        with pytest.raises(StoreError):
            Folder("s3://bucket/folder").read("a")
        server.shutdown(socket.SHUT_RDWR)
        responding.result(timeout=10)
    assert connections == requests
