"""What tests feed to `raylift.datasets`: a thorax given by a formula, files of every kind made from it, archives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.special import expit

from raylift.datasets.archive.archive import RadiographSample, Sample
from raylift.datasets.archive.entry import Entry
from raylift.datasets.archive.manifest import latest_manifest
from raylift.datasets.archive.store import Folder
from raylift.datasets.archive.writer import ArchiveWriter
from raylift.datasets.geometry import Geometry, Grid, fit_detector
from raylift.datasets.intensity import normalize
from raylift.datasets.serialization import to_plain

GRID = Grid(16, 20.0)
GEOMETRY = fit_detector(GRID, Geometry("cone", 1650.0, 1800.0, 8, 1.0))


def thorax_hu(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """HU at points in patient coordinates (LPS, mm): no two of its six sides look alike, and its edges are soft."""

    def blob(cx: float, cy: float, cz: float, rx: float, ry: float, rz: float) -> np.ndarray:
        radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2)
        return expit((1 - radius) * min(rx, ry, rz) / 3)

    hu = np.full(np.broadcast(x, y, z).shape, -1000.0)
    for value, shape in (
        (40, blob(0, 0, 0, 150, 105, 1e6)),  # body
        (-850, blob(-70, 0, 0, 48, 70, 95)),  # right lung
        (-850, blob(70, 0, 10, 42, 65, 85)),  # left lung
        (60, blob(30, -35, -40, 40, 40, 45)),  # heart, to the left and front
        (90, blob(-60, 0, -125, 70, 70, 35)),  # liver, to the right and below
        (500, blob(0, 70, 0, 18, 18, 1e6)),  # spine, at the back
    ):
        hu = hu + (value - hu) * shape
    return hu


def thorax_image(
    size: Sequence[int] = (80, 60, 80),
    spacing: Sequence[float] = (4.5, 4.5, 4.5),
    direction: np.ndarray | None = None,
    hu: Callable[..., np.ndarray] = thorax_hu,
    kind: type[Any] = np.int16,
) -> sitk.Image:
    """The thorax on a grid centered on it; `direction` has the axes of the grid as columns."""
    axes = np.eye(3) if direction is None else direction
    origin = -axes @ ((np.array(size) - 1) / 2 * spacing)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    points = index * spacing @ axes.T + origin
    image = sitk.GetImageFromArray(np.rint(hu(*np.moveaxis(points, -1, 0))).astype(kind).transpose(2, 1, 0))
    image.SetSpacing([float(value) for value in spacing])
    image.SetOrigin(origin.tolist())
    image.SetDirection(axes.ravel().tolist())
    return image


def thorax_on(affine: np.ndarray, size: Sequence[int], kind: type[Any] = np.int16) -> np.ndarray:
    """The thorax as slices, rows and columns of a grid, sheared or not; `affine` maps indices to LPS millimeters."""
    index = np.stack([*np.indices(size), np.ones(size)])
    x, y, z, _ = np.tensordot(affine, index, axes=1)
    return np.rint(thorax_hu(x, y, z)).astype(kind).transpose(2, 1, 0)


def centered(axes: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """The affine with these columns of millimeters a voxel whose grid is centered on the thorax."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = -axes @ ((np.array(size) - 1) / 2)
    return affine


def affine_of(image: sitk.Image) -> np.ndarray:
    """Indices to LPS millimeters."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


def turned(x_deg: float = 0, y_deg: float = 0, z_deg: float = 0) -> np.ndarray:
    """A direction matrix: the patient's axes turned about x, then y, then z."""
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*np.deg2rad([x_deg, y_deg, z_deg]).tolist())
    return np.array(turn.GetMatrix()).reshape(3, 3)


def write_image(image: sitk.Image, path: Path) -> Path:
    """The image as a file of the kind that its suffix names."""
    sitk.WriteImage(image, str(path), useCompression=not path.name.endswith((".nii", ".mhd", ".nhdr")))
    return path


def write_series(
    folder: Path,
    image: sitk.Image,
    *,
    patient: str = "patient-1",
    series: str = "",
    change: Callable[[int, Dataset], Dataset | None] = lambda _, slice_: slice_,
) -> list[Path]:
    """The image as a DICOM CT series; `change` edits a slice before it is written, or leaves it out with None."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, study = series or generate_uid(), generate_uid()
    axes = np.array(image.GetDirection()).reshape(3, 3)
    voxels = sitk.GetArrayFromImage(image)
    paths = []
    for k, plane in enumerate(voxels):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.Modality, ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = "CT", patient, study, uid
        ds.InstanceNumber = k + 1
        place = image.TransformIndexToPhysicalPoint((0, 0, k))
        ds.ImagePositionPatient = [round(value, 4) for value in place]
        ds.ImageOrientationPatient = [round(float(value), 8) for value in (*axes[:, 0], *axes[:, 1])]
        ds.PixelSpacing = [image.GetSpacing()[1], image.GetSpacing()[0]]
        ds.SliceThickness = image.GetSpacing()[2]
        ds.Rows, ds.Columns = plane.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = -1024, 1
        ds.PixelData = (plane + 1024).astype("<i2").tobytes()
        changed = change(k, ds)
        if changed is not None:
            # Names in an order that is not the order of the slices.
            path = folder / f"{(k * 7919) % 1000:03d}.dcm"
            pydicom.dcmwrite(path, changed, enforce_file_format=True)
            paths.append(path)
    return paths


def sample(seed: int, grid: Grid = GRID, geometry: Geometry = GEOMETRY) -> Sample:
    """A sample of noise: no two are alike, and none holds the fill value alone."""
    rng = np.random.default_rng(seed)
    views, px = len(geometry.views), geometry.detector_px
    return Sample(
        rng.integers(-1024, 3072, grid.shape, dtype=np.int16),
        rng.random((views, px, px), dtype=np.float32),
        rng.integers(0, 4, grid.shape, dtype=np.uint8),
    )


def radiographs(seed: int, geometry: Geometry = GEOMETRY) -> RadiographSample:
    """Radiographs of noise without CT, normalized as an archive holds them."""
    rng = np.random.default_rng(seed)
    px = geometry.detector_px
    images = [normalize(rng.random((px, px), dtype=np.float32)) for _ in geometry.views]
    return RadiographSample(np.stack(images))


def entry(seed: int, subject: str = "") -> Entry:
    """The entry that goes with `sample(seed)`."""
    subject = subject or f"subject-{seed}"
    return Entry(subject, subject, f"{seed}.nii.gz", f"{seed:064x}", "CC0-1.0", "threshold", {"seed": seed})


def write_archive(
    url: str, seeds: Sequence[int], *, samples_per_shard: int = 4, subjects: Sequence[str] = ()
) -> list[Entry]:
    """The samples of these seeds in the archive at `url`; what it published."""
    with ArchiveWriter(url, GRID, GEOMETRY, samples_per_shard=samples_per_shard) as writer:
        for k, seed in enumerate(seeds):
            writer.add(entry(seed, subjects[k] if subjects else ""), sample(seed))
    return writer.published


def in_old_format(url: str, version: int = 1, recorded_from: int = 1) -> None:
    """Give the archive the one manifest that an older raylift wrote, with all entries in it.

    `recorded_from` is the first snapshot whose number of samples it has; with 0 it has none.
    """
    folder = Folder(url)
    manifest = latest_manifest(folder)
    counts = [
        len(at.entries) if number >= recorded_from and (at := manifest.at(number)) else 0
        for number in range(1, manifest.snapshot + 1)
    ]
    plain = {name: to_plain(getattr(manifest, name)) for name in ("grid", "geometry", "split_rule", "snapshot")}
    plain["entries"] = [to_plain(stored) for stored in manifest.entries]
    if recorded_from:
        plain["samples_at"] = counts
    folder.remove("manifests")
    folder.remove("index")
    head = {"format": "raylift-archive", "version": version, "written_by": "raylift 0.1.0"}
    folder.write(f"manifests/{manifest.snapshot:06d}.json", json.dumps({**head, "archive": plain}, indent=1).encode())


def seed_of(stored: Entry) -> int:
    """The seed an entry was made from."""
    return int(stored.record["seed"])


def same(one: Sample | RadiographSample, other: Sample | RadiographSample) -> bool:
    """Whether all arrays are equal, types included."""
    pairs = [(a, other.arrays()[name]) for name, a in one.arrays().items()]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def with_views(geometry: Geometry, *views: Any) -> Geometry:
    """The geometry with other views."""
    return replace(geometry, views=views)
