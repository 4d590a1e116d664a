"""Two processes resume one run: one trains, the other is refused, and a stale lease is taken over on request only."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import S3Server

from raylift.datasets import hashed_json
from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import ConfigError
from raylift.platform import cli
from raylift.platform.training import lease, runs
from raylift.platform.training.driver import interruptible
from raylift.platform.tuning import search
from raylift.platform.tuning.search import Search, Space


def write_lease(url: str, age_s: float, number: int = 1, **process: object) -> None:
    """The lease of another process, as it is without its further heartbeats."""
    content = {"process": {"host": "node-7", "pid": 4242, "started": 0.0, **process}, "time": time.time() - age_s}
    Folder(url).write(f".lease-{number:06d}.json", hashed_json.encode(content))


class LeaseSuite:
    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _fast_heartbeat(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "BEAT_S", 0.1)

    def test_it_is_refused_while_held_and_free_afterwards(self, url: str) -> None:
        with (
            lease.acquire(url),
            pytest.raises(ConfigError, match=r"is in use by process \d+ on .*last heartbeat is \d s"),
        ):
            lease.acquire(url, take_over=True).__enter__()
        with lease.acquire(url):
            pass
        assert [name for name in Folder(url).names() if "lease" in name] == []

    def test_a_stale_one_is_taken_over_on_request_only(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        write_lease(url, age_s=100)
        with pytest.raises(
            ConfigError, match=r"process 4242 on node-7, whose last heartbeat is 100 s old.*--take-over"
        ):
            lease.acquire(url).__enter__()
        with lease.acquire(url, take_over=True):
            assert Folder(url).names() == [".lease-000002.json"]
        assert "is taken over from process 4242 on node-7" in capsys.readouterr().out

    def test_of_processes_that_take_it_over_at_once_one_succeeds(self, url: str) -> None:
        write_lease(url, age_s=100)

        def take(_: int) -> bool:
            try:
                lease._take(Folder(url), take_over=True)
            except ConfigError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(take, range(4))).count(True) == 1

    def test_the_heartbeat_is_renewed_and_an_owner_that_lost_its_lease_stops(self, url: str) -> None:
        def hold() -> None:
            # In a process of a shell's background, SIGINT is ignored until a handler is set.
            with lease.acquire(url), interruptible():
                first = Folder(url).read_hashed(".lease-000001.json")["time"]
                time.sleep(1.0)
                assert Folder(url).read_hashed(".lease-000001.json")["time"] > first
                write_lease(url, age_s=0, number=2)
                time.sleep(20)

        begun = time.monotonic()
        with pytest.raises(lease.LeaseLostError, match="taken over by another process"):
            hold()
        assert time.monotonic() - begun < 10
        assert Folder(url).names() == [".lease-000002.json"]

    @pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
    def test_where_clocks_differ_a_heartbeat_shows_that_the_owner_lives(
        self, url: str, ahead_s: float, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_lease(url, -ahead_s)
        with pytest.raises(ConfigError, match=r"3600 s (old|dated|ahead).*add --take-over"):
            lease.acquire(url).__enter__()
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(0.05):
                write_lease(url, -ahead_s)

        with ThreadPoolExecutor(1) as pool:
            beating = pool.submit(beat)
            try:
                with pytest.raises(ConfigError, match="whose clock differs and whose heartbeats go on: stop it first"):
                    lease.acquire(url, take_over=True).__enter__()
            finally:
                stop.set()
            beating.result()
        with lease.acquire(url, take_over=True):
            assert "is taken over from process 4242" in capsys.readouterr().out


class TestFolder(LeaseSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "run")


class TestBucket(LeaseSuite):
    @pytest.fixture
    def url(self, s3_bucket_url: str) -> str:
        return f"{s3_bucket_url}/{uuid.uuid4().hex}"


def test_a_store_that_does_not_respond_delays_the_end_of_a_run_and_does_not_hide_its_reason(
    s3_server: S3Server, s3_bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RELEASE_S", 1.0)
    begun = time.monotonic()
    url, proxy = f"{s3_bucket_url}/{uuid.uuid4().hex}", s3_server.processes["proxy"]
    try:
        with pytest.raises(InterruptedError, match="the reason"):
            stop_a_run(url, proxy)
        assert 1.0 <= time.monotonic() - begun < 15.0
    finally:
        proxy.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 30
    while Folder(url).names() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert Folder(url).names() == []


def stop_a_run(url: str, store: subprocess.Popen) -> None:
    """Stop a store while a lease is held, and end for another reason."""
    with lease.acquire(url):
        assert Folder(url).names() == [".lease-000001.json"]
        store.send_signal(signal.SIGSTOP)
        raise InterruptedError("the reason")


def test_a_process_of_this_machine_that_has_ended_holds_nothing(tmp_path: Path) -> None:
    gone = {**lease.this_process(), "started": lease.this_process()["started"] - 1}
    write_lease(str(tmp_path), 0, **gone)
    with lease.acquire(str(tmp_path)):
        pass


@pytest.mark.parametrize("other", [{"namespace": "another boot pid:[1]"}, {"pid": 2**22 + 1, "namespace": None}])
def test_a_process_of_another_container_with_the_same_host_name_holds_its_lease(tmp_path: Path, other: dict) -> None:
    write_lease(str(tmp_path), 0, **{**lease.this_process(), "started": 1, **other})
    with pytest.raises(ConfigError, match="is in use by process"), lease.acquire(str(tmp_path)):
        pass


def test_an_owner_lives_whatever_happens_to_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    owner = lease.this_process()
    monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)
    assert not lease.has_ended(owner)
    assert lease.has_ended({**owner, "pid": 2**22 + 1})


def test_the_library_refuses_a_run_or_a_search_of_another_process_too(tiny, ray_cluster, tmp_path):
    run = runs.create(tiny, str(tmp_path / "run"))
    search.create(Search(tiny, Space({"optimizer.lr": {"choice": [1e-4]}})), str(tmp_path / "search"))
    for name, fit in (("run", lambda url: runs.fit(run, url)), ("search", search.fit)):
        write_lease(str(tmp_path / name), age_s=30)
        with pytest.raises(ConfigError, match="is in use by process 4242 on node-7"):
            fit(str(tmp_path / name))
    assert cli.main(["tune", "--resume", str(tmp_path / "search"), "--cluster.max-failures", "1"]) == 2
    assert search.load_search(str(tmp_path / "search")).run.cluster.max_failures == 2
    assert not (tmp_path / "search/trials").exists()


def test_a_second_resume_is_refused_with_the_owner_and_changes_nothing(tiny, tmp_path, capsys):
    url = str(tmp_path / "run")
    runs.create(tiny, url)
    before = (tmp_path / "run/run.json").read_bytes()
    write_lease(url, age_s=30)
    assert cli.main(["train", "--resume", url, "--train.steps", "99", "--take-over"]) == 2
    assert re.search(r"process 4242 on node-7, whose last heartbeat is 3\d s old", capsys.readouterr().err)
    assert (tmp_path / "run/run.json").read_bytes() == before
