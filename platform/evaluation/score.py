"""Metrics of volumes of any program against their ground truth, under every volume protocol; no model and no archive.

Both volumes of a pair are read by the readers of `raylift ingest` and put in one orientation, which moves no voxel.
Nothing is resampled unless requested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float32

from raylift.datasets.csv_file import read_rows
from raylift.datasets.errors import ConfigError, FileError
from raylift.datasets.intensity import HU_MIN
from raylift.datasets.lung_segmenter import THRESHOLDS, Segmenter
from raylift.datasets.scans import reader, volume_file
from raylift.datasets.scans.header_checks import DEFAULT_LIMITS, ScanLimits
from raylift.datasets.sources import Source, is_apple_double
from raylift.models import segmentation_metrics
from raylift.models.metrics import Metrics
from raylift.platform.evaluation.protocols import PROTOCOLS, VOLUME_PROTOCOLS, VolumeProtocolName
from raylift.platform.evaluation.tables import MetricTable

PREDICTOR = "prediction"
VOLUME_ORDER = "LPI"
"""Directions of increasing columns, rows and slices of a volume in raylift."""
TOLERANCE = 0.01
"""Largest distance, in voxels, between the corners of two grids that count as one."""
COLUMNS = ("prediction", "ground_truth")


@dataclass(frozen=True)
class Pair:
    """The files of one subject."""

    name: str
    prediction: Path
    ground_truth: Path


@dataclass(frozen=True)
class Score:
    """The metrics of all pairs, and what a reader must consider with them."""

    table: MetricTable
    missing: list[str]
    """Ground truth without a prediction, which no metric includes."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """By subject, what was resampled, changed or assumed."""


def pairs_by_name(predictions: Path, ground_truth: Path) -> tuple[list[Pair], list[str]]:
    """Pairs of files whose paths inside the two folders are equal up to the suffix, and ground truth without one.

    Raises:
        ConfigError: a folder holds no volume or two of one name, or a prediction has no ground truth.
    """
    predicted, wanted = volumes_by_name(predictions), volumes_by_name(ground_truth)
    if alone := sorted(predicted.keys() - wanted.keys()):
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise ConfigError(
            f"{predicted[alone[0]]} has no ground truth of that name in {ground_truth}{more}: rename "
            f"it, or list the pairs in a CSV with the columns {' and '.join(COLUMNS)} (--pairs)"
        )
    pairs = [Pair(name, path, wanted[name]) for name, path in predicted.items()]
    return pairs, sorted(wanted.keys() - predicted.keys())


def pairs_by_table(table: Path, predictions: Path, ground_truth: Path) -> list[Pair]:
    """Pairs from a CSV with the columns prediction and ground_truth, paths inside the two folders.

    Raises:
        ConfigError: a column or a file is missing, or a prediction is listed twice.
    """
    columns, rows = read_rows(table)
    if not set(COLUMNS) <= set(columns):
        raise ConfigError(f"{table}: columns {columns}, needed are {' and '.join(COLUMNS)}")
    pairs = [Pair(row[COLUMNS[0]], predictions / row[COLUMNS[0]], ground_truth / row[COLUMNS[1]]) for row in rows]
    if len({pair.name for pair in pairs}) < len(pairs):
        raise ConfigError(f"{table}: a prediction is listed twice: leave one row for each")
    for path in (path for pair in pairs for path in (pair.prediction, pair.ground_truth)):
        if not path.is_file():
            raise ConfigError(f"{table}: {path} is not a file: correct the path")
    return pairs


def score(
    pairs: Sequence[Pair],
    *,
    missing: Sequence[str] = (),
    protocols: Sequence[VolumeProtocolName] = (),
    resample: bool = False,
    limits: ScanLimits = DEFAULT_LIMITS,
    assume_spacing_mm: Sequence[float] | None = None,
    segmenter: Segmenter = THRESHOLDS,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Score:
    """Metrics of every pair.

    Args:
        pairs: at least one.
        missing: ground truth without a prediction, for the report.
        protocols: by default all that compare volumes; the anatomy is always compared.
        resample: resample a prediction on another grid to that of its ground truth: linear, without smoothing, air
            outside.
        limits: largest volume accepted.
        assume_spacing_mm: spacing of NRRD and MetaImage files that state none.
        segmenter: finds the lungs of both volumes.
        progress: called with the number of finished pairs, the number of all, and the next one's name.

    Raises:
        ConfigError: there is no pair, or the grids of a pair differ and `resample` is False.
        FileError: a file is no volume, is damaged, has NaN, or is not in HU.
    """
    if not pairs:
        raise ConfigError("there is no pair of volumes to score")
    chosen = {name: VOLUME_PROTOCOLS[name] for name in protocols or VOLUME_PROTOCOLS}
    values: dict[str, dict[str, dict[str, Metrics]]] = {}
    notes: dict[str, list[str]] = {}
    for done, pair in enumerate(pairs):
        progress(done, len(pairs), pair.name)
        ground_truth = reader.read(_source(pair.ground_truth), limits, assume_spacing_mm)
        target = sitk.DICOMOrient(ground_truth.image, VOLUME_ORDER)
        hu, changed = read_prediction(
            pair.prediction, target, str(pair.ground_truth), resample, limits, assume_spacing_mm
        )
        target_hu = _hu(target)
        width_mm, height_mm, depth_mm = target.GetSpacing()
        values[pair.name] = {
            PREDICTOR: {
                **{name: protocol.evaluate(hu, target_hu) for name, protocol in chosen.items()},
                "segmentation": segmentation_metrics.compare(hu, target_hu, (depth_mm, height_mm, width_mm), segmenter),
            }
        }
        if pair_notes := [*changed, *ground_truth.changes]:
            notes[pair.name] = pair_notes
    progress(len(pairs), len(pairs), "")
    definitions = {name: PROTOCOLS[name].definition for name in (*chosen, "segmentation")}
    return Score(MetricTable(values, definitions), list(missing), notes)


def holds_volumes(folder: Path, unless: Sequence[str] = ()) -> bool:
    """Whether this is a folder with volume files at any depth, and without any of the named files."""
    if not folder.is_dir() or any((folder / name).exists() for name in unless):
        return False
    return any(volume_file.suffix(path) for path in folder.rglob("*"))


def read_prediction(
    path: Path,
    target: sitk.Image,
    ground_truth: str,
    resample: bool,
    limits: ScanLimits = DEFAULT_LIMITS,
    assume_spacing_mm: Sequence[float] | None = None,
) -> tuple[Float32[np.ndarray, "d h w"], list[str]]:
    """A predicted volume in HU and volume order on the grid of its ground truth, and what was resampled or changed.

    Args:
        path: the file.
        target: the ground truth in volume order.
        ground_truth: its name, for messages.
        resample: see `score`.
        limits: largest volume accepted.
        assume_spacing_mm: see `score`.

    Raises:
        ConfigError: the grids differ and `resample` is False.
        FileError: the file is no volume, is damaged, has NaN, or is not in HU.
    """
    prediction = reader.read_values(_source(path), limits, assume_spacing_mm)
    image, changed = _on_grid(sitk.DICOMOrient(prediction.image, VOLUME_ORDER), target, path, ground_truth, resample)
    hu = _hu(image)
    _check_predicted_hu(path, hu)
    return hu, [*changed, *prediction.changes]


def volumes_by_name(folder: Path) -> Mapping[str, Path]:
    """Volume files under a folder by their path inside it without suffix, sorted."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if not (suffix := volume_file.suffix(path)) or is_apple_double(path) or not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()[: -len(suffix)]
        if name in files:
            raise ConfigError(f"{folder}: {files[name].name} and {path.name} have one name: keep one of them")
        files[name] = path
    if not files:
        raise ConfigError(f"{folder} holds no volume ({', '.join(volume_file.SUFFIXES)})")
    return files


def _source(path: Path) -> Source:
    if not volume_file.suffix(path):
        raise FileError(f"{path}: not a volume raylift reads ({', '.join(volume_file.SUFFIXES)})")
    return Source(path.name, path.name, (path, *volume_file.data_files(path)))


def _hu(image: sitk.Image) -> Float32[np.ndarray, "d h w"]:
    hu: Float32[np.ndarray, "d h w"] = sitk.GetArrayFromImage(image).astype(np.float32)
    return hu


def _on_grid(
    image: sitk.Image, target: sitk.Image, path: Path, ground_truth: str, resample: bool
) -> tuple[sitk.Image, list[str]]:
    """The prediction on the grid of its ground truth, and what was resampled."""
    if image.GetSize() == target.GetSize() and _distance(image, target) <= TOLERANCE:
        return image, []
    if not resample:
        raise ConfigError(
            f"{path} has {_grid(image)}, its ground truth {ground_truth} has {_grid(target)}: pass "
            "--resample to resample the prediction to that grid, or correct its header"
        )
    same = sitk.Resample(image, target, sitk.Transform(), sitk.sitkLinear, float(HU_MIN), sitk.sitkFloat32)
    inside = sitk.Resample(
        sitk.Cast(image * 0 + 1, sitk.sitkFloat32), target, sitk.Transform(), sitk.sitkNearestNeighbor
    )
    covered = float(sitk.GetArrayViewFromImage(inside).mean())
    if covered == 0:
        raise ConfigError(
            f"{path} and its ground truth {ground_truth} do not overlap: correct the origin or direction in the header"
        )
    return same, [f"resampled from {_grid(image)}; it covers {covered:.1%} of the ground truth, the rest is air"]


def _distance(image: sitk.Image, target: sitk.Image) -> float:
    """Largest distance between the corners of two grids of one size, in voxels."""
    corners = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    last = np.array(target.GetSize()) - 1
    places = [
        np.array([grid.TransformIndexToPhysicalPoint((corner * last).tolist()) for corner in np.array(corners)])
        for grid in (image, target)
    ]
    return float(np.linalg.norm(places[0] - places[1], axis=1).max() / min(target.GetSpacing()))


def _grid(image: sitk.Image) -> str:
    size, spacing, origin = image.GetSize(), image.GetSpacing(), image.GetOrigin()
    return (
        f"{'x'.join(map(str, size))} voxels of {' x '.join(f'{value:.4g}' for value in spacing)} mm from "
        f"({', '.join(f'{value:.1f}' for value in origin)})"
    )


def _check_predicted_hu(path: Path, hu: Float32[np.ndarray, "d h w"]) -> None:
    """Refuse a prediction in another unit, whose metrics would be low for no stated reason."""
    low, high = float(hu.min()), float(hu.max())
    if low >= -2 and high <= 2:
        raise FileError(f"{path}: values {low:g} to {high:g} are in a network's range, not in HU: convert them to HU")
    if low >= 0 and high > 1100:
        raise FileError(f"{path}: values {low:g} to {high:g} have no air: they may be HU + 1024, so subtract 1024")
