"""What a model keeps of its training data: the fit of the trivial baselines, and the digests of the scans.

```
training_data.npz
    scans       uint8 (n, 32), SHA-256 of the source files of every training scan
    unlisted    int (1): number of models that the training started with and whose scans are unknown
    mean_hu     int16 (D, H, W), mean of the training volumes in HU
    fit         float64 (3): scale and offset of the back-projection, and the number of volumes of the fit
```

`mean_hu` and `fit` are absent where the training had no CT. Arrays are compressed, and none is a pickle.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import Window
from raylift.models.baselines import FittedBaselines

DIGEST_BYTES = 32
MAX_BYTES = 2**30
"""Largest array that is decompressed: a volume of 812 voxels per side, or the digests of 33 million scans."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Digests of a model's training scans, and the trivial baselines fitted to them."""

    scans: frozenset[str]
    """SHA-256 of the source files of every training scan, also of the models that the training started with."""
    baselines: FittedBaselines | None = None
    """Fitted to the training volumes; None without CT."""
    unlisted: int = 0
    """Number of models that the training started with and whose scans are unknown."""

    def save(self, path: Path, window: Window) -> None:
        """Write the file; the mean volume is rounded to whole HU."""
        digests = b"".join(bytes.fromhex(scan) for scan in sorted(self.scans))
        arrays = {
            "scans": np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
            "unlisted": np.array([self.unlisted]),
        }
        if self.baselines:
            mean_hu = window.to_hu(self.baselines.mean)[0, 0].round().numpy()
            arrays["mean_hu"] = mean_hu.astype(np.int16)
            arrays["fit"] = np.array([self.baselines.scale, self.baselines.offset, self.baselines.volumes])
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy takes allow_pickle by name too

    @classmethod
    def load(cls, path: Path, grid: Grid, window: Window) -> TrainingData:
        """Read a file of a model with this grid and window.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                largest = max((entry.file_size for entry in archive.infolist()), default=0)
            if largest > MAX_BYTES:
                raise ValueError(f"an array of {largest} bytes")
            with np.load(path, allow_pickle=False) as arrays:
                scans, unlisted = arrays["scans"], int(arrays["unlisted"][0])
                mean_hu, fit = (arrays.get(name) for name in ("mean_hu", "fit"))
        except (
            zipfile.BadZipFile,
            zlib.error,
            KeyError,
            IndexError,
            EOFError,
            MemoryError,
            NotImplementedError,
        ) as error:
            raise ValueError(repr(error)) from error
        if scans.dtype != np.uint8 or scans.ndim != 2 or scans.shape[1] != DIGEST_BYTES:
            raise ValueError(f"scans are {scans.dtype} {scans.shape}")
        baselines = None
        if mean_hu is not None and fit is not None:
            if mean_hu.dtype != np.int16 or mean_hu.shape != grid.shape or fit.shape != (3,):
                raise ValueError(f"mean_hu is {mean_hu.dtype} {mean_hu.shape}, fit {fit.shape}, the grid {grid.shape}")
            mean = window.to_unit(torch.from_numpy(mean_hu.astype(np.float32)))[None, None]
            scale, offset, volumes = fit.tolist()
            baselines = FittedBaselines(mean, scale, offset, int(volumes))
        return cls(frozenset(scan.tobytes().hex() for scan in scans), baselines, unlisted)
