"""CT files to volumes: find the scans, refuse what is not one, and bring each to the grid a model is trained on.

Everything is read through SimpleITK, so orientation and spacing come from the file; DICOM headers are looked at with
pydicom first, because a series with a hole reads without complaint. All limits are checked from the header, before a
voxel is read.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float, Int16

from raylift.datasets import segmentation
from raylift.datasets.errors import RefusedFile
from raylift.datasets.geometry import Grid
from raylift.datasets.intensity import HU_MAX, HU_MIN

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
ORIENTATION = "LPI"
"""Volume order in DICOM letters: x to the left, y posterior, z inferior."""


@dataclass(frozen=True)
class Limits:
    """The largest scan that is read. A 512 x 512 x 2000 CT passes the defaults."""

    max_voxels: int = 2**30
    max_side: int = 4096
    max_file_bytes: int = 8 * 2**30
    min_slices: int = 8


@dataclass(frozen=True)
class Source:
    """One candidate scan: a volume file, or the files of one DICOM series."""

    name: str
    subject: str
    files: tuple[Path, ...]
    is_dicom: bool = False

    def digest(self) -> str:
        """SHA-256 over the bytes of all files, in order of their names."""
        total = hashlib.sha256()
        for path in sorted(self.files):
            with path.open("rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    total.update(block)
        return total.hexdigest()


@dataclass(frozen=True)
class Scan:
    """A CT as it came, in HU, with what is known of it."""

    source: Source
    image: sitk.Image
    orientation: str

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Spacing of the file's own axes."""
        return tuple(round(value, 4) for value in self.image.GetSpacing())


@dataclass(frozen=True)
class Found:
    """What a search of files and folders brought up."""

    sources: list[Source] = field(default_factory=list)
    refused: list[RefusedFile] = field(default_factory=list)
    passed_over: int = 0
    """Files in searched folders that are neither volumes nor DICOM."""


def find(paths: Iterable[Path]) -> Found:
    """All candidate scans under files and folders, in order of name; DICOM files are grouped by series."""
    found = Found()
    series: dict[tuple[str, str], list[Path]] = defaultdict(list)
    passed_over = 0
    for root in paths:
        if not root.exists():
            found.refused.append(RefusedFile(f"{root}: no such file or folder"))
            continue
        for path in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
            if path.name.lower().endswith(VOLUME_SUFFIXES):
                found.sources.append(Source(path.name, _stem(path), (path,)))
            elif _is_dicom(path):
                header = pydicom.dcmread(
                    path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "PatientID"]
                )
                uid = str(header.get("SeriesInstanceUID", path.parent))
                series[uid, str(header.get("PatientID", "") or path.parent)].append(path)
            elif root.is_dir():
                passed_over += 1
            else:
                found.refused.append(
                    RefusedFile(f"{path}: not a volume raylift reads ({', '.join(VOLUME_SUFFIXES)} or DICOM)")
                )
    for (_, patient), files in series.items():
        folder = files[0].parent
        shared = sum(other[0].parent == folder for other in series.values()) > 1
        name = f"{folder.name}/{files[0].name}" if shared else folder.name
        # A patient's own number stays out of archives; the pseudonym is stable, so splits by subject still hold.
        pseudonym = "sub-" + hashlib.sha256(patient.encode()).hexdigest()[:12]
        found.sources.append(Source(name, pseudonym, tuple(files), is_dicom=True))
    return Found(found.sources, found.refused, passed_over)


def read(source: Source, limits: Limits = Limits()) -> Scan:
    """The scan in HU.

    Raises:
        RefusedFile: not a CT, missing or duplicate slices, not 3-D, not in HU, truncated, or over the limits.
    """
    total = sum(path.stat().st_size for path in source.files)
    if total > limits.max_file_bytes:
        raise RefusedFile(
            f"{source.name}: {total} bytes, over the limit of {limits.max_file_bytes} (--limits.max-file-bytes)"
        )
    image = _read_series(source, limits) if source.is_dicom else _read_file(source, limits)
    spacing = image.GetSpacing()
    if not all(0.05 <= value <= 20 for value in spacing):
        raise RefusedFile(f"{source.name}: spacing {spacing} mm is not that of a CT: correct it in the header")
    _check_hu(source.name, sitk.GetArrayViewFromImage(image))
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
    return Scan(source, image, orientation)


def resample(scan: Scan, grid: Grid, keep_table: bool = False) -> tuple[Int16[np.ndarray, "d h w"], dict[str, Any]]:
    """The scan on `grid`, in HU and volume order, centred on the body, with a record of what was done.

    HU is clamped to [-1024, 3071]; axes that become coarser are smoothed first (a Gaussian of half the loss in
    voxels, as scikit-image does); what lies outside the scan is air. Left-right and front-back the cube is centred on
    the body. Along the body it is centred on the lungs, moved as far as needed to stay inside the scan. Unless
    `keep_table`, everything outside the body becomes air.
    """
    clamped = sitk.Clamp(scan.image, sitk.sitkFloat32, HU_MIN, HU_MAX)
    smooth = _smooth_for(clamped, grid.spacing_mm)
    centre, lungs_found = _centre(clamped, grid)
    origin = centre - (grid.size - 1) / 2 * grid.spacing_mm * np.array([1, 1, -1])
    cube = _on_axes(smooth, origin, (grid.size,) * 3, grid.spacing_mm)
    hu = np.rint(sitk.GetArrayFromImage(cube)).clip(HU_MIN, HU_MAX).astype(np.int16)
    inside = segmentation.body(hu, grid.spacing_mm)
    if not inside.any():
        raise RefusedFile(
            f"{scan.source.name}: no body found in the central {grid.extent_mm:.0f} mm: not a CT of a person"
        )
    if not keep_table:
        hu[~inside] = HU_MIN
    record = {
        "source_size": list(scan.image.GetSize()),
        "source_spacing_mm": list(scan.spacing_mm),
        "source_orientation": scan.orientation,
        "centre_lps_mm": [round(float(value), 2) for value in centre],
        "centred_on": "lungs" if lungs_found else "scan",
        "table_removed": not keep_table,
    }
    return hu, record


def check_whole_thorax(scan: Scan) -> None:
    """Refuse a scan that does not hold two whole lungs.

    Raises:
        RefusedFile: a lung is missing, under 300 ml, or cut by the first or last slice.
    """
    coarse, spacing_mm = _coarse(sitk.Clamp(scan.image, sitk.sitkFloat32, HU_MIN, HU_MAX))
    lung = segmentation.lungs(coarse, spacing_mm)
    remedy = "ingest it without --require-whole-thorax, or leave it out"
    if not lung.any():
        raise RefusedFile(f"{scan.source.name}: no lungs inside the field of view: {remedy}")
    body = segmentation.body(coarse, spacing_mm)
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    middle = (columns[0] + columns[-1]) // 2
    for side, half in (("right", lung[:, :, :middle]), ("left", lung[:, :, middle:])):
        volume_ml = half.sum() * spacing_mm**3 / 1000
        if volume_ml < 300:
            raise RefusedFile(f"{scan.source.name}: {volume_ml:.0f} ml of {side} lung in the field of view: {remedy}")
    area = lung.sum(axis=(1, 2))
    for end, cut in (("first", area[0]), ("last", area[-1])):
        if cut > 0.25 * area.max():
            raise RefusedFile(f"{scan.source.name}: the lungs are cut by the {end} slice: {remedy}")


def _stem(path: Path) -> str:
    suffix = next(s for s in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s))
    return path.name[: -len(suffix)]


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM"


def _read_file(source: Source, limits: Limits) -> sitk.Image:
    path = source.files[0]
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise RefusedFile(f"{source.name}: the header cannot be read: {_last_line(error)}") from error
    _check_size(source.name, reader.GetSize(), limits)
    if reader.GetNumberOfComponents() != 1:
        raise RefusedFile(f"{source.name}: {reader.GetNumberOfComponents()} values a voxel, a CT has one")
    keys = reader.GetMetaDataKeys()
    if "qform_code" in keys and int(reader.GetMetaData("qform_code")) == int(reader.GetMetaData("sform_code")) == 0:
        raise RefusedFile(f"{source.name}: neither qform nor sform is set, so its orientation is unknown: set one")
    # A size of 1 in a fourth dimension is a 3-D volume.
    reader.SetExtractSize([*reader.GetSize()[:3], *[0] * (reader.GetDimension() - 3)])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RefusedFile(
            f"{source.name}: the voxels cannot be read, the file may be truncated: {_last_line(error)}"
        ) from error


def _check_size(name: str, size: tuple[int, ...], limits: Limits) -> None:
    shown = " x ".join(str(n) for n in size)
    if len(size) < 3 or min(size[:3]) < limits.min_slices:
        raise RefusedFile(f"{name}: {shown} voxels is not a volume of {limits.min_slices} slices or more")
    if any(n != 1 for n in size[3:]):
        raise RefusedFile(f"{name}: {shown} voxels is a series of volumes: extract one")
    if max(size) > limits.max_side:
        raise RefusedFile(f"{name}: {shown} voxels, over the limit of {limits.max_side} a side (--limits.max-side)")
    if np.prod(size, dtype=object) > limits.max_voxels:
        raise RefusedFile(f"{name}: {shown} voxels, over the limit of {limits.max_voxels} (--limits.max-voxels)")


TAGS = [
    "Modality", "ImageOrientationPatient", "ImagePositionPatient", "Rows", "Columns", "NumberOfFrames",
    "PixelSpacing",
]  # fmt: skip


def _read_series(source: Source, limits: Limits) -> sitk.Image:
    name = source.name
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS) for path in source.files}
    first = headers[source.files[0]]
    modality = first.get("Modality", "none")
    if modality != "CT":
        raise RefusedFile(f"{name}: DICOM modality {modality} is not CT")
    if any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers.values()):
        raise RefusedFile(f"{name}: an enhanced multi-frame DICOM: convert it to NIfTI first")
    if any("ImageOrientationPatient" not in h or "ImagePositionPatient" not in h for h in headers.values()):
        raise RefusedFile(f"{name}: slices without position or orientation: not a volume")
    _check_size(name, (int(first.Columns), int(first.Rows), len(headers)), limits)
    if len({(int(h.Rows), int(h.Columns), tuple(h.PixelSpacing)) for h in headers.values()}) > 1:
        raise RefusedFile(f"{name}: slices differ in size or pixel spacing: split the series")
    directions = np.array([h.ImageOrientationPatient for h in headers.values()], dtype=float)
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise RefusedFile(f"{name}: slices differ in orientation (a localizer among them?): split the series")
    normal = np.cross(directions[0, :3], directions[0, 3:])
    places = {path: np.array(h.ImagePositionPatient, dtype=float) for path, h in headers.items()}
    ordered = sorted(source.files, key=lambda path: float(places[path] @ normal))
    _check_slices(name, np.stack([places[path] for path in ordered]), normal)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in ordered])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RefusedFile(f"{name}: the slices cannot be read, one may be truncated: {_last_line(error)}") from error


def _check_slices(name: str, positions: Float[np.ndarray, "slices 3"], normal: Float[np.ndarray, " 3"]) -> None:
    along = positions @ normal
    steps = np.diff(along)
    step = float(np.median(steps))
    where = int(np.argmin(steps))
    if steps[where] < 0.01 or step <= 0:
        raise RefusedFile(f"{name}: two slices at {along[where]:.2f} mm: remove the duplicates or split the series")
    where = int(np.argmax(np.abs(steps - step)))
    if abs(steps[where] - step) > 0.05 * step + 0.01:
        raise RefusedFile(
            f"{name}: {steps[where]:.2f} mm between the slices at {along[where]:.2f} and {along[where + 1]:.2f} mm "
            f"where the others lie {step:.2f} mm apart: slices are missing"
        )
    drift = (positions[-1] - positions[0]) - (along[-1] - along[0]) * normal
    if np.linalg.norm(drift) > 0.02 * (along[-1] - along[0]):
        raise RefusedFile(f"{name}: a tilted gantry, {np.linalg.norm(drift):.1f} mm of shear: straighten it first")


def _check_hu(name: str, voxels: np.ndarray) -> None:
    sample = np.asarray(voxels[:: max(1, voxels.shape[0] // 64), ::4, ::4], dtype=np.float32)
    if not np.isfinite(sample).all():
        raise RefusedFile(f"{name}: NaN or infinite voxels")
    air, tissue = float((sample < -500).mean()), float(((sample > -200) & (sample < 300)).mean())
    low, high = float(sample.min()), float(sample.max())
    if air < 0.01 or tissue < 0.01:
        hint = "it looks like HU + 1024: subtract 1024" if low >= 0 and high > 1100 else "convert it to HU"
        raise RefusedFile(f"{name}: values {low:g} to {high:g} are not in HU (no air near -1000): {hint}")


def _smooth_for(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    for axis, spacing in enumerate(image.GetSpacing()):
        factor = spacing_mm / spacing
        if factor > 1.05:
            kernel = sitk.RecursiveGaussianImageFilter()
            kernel.SetDirection(axis)
            kernel.SetSigma((factor - 1) / 2 * spacing)
            image = kernel.Execute(image)
    return image


def _on_axes(image: sitk.Image, origin: np.ndarray, size: tuple[int, int, int], spacing_mm: float) -> sitk.Image:
    return sitk.Resample(
        image, list(size), sitk.Transform(), sitk.sitkLinear, [float(value) for value in origin], [spacing_mm] * 3,
        [1, 0, 0, 0, 1, 0, 0, 0, -1], float(HU_MIN), sitk.sitkFloat32,
    )  # fmt: skip


def _extent(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the scan's voxel centres in the patient frame, oblique scans by their box."""
    ends = [(0, n - 1) for n in image.GetSize()]
    corners = np.array(
        [image.TransformIndexToPhysicalPoint((i, j, k)) for i in ends[0] for j in ends[1] for k in ends[2]]
    )
    return corners.min(axis=0), corners.max(axis=0)


def _coarse(image: sitk.Image, spacing_mm: float = 4.0) -> tuple[Int16[np.ndarray, "d h w"], float]:
    """The whole scan in volume order on voxels large enough to segment in no time."""
    low, high = _extent(image)
    size = [int(n) for n in np.ceil((high - low) / spacing_mm) + 1]
    origin = np.array([low[0], low[1], high[2]])
    coarse = _on_axes(image, origin, (size[0], size[1], size[2]), spacing_mm)
    return np.rint(sitk.GetArrayFromImage(coarse)).astype(np.int16), spacing_mm


def _centre(image: sitk.Image, grid: Grid) -> tuple[np.ndarray, bool]:
    """Where the cube's centre goes, in the patient frame, and whether lungs decided its height."""
    low, high = _extent(image)
    hu, spacing_mm = _coarse(image)
    body = segmentation.body(hu, spacing_mm)
    lung = segmentation.lungs(hu, spacing_mm)
    centre = (low + high) / 2
    for axis, plane in ((0, (0, 1)), (1, (0, 2))):
        where = np.flatnonzero(body.any(axis=plane))
        if len(where):
            centre[axis] = low[axis] + (where[0] + where[-1]) / 2 * spacing_mm
    slices = np.flatnonzero(lung.any(axis=(1, 2)))
    half = grid.extent_mm / 2
    if len(slices) and high[2] - low[2] > grid.extent_mm:
        middle = high[2] - (slices[0] + slices[-1]) / 2 * spacing_mm
        centre[2] = np.clip(middle, low[2] + half, high[2] - half)
    return centre, len(slices) > 0


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
