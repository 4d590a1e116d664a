"""The search for files: links, names, and files that are not what they are called."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import thorax_image, write_image, write_series

from raylift.datasets.scans import reader

IMAGE = thorax_image((40, 30, 20), (9, 9, 9))


def messages(root: Path) -> list[str]:
    return [str(error).replace(f"{root}/", "") for error in reader.find([root]).refused]


def test_links_to_folders_elsewhere_are_followed_and_every_file_is_found_once(tmp_path: Path) -> None:
    elsewhere, scans = tmp_path / "elsewhere", tmp_path / "scans"
    write_series(elsewhere / "series", IMAGE)
    (elsewhere / "series" / "up").symlink_to(elsewhere)
    for name in ("a", "b"):
        (scans / name).mkdir(parents=True)
        (scans / name / "link").symlink_to(elsewhere)
    (scans / "circle").symlink_to(scans)
    found = reader.find([scans])
    assert (found.refused, found.skipped) == ([], 0)
    [source] = found.sources
    assert len(source.files) == 20
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reader.read(source).image), sitk.GetArrayFromImage(IMAGE))


def test_links_to_files_that_do_not_exist_are_refused_together(tmp_path: Path) -> None:
    for name in ("anna.nii.gz", "bert.nii.gz", "carl.nii.gz"):
        (tmp_path / name).symlink_to(tmp_path / ".git" / "annex" / name)
    assert messages(tmp_path) == [
        "anna.nii.gz and 2 more: a link to a file that does not exist: fetch the file, or remove the link"
    ]


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz", ".dcm"])
def test_a_name_that_is_not_utf8_is_refused_before_a_library_gets_it(suffix: str, tmp_path: Path) -> None:
    if suffix == ".dcm":
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller"))
        write_series(tmp_path / "series", IMAGE)
        os.rename(tmp_path / "series", folder)
        name = "M\\udcfcller/000.dcm and 19 more"
    else:
        path = write_image(IMAGE, tmp_path / f"person{suffix}")
        os.rename(path, os.fsencode(tmp_path) + b"/M\xfcller" + suffix.encode())
        name = f"M\\udcfcller{suffix}"
    assert messages(tmp_path) == [f"{name}: the name is not in UTF-8: rename it"]


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd", ".nii.gz"])
def test_names_in_any_script_are_read(suffix: str, tmp_path: Path) -> None:
    path = write_image(IMAGE, tmp_path / f"Größe 测试{suffix}")
    found = reader.find([path])
    assert found.refused == []
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(reader.read(found.sources[0]).image), sitk.GetArrayFromImage(IMAGE)
    )


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_voxel_file_next_to_its_header_may_be_named_with_its_folder(prefix: str, tmp_path: Path) -> None:
    path = write_image(IMAGE, tmp_path / "person.mhd")
    path.write_text(path.read_text().replace("= person.raw", f"= {prefix}person.raw"))
    [source] = reader.find([tmp_path]).sources
    assert source.files == (path, tmp_path / "person.raw")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reader.read(source).image), sitk.GetArrayFromImage(IMAGE))


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_slices_that_were_not_copied_are_refused_together(content: bytes, tmp_path: Path) -> None:
    paths = sorted(write_series(tmp_path, IMAGE))
    for path in paths[:3]:
        path.write_bytes(content)
    shutil.copy(paths[0], tmp_path / "notes.txt")
    found = reader.find([tmp_path])
    assert found.skipped == 1
    assert [str(error) for error in found.refused] == [
        f"{paths[0]} and 2 more: not DICOM in spite of the suffix, or empty: copy it again, or leave it out"
    ]
