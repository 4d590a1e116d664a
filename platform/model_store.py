"""Trained models on any storage: a model of a URL is downloaded, checked and loaded.

A URL names an exported model folder or a checkpoint, which contains one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylift.datasets.archive.store import Folder, absolute, is_local, join
from raylift.models import weights
from raylift.models.weights import DESCRIPTION_FILE, WEIGHTS_FILE, Description, Model


def load(url: str | Path) -> Model:
    """The network of an exported model or of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        WeightsError: a file is missing, or the weights do not match their digest or the description.
    """
    with _local(url, DESCRIPTION_FILE, WEIGHTS_FILE) as folder:
        return weights.load(folder)


def description_of(url: str | Path) -> Description:
    """The description of an exported model or of a checkpoint.

    Raises:
        WeightsError: the URL is not a model.
    """
    with _local(url, DESCRIPTION_FILE) as folder:
        return weights.describe(weights.model_folder(folder))[0]


@contextmanager
def _local(url: str | Path, *names: str) -> Iterator[Path]:
    """A local folder with those of the named files of a model that exist."""
    url = absolute(url)
    if is_local(url):
        yield Path(url)
        return
    remote = join(url, "model") if Folder(url).exists(f"model/{DESCRIPTION_FILE}") else url
    with tempfile.TemporaryDirectory(prefix="raylift-model-") as temporary:
        for name in names:
            if Folder(remote).exists(name):
                Folder(remote).get(name, Path(temporary) / name)
        yield Path(temporary)
