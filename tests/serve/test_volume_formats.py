"""Other programs read every value of a volume's file at its place, and the API returns the format that is accepted."""

import io
import json
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from fastapi import HTTPException
from fastapi.testclient import TestClient
from PIL import Image

from raylift.datasets.geometry import Grid
from raylift.platform import cli
from raylift.serve.api.negotiation import negotiated
from raylift.serve.images import SIDE_PX, slice_image
from raylift.serve.volume_formats import FORMATS, dicom_series, png_sheet

GRID, NOTE = Grid(8, 2.5), "raylift 0123, research only"
HU = np.random.default_rng(1).integers(-1024, 1477, (8, 8, 8)).astype(np.int16)
URL = "/v1/reconstructions"


def dicom_files(data: bytes, folder: Path) -> list[str]:
    zipfile.ZipFile(io.BytesIO(data)).extractall(folder)
    return sorted(str(path) for path in folder.glob("*.dcm"))


def read_series(data: bytes, folder: Path) -> sitk.Image:
    dicom_files(data, folder)
    return sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))


def read(data: bytes, suffix: str, folder: Path) -> sitk.Image:
    if suffix == ".zip":
        return read_series(data, folder)
    path = folder / f"volume{suffix}"
    path.write_bytes(data)
    return sitk.ReadImage(str(path))


@pytest.mark.parametrize("media_type", ["application/gzip", "application/x-nrrd", "application/dicom"])
def test_every_value_is_at_its_patient_coordinates(media_type: str, tmp_path: Path) -> None:
    kind = FORMATS[media_type]
    image = read(kind.encode(HU, GRID, NOTE), kind.suffix, tmp_path)
    assert image.GetSize() == (8, 8, 8)
    assert image.GetSpacing() == (2.5, 2.5, 2.5)
    np.testing.assert_allclose(image.GetDirection(), np.eye(3).ravel())
    for d, h, w in ((0, 0, 0), (7, 0, 3), (2, 5, 7)):
        point = ((w - 3.5) * 2.5, (h - 3.5) * 2.5, (3.5 - d) * 2.5)
        assert image[image.TransformPhysicalPointToIndex(point)] == HU[d, h, w]


def test_dicom_images_are_one_derived_series_for_research_without_a_patient(tmp_path: Path) -> None:
    images = [pydicom.dcmread(path) for path in dicom_files(dicom_series(HU, GRID, NOTE), tmp_path)]
    assert len({ds.SOPInstanceUID for ds in images}) == len(images) == 8
    assert len({(ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID) for ds in images}) == 1
    positions = [ds.ImagePositionPatient[2] for ds in images]
    assert positions == sorted(positions)
    for ds in images:
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
        assert (ds.ContentQualification, ds.Modality, ds.BurnedInAnnotation) == ("RESEARCH", "CT", "NO")
        assert NOTE in ds.DerivationDescription
        assert [ds.PatientName, ds.PatientID, ds.PatientBirthDate] == ["", "", ""]


def test_the_bytes_of_a_format_depend_on_the_volume_and_the_note_alone(tmp_path: Path) -> None:
    first = {name: kind.encode(HU, GRID, NOTE) for name, kind in FORMATS.items()}
    time.sleep(2.1)  # zip has a resolution of two seconds
    assert {name: kind.encode(HU.copy(), GRID, NOTE) for name, kind in FORMATS.items()} == first

    files = {"same": first["application/dicom"], "volume": dicom_series(HU + 1, GRID, NOTE)}
    files |= {"note": dicom_series(HU, GRID, "another"), "grid": dicom_series(HU, Grid(8, 2.0), NOTE)}
    uids: set[str] = set()
    for name, data in files.items():
        for path in dicom_files(data, tmp_path / name):
            ds = pydicom.dcmread(path)
            uids |= {ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID}
            assert {ds.StudyDate, ds.SeriesDate, ds.ContentDate, ds.StudyTime} == {""}
            assert all(uid.is_valid for uid in (ds.SOPInstanceUID, ds.StudyInstanceUID))
    assert len(uids) == len(files) * (8 + 3)
    with zipfile.ZipFile(io.BytesIO(first["application/dicom"])) as archive:
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}


def test_a_png_sheet_has_a_plane_in_each_column_and_a_window_in_each_row() -> None:
    image = Image.open(io.BytesIO(png_sheet(HU, GRID, NOTE)))
    assert (image.size, image.text["Description"]) == ((3 * SIDE_PX, 3 * SIDE_PX), NOTE)
    lung_coronal = np.asarray(image)[SIDE_PX : 2 * SIDE_PX, SIDE_PX : 2 * SIDE_PX]
    np.testing.assert_array_equal(lung_coronal, slice_image(HU, "coronal", 4, "lung"))


@pytest.mark.parametrize("media_type", FORMATS)
def test_the_api_returns_the_format_that_the_request_accepts(
    media_type: str, service_client: TestClient, radiographs: dict[str, bytes], tmp_path: Path
) -> None:
    plain = service_client.post(URL, files=radiographs)
    response = service_client.post(URL, files=radiographs, headers={"Accept": f"{media_type}, */*;q=0.1"})
    kind = FORMATS[media_type]
    assert (response.status_code, response.headers["content-type"]) == (200, kind.media_type)
    assert response.headers["content-disposition"].endswith(f'{kind.suffix}"')
    assert response.headers["vary"] == "Accept"
    if media_type == "image/png":
        assert Image.open(io.BytesIO(response.content)).size == (3 * SIDE_PX, 3 * SIDE_PX)
    else:
        folders = [tmp_path / name for name in ("plain", "other")]
        for folder in folders:
            folder.mkdir()
        one, other = read(plain.content, ".nii.gz", folders[0]), read(response.content, kind.suffix, folders[1])
        np.testing.assert_array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))


def test_json_has_what_was_found_and_no_voxels(service_client: TestClient, radiographs: dict[str, bytes]) -> None:
    accept = {"Accept": "application/json"}
    exchanged = {"frontal": radiographs["lateral"], "lateral": radiographs["frontal"]}
    model = service_client.get("/v1/model").json()
    for files, level in ((radiographs, "ok"), (exchanged, "stop")):
        report = service_client.post(URL, files=files, headers=accept).json()
        assert (report["model"], report["level"]) == (model["sha256"], level)
        assert (report["size"], report["spacing_mm"]) == (32, 10.0)
        assert report["hu"]["min"] < report["hu"]["mean"] < report["hu"]["max"]
        names = {check["name"] for check in report["checks"]["frontal"]}
        assert ("lungs" in names) == (level == "ok")
        assert all(bool(one["text"]) == (one["level"] != "ok") for one in report["checks"]["frontal"])
        assert len(json.dumps(report)) < 20_000


def test_the_page_of_the_api_has_every_route_format_header_and_status(service_client: TestClient) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/reference/http-api.md").read_text()
    description = service_client.get("/openapi.json").json()
    routes_of_page = set(re.findall(r"^\| `(GET|POST|DELETE) (/\S+)` \|", page, re.MULTILINE))
    assert routes_of_page == {
        (method.upper(), path) for path, methods in description["paths"].items() for method in methods
    }
    responses = description["paths"]["/v1/reconstructions"]["post"]["responses"]
    formats = page.partition("## Formats")[2].partition("## Headers")[0]
    assert set(re.findall(r"^\| `(\w+/[\w-]+)` \|", formats, re.MULTILINE)) == set(responses["200"]["content"])
    assert set(responses["200"]["headers"]) <= set(re.findall(r"`(X-Raylift-[\w-]+)`", page))
    errors = page.partition("## Errors")[2]
    documented = set(re.findall(r"\b\d{3}\b", errors))
    for methods in description["paths"].values():
        for route in methods.values():
            assert {status for status in route["responses"] if status >= "300"} - {"500"} <= documented


def test_a_request_that_accepts_no_format_gets_406_before_the_model_is_called(
    service_client: TestClient, radiographs: dict[str, bytes]
) -> None:
    response = service_client.post(URL, files=radiographs, headers={"Accept": "text/csv"})
    assert (response.status_code, response.headers["content-type"]) == (406, "application/problem+json")
    assert "Accept is text/csv: accept one of application/gzip, application/x-nrrd" in response.json()["detail"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "a/b"),
        ("", "a/b"),
        ("c/d;q=0.5, a/*;q=0.9", "a/b"),
        ("C/D", "c/d"),
        ("text/html, c/*;q=0.2", "c/d"),
        ("a/b;q=0, c/d;q=0.1", "c/d"),
        ("c/[d]", None),
        ("a/b;q=zero", None),
        ("a/b;q=0", None),
    ],
)
def test_the_preferred_media_type_is_chosen(accept: str, expected: str | None) -> None:
    if expected:
        assert negotiated(accept, ["a/b", "c/d"]) == expected
    else:
        with pytest.raises(HTTPException, match="406"):
            negotiated(accept, ["a/b", "c/d"])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".zip", ".png"])
def test_reconstruct_writes_the_format_of_the_suffix(
    suffix: str, model_folder: Path, pair: list[str], tmp_path: Path
) -> None:
    output = tmp_path / f"volume{suffix}"
    assert cli.main(["reconstruct", str(model_folder), "-o", str(output), *pair]) == 0
    if suffix == ".png":
        with Image.open(output) as image:
            assert image.size == (3 * SIDE_PX, 3 * SIDE_PX)
    else:
        assert read(output.read_bytes(), suffix, tmp_path).GetSize() == (32, 32, 32)


def test_reconstruct_refuses_another_suffix_and_the_standard_deviation_as_dicom(
    model_folder: Path, pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reconstruct", str(model_folder), "-o", str(tmp_path / "volume.mha"), *pair]) == 2
    assert "volumes are written as .nii.gz (NIfTI" in capsys.readouterr().err
    assert cli.main(["reconstruct", str(model_folder), "-o", str(tmp_path / "v.zip"), *pair, "--samples", "2"]) == 2
    assert "with --samples write .nii.gz or .nrrd" in capsys.readouterr().err
