"""What a run is judged by: the volume where there is CT to compare with, else its projections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raylift.datasets.archive.manifest import Contents

METRICS = {"val_psnr_db": "volume", "val_reprojection_psnr_db": "reprojection"}
"""Protocol of each metric that decides which checkpoint is the best; more is better."""
DECIDING: dict[Contents, str] = {"volumes": "val_psnr_db", "radiographs": "val_reprojection_psnr_db"}
"""The metric by what the archive holds."""


def deciding(metrics: Iterable[str]) -> str:
    """The name of that metric among the metrics of a validation; the volume's where there are none yet."""
    return next((name for name in metrics if name in METRICS), DECIDING["volumes"])


def told(metrics: Mapping[str, float]) -> str:
    """A validation in a few words."""
    if "val_psnr_db" in metrics:
        return f"PSNR {metrics['val_psnr_db']:.2f} dB, MAE {metrics['val_mae_hu']:.0f} HU"
    psnr, residual = metrics["val_reprojection_psnr_db"], metrics["val_reprojection_residual"]
    return f"re-projection PSNR {psnr:.2f} dB, residual {residual:.3f}"
