"""The registry of evaluation protocols: what each computes, and whether it needs CT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from raylift.datasets import ptx_seg, segmentation
from raylift.datasets.choices import KeyOf
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import Normalization, Window
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.models import consistency, metrics, segmentation_metrics
from raylift.models.metrics import Metrics, VolumeProtocol
from raylift.platform.evaluation import ptx


@dataclass(frozen=True)
class Prediction:
    """One predicted volume with everything it can be compared with."""

    volume: Float[Tensor, "1 1 d h w"]
    """In the window's [0, 1]."""
    ground_truth_hu: Float32[np.ndarray, "d h w"] | None
    """The CT, if there is one; NaN outside the field of view of a CT with a mask."""
    radiographs: Float[Tensor, "1 views rows columns"]
    """Input of the model, in [0, 1]."""
    window: Window
    grid: Grid
    geometry: Geometry
    """The geometry of the radiographs, whose views are its views."""
    normalization: Normalization = "percentiles"
    """How the radiographs were scaled to [0, 1]."""
    segmenter: Segmenter = THRESHOLDS
    """Finds the lungs of both volumes."""

    @cached_property
    def hu(self) -> Float32[np.ndarray, "d h w"]:
        """The volume in HU."""
        hu: Float32[np.ndarray, "d h w"] = self.window.to_hu(self.volume)[0, 0].numpy()
        return hu

    @property
    def required_ground_truth_hu(self) -> Float32[np.ndarray, "d h w"]:
        """The CT, for protocols that need it."""
        assert self.ground_truth_hu is not None
        return self.ground_truth_hu


@dataclass(frozen=True)
class EvaluationProtocol:
    """Named metrics of a prediction."""

    definition: str
    """How the metrics are computed, for reports."""
    evaluate: Callable[[Prediction], Metrics]
    needs_ct: bool = True
    volumes: VolumeProtocol | None = None
    """The comparison of two volumes in HU, of protocols that need nothing else."""


def _compare_volumes(protocol: VolumeProtocol) -> EvaluationProtocol:
    return EvaluationProtocol(
        protocol.definition,
        lambda prediction: protocol.evaluate(prediction.hu, prediction.required_ground_truth_hu),
        volumes=protocol,
    )


def _compare_reprojections(prediction: Prediction) -> Metrics:
    with torch.no_grad():
        reprojection = consistency.reprojection_metrics(
            prediction.volume, prediction.radiographs, prediction.window, prediction.grid, prediction.geometry
        )
    by_view = zip(prediction.geometry.views, reprojection.residual[0].tolist(), strict=True)
    return {
        "psnr_db": float(reprojection.psnr_db.mean()),
        "residual": float(reprojection.residual.mean()),
        **{f"residual_{view.name}": value for view, value in by_view},
    }


def _compare_anatomy(prediction: Prediction) -> Metrics:
    spacing_mm = (prediction.grid.spacing_mm,) * 3
    volumes = prediction.hu, prediction.required_ground_truth_hu
    return segmentation_metrics.compare(*volumes, spacing_mm, prediction.segmenter)


def _compare_pneumothorax(prediction: Prediction) -> Metrics:
    volumes = prediction.hu, prediction.required_ground_truth_hu
    return ptx.compare(*volumes, prediction.grid, prediction.segmenter)


PROTOCOLS: dict[str, EvaluationProtocol] = {
    "volume": _compare_volumes(metrics.VOLUME),
    "x2ct": _compare_volumes(metrics.X2CT),
    "cvaa": _compare_volumes(metrics.CVAA),
    "reprojection": EvaluationProtocol(
        "Reprojections of the volumes compared with the input radiographs, each after the gain and offset that fit it "
        "best: PSNR relative to the radiograph's range, and relative L2 distance. No volume is compared.",
        _compare_reprojections,
        needs_ct=False,
    ),
    "segmentation": EvaluationProtocol(
        "Organs of both volumes by the same thresholds and shapes: lungs, trachea, vessels inside the lungs, bone "
        f"(above {segmentation.BONE_HU} HU) and what is left between the lungs. Surfaces agree up to "
        f"{segmentation_metrics.TOLERANCE_MM:g} mm. Errors and biases are prediction minus ground truth, biases inside "
        "the tissue of the ground truth.",
        _compare_anatomy,
    ),
    "pneumothorax": EvaluationProtocol(
        "Pneumothorax of both volumes by PTX-Seg: volume of both sides, and occupancy, which is the share of the "
        "pleural cavity, on the side where the CT has more. A volume without lungs has no pneumothorax. Gas counts as "
        f"at the chest wall up to {ptx_seg.WALL_MM:g} mm from it, and up to {ptx_seg.COARSE_WALL_MM:g} mm where voxels "
        f"are above {ptx_seg.SPACING_MM:g} mm.",
        _compare_pneumothorax,
    ),
}
"""Protocols by name. `segmentation` is computed where there is CT, and `pneumothorax` by `--ptx`, in addition to the
ones that are chosen."""
ADDED = ("segmentation", "pneumothorax")
VOLUME_PROTOCOLS = {name: protocol.volumes for name, protocol in PROTOCOLS.items() if protocol.volumes}
"""Those of `PROTOCOLS` that compare two volumes."""
ProtocolName = KeyOf[str, [name for name in PROTOCOLS if name not in ADDED]]
VolumeProtocolName = KeyOf[str, VOLUME_PROTOCOLS]


def default_protocols(has_ct: bool) -> tuple[ProtocolName, ...]:
    """All protocols that compare volumes; without CT those that do not need it."""
    if has_ct:
        return tuple(VOLUME_PROTOCOLS)
    return tuple(name for name, protocol in PROTOCOLS.items() if not protocol.needs_ct)
