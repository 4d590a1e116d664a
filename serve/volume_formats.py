"""Files of a reconstructed volume: NIfTI, NRRD, a DICOM series and a PNG of its middle slices."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Int16
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from raylift import __version__
from raylift.datasets import process_folder
from raylift.datasets.geometry import Grid
from raylift.datasets.scans.resample import archive_image
from raylift.serve.images import PLANES, slice_image

Volume = Int16[np.ndarray, "d h w"]
"""HU in volume order."""
SHEET_WINDOWS = ("wide", "lung", "soft tissue")
DISPLAY_WINDOW_HU = (0, 1500)
"""Center and width that a DICOM viewer shows first."""


@dataclass(frozen=True)
class VolumeFormat:
    """A format of volumes."""

    name: str
    """Short name, as on buttons."""
    media_type: str
    """Content-Type of the HTTP response."""
    suffix: str
    encode: Callable[[Volume, Grid, str], bytes]
    """The bytes of a volume, its grid, and a note on the model."""
    summary: str
    has_std: bool
    """Whether the standard deviation over samples can be written in it too."""


def nifti(hu: Volume, grid: Grid, note: str = "") -> bytes:
    """A gzipped NIfTI: int16 HU, spacing in mm, voxel axes to the left, posterior and superior, centered on zero."""
    image = archive_image(hu, grid)
    image.SetMetaData("ITK_FileNotes", note[:79])
    return _written(image, ".nii.gz")


def read_nifti(path: Path) -> Volume:
    """The volume of a file that has the bytes of `nifti`.

    Raises:
        RuntimeError: the file is missing or not readable.
    """
    return np.ascontiguousarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[::-1])


def nrrd(hu: Volume, grid: Grid, note: str = "") -> bytes:
    """A gzipped NRRD with the same voxels and axes as the NIfTI."""
    image = archive_image(hu, grid)
    image.SetMetaData("note", note)
    return _written(image, ".nrrd")


def _written(image: sitk.Image, suffix: str) -> bytes:
    with process_folder.make("volume") as folder:
        path = folder / f"volume{suffix}"
        sitk.WriteImage(image, str(path), useCompression=True)
        return path.read_bytes()


def dicom_series(hu: Volume, grid: Grid, note: str = "") -> bytes:
    """A zip of axial CT images from inferior to superior, marked as derived and for research.

    Their UIDs derive from a digest of the volume, and their dates and times are empty, so that the bytes depend on
    the arguments alone. They have no patient: identifiers of the radiographs are not copied.
    """
    image = archive_image(hu, grid)
    voxels, origin = sitk.GetArrayFromImage(image), image.GetOrigin()
    digest = hashlib.sha256(voxels.tobytes() + repr((grid, note, __version__)).encode()).hexdigest()
    study, series, frame = (generate_uid(entropy_srcs=[digest, part]) for part in ("study", "series", "frame"))
    files = {}
    for number, pixels in enumerate(voxels, 1):
        ds = _ct_image(pixels, grid, note, generate_uid(entropy_srcs=[digest, str(number)]))
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.InstanceNumber = number
        ds.ImagePositionPatient = [*origin[:2], origin[2] + (number - 1) * grid.spacing_mm]
        ds.SliceLocation = ds.ImagePositionPatient[2]
        stored = io.BytesIO()
        dcmwrite(stored, ds, enforce_file_format=True)
        files[f"{number:04d}.dcm"] = stored.getvalue()
    return zipped(files, zipfile.ZIP_DEFLATED)


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of files by name, without the time of its making."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, compression)
    return file.getvalue()


def _ct_image(pixels: Int16[np.ndarray, "rows columns"], grid: Grid, note: str, uid: UID) -> Dataset:
    """A CT image without UIDs of its series and without its position."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(ds, name, "")
    ds.ReferringPhysicianName = ds.PositionReferenceIndicator = ""
    ds.KVP = ds.AcquisitionNumber = None
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = ds.StudyTime = ds.SeriesTime = ds.ContentTime = ""
    ds.Modality, ds.Manufacturer, ds.SoftwareVersions = "CT", "raylift", __version__
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.SeriesDescription = "reconstructed from radiographs, not for diagnosis"
    ds.DerivationDescription = f"Estimated from radiographs by a neural network; {note}"
    ds.ContentQualification, ds.BurnedInAnnotation = "RESEARCH", "NO"
    ds.SeriesNumber, ds.PatientPosition = 1, "HFS"
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [grid.spacing_mm] * 2, grid.spacing_mm
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = DISPLAY_WINDOW_HU
    ds.PixelData = pixels.astype("<i2").tobytes()
    return ds


def png_sheet(hu: Volume, grid: Grid, note: str = "") -> bytes:
    """A PNG of the middle slices: a column for each plane, a row for each window."""
    middle = grid.size // 2
    rows = [np.hstack([slice_image(hu, plane, middle, window) for plane in PLANES]) for window in SHEET_WINDOWS]
    file = io.BytesIO()
    text = PngInfo()
    text.add_text("Description", note)
    Image.fromarray(np.vstack(rows)).save(file, "PNG", pnginfo=text)
    return file.getvalue()


NIFTI = VolumeFormat("NIfTI", "application/gzip", ".nii.gz", nifti, "NIfTI, gzipped, int16 HU", True)
FORMATS = {
    "application/gzip": NIFTI,
    "application/x-nrrd": VolumeFormat("NRRD", "application/x-nrrd", ".nrrd", nrrd, "NRRD, gzipped, int16 HU", True),
    "application/dicom": VolumeFormat(
        "DICOM", "application/zip", ".zip", dicom_series, "zip of a DICOM series of CT images", False
    ),
    "image/png": VolumeFormat(
        "PNG", "image/png", ".png", png_sheet, f"PNG of the middle slices in windows {', '.join(SHEET_WINDOWS)}", False
    ),
}
"""By the media type that a request accepts; the first one is the default."""
