"""The validation metric that ranks checkpoints and trials: PSNR of the volume with CT, else of its reprojection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raylift.datasets.archive.manifest import Contents

MONITORED: dict[Contents, str] = {"volumes": "val_psnr_db", "radiographs": "val_reprojection_psnr_db"}
"""Monitored metric by what the archive holds; higher is better."""
PROTOCOL_OF = {"val_psnr_db": "volume", "val_reprojection_psnr_db": "reprojection"}
"""Evaluation protocol of each monitored metric."""


def monitored(metrics: Iterable[str]) -> str:
    """The name of the monitored metric among the metrics of a validation; the volume's PSNR if there are none yet."""
    return next((name for name in metrics if name in PROTOCOL_OF), MONITORED["volumes"])


def format_metrics(metrics: Mapping[str, float]) -> str:
    """The metrics of a validation in one line."""
    if "val_psnr_db" in metrics:
        return f"PSNR {metrics['val_psnr_db']:.2f} dB, MAE {metrics['val_mae_hu']:.0f} HU"
    psnr, residual = metrics["val_reprojection_psnr_db"], metrics["val_reprojection_residual"]
    return f"reprojection PSNR {psnr:.2f} dB, residual {residual:.3f}"
