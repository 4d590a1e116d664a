"""One suite that a folder and a bucket both pass."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from raylift.datasets.archive import store
from raylift.datasets.archive.store import Folder, absolute, is_local, join, local_path, zarr_store
from raylift.datasets.errors import ArchiveError, ConfigError, RayliftError, StoreError


class StoreSuite:
    """What every place for archives, runs and models must do; `url` is one that nothing was written to."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def folder(self, url: str) -> Folder:
        return Folder(url)

    @pytest.mark.parametrize("size", [0, 1, 300_000])
    def test_an_object_comes_back_as_it_was_written(self, folder: Folder, url: str, size: int) -> None:
        data = os.urandom(size)
        folder.write("deep/down/object", data)
        assert folder.read("deep/down/object") == data
        assert Folder(url).read("deep/down/object") == data

    def test_writing_again_replaces(self, folder: Folder) -> None:
        folder.write("a", b"long before")
        folder.write("a", b"after")
        assert folder.read("a") == b"after"

    def test_what_is_not_there_is_a_file_not_found(self, folder: Folder) -> None:
        with pytest.raises(FileNotFoundError):
            folder.read("nothing")
        folder.write("some/thing", b"1")
        with pytest.raises(FileNotFoundError):
            folder.read("some/other")

    def test_names_are_those_directly_inside_in_order(self, folder: Folder) -> None:
        for name in ("b", "a/deep", "c/1", "c/2", "d.json"):
            folder.write(name, b"x")
        assert folder.names() == ["a", "b", "c", "d.json"]
        assert folder.names("c") == ["1", "2"]

    def test_a_folder_that_is_not_there_has_no_names(self, folder: Folder) -> None:
        assert folder.names() == []
        assert folder.names("nowhere") == []

    def test_what_another_has_written_or_removed_is_seen_at_once(self, folder: Folder, url: str) -> None:
        other = Folder(url)
        assert folder.names() == []
        assert not folder.exists("a")
        other.write("a", b"1")
        assert folder.names() == ["a"]
        assert folder.exists("a")
        other.write("b", b"2")
        assert folder.names() == ["a", "b"]
        other.remove("a")
        assert folder.names() == ["b"]
        assert not folder.exists("a")

    def test_objects_and_folders_exist_and_prefixes_of_names_do_not(self, folder: Folder) -> None:
        folder.write("models/best", b"1")
        assert folder.exists("models/best")
        assert folder.exists("models")
        assert not folder.exists("model")
        assert not folder.exists("models/be")

    def test_creating_what_exists_fails_and_leaves_it(self, folder: Folder, url: str) -> None:
        folder.create("once", b"first")
        for again in (folder, Folder(url)):
            with pytest.raises(FileExistsError):
                again.create("once", b"second")
        assert folder.read("once") == b"first"
        assert folder.names() == ["once"], "nothing else is left"

    def test_an_object_can_be_created_after_it_was_removed(self, folder: Folder) -> None:
        folder.create("once", b"first")
        folder.remove("once")
        folder.create("once", b"second")
        assert folder.read("once") == b"second"

    def test_removing_takes_an_object_or_a_whole_folder_and_nothing_else(self, folder: Folder) -> None:
        for name in ("a/1", "a/deep/2", "ab/3", "b"):
            folder.write(name, b"x")
        folder.remove("a")
        folder.remove("b")
        folder.remove("never there")
        assert folder.names() == ["ab"]
        assert folder.read("ab/3") == b"x"

    def test_many_may_remove_the_same_object_at_once(self, folder: Folder) -> None:
        for k in range(5):
            folder.write(f"a{k}", b"x")
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(folder.remove, [f"a{k}"] * 8))
        assert folder.names() == []

    def test_files_are_put_and_fetched_whole(self, folder: Folder, tmp_path: Path) -> None:
        data = os.urandom(200_000)
        (tmp_path / "here").write_bytes(data)
        folder.put(tmp_path / "here", "there/object")
        folder.get("there/object", tmp_path / "new" / "back")
        assert (tmp_path / "new" / "back").read_bytes() == data
        assert folder.names("there") == ["object"]
        (tmp_path / "here").write_bytes(b"other")
        folder.put(tmp_path / "here", "there/object")
        assert folder.read("there/object") == b"other"

    def test_a_reader_gets_the_old_object_or_the_new_one(self, folder: Folder) -> None:
        versions = [bytes([k]) * 200_000 for k in range(6)]
        folder.write("a", versions[0])
        done = threading.Event()
        seen: set[bytes] = set()

        def watch() -> None:
            while not done.is_set():
                seen.add(folder.read("a"))

        with ThreadPoolExecutor(2) as pool:
            watchers = [pool.submit(watch) for _ in range(2)]
            for data in versions * 3:
                folder.write("a", data)
            done.set()
            for watcher in watchers:
                watcher.result()
        assert seen
        assert seen <= set(versions)

    def test_a_zarr_array_is_read_back_by_another_store(self, url: str) -> None:
        values = np.arange(4 * 8 * 8, dtype=np.int16).reshape(4, 8, 8)
        array = zarr.create_array(
            zarr_store(join(url, "array"), read_only=False),
            shape=values.shape,
            dtype="i2",
            chunks=(1, 8, 8),
            shards=(4, 8, 8),
        )
        array[:] = values
        again = zarr.open_array(zarr_store(join(url, "array"), read_only=True), mode="r")
        np.testing.assert_array_equal(again[2], values[2])
        with pytest.raises(ValueError, match="read-only"):
            again[0] = values[1]


class TestFolder(StoreSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return str(tmp_path / "place")

    def test_of_many_that_create_at_once_one_succeeds(self, folder: Folder) -> None:
        def create(k: int) -> bool:
            try:
                folder.create("once", str(k).encode() * 1000)
            except FileExistsError:
                return False
            return True

        for _ in range(10):
            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(create, range(8)))
            assert won.count(True) == 1
            assert folder.read("once") == str(won.index(True)).encode() * 1000
            assert folder.names() == ["once"]
            folder.remove("once")

    def test_a_missing_folder_is_no_zarr_store_to_read(self, url: str) -> None:
        with pytest.raises(ArchiveError, match="no such folder"):
            zarr_store(url, read_only=True)

    def test_a_folder_is_the_same_by_path_by_url_and_from_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Folder("place").write("a", b"1")
        for url in (str(tmp_path / "place"), f"file://{tmp_path}/place", f"{tmp_path}/./place/", tmp_path / "place"):
            assert Folder(url).read("a") == b"1"
            assert is_local(str(url))


class TestBucket(StoreSuite):
    @pytest.fixture
    def url(self, s3_bucket_url: str) -> str:
        return f"{s3_bucket_url}/{uuid.uuid4().hex}"

    def test_an_address_where_nothing_listens_is_unreachable_by_name(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{taken.getsockname()[1]}")
            monkeypatch.setattr(store, "S3_OPTIONS", few_attempts(connect_timeout=3))
            folder = Folder(url)
            for act in (
                lambda: folder.read("a"),
                folder.names,
                lambda: folder.exists("a"),
                lambda: folder.write("a", b"1"),
                lambda: folder.create("a", b"1"),
                lambda: folder.remove("a"),
            ):
                with pytest.raises(StoreError, match=f"^{url}: .*AWS_ENDPOINT_URL_S3") as caught:
                    act()
                assert isinstance(caught.value, RayliftError)
                assert isinstance(caught.value, ConnectionError)

    def test_wrong_credentials_are_unreachable_by_name_and_not_repeated(
        self, folder: Folder, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder.write("a", b"1")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
        monkeypatch.setattr(store, "S3_OPTIONS", few_attempts(connect_timeout=4))
        with pytest.raises(StoreError, match=f"^{url}: .*credentials") as caught:
            Folder(url).read("a")
        assert "a-wrong-secret" not in str(caught.value)

    def test_a_bucket_that_is_not_there_is_named(self, s3_bucket_url: str) -> None:
        folder = Folder("s3://raylift-no-such-bucket/archive")
        with pytest.raises((FileNotFoundError, StoreError), match=r"(?i)bucket"):
            folder.create("a", b"1")


def few_attempts(connect_timeout: int) -> dict[str, object]:
    """Options of their own, so that no client made earlier is used again."""
    return {"config_kwargs": {"retries": {"max_attempts": 1}, "connect_timeout": connect_timeout}}


def test_relative_paths_become_absolute_and_urls_lose_their_last_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("a/../b") == str(tmp_path / "b")
    assert absolute("~/a") == str(tmp_path / "a")
    assert absolute("s3://bucket/a/") == "s3://bucket/a"
    assert absolute("gs://bucket/a") == "gs://bucket/a"
    assert not is_local("s3://bucket/a")
    assert join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/a", "https://user:secret@host/a", "s3://secret@bucket"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="environment instead") as caught:
        absolute(url)
    assert "secret" not in str(caught.value)


def test_an_at_sign_in_a_key_is_no_credential() -> None:
    assert absolute("s3://bucket/run@2") == "s3://bucket/run@2"
    assert absolute("/data/run@2") == "/data/run@2"


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("s3:bucket/x", "write s3://bucket/x or ./s3:bucket/x for a folder of that name"),
        ("gs:bucket", "write gs://bucket or ./gs:bucket for a folder of that name"),
        ("s3:///bucket/x", "write s3://bucket/x"),
        ("s3//bucket/x", "write s3://bucket/x"),
        ("s3:\\\\bucket\\x", "write s3://bucket/x"),
        ("S3://bucket/x", "write s3://bucket/x"),
        ("s3a://bucket/x", "write s3://bucket/x"),
        ("ss3://bucket/x", "write s3://bucket/x"),
        (" s3://bucket/x", "write s3://bucket/x"),
        ("https:/host/x", "write https://host/x"),
        ("bucket://x", "give a path, or a URL such as s3://BUCKET/FOLDER"),
        ("s3://", "write s3://BUCKET/FOLDER"),
        ("$STORE/s3://bucket", "write only the URL or a path"),
        ("run:1", "write ./run:1 for a folder of that name"),
        ("models:chest-64", "write ./models:chest-64 for a folder of that name"),
        ("file://localhost/tmp/x", "write the path alone, /tmp/x"),
        ("file://tmp/x", "write the path alone, /tmp/x"),
        ("file:/tmp/x", "write the path alone, /tmp/x"),
        ("file:///tmp/a%20b", "write the path alone, /tmp/a b"),
        ("file://~/x", "write the path alone, ~/x"),
        ("FILE:///tmp/x", "write the path alone, /tmp/x"),
        ("local:///tmp/x", "write the path alone, /tmp/x"),
        ("C:\\data\\x", "as /mnt/c/data/x under WSL"),
        ("D:/data/x", "as /mnt/d/data/x under WSL"),
        ("\\\\server\\share", "is a Windows path"),
        ("runs\\first", "write runs/first"),
        ("", "is a shell variable not set"),
        ("~no-such-user/x", "there is no such user"),
    ],
)
def test_what_resembles_a_url_is_refused_with_its_likely_spelling_and_makes_no_folder(
    url: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (absolute, Folder, is_local):
        with pytest.raises(ConfigError) as refused:
            use(url)
        assert remedy in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_paths_with_colons_and_known_urls_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("./run:1", "runs/12:30:00", "data//chest", "./s3:/x"):
        assert absolute(path) == str((tmp_path / path).resolve())
    assert absolute("file:///tmp/x") == "/tmp/x"
    for url in ("gs://bucket/x", "hdfs:///x", "memory://x", "abfs://container/x", "simplecache::s3://bucket/x"):
        assert absolute(url) == url


def test_a_store_whose_client_is_not_installed_is_named_with_the_package() -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/x: .*gcsfs"):
        Folder("gs://bucket/x")


@pytest.mark.parametrize("path", ["s3://bucket/x", "gs:x", "file:///tmp/x", "C:\\x", "ftp://host/x"])
def test_an_output_that_is_written_to_this_machine_is_no_url(path: str) -> None:
    with pytest.raises(ConfigError, match="not a path of this machine"):
        local_path(Path(path))
    for accepted in (Path("run:1"), Path("a/b:/c"), Path("/tmp/x")):
        assert local_path(accepted) == accepted
