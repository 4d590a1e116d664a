"""CT files to scans in HU: find them, and refuse what is not one, not whole, or too large.

Everything is read through SimpleITK, so orientation and spacing come from the file. What it reads without complaint is
looked at first: a DICOM series with a hole, and NIfTI and compressed files that end early or are damaged. All limits
are checked from the header, before a voxel is read.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float
from pydicom.uid import MediaStorageDirectoryStorage

from raylift.datasets import dicom
from raylift.datasets.errors import RefusedFile

IMAGE_IO = {
    ".nii": "NiftiImageIO", ".nii.gz": "NiftiImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO", ".mhd": "MetaImageIO",
}  # fmt: skip
"""Which of ITK's readers opens a file of that suffix; no other is tried."""
VOLUME_SUFFIXES = tuple(IMAGE_IO)

LONGEST_MM, WIDEST_MM = 2500.0, 1000.0
"""More than any scanner's table and bore: at most one side of a scan is over a metre."""

BEHIND_HEADER = 0x0029_0000
"""The first DICOM tag behind those that describe an image."""

BYTES = {
    sitk.sitkUInt8: 1, sitk.sitkInt8: 1, sitk.sitkUInt16: 2, sitk.sitkInt16: 2, sitk.sitkUInt32: 4, sitk.sitkInt32: 4,
    sitk.sitkUInt64: 8, sitk.sitkInt64: 8, sitk.sitkFloat32: 4, sitk.sitkFloat64: 8,
}  # fmt: skip
"""Width of a voxel, for the types that a CT may have."""
HEADER_END = {
    "NrrdImageIO": re.compile(rb"\r?\n\r?\n|\Z"),
    "MetaImageIO": re.compile(rb"^ElementDataFile *=.*(?:\n|\Z)", re.IGNORECASE | re.MULTILINE),
}
DATA_FILE = re.compile(rb"^(?:data ?file *:|ElementDataFile *=)[ \t]*(.*?)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)
COMPRESSED = re.compile(rb"^(?:encoding *: *gz(?:ip)?|CompressedData *= *True)[ \t\r]*$", re.IGNORECASE | re.MULTILINE)


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

    @property
    def where(self) -> str:
        """Its path, for messages; the name alone goes into archives."""
        rest = len(self.files) - 1
        return f"{self.files[0]} and {rest} more" if self.is_dicom and rest else str(self.files[0])

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
    others: list[Path] = []
    for root in paths:
        if not root.is_file() and not root.is_dir():  # nor a pipe, which would be waited for
            found.refused.append(RefusedFile(f"{root}: no such file or folder"))
            continue
        for path in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
            try:
                if path.name.lower().endswith(VOLUME_SUFFIXES):
                    found.sources.append(
                        Source(path.name, path.name[: -len(_suffix(path))], (path, *_data_files(path)))
                    )
                elif key := _series_key(path):
                    series[key].append(path)
                elif root.is_dir():
                    others.append(path)
                else:
                    kinds = ", ".join(VOLUME_SUFFIXES)
                    found.refused.append(RefusedFile(f"{path}: not a volume raylift reads ({kinds} or DICOM)"))
            except RefusedFile as error:
                found.refused.append(error)
            except Exception as error:
                # One unreadable file must not end the search; what pydicom raises on a damaged one is open.
                found.refused.append(RefusedFile(f"{path}: cannot be read: {error!r}"))
    data_files = {path for source in found.sources for path in source.files[1:]}
    for (_, patient), files in series.items():
        folder = files[0].parent
        shared = len(files) == 1 or sum(other[0].parent == folder for other in series.values()) > 1
        name = f"{folder.name}/{files[0].name}" if shared else folder.name
        # A patient's own number stays out of archives; the pseudonym is stable, so splits by subject still hold.
        pseudonym = "sub-" + hashlib.sha256(patient.encode()).hexdigest()[:12]
        found.sources.append(Source(name, pseudonym, tuple(files), is_dicom=True))
    return Found(found.sources, found.refused, passed_over=len(set(others) - data_files))


def read(source: Source, limits: Limits = Limits()) -> Scan:
    """The scan in HU.

    Raises:
        RefusedFile: not a CT, missing or duplicate slices, not 3-D, not in HU, truncated, or over the limits.
    """
    total = _bytes(source)
    if total > limits.max_file_bytes:
        raise RefusedFile(
            f"{source.where}: {total} bytes, over the limit of {limits.max_file_bytes} (--limits.max-file-bytes)"
        )
    image = _read_series(source, limits) if source.is_dicom else _read_file(source, limits)
    _check_hu(source.where, sitk.GetArrayViewFromImage(image))
    orientation = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(image.GetDirection())
    return Scan(source, image, orientation)


def _suffix(path: Path) -> str:
    return max((suffix for suffix in VOLUME_SUFFIXES if path.name.lower().endswith(suffix)), key=len)


def _text_header(path: Path) -> bytes:
    """The lines at the head of a NRRD or MetaImage file, up to where its voxels begin."""
    with path.open("rb") as file:
        head = file.read(2**16)
    end = HEADER_END[IMAGE_IO[_suffix(path)]].search(head)
    if end is None or end.end() == 2**16:
        raise RefusedFile(f"{path}: the header cannot be read: no end of it in the first {len(head)} bytes")
    return head[: end.end()]


def _data_files(path: Path) -> list[Path]:
    """The file a NRRD or MetaImage header keeps its voxels in; none where they follow the header."""
    named = None if IMAGE_IO[_suffix(path)] == "NiftiImageIO" else DATA_FILE.search(_text_header(path))
    if named is None or named[1] == b"LOCAL":
        return []
    value = named[1].decode("latin-1")
    # A header that names files elsewhere would have any file of this machine read as voxels.
    if Path(value).name != value or not path.with_name(value).is_file():
        raise RefusedFile(f"{path}: its voxels are in '{value}', which is not a file beside it: convert it to one file")
    return [path.with_name(value)]


def _series_key(path: Path) -> tuple[str, str] | None:
    """What tells a DICOM file's series and patient apart; None for a file that is not DICOM, or an index of others."""
    head = _head(path)
    if not dicom.is_dicom(head):
        return None
    if dicom.meta(head).get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None
    header = dicom.parse(head, str(path), until=BEHIND_HEADER)
    # Without a number for the patient, the series of one study still belong together.
    patient = header.get("PatientID") or header.get("StudyInstanceUID") or path.parent
    return str(header.get("SeriesInstanceUID", path.parent)), str(patient)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2**18)


def _bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.files)


def _read_file(source: Source, limits: Limits) -> sitk.Image:
    path = source.files[0]
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(IMAGE_IO[_suffix(path)])
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise RefusedFile(f"{source.where}: the header cannot be read: {_last_line(error)}") from error
    _check_size(source.where, reader.GetSize(), limits)
    _check_extent(source.where, reader.GetSize(), reader.GetSpacing())
    if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() not in BYTES:
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise RefusedFile(f"{source.where}: {kind} voxels, a CT has one number each")
    _check_bytes(source, reader.GetSize(), reader.GetPixelID())
    if reader.GetImageIO() == "NiftiImageIO":
        header = {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}
        if int(header["qform_code"]) == int(header["sform_code"]) == 0:
            raise RefusedFile(f"{source.where}: neither qform nor sform is set, so its orientation is unknown: set one")
        voxels = math.prod(reader.GetSize()) * int(header["bitpix"]) // 8
        _check_whole(path, int(float(header["vox_offset"])) + voxels, compressed=path.suffix.lower() == ".gz")
    elif COMPRESSED.search(text := _text_header(path)):
        voxels = math.prod(reader.GetSize()) * BYTES[reader.GetPixelID()]
        _check_whole(source.files[-1], voxels, compressed=True, start=len(text) if len(source.files) == 1 else 0)
    # A size of 1 in a fourth dimension is a 3-D volume.
    reader.SetExtractSize([*reader.GetSize()[:3], *[0] * (reader.GetDimension() - 3)])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RefusedFile(
            f"{source.where}: the voxels cannot be read, the file may be truncated: {_last_line(error)}"
        ) from error


def _check_whole(path: Path, wanted: int, *, compressed: bool, start: int = 0) -> None:
    """Refuse a file whose voxels end early or are damaged; most of ITK's readers make something up and go on."""
    try:
        held = _inflated(path, start, wanted) if compressed else path.stat().st_size
    except zlib.error as error:
        raise RefusedFile(f"{path}: the voxels are damaged: {error}") from error
    if held < wanted:
        raise RefusedFile(f"{path}: {held} bytes where its header promises {wanted}: it is truncated")


def _inflated(path: Path, start: int, enough: int) -> int:
    """How many bytes a gzip or zlib stream holds that ends properly; no more than a block beyond `enough`."""
    held, inflate = 0, zlib.decompressobj(wbits=47)  # either kind
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(2**20)
        while data and held <= enough:
            held += len(inflate.decompress(data, 2**20))
            if inflate.eof:
                # A gzip file may have several members, and zeros behind the last.
                data = inflate.unused_data.lstrip(b"\0") or file.read(2**20).lstrip(b"\0")
                inflate = zlib.decompressobj(wbits=47) if data else inflate
            else:
                data = inflate.unconsumed_tail or file.read(2**20)
    return held if inflate.eof or held > enough else min(held, enough - 1)


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


def _check_extent(name: str, size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    if not all(0.05 <= value <= 20 for value in spacing[:3]):
        raise RefusedFile(f"{name}: spacing {spacing[:3]} mm is not that of a CT: correct it in the header")
    extent = [n * value for n, value in zip(size[:3], spacing[:3], strict=True)]
    if max(extent) > LONGEST_MM or sorted(extent)[1] > WIDEST_MM:
        shown = " x ".join(f"{value:.0f}" for value in extent)
        raise RefusedFile(f"{name}: {shown} mm is more than a scanner holds: correct the spacing in the header")


def _check_bytes(source: Source, size: tuple[int, ...], pixel: int) -> None:
    """Refuse a header that claims more voxels than any compression could have put into its file."""
    claimed = math.prod(size) * BYTES[pixel]
    stored = _bytes(source)
    if claimed > 1032 * stored:  # the best that deflate can do
        raise RefusedFile(f"{source.where}: {stored} bytes cannot hold its {math.prod(size)} voxels: it is truncated")


def _read_series(source: Source, limits: Limits) -> sitk.Image:
    name = source.where
    try:
        headers = {path: dicom.parse(_head(path), str(path), until=BEHIND_HEADER) for path in source.files}
        ordered = _ordered(source, headers, limits)
    except RefusedFile:
        raise
    except Exception as error:
        # A missing tag, or one that holds something else: what pydicom raises on it is open.
        raise RefusedFile(f"{name}: the DICOM header cannot be read: {error!r}") from error
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in ordered])
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise RefusedFile(f"{name}: the slices cannot be read, one may be truncated: {_last_line(error)}") from error


def _ordered(source: Source, headers: Mapping[Path, pydicom.Dataset], limits: Limits) -> list[Path]:
    """The files from one end of the volume to the other, or a RefusedFile where they are none."""
    name = source.where
    first = headers[source.files[0]]
    for header in headers.values():
        if header.get("Modality", "none") != "CT":
            raise RefusedFile(f"{name}: DICOM modality {header.get('Modality', 'none')} is not CT")
        if int(header.get("NumberOfFrames") or 1) > 1 or int(header.get("SamplesPerPixel") or 1) > 1:
            raise RefusedFile(f"{name}: an enhanced multi-frame or colour DICOM: convert it to NIfTI first")
        if not header.get("ImageOrientationPatient") or not header.get("ImagePositionPatient"):
            raise RefusedFile(f"{name}: slices without position or orientation: not a volume")
    size = (int(first.Columns), int(first.Rows), len(headers))
    _check_size(name, size, limits)
    _check_bytes(source, size, sitk.sitkInt16)
    if len({(int(h.Rows), int(h.Columns), tuple(h.PixelSpacing)) for h in headers.values()}) > 1:
        raise RefusedFile(f"{name}: slices differ in size or pixel spacing: split the series")
    directions = np.array([h.ImageOrientationPatient for h in headers.values()], dtype=float)
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise RefusedFile(f"{name}: slices differ in orientation (a localizer among them?): split the series")
    normal = np.cross(directions[0, :3], directions[0, 3:])
    places = {path: np.array(h.ImagePositionPatient, dtype=float) for path, h in headers.items()}
    ordered = sorted(source.files, key=lambda path: float(places[path] @ normal))
    step = _check_slices(name, np.stack([places[path] for path in ordered]), normal)
    rows, columns = (float(value) for value in first.PixelSpacing)
    _check_extent(name, size, (columns, rows, step))
    return ordered


def _check_slices(name: str, positions: Float[np.ndarray, "slices 3"], normal: Float[np.ndarray, " 3"]) -> float:
    """The distance between slices in mm, or a RefusedFile where it is not one."""
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
    return step


def _check_hu(name: str, voxels: np.ndarray) -> None:
    if not all(np.isfinite(plane).all() for plane in voxels):
        raise RefusedFile(f"{name}: NaN or infinite voxels: set them to -1024")
    sample = np.asarray(voxels[:: max(1, voxels.shape[0] // 64), ::4, ::4], dtype=np.float32)
    # Padding of -2000 and less stands in files that are not in HU too, so it does not count as air.
    air = float(((sample > -1200) & (sample < -500)).mean())
    tissue = float(((sample > -200) & (sample < 300)).mean())
    low, high = float(sample.min()), float(sample.max())
    if air < 0.01 or tissue < 0.01:
        hint = "it looks like HU + 1024: subtract 1024" if low >= 0 and high > 1100 else "convert it to HU"
        raise RefusedFile(f"{name}: values {low:g} to {high:g} are not in HU (no air near -1000): {hint}")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
