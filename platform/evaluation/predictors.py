"""What is compared on the same scans: models, folders of volumes, and the trivial baselines."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from raylift.datasets.archive.archive import Archive
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.manifest import Manifest
from raylift.datasets.batch import Batch
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import Geometry, Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN, Normalization, Window
from raylift.datasets.radiographs.histogram import Quantiles
from raylift.datasets.scans.resample import archive_image
from raylift.datasets.streaming.stream import SampleReader, load_batch
from raylift.models import baselines, consistency
from raylift.models.baselines import BackProjection
from raylift.models.diffusion.diffusion_network import SamplingFlags
from raylift.models.inference import Residuals, reconstruct
from raylift.models.weights import Description, Model
from raylift.platform.evaluation.protocols import Prediction
from raylift.platform.evaluation.score import VOLUME_ORDER, read_prediction, volumes_by_name

STORED = Window(HU_MIN, HU_MAX)
"""The window of everything that an archive stores."""


@dataclass(frozen=True)
class ArchiveDescription:
    """Window, grid and geometry where there is no model: those of an archive, all of its views."""

    grid: Grid
    geometry: Geometry
    window: Window = STORED
    normalization: Normalization = "percentiles"
    reference_quantiles: tuple[Quantiles, ...] = ()

    @classmethod
    def of(cls, archive: Archive) -> ArchiveDescription:
        """The description of an archive."""
        return cls(archive.manifest.grid, archive.manifest.geometry)


InputDescription = Description | ArchiveDescription
"""How radiographs become input, and the grid and window of volumes."""
FITTED = " + data-consistency fit"
"""Ends the name of a model's volumes after a data-consistency fit."""
GroundTruth = Float32[np.ndarray, "d h w"] | None
"""The CT in HU, NaN outside the field of view of a CT with a mask."""


@runtime_checkable
class ScanReader(SampleReader, Protocol):
    """Reads scans of an archive: the archive, or a wrapper around it."""

    @property
    def url(self) -> str:
        """Folder or URL of the archive."""
        ...

    @property
    def manifest(self) -> Manifest:
        """Grid, geometry and samples of the archive."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The predictions of one scan."""

    predictions: dict[str, Prediction]
    """By name."""
    residuals: dict[str, Residuals] = field(default_factory=dict)
    """Residuals of data-consistency fits, by model; empty without any."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each network."""
    notes: tuple[str, ...] = ()
    """What was resampled or changed."""


@runtime_checkable
class Predictor(Protocol):
    """Predicts the volume of a scan under one or several names."""

    def predict(self, archive: ScanReader, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The predictions of one scan."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for predictors whose predictions are equal."""
        ...


class ModelPredictor:
    """A model and, with consistency steps, its volumes after a fit to the radiographs.

    Args:
        name: of its volumes.
        model: the model.
        sampling: settings of a diffusion model.
        samples: number of samples of a diffusion model, whose mean is evaluated; each is fitted by itself.
        consistency_steps: of a fit to the radiographs (`raylift.models.consistency`); 0 for none.

    Raises:
        ConfigError: the steps are negative, or the model does not sample.
    """

    def __init__(
        self, name: str, model: Model, sampling: SamplingFlags | None, samples: int, consistency_steps: int
    ) -> None:
        consistency.require_steps(consistency_steps)
        self.name, self.model = name, model
        self.sampling = (sampling or SamplingFlags()).resolve(model.network, samples)
        self._samples, self._steps = samples, consistency_steps

    def predict(self, archive: ScanReader, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The model's volume and, with consistency steps, the fitted one."""
        description = self.model.description
        views = radiographs(archive, entry, description)
        (result,) = reconstruct(
            self.model.network,
            views,
            description.window,
            description.grid,
            description.geometry,
            sampling=self.sampling,
            samples=[self._samples],
            consistency_steps=self._steps,
        )
        volumes = {self.name: result.predicted}
        if result.fitted is not None:
            volumes[self.name + FITTED] = result.fitted
        return Outcome(
            {name: prediction(volume[None], views, description, ground_truth) for name, volume in volumes.items()},
            {self.name: result.residuals} if result.residuals else {},
            {self.name: result.prediction_time_s},
        )

    def of(self, model: Model) -> ModelPredictor:
        """The same settings for another model."""
        other = copy.copy(self)
        other.model = model
        return other

    @property
    def fingerprint(self) -> str:
        """Equal for models of the same name, weights, description and settings."""
        of = (self.name, self.model.sha256, self.model.description, self.sampling, self._samples, self._steps)
        return repr(of)


class FolderPredictor:
    """Volumes of another program, on the grid of the archive, by the names of the archive's scans.

    Args:
        name: of its volumes.
        folder: of NIfTI, NRRD or MetaImage files in HU.
        description: of the radiographs that reprojections are compared with.
        resample: resample volumes on another grid than the archive's, which are an error otherwise.

    Raises:
        ConfigError: the folder holds no volume, or two of one name.
    """

    def __init__(self, name: str, folder: Path, description: InputDescription, resample: bool) -> None:
        self.name, self.folder = name, folder
        self.files = volumes_by_name(folder)
        self._description, self._resample = description, resample

    def predict(self, archive: ScanReader, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The volume of the file with the scan's name, as it is; HU outside of CT's range are clipped."""
        views, grid = radiographs(archive, entry, self._description), archive.manifest.grid
        target = sitk.DICOMOrient(archive_image(np.zeros(grid.shape, np.float32), grid), VOLUME_ORDER)
        path = self.files[entry.id]
        hu, notes = read_prediction(path, target, f"{entry.id} of {archive.url}", self._resample)
        result = Prediction(
            STORED.to_unit(torch.from_numpy(hu))[None, None],
            ground_truth,
            views,
            STORED,
            grid,
            self._description.geometry,
            self._description.normalization,
        )
        return Outcome({self.name: result}, notes=tuple(f"{path}: {note}" for note in notes))

    @property
    def fingerprint(self) -> str:
        """Equal as long as no file is written again."""
        stats = [(str(path.absolute()), path.stat()) for path in self.files.values()]
        written = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return repr((self.name, written, self._description, self._resample))


class BaselinePredictor:
    """Trivial baselines, for radiographs as a model has them."""

    def __init__(self, networks: Mapping[str, nn.Module], description: InputDescription) -> None:
        self.networks, self.description = networks, description

    @property
    def fingerprint(self) -> str:
        """Equal for baselines of the same names whose predictions are equal."""
        return repr({name: self.fingerprint_of(name, reprojected=True) for name in self.networks})

    def fingerprint_of(self, baseline: str, reprojected: bool) -> str:
        """Equal for baselines of one name whose volumes and, if `reprojected`, radiographs are equal."""
        network, description = self.networks[baseline], self.description
        total = hashlib.sha256(repr(description.window).encode())
        if isinstance(network, BackProjection):
            total.update(repr((network.scale, network.offset)).encode())
        if isinstance(network, BackProjection) or reprojected:
            inputs = description.geometry, description.normalization, description.reference_quantiles
            total.update(repr(inputs).encode())
        for buffer in network.buffers():
            total.update(buffer.numpy().tobytes())
        return total.hexdigest()

    def predict(self, archive: ScanReader, entry: Entry, ground_truth: GroundTruth) -> Outcome:
        """The volume of each baseline."""
        views = radiographs(archive, entry, self.description)
        with torch.no_grad():
            volumes = {name: network(views).float() for name, network in self.networks.items()}
        return Outcome(
            {name: prediction(volume, views, self.description, ground_truth) for name, volume in volumes.items()}
        )


def trivial_baselines(
    model: Model | None, description: InputDescription, held_out: Sequence[Archive]
) -> tuple[BaselinePredictor, str]:
    """The baselines of a model's own training data, and a sentence on what they are fitted to if it has none.

    Args:
        model: the model; None if only volumes of other programs are compared.
        description: the description of the model, or that of the archives.
        held_out: archives with CT whose train split is not evaluated; baselines without training data are fitted to
            these splits or, where they are empty, to nothing.
    """
    grid, geometry = description.grid, description.geometry
    if model and model.training_data and model.training_data.baselines:
        return BaselinePredictor(model.training_data.baselines.predictors(grid, geometry), description), ""
    reason = (
        f"the model of {model.description.system.name} has no baselines of its training data" if model else "no model"
    )
    without = f"{reason}: the trivial baselines are"
    if any(archive.entries("train") for archive in held_out):
        fit = baselines.fit(_train_batches(held_out, description), grid, geometry)
        urls = ", ".join(archive.url for archive in held_out)
        return BaselinePredictor(
            fit.predictors(grid, geometry), description
        ), f"{without} fitted to the train split of {urls}"
    return BaselinePredictor(baselines.unfitted(grid, geometry), description), f"{without} not fitted to any data"


def radiographs(
    archive: ScanReader, entry: Entry, description: InputDescription
) -> Float[Tensor, "1 views rows columns"]:
    """The radiographs of a scan as the model has them as input."""
    return _load(archive, entry, description, volumes=False).radiographs


def prediction(
    volume: Float[Tensor, "1 1 d h w"],
    images: Float[Tensor, "1 views rows columns"],
    description: InputDescription,
    ground_truth: GroundTruth,
) -> Prediction:
    """A volume in the window's [0, 1] with what it is compared with."""
    return Prediction(
        volume,
        ground_truth,
        images,
        description.window,
        description.grid,
        description.geometry,
        description.normalization,
    )


def matching_views(description: InputDescription, archive: ScanReader) -> list[int]:
    """Indices of a model's views among the archive's, if both have the same geometry.

    Raises:
        ConfigError: grid, distances, detector, attenuation or views differ.
    """
    manifest = archive.manifest
    if description.grid != manifest.grid:
        raise ConfigError(f"the model was trained on {description.grid}, {archive.url} holds {manifest.grid}")
    missing = [view for view in description.geometry.views if view not in manifest.geometry.views]
    compared = {"source_isocenter_mm", "source_detector_mm", "detector_px", "detector_pitch_mm", "beam", "attenuation"}
    differ = [
        name for name in sorted(compared) if getattr(description.geometry, name) != getattr(manifest.geometry, name)
    ]
    if missing or differ:
        differing = differ or [view.name for view in missing]
        raise ConfigError(
            f"{archive.url} has another geometry than the model's training data ({', '.join(differing)} differ): "
            "ingest it with the model's geometry"
        )
    return [manifest.geometry.views.index(view) for view in description.geometry.views]


def _train_batches(archives: Sequence[Archive], description: InputDescription) -> Iterator[Batch]:
    for archive in archives:
        for entry in archive.entries("train"):
            yield _load(archive, entry, description, volumes=True)


def _load(archive: ScanReader, entry: Entry, description: InputDescription, volumes: bool) -> Batch:
    return load_batch(
        archive,
        [entry],
        description.window,
        matching_views(description, archive),
        volumes=volumes,
        reference_quantiles=description.reference_quantiles,
        normalization=description.normalization,
    )
