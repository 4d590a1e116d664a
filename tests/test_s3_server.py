import asyncio
import errno
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow.fs
import pytest
import s3_server
import s3fs
import zarr
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session
from s3_server import S3Server, S3ServerError

BUCKET = "test-bucket"
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def fs(server: S3Server) -> s3fs.S3FileSystem:
    """Configured by the environment alone."""
    return s3fs.S3FileSystem(use_listings_cache=False)


def client_without_retries() -> Any:
    return Session().create_client("s3", config=Config(retries={"total_max_attempts": 1}))


def test_an_object_comes_back_whole_and_in_ranges(fs: s3fs.S3FileSystem) -> None:
    data = os.urandom(100_000)
    fs.pipe_file(f"{BUCKET}/ranges", data)
    assert fs.cat_file(f"{BUCKET}/ranges") == data
    assert fs.cat_file(f"{BUCKET}/ranges", start=10, end=70_000) == data[10:70_000]
    assert fs.cat_file(f"{BUCKET}/ranges", start=99_000) == data[99_000:]
    assert fs.cat_file(f"{BUCKET}/ranges", start=-300) == data[-300:]


def test_a_listing_names_every_object_at_once_and_leaves_out_deleted_ones(fs: s3fs.S3FileSystem) -> None:
    names = [f"{BUCKET}/list/{i:02d}/object" for i in range(20)]
    for name in names:
        fs.pipe_file(name, name.encode())
    assert fs.find(f"{BUCKET}/list") == names
    assert fs.ls(f"{BUCKET}/list", detail=False) == [name.removesuffix("/object") for name in names]
    fs.rm_file(names[0])
    assert fs.find(f"{BUCKET}/list") == names[1:]


def test_a_multipart_upload_reads_back_across_the_seams(fs: s3fs.S3FileSystem) -> None:
    data = os.urandom(12 * MIB)
    fs.pipe_file(f"{BUCKET}/parts", data, chunksize=5 * MIB)
    assert fs.cat_file(f"{BUCKET}/parts") == data
    assert fs.cat_file(f"{BUCKET}/parts", start=5 * MIB - 7, end=5 * MIB + 7) == data[5 * MIB - 7 : 5 * MIB + 7]
    assert fs.cat_file(f"{BUCKET}/parts", start=-9) == data[-9:]


@pytest.mark.parametrize("size", [10, 11 * MIB], ids=["one request", "multipart"])
def test_creating_refuses_the_second_writer(fs: s3fs.S3FileSystem, size: int) -> None:
    path = f"{BUCKET}/exclusive-{size}"
    fs.pipe_file(path, b"1" * size, mode="create", chunksize=5 * MIB)
    with pytest.raises(OSError, match="preconditions") as caught:
        fs.pipe_file(path, b"2" * size, mode="create", chunksize=5 * MIB)
    # s3fs has a FileExistsError only for a reply with AWS's <Condition> element, which Swift does not send.
    assert caught.value.errno == errno.EINVAL
    assert isinstance(caught.value.__cause__, ClientError)
    assert caught.value.__cause__.response["Error"]["Code"] == "PreconditionFailed"
    assert fs.cat_file(path) == b"1" * size


def test_of_two_that_create_at_the_same_time_both_succeed_and_the_one_that_began_last_is_kept(
    fs: s3fs.S3FileSystem,
) -> None:
    """A limit of Swift that code tested here must live with; AWS refuses one of them."""
    parameters = {"Bucket": BUCKET, "Key": "overlap", "IfNoneMatch": "*"}
    url = urlsplit(client_without_retries().generate_presigned_url("put_object", Params=parameters))
    slow = http.client.HTTPConnection(url.netloc, timeout=30)
    slow.putrequest("PUT", f"{url.path}?{url.query}")
    slow.putheader("If-None-Match", "*")
    slow.putheader("Content-Length", "6")
    slow.putheader("Expect", "100-continue")
    slow.endheaders()
    assert slow.sock.recv(1000).startswith(b"HTTP/1.1 100")  # Swift has read If-None-Match and waits for the content
    fs.pipe_file(f"{BUCKET}/overlap", b"quick", mode="create")
    slow.send(b"slowly")
    assert slow.getresponse().status == 200
    slow.close()
    assert fs.cat_file(f"{BUCKET}/overlap") == b"quick"


@pytest.mark.parametrize(
    "wrong", [{"key": s3_server.ACCESS_KEY, "secret": "wrong"}, {"key": "wrong", "secret": "wrong"}]
)
def test_wrong_credentials_are_refused(fs: s3fs.S3FileSystem, wrong: dict[str, str]) -> None:
    fs.pipe_file(f"{BUCKET}/private", b"private")
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(**wrong).cat_file(f"{BUCKET}/private")


def test_acknowledged_objects_survive_kill_9_and_are_listed(server: S3Server, fs: s3fs.S3FileSystem) -> None:
    acknowledged: dict[str, bytes] = {}
    refused: list[str] = []
    enough = threading.Event()

    def write(writer: int) -> None:
        client = client_without_retries()
        for i in range(100_000):
            if enough.is_set():
                return
            key, data = f"kill/{writer}/{i:05d}", os.urandom(20_000)
            try:
                client.put_object(Bucket=BUCKET, Key=key, Body=data)
            except (BotoCoreError, ClientError):
                refused.append(key)
            else:
                acknowledged[key] = data

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in writers:
        thread.start()
    try:
        for kills in range(1, 3):
            deadline = time.monotonic() + 60
            while len(acknowledged) < 20 * kills and time.monotonic() < deadline:
                time.sleep(0.01)
            server.kill()
            server.start()
    finally:
        enough.set()
        for thread in writers:
            thread.join()
    assert refused, "no write was under way when the server was killed"
    assert len(acknowledged) >= 40
    listed = {name.removeprefix(f"{BUCKET}/") for name in fs.find(f"{BUCKET}/kill")}
    assert acknowledged.keys() <= listed
    assert {key: fs.cat_file(f"{BUCKET}/{key}") for key in acknowledged} == acknowledged


def test_a_sharded_zarr_array_reads_back(server: S3Server) -> None:
    values = np.random.default_rng(0).random((64, 64, 64), dtype=np.float32)

    async def write_and_read() -> None:
        fs = s3fs.S3FileSystem(asynchronous=True, skip_instance_cache=True)
        session = await fs.set_session()
        store = zarr.storage.FsspecStore(fs, path=f"{BUCKET}/volume.zarr")
        like = {"shape": values.shape, "dtype": values.dtype, "shards": (32, 32, 32), "chunks": (16, 16, 16)}
        written = await zarr.api.asynchronous.create_array(store, **like)
        await written.setitem(..., values)
        read = await zarr.api.asynchronous.open_array(store=store, mode="r")
        part = (slice(20, 50), slice(3, 33), slice(7, 9))  # some chunks of each shard: through the shards' indices
        np.testing.assert_array_equal(await read.getitem(part), values[part])
        np.testing.assert_array_equal(await read.getitem(...), values)
        await session.close()

    asyncio.run(write_and_read())


def test_pyarrow_reads_and_writes_with_an_endpoint_or_an_s3_address(server: S3Server, fs: s3fs.S3FileSystem) -> None:
    by_endpoint = pyarrow.fs.S3FileSystem(endpoint_override=server.endpoint)
    with by_endpoint.open_output_stream(f"{BUCKET}/arrow") as stream:
        stream.write(b"arrow" * MIB)
    assert fs.cat_file(f"{BUCKET}/arrow") == b"arrow" * MIB
    by_address, path = pyarrow.fs.FileSystem.from_uri(f"s3://{BUCKET}/arrow")
    with by_address.open_input_file(path) as file:
        assert file.read(10) == b"arrowarrow"


def test_the_daemons_end_with_the_process_that_started_them_but_not_with_its_thread(tmp_path: Path) -> None:
    code = (
        "import sys, threading, time; from pathlib import Path; from s3_server import S3Server\n"
        "server = S3Server(Path(sys.argv[1])); starter = threading.Thread(target=server.start)\n"
        "starter.start(); starter.join(); time.sleep(0.2)\n"
        "print(*[process.pid for process in server.processes.values() if process.poll() is None], flush=True)\n"
        "time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(s3_server.__file__).parent)}
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        daemons = [int(pid) for pid in starter.stdout.readline().split()]
        starter.send_signal(signal.SIGKILL)
    assert len(daemons) == 4
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in daemons if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie has ended; who reaps it is up to the machine's init


def test_a_taken_port_is_refused_by_number(server: S3Server, tmp_path: Path) -> None:
    port = server.ports["proxy"]
    with pytest.raises(S3ServerError, match=rf"port {port} on 127\.0\.0\.1.*is not free.*use another port"):
        S3Server(tmp_path, port=port).start()


def test_a_daemon_that_fails_at_start_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_server, "_proxy_filters", lambda secret: {"nonesuch": {}})
    server = S3Server(tmp_path)
    with pytest.raises(S3ServerError, match=r"(?s)proxy server exited with 1 at start.*proxy\.log.*nonesuch"):
        server.start()
    assert all(process.poll() is not None for process in server.processes.values())


def test_a_folder_without_user_xattrs_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", refuse)
    with pytest.raises(S3ServerError, match=rf"{tmp_path}.*without user extended attributes.*use a folder on ext4"):
        S3Server(tmp_path).start()


def test_an_installation_without_a_package_index_states_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(S3ServerError, match=r"(?s)cannot install OpenStack Swift .* Give pip a package index.*ERROR"):
        s3_server.ensure_installed(tmp_path)
    assert not (tmp_path / f"swift-{s3_server.SWIFT_VERSION}" / "installed-constraints.txt").exists()
