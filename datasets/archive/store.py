"""Folders and buckets behind one door: small objects through fsspec, arrays through a Zarr store.

A plain path is a folder; any other URL is what fsspec makes of it. `s3://` takes its endpoint, region and credentials
from the environment (`AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, an instance role ...), never
from the URL: URLs end up in logs, manifests and process lists.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import zarr.storage
from zarr.abc.store import Store

from raylift.datasets.errors import ArchiveError, ConfigError, RayliftError, StoreUnreachable

S3_OPTIONS: dict[str, Any] = {
    # A store that restarts is away for seconds; the default gives up after four tries within one.
    "config_kwargs": {"retries": {"max_attempts": 12, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 60},
}


def absolute(url: str | Path) -> str:
    """The URL with a relative folder made absolute: workers do not share the caller's working directory.

    Raises:
        ConfigError: the URL carries credentials.
    """
    text = str(url)
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ConfigError(
            f"credentials in '{parts.scheme}://***@{parts.hostname}': set them in the environment instead"
        )
    if "://" not in text:
        return str(Path(text).expanduser().resolve())
    return text.removeprefix("file://").rstrip("/") if parts.scheme == "file" else text.rstrip("/")


def is_local(url: str) -> bool:
    """Whether the URL is a folder of this machine."""
    return "://" not in absolute(url)


def join(url: str, *names: str) -> str:
    """The URL of something inside."""
    return "/".join([url.rstrip("/"), *names])


class Folder:
    """A folder or bucket prefix for small objects: whole reads, atomic writes, exclusive creation, listing."""

    def __init__(self, url: str | Path) -> None:
        self.url = absolute(url)
        options = S3_OPTIONS if self.url.startswith("s3://") else {}
        self.fs, self._root = fsspec.core.url_to_fs(self.url, **options)
        self._local = is_local(self.url)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def key(self, name: str) -> str:
        """The name as the file system wants it."""
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        """The whole object. Raises FileNotFoundError where there is none."""
        with store_errors(self.url):
            data: bytes = self.fs.cat_file(self.key(name))
        return data

    def exists(self, name: str) -> bool:
        """Whether there is an object or folder of that name, asked of the store and not of a cache."""
        self.fs.invalidate_cache()
        with store_errors(self.url):
            return bool(self.fs.exists(self.key(name)))

    def names(self, name: str = "") -> list[str]:
        """Names directly inside a folder, sorted; empty where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            with store_errors(self.url):
                found = self.fs.ls(self.key(name).rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def write(self, name: str, data: bytes) -> None:
        """Write or replace the object so that a reader sees the old or the new one, never a part."""
        if self._local:
            aside = self._write_aside(name, data)
            aside.replace(self.key(name))
        else:
            with store_errors(self.url):
                self.fs.pipe_file(self.key(name), data)

    def create(self, name: str, data: bytes) -> None:
        """Write an object that must not exist yet. Of two writers at once one gets FileExistsError."""
        if self._local:
            aside = self._write_aside(name, data)
            try:
                os.link(aside, self.key(name))
            finally:
                aside.unlink()
            return
        with store_errors(self.url):
            try:
                self.fs.pipe_file(self.key(name), data, mode="create")
            except OSError as error:
                # A retry after a lost answer is refused by what it wrote itself.
                if not _refused(error):
                    raise
                if not self._holds(name, data):
                    raise FileExistsError(f"{join(self.url, name)} exists") from error
            # Not every S3-compatible server checks and writes in one step, so the last word is what stands there.
            if not self._holds(name, data):
                raise FileExistsError(f"{join(self.url, name)} was written by another at the same time")

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to the object, which appears whole."""
        if self._local:
            target = Path(self.key(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            self.fs.get_file(str(source), str(aside))
            aside.replace(target)
        else:
            with store_errors(self.url):
                self.fs.put_file(str(source), self.key(name))

    def get(self, name: str, target: Path) -> None:
        """Copy an object to a local file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with store_errors(self.url):
            self.fs.get_file(self.key(name), str(target))

    def remove(self, name: str) -> None:
        """Remove an object or a whole folder; nothing happens where there is none."""
        if self.exists(name):
            # Another may remove it at the same time.
            with store_errors(self.url), suppress(FileNotFoundError):
                self.fs.rm(self.key(name), recursive=True)

    def _holds(self, name: str, data: bytes) -> bool:
        with suppress(FileNotFoundError):
            return self.read(name) == data
        return False

    def _write_aside(self, name: str, data: bytes) -> Path:
        target = Path(self.key(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return aside


def _refused(error: OSError) -> bool:
    """Whether a store declined to create what exists: s3fs turns most servers' 412 into a plain OSError."""
    response = getattr(error.__cause__, "response", {})
    code = response.get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict")


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Name the place in errors of an object store: half of them are no OSError, and most name only an address.

    Raises:
        StoreUnreachable: the store did not answer, or refused. What is merely absent stays a FileNotFoundError.
    """
    try:
        yield
    except RayliftError:
        raise
    except Exception as error:
        if is_local(url) or not _is_away(error):
            raise
        raise StoreUnreachable(
            f"{url}: {error or type(error).__name__}: check AWS_ENDPOINT_URL_S3 and the credentials"
        ) from error


def _is_away(error: Exception) -> bool:
    if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
        return True
    status = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return isinstance(error, PermissionError | ConnectionError | TimeoutError) or status >= 500 or status in (401, 429)


def zarr_store(url: str, read_only: bool) -> Store:
    """A Zarr store on the URL. Make it in the process that uses it: connections do not survive a fork."""
    url = absolute(url)
    if is_local(url):
        if read_only and not Path(url).is_dir():
            raise ArchiveError(f"{url}: no such folder")
        return zarr.storage.LocalStore(url, read_only=read_only)
    options = dict(S3_OPTIONS) if url.startswith("s3://") else {}
    return zarr.storage.FsspecStore.from_url(url, storage_options=options, read_only=read_only)
