"""Files of the page, stored once by their digest in Gradio's folder, and the record of a result next to its volume."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
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
DIGEST = re.compile(r"[0-9a-f]{64}")
"""The name of the folder of a volume, and its id in links."""


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

    @property
    def files(self) -> list[str]:
        """Paths of all files that the page shows."""
        uploads = self.inputs[: 3 * len(self.images) : 3]
        return [*uploads, *(path for pair in self.images.values() for path in pair), *([self.std] if self.std else [])]


class ResultFiles:
    """Writes files that Gradio may serve.

    Attributes:
        paths: of all files. In `Blocks.temp_file_sets` Gradio deletes them when they are older than its cache may be.
    """

    def __init__(self) -> None:
        self.paths: set[str] = set()

    def write(self, data: bytes, name: str) -> str:
        """Write a file in the folder of its digest, atomically and once; returns its path."""
        folder = Path(get_upload_folder()).resolve() / hash_bytes(data)
        file = folder / name
        if file.exists():
            # Gradio deletes by the time of the last change.
            os.utime(file)
        else:
            self._replace(file, data)
        return str(file)

    def write_image(self, image: UInt8[np.ndarray, "rows columns *colors"]) -> str:
        """Write an image as PNG; returns its path.

        Gradio writes the file of an array again for every equal array, also while a browser reads it.
        """
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        return self.write(data.getvalue(), "image.png")

    def write_record(self, volume: str, record: ResultRecord) -> None:
        """Write the record of a result next to its volume, in place of that of an equal volume."""
        self._replace(Path(volume).with_name(RECORD), json.dumps(asdict(record)).encode())

    def _replace(self, file: Path, data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(data)
        Path(temporary.name).replace(file)
        self.paths.add(str(file))


def read(folder: Path, digest: str) -> tuple[Path, ResultRecord] | None:
    """Path of the volume and record of a result below a folder; None if it was deleted or never was."""
    if not DIGEST.fullmatch(digest):
        return None
    stored = folder / digest / VOLUME
    try:
        record = ResultRecord(**json.loads(stored.with_name(RECORD).read_bytes()))
    except FileNotFoundError:
        return None
    return (stored, record) if all(Path(path).exists() for path in (str(stored), *record.files)) else None
