"""Files of the page in Gradio's folder: images, stored once by their digest, and each result in a folder of its own."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gradio.processing_utils import hash_bytes
from gradio.utils import get_upload_folder
from jaxtyping import UInt8
from PIL import Image

from raylift.serve.volume_formats import NIFTI

STEM = "reconstruction"
VOLUME = f"{STEM}{NIFTI.suffix}"
RECORD = "result.json"
ID = re.compile(r"[0-9a-f]{64}")
"""The name of the folder of a result, and its secret id in links."""


@dataclass(frozen=True)
class ResultRecord:
    """What the page shows of a reconstruction, without the voxels."""

    inputs: list[Any]
    """Values of all inputs: file path, inversion and flip of each view in turn, and the number of samples."""
    facts: str
    """Size, range, time and settings, as Markdown."""
    checks: str
    """Results of the checks of the radiographs, as HTML."""
    images: dict[str, list[str]]
    """Paths of the radiograph and of the reprojection, by view."""
    std: str | None
    """Path of the standard deviation over samples as NIfTI."""
    owner: str | None = None
    """Who alone may use it; None in a service without logins and tokens, where the id is a secret."""

    @property
    def files(self) -> list[str]:
        """Paths of all files that the page shows."""
        uploads = self.inputs[: 3 * len(self.images) : 3]
        return [*uploads, *(path for pair in self.images.values() for path in pair), *([self.std] if self.std else [])]


class _Paths(set[str]):
    """Paths that may be added while Gradio iterates over them."""

    def __iter__(self) -> Iterator[str]:
        # No other thread runs while the tuple is made: no Python code does either.
        return iter(tuple(super().__iter__()))


class ResultFiles:
    """Writes files that Gradio may serve.

    Attributes:
        paths: of all files. In `Blocks.temp_file_sets` Gradio deletes them when they are older than its cache may be.
    """

    def __init__(self) -> None:
        self.paths: set[str] = _Paths()

    def write(self, data: bytes, name: str) -> str:
        """Write a file in the folder of its digest, atomically and once; returns its path."""
        file = Path(get_upload_folder()).resolve() / hash_bytes(data) / name
        if not _keep(str(file)):
            self._replace(file, data)
        return str(file)

    def write_image(self, image: UInt8[np.ndarray, "rows columns *colors"]) -> str:
        """Write an image as PNG; returns its path.

        Gradio writes the file of an array again for every equal array, also while a browser reads it.
        """
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        return self.write(data.getvalue(), "image.png")

    def write_result(self, volume: bytes, record: ResultRecord) -> Path:
        """Write a NIfTI and its record to a new folder; returns the path of the NIfTI.

        Uploads and images of the record are kept as long as these.
        """
        stored = Path(get_upload_folder()).resolve() / secrets.token_hex(32) / VOLUME
        self._replace(stored, volume)
        self._replace(stored.with_name(RECORD), json.dumps(asdict(record)).encode())
        for path in record.files:
            _keep(path)
        return stored

    def _replace(self, file: Path, data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            try:
                temporary.write(data)
                temporary.flush()
                Path(temporary.name).replace(file)
            except BaseException:
                Path(temporary.name).unlink()
                raise
        self.paths.add(str(file))


def read(folder: Path, identifier: str, user: str | None) -> tuple[Path, ResultRecord] | None:
    """Path of the volume and record of a user's result below a folder; None if it has expired or never was."""
    if not ID.fullmatch(identifier):
        return None
    stored = folder / identifier / VOLUME
    with suppress(FileNotFoundError):
        record = ResultRecord(**json.loads(stored.with_name(RECORD).read_bytes()))
        if record.owner == user and all(Path(path).exists() for path in (str(stored), *record.files)):
            return stored, record
    return None


def _keep(path: str) -> bool:
    """Delay the deletion of a file, for which Gradio takes the time of its last change; False if it does not exist."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
