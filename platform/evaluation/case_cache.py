"""Finished scans of a comparison, kept in a folder until its report is written.

A file has the metrics, notes and images of one scan: `case`, JSON in which `{"array": k}` stands for the array `a<k>`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from raylift.datasets.archive.store import Folder
from raylift.datasets.errors import AlteredFileError
from raylift.platform.evaluation.results import Case, Images


class CaseCache:
    """A folder of finished scans, from which a comparison that was interrupted continues.

    Attributes:
        loaded: number of scans that an earlier run had finished.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.loaded = Folder(folder), 0

    def load(self, key: str) -> Case | None:
        """The scan of that key, or None.

        Raises:
            AlteredFileError: its file is damaged.
        """
        name = f"{key}.npz"
        if not self._folder.exists(name):
            return None
        try:
            case = _decode(self._folder.read(name))
        except (zipfile.BadZipFile, EOFError, ValueError, KeyError, TypeError) as error:
            path = self._folder.key(name)
            raise AlteredFileError(
                f"{path} is damaged ({error}): remove it, and its scan is evaluated again"
            ) from error
        self.loaded += 1
        return case

    def save(self, key: str, case: Case) -> None:
        """Write a scan atomically."""
        self._folder.write(f"{key}.npz", _encode(case))

    def remove(self) -> None:
        """Remove the folder."""
        self._folder.remove("")


def _encode(case: Case) -> bytes:
    arrays: dict[str, np.ndarray] = {}

    def keep(array: np.ndarray) -> dict[str, int]:
        arrays[f"a{len(arrays)}"] = array
        return {"array": len(arrays) - 1}

    text, file = json.dumps(dataclasses.asdict(case), default=keep), io.BytesIO()
    np.savez(file, case=np.array(text), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _decode(raw: bytes) -> Case:
    with np.load(io.BytesIO(raw), allow_pickle=False) as file:

        def restore(value: dict[str, Any]) -> Any:
            return file[f"a{value['array']}"] if isinstance(value.get("array"), int) else value

        data = json.loads(str(file["case"]), object_hook=restore)
    images = data.pop("images")
    residuals = {name: {view: tuple(pair) for view, pair in by.items()} for name, by in data.pop("residuals").items()}
    shown = Images(**{**images, "views": tuple(images["views"])}) if images else None
    return Case(**{**data, "notes": tuple(data["notes"])}, images=shown, residuals=residuals)
