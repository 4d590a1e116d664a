"""One interface to folders and buckets: small objects through fsspec, arrays through a Zarr store.

A plain path is a folder; any other URL is opened by fsspec. Text that resembles a URL or a Windows path and is neither,
such as `s3:/bucket`, is refused, because it would name a folder in the working directory. `s3://` takes its endpoint,
region and credentials from the environment (`AWS_ENDPOINT_URL_S3`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, an
instance role ...), never from the URL, because URLs appear in logs, manifests and process lists.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import zarr.storage
from zarr.abc.store import Store

from raylift.datasets import hashed_json
from raylift.datasets.errors import ArchiveError, ConfigError, RayliftError, StoreError

S3_OPTIONS: dict[str, Any] = {
    # A store that restarts is unavailable for seconds; by default botocore makes four attempts within one second. A
    # request to a store that never responds ends within nine minutes.
    "config_kwargs": {"retries": {"max_attempts": 12, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 30},
}


def _print_stall(text: str) -> None:
    print(f"raylift: {text}", file=sys.stderr, flush=True)


report_stall: Callable[[str], None] = _print_stall
"""Prints that a store does not respond. Workers of a run replace it, and send the line to their driver."""


def absolute(url: str | Path) -> str:
    """The URL with a relative folder made absolute, because workers have other working directories.

    Raises:
        ConfigError: the text is empty, resembles a URL or a Windows path and is none, or carries credentials.
    """
    text = str(url)
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ConfigError(
            f"credentials in '{parts.scheme}://***@{parts.hostname}': set them in the environment instead"
        )
    _require_spelling(text)
    if "://" not in text:
        try:
            return str(Path(text).expanduser().resolve())
        except RuntimeError as error:
            raise ConfigError(f"{text}: there is no such user: write the path of the home folder") from error
    return text.removeprefix("file://").rstrip("/") if parts.scheme == "file" else text.rstrip("/")


BUCKETS = ("s3", "gs", "gcs", "az", "abfs", "oss", "http", "https")
"""Schemes whose URLs name a bucket or host behind the two slashes."""
OTHER_NAMES = {"s3a": "s3", "s3n": "s3", "local": "file"}
"""Schemes of other programs, by raylift's."""


def _require_spelling(text: str) -> None:
    """Raise a ConfigError with the likely spelling for text that is neither a path nor a URL that fsspec opens."""
    plain = text.strip()
    if not plain:
        raise ConfigError("the name of a folder is empty: give a path or a URL (is a shell variable not set?)")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(:[:/\\]*|//)(.*)", plain, re.DOTALL)
    if plain.startswith("\\") or (match and len(match[1]) == 1 and match[2] != "//"):
        drive = f"/mnt/{match[1].lower()}/{_slashes(match[3])}" if match else "/mnt/..."
        raise ConfigError(f"{text} is a Windows path: write a path of this system, as {drive} under WSL")
    if match is None or (match[2] == "//" and match[1].lower() not in BUCKETS):
        if "://" in plain:
            raise ConfigError(f"{text} is no URL, because of what stands before '://': write only the URL or a path")
        if "\\" in plain:
            raise ConfigError(f"{text} has the separators of Windows: write {_slashes(plain)}")
        return
    written, separator, rest = match.groups()
    scheme = OTHER_NAMES.get(written.lower(), written.lower())
    if scheme == "file":
        _require_file_url(text, separator, rest)
        return
    known = fsspec.available_protocols()
    if "::" in plain and written in known:
        return
    if scheme not in known:
        scheme = next(iter(difflib.get_close_matches(scheme, BUCKETS, n=1)), "")
    if not rest:
        raise ConfigError(f"{text} names no bucket or folder: write {scheme or 's3'}://BUCKET/FOLDER")
    absolute_key = separator == ":///" and scheme not in BUCKETS
    if text != plain or not (written == scheme and (separator == "://" or absolute_key)):
        likely = [f"{scheme}://{_slashes(rest)}"] if scheme else []
        likely += [f"./{plain} for a folder of that name"] if separator == ":" else []
        remedy = f"write {' or '.join(likely)}" if likely else "give a path, or a URL such as s3://BUCKET/FOLDER"
        raise ConfigError(f"{text} is no URL that fsspec opens: {remedy}")


def _require_file_url(text: str, separator: str, rest: str) -> None:
    """Raise a ConfigError unless it is `file:///PATH`, and the same file for every reader."""
    path = rest if rest.startswith("~") or separator == ":" else f"/{rest}"
    path = unquote(path.removeprefix("/localhost") if path.startswith("/localhost/") else path)
    if text != f"file://{path}" or not path.startswith("/"):
        raise ConfigError(f"{text} is read in different ways: write the path alone, {path}")


def _slashes(text: str) -> str:
    return text.replace("\\", "/").lstrip("/")


def local_path(path: Path) -> Path:
    """A path of this machine, for what is not written to a store.

    Raises:
        ConfigError: it is a URL or a Windows path.
    """
    # A Path has lost one slash of a URL.
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):([/\\]?)", str(path))
    if match and (match[2] or match[1].lower() in BUCKETS):
        raise ConfigError(f"{path} is not a path of this machine, where this file or folder is written: give a path")
    return path


def is_local(url: str) -> bool:
    """Whether the URL is a folder of this machine."""
    return "://" not in absolute(url)


def join(url: str, *names: str) -> str:
    """The URL of an object inside."""
    return "/".join([url.rstrip("/"), *names])


def require_reachable(url: str | Path) -> None:
    """Check that the bucket of an `s3://` URL exists and responds, before work; nothing for other URLs.

    Raises:
        StoreError: within ten seconds.
    """
    if absolute(url).startswith("s3://"):
        from raylift.datasets.archive.s3 import require_bucket

        require_bucket(absolute(url))


class Folder:
    """A folder or bucket prefix of small objects, with atomic writes and exclusive creation."""

    def __init__(self, url: str | Path) -> None:
        self.url = absolute(url)
        try:
            if self.url.startswith("s3://"):
                from raylift.datasets.archive.s3 import S3FileSystem

                self.fs, self._root = S3FileSystem(**S3_OPTIONS), self.url.removeprefix("s3://")
            else:
                self.fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise ConfigError(f"{self.url}: {error} (with pip, in the environment of raylift)") from error
        self._local = is_local(self.url)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def key(self, name: str) -> str:
        """The path of a name in the file system."""
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        """The content of an object. Raises FileNotFoundError if there is none."""
        with store_errors(self.url):
            data: bytes = self.fs.cat_file(self.key(name))
        return data

    def read_hashed(self, name: str) -> dict[str, Any]:
        """The data of a file of `hashed_json`.

        Raises:
            FileNotFoundError: there is none.
            AlteredFileError: its content is not what was written.
        """
        return hashed_json.decode(self.read(name), join(self.url, name))

    def exists(self, name: str) -> bool:
        """Whether there is an object or folder of that name, bypassing fsspec's cache."""
        self.fs.invalidate_cache()
        with store_errors(self.url):
            return bool(self.fs.exists(self.key(name)))

    def names(self, name: str = "") -> list[str]:
        """Sorted names directly inside a folder; empty if there is no such folder."""
        self.fs.invalidate_cache()
        try:
            with store_errors(self.url):
                listed = self.fs.ls(self.key(name).rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in listed)

    def size(self) -> int:
        """Bytes of all objects inside, without those that another process removes meanwhile."""
        if self._local:
            total = 0
            for folder, _, names in os.walk(self._root):
                for name in names:
                    with suppress(FileNotFoundError):
                        total += os.stat(f"{folder}/{name}").st_size
            return total
        with store_errors(self.url):
            return int(self.fs.du(self._root))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace the object atomically."""
        if self._local:
            temporary = self._write_temporary(name, data)
            temporary.replace(self.key(name))
        else:
            with store_errors(self.url):
                self.fs.pipe_file(self.key(name), data)

    def create(self, name: str, data: bytes) -> None:
        """Write an object that must not exist yet; of two concurrent writers one gets FileExistsError."""
        if self._local:
            temporary = self._write_temporary(name, data)
            try:
                os.link(temporary, self.key(name))
            finally:
                temporary.unlink()
            return
        with store_errors(self.url):
            try:
                self.fs.pipe_file(self.key(name), data, mode="create")
            except OSError as error:
                # After a lost response a retry is rejected because of the object that the first attempt wrote.
                if not _exists_already(error):
                    raise
                if not self._holds(name, data):
                    raise FileExistsError(f"{join(self.url, name)} exists") from error
            # Not every S3-compatible server checks and writes atomically, so the stored content decides.
            if not self._holds(name, data):
                raise FileExistsError(f"{join(self.url, name)} was written by another writer at the same time")

    def put(self, source: Path, name: str) -> None:
        """Upload a local file atomically."""
        if self._local:
            target = Path(self.key(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            self.fs.get_file(str(source), str(temporary))
            temporary.replace(target)
        else:
            with store_errors(self.url):
                self.fs.put_file(str(source), self.key(name))

    def get(self, name: str, target: Path) -> None:
        """Download an object to a local file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with store_errors(self.url):
            self.fs.get_file(self.key(name), str(target))

    def remove(self, name: str) -> None:
        """Remove an object or a folder with its content, if there is one."""
        if self.exists(name):
            # Another process may remove it at the same time.
            with store_errors(self.url), suppress(FileNotFoundError):
                self.fs.rm(self.key(name), recursive=True)

    def _holds(self, name: str, data: bytes) -> bool:
        with suppress(FileNotFoundError):
            return self.read(name) == data
        return False

    def _write_temporary(self, name: str, data: bytes) -> Path:
        target = Path(self.key(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary


def _exists_already(error: OSError) -> bool:
    """Whether a store refused to create an existing object: s3fs raises a plain OSError for most servers' 412."""
    response = getattr(error.__cause__, "response", {})
    code = response.get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict")


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn errors of an object store into ones that name the URL; many are no OSError and name only an address.

    Raises:
        StoreError: the store did not respond, or denied access. A missing object stays a FileNotFoundError.
    """
    try:
        yield
    except RayliftError:
        raise
    except Exception as error:
        if is_local(url) or not _is_unreachable(error):
            raise
        raise StoreError(
            f"{url}: {error or type(error).__name__}: check AWS_ENDPOINT_URL_S3 and the credentials"
        ) from error


def _is_unreachable(error: Exception) -> bool:
    if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
        return True
    status = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return isinstance(error, PermissionError | ConnectionError | TimeoutError) or status >= 500 or status in (401, 429)


def zarr_store(url: str, read_only: bool) -> Store:
    """A Zarr store on the URL. Open it in the process that uses it: connections do not survive a fork."""
    url = absolute(url)
    if is_local(url):
        if read_only and not Path(url).is_dir():
            raise ArchiveError(f"{url}: no such folder")
        return zarr.storage.LocalStore(url, read_only=read_only)
    if url.startswith("s3://"):
        from raylift.datasets.archive.s3 import S3FileSystem

        asynchronous = S3FileSystem(**S3_OPTIONS, asynchronous=True)
        return zarr.storage.FsspecStore(asynchronous, path=url.removeprefix("s3://"), read_only=read_only)
    return zarr.storage.FsspecStore.from_url(url, read_only=read_only)
