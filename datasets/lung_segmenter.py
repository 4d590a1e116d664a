"""What finds the lungs of a CT: thresholds, or a network of the package lungmask with weights from a local file.

lungmask (Hofmanninger et al., 2020) segments axial slices with a U-Net; its lungs contain consolidations, which
thresholds miss, and no airways. raylift contains no weights.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int16

from raylift.datasets.errors import ConfigError

Mask = Bool[np.ndarray, "d h w"]
WEIGHTS = "unet_r231-d5d2fc3d.pth of https://github.com/JoHof/lungmask/releases"


@runtime_checkable
class Segmenter(Protocol):
    """Finds the lungs of a CT; can be sent to another process."""

    @property
    def name(self) -> str:
        """For reports and records, with version and digest of weights."""
        ...

    def lungs(self, hu: Int16[np.ndarray, "d h w"], air: Mask) -> Mask:
        """The lungs of a CT in HU and volume order; `air` is what thresholds find."""
        ...


@dataclass(frozen=True)
class Thresholds:
    """The lungs of `segmentation.lungs`."""

    name: str = "thresholds"

    def lungs(self, hu: Int16[np.ndarray, "d h w"], air: Mask) -> Mask:  # noqa: ARG002
        """What thresholds find."""
        return air


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Lungmask:
    """The lungs of a network of lungmask, without airways."""

    weights: Path = field(repr=False)
    """Where the file is, which the representation leaves out: keys of finished scans contain it."""
    sha256: str
    """Digest of the file."""

    @property
    def name(self) -> str:
        """Version of the package, and the file."""
        return f"lungmask {version('lungmask')}, {self.weights.name}, SHA-256 {self.sha256[:12]}"

    def lungs(self, hu: Int16[np.ndarray, "d h w"], air: Mask) -> Mask:  # noqa: ARG002
        """What the network finds.

        Raises:
            ConfigError: the file is missing on this node, is another one, or holds no weights of lungmask.
        """
        return np.asarray(_network(self.weights, self.sha256).apply(hu) > 0)


def segmenter_of(choice: str) -> Segmenter:
    """The segmenter of `thresholds` or `lungmask:FILE`.

    Raises:
        ConfigError: it is none of them, or the package or the file is missing.
    """
    kind, _, file = choice.partition(":")
    if choice == THRESHOLDS.name:
        return THRESHOLDS
    if kind != "lungmask" or not file:
        raise ConfigError(f"segmenter '{choice}': use thresholds, or lungmask:FILE with the file of the weights")
    try:
        version("lungmask")
    except PackageNotFoundError:
        raise ConfigError(f"segmenter '{choice}' needs the package lungmask: pip install 'raylift[lungmask]'") from None
    weights = Path(file).absolute()
    if not weights.is_file():
        raise ConfigError(f"{weights} with weights of lungmask is missing: download {WEIGHTS}, and give its path")
    return Lungmask(weights, _digest(weights))


def _digest(weights: Path) -> str:
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@cache
def _network(weights: Path, sha256: str) -> Any:
    from lungmask import LMInferer

    try:
        found = _digest(weights)
    except OSError as error:
        raise ConfigError(f"{weights} cannot be read on this node ({error.strerror}): copy it to every node") from error
    if found != sha256:
        raise ConfigError(f"{weights} has SHA-256 {found} on this node and not {sha256}: copy one file to every node")
    try:
        return LMInferer(modelpath=str(weights), tqdm_disable=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{weights} holds no weights of lungmask ({reason}): give {WEIGHTS}") from error
