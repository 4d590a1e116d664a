import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from raylift.datasets import projector
from raylift.datasets.errors import ConfigError
from raylift.datasets.geometry import FRONTAL, LATERAL, Geometry, View
from raylift.datasets.intensity import hu_to_attenuation
from raylift.datasets.projector import backproject, project, project_pose, view_coordinates

CONE = Geometry("cone", 800.0, 1200.0, 40, 6.0)
PARALLEL = Geometry("parallel", 1.0, 1.0, 40, 4.0)
BEAMS = pytest.mark.parametrize("geometry", [CONE, PARALLEL], ids=["cone", "parallel"])
ON_AXES = [
    FRONTAL, LATERAL, View("ap", 180), View("right lateral", 270), View("axial", 0, 90), View("turned", 0, 0, 90),
]  # fmt: skip
OFF_AXES = [
    View("oblique", 35, 10), View("rolled", 0, 0, 20), View("all", -70, -25, 12), View("moved", offset_mm=(8, -6, 11)),
    View("oblique and moved", 50, 15, 5, (-9, 4, 7)),
]  # fmt: skip


def obliqueness(geometry: Geometry) -> Tensor:
    """1 / cos of each pixel's ray with the central ray."""
    offsets = torch.arange(geometry.detector_px, dtype=torch.float64) - (geometry.detector_px - 1) / 2
    squared = (offsets[:, None] ** 2 + offsets[None] ** 2) * geometry.detector_pitch_mm**2
    if geometry.beam == "parallel":
        return torch.ones_like(squared)
    return torch.sqrt(1 + squared / geometry.source_detector_mm**2)


@BEAMS
@pytest.mark.parametrize("view", ON_AXES, ids=lambda view: view.name)
def test_rays_through_a_uniform_slab_have_the_analytic_integral(geometry: Geometry, view: View) -> None:
    volume = torch.zeros(1, 1, 60, 60, 60, dtype=torch.float64)
    depth_axis = {0: 2, 1: 1, 2: 0}[int(np.abs(view.axes()[2]).argmax())]
    volume.narrow(2 + depth_axis, 20, 13).fill_(0.02)
    image = project(volume, 4.0, geometry, view)[0, 0]
    torch.testing.assert_close(image, 0.02 * 13 * 4.0 * obliqueness(geometry), rtol=1e-12, atol=0)


@BEAMS
def test_rays_at_an_angle_through_a_uniform_slab_have_the_analytic_integral(geometry: Geometry) -> None:
    # A slab across y, thinner than the volume, wider than the detector's field of view.
    geometry = replace(geometry, detector_px=15)
    volume = torch.zeros(1, 1, 60, 50, 60, dtype=torch.float64)
    volume[0, 0, :, 20:31] = 0.02
    view = View("oblique", 20, 12)
    column, row, ray = (torch.from_numpy(axis) for axis in view.axes().copy())
    offsets = (torch.arange(15, dtype=torch.float64) - 7) * geometry.detector_pitch_mm
    rays = ray.expand(15, 15, 3)
    if geometry.beam == "cone":
        rays = offsets[None, :, None] * column + offsets[:, None, None] * row + geometry.source_detector_mm * ray
    through = 11 * 4.0 / (rays[..., 1].abs() / rays.norm(dim=-1))
    image = project(volume, 4.0, geometry, view)[0, 0]
    torch.testing.assert_close(image, 0.02 * through, rtol=0.01, atol=0)


@pytest.mark.parametrize("depth_mm", [-60, 0, 60])
@pytest.mark.parametrize("view", [FRONTAL, LATERAL, View("ap", 180)], ids=lambda view: view.name)
def test_a_thin_object_is_magnified_by_its_distance_from_the_source(view: View, depth_mm: int) -> None:
    volume = torch.zeros(1, 1, 80, 80, 80, dtype=torch.float64)
    depth_axis, side = {"frontal": (1, -1), "lateral": (2, 1), "ap": (1, 1)}[view.name]
    place = [slice(35, 45)] * 3
    # Ten voxels of 4 mm in the plane, two in depth; rays run towards -y, +x and +y.
    middle = 40 + side * depth_mm // 4
    place[depth_axis] = slice(middle - 1, middle + 1)
    volume[0, 0, *place] = 0.02
    geometry = Geometry("cone", 800.0, 1200.0, 200, 1.0)
    image = project(volume, 4.0, geometry, view)[0, 0]
    for profile in (image[100], image[:, 100]):
        # Width at half height, counting the share of the pixels at the edges.
        width_mm = float(profile.sum() / profile.max())
        assert width_mm == pytest.approx(10 * 4.0 * 1200 / (800 + depth_mm), rel=0.005)


def test_a_parallel_beam_sums_columns_of_voxels_without_magnification() -> None:
    volume = torch.rand(1, 1, 20, 20, 20, dtype=torch.float64)
    geometry = Geometry("parallel", 1.0, 1.0, 20, 4.0)
    torch.testing.assert_close(project(volume, 4.0, geometry, FRONTAL)[0, 0], volume[0, 0].sum(1) * 4.0)
    torch.testing.assert_close(project(volume, 4.0, geometry, LATERAL)[0, 0], volume[0, 0].sum(2) * 4.0)


@BEAMS
def test_superior_right_and_anterior_are_up_and_left_in_both_views(geometry: Geometry) -> None:
    volume = torch.zeros(1, 1, 30, 30, 30)
    volume[0, 0, 5, 8, 3] = 1.0  # up, in front, to the patient's right
    for view in (FRONTAL, LATERAL):
        row, column = centroid(project(volume, 4.0, geometry, view)[0, 0])
        assert row < 19.5
        assert column < 19.5


def centroid(image: Tensor) -> tuple[float, float]:
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=image.dtype) for n in image.shape), indexing="ij")
    return float((image * rows).sum() / image.sum()), float((image * columns).sum() / image.sum())


@BEAMS
@pytest.mark.parametrize("view", ON_AXES + OFF_AXES, ids=lambda view: view.name)
def test_a_bright_voxel_projects_to_the_pixel_where_backprojection_reads(geometry: Geometry, view: View) -> None:
    shape = (24, 20, 22)
    rows, columns = torch.meshgrid(*[torch.arange(40, dtype=torch.float64)] * 2, indexing="ij")
    where = backproject(torch.stack([rows, columns])[None], shape, 4.0, geometry, view)[0]
    rng = np.random.default_rng(0)
    for d, h, w in zip(*(rng.integers(2, n - 2, 6) for n in shape), strict=True):
        volume = torch.zeros(1, 1, *shape, dtype=torch.float64)
        volume[0, 0, d, h, w] = 1.0
        # Tenths of a pixel: what sampling in planes moves the center of one voxel.
        found = centroid(project(volume, 4.0, geometry, view)[0, 0])
        assert found == pytest.approx((float(where[0, d, h, w]), float(where[1, d, h, w])), abs=0.3)


@BEAMS
def test_backprojection_is_zero_for_voxels_outside_the_detector(geometry: Geometry) -> None:
    narrow = replace(geometry, detector_px=4)
    seen = backproject(torch.ones(1, 1, 4, 4), (20, 20, 20), 4.0, narrow, FRONTAL)[0, 0]
    assert seen[10, 10, 10] == 1
    assert not seen[0].any()
    assert not seen[:, :, -1].any()


@BEAMS
@pytest.mark.parametrize("view", ON_AXES[:3], ids=lambda view: view.name)
def test_the_frustum_agrees_with_the_slices_where_both_can_be_taken(geometry: Geometry, view: View) -> None:
    volume = torch.rand(2, 1, 24, 20, 22, dtype=torch.float64)
    by_slices = project(volume, 4.0, geometry, view)
    by_frustum = projector._project_frustum(volume, 4.0, geometry, view, projector._axes(view, volume))
    torch.testing.assert_close(by_frustum, by_slices)


@BEAMS
@pytest.mark.parametrize("view", ON_AXES, ids=lambda view: view.name)
def test_the_matrix_products_of_a_gpu_backproject_as_grid_sample_does(geometry: Geometry, view: View) -> None:
    image = torch.rand(2, 3, 20, 24, dtype=torch.float64, requires_grad=True)
    volumes = [one(image, (12, 14, 16), 4.0, geometry, view) for one in (backproject, projector._backproject_slices)]
    torch.testing.assert_close(*volumes)
    weight = torch.rand_like(volumes[0])
    torch.testing.assert_close(*(torch.autograd.grad((volume * weight).sum(), image)[0] for volume in volumes))


@BEAMS
@pytest.mark.parametrize("view", [FRONTAL, LATERAL, OFF_AXES[2], OFF_AXES[3]], ids=lambda view: view.name)
def test_projection_and_backprojection_have_right_gradients(geometry: Geometry, view: View) -> None:
    small = replace(geometry, detector_px=5, detector_pitch_mm=8.0)
    volume = torch.rand(2, 1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    image = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: project(v, 6.0, small, view), volume)
    assert torch.autograd.gradcheck(lambda i: backproject(i, (4, 5, 6), 6.0, small, view), image)


@BEAMS
@pytest.mark.parametrize("view", [LATERAL, OFF_AXES[4]], ids=lambda view: view.name)
def test_volumes_of_a_batch_are_projected_each_by_itself_and_linearly(geometry: Geometry, view: View) -> None:
    volumes = torch.rand(3, 1, 12, 14, 16, dtype=torch.float64)
    images = project(volumes, 4.0, geometry, view)
    for volume, image in zip(volumes, images, strict=True):
        torch.testing.assert_close(project(volume[None], 4.0, geometry, view)[0], image)
    torch.testing.assert_close(
        project(volumes[:1] + 2 * volumes[1:2], 4.0, geometry, view)[0], images[0] + 2 * images[1]
    )
    maps = torch.rand(2, 3, 40, 40, dtype=torch.float64)
    spread = backproject(maps, (12, 14, 16), 4.0, geometry, view)
    torch.testing.assert_close(spread[1:, 2:], backproject(maps[1:, 2:], (12, 14, 16), 4.0, geometry, view))


@pytest.mark.parametrize("hu", [-1000, -1024, -2048, -3024])
@pytest.mark.parametrize("view", [FRONTAL, OFF_AXES[0]], ids=lambda view: view.name)
def test_air_and_padding_contribute_nothing(hu: int, view: View) -> None:
    body = torch.full((1, 1, 20, 20, 20), float(hu))
    body[0, 0, 8:12, 8:12, 8:12] = 40.0
    alone = hu_to_attenuation(body) * (body > 0)
    torch.testing.assert_close(
        project(hu_to_attenuation(body), 4.0, CONE, view), project(alone, 4.0, CONE, view), rtol=0, atol=0
    )
    assert not project(hu_to_attenuation(torch.full_like(body, float(hu))), 4.0, CONE, view).any()


def test_an_offset_moves_what_is_imaged_at_the_center() -> None:
    volume = torch.zeros(1, 1, 24, 24, 24, dtype=torch.float64)
    volume[0, 0, 4, 12, 17] = 1.0
    # Index (4, 12, 17) in patient coordinates: 5.5 voxels to the left, 0.5 to the back, 7.5 up.
    view = View("on it", 30, 10, offset_mm=(22.0, 2.0, 30.0))
    assert centroid(project(volume, 4.0, CONE, view)[0, 0]) == pytest.approx((19.5, 19.5), abs=0.1)


@pytest.mark.parametrize(
    "view", [FRONTAL, View("oblique", 45), View("moved", offset_mm=(0.0, -60.0, 0.0))], ids=lambda view: view.name
)
def test_a_source_inside_the_volume_is_refused(view: View) -> None:
    near = Geometry("cone", 90.0, 300.0, 8, 1.0)
    volume = torch.zeros(1, 1, 40, 50, 40)
    with pytest.raises(ConfigError, match=rf"view '{view.name}'.*source.*90 mm"):
        project(volume, 4.0, near, view)
    with pytest.raises(ConfigError, match=rf"view '{view.name}'.*source.*90 mm"):
        backproject(torch.zeros(1, 1, 8, 8), (40, 50, 40), 4.0, near, view)


def test_a_source_just_outside_the_volume_is_not() -> None:
    near = Geometry("cone", 101.0, 300.0, 8, 1.0)
    assert project(torch.ones(1, 1, 40, 50, 40), 4.0, near, FRONTAL).isfinite().all()


@pytest.fixture(scope="module")
def real_attenuation(real_data: Path) -> Tensor:
    image = sitk.DICOMOrient(sitk.ReadImage(str(real_data / "ct" / "lidc_idri_0001_2mm.nii.gz")), "LPI")
    assert image.GetSpacing() == (2, 2, 2)
    return hu_to_attenuation(torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.float32)))[None, None]


@pytest.mark.parametrize("view", [FRONTAL, LATERAL, View("oblique", 35, 10)], ids=lambda view: view.name)
def test_a_real_ct_is_projected_as_plastimatch_projects_it(
    view: View, real_attenuation: Tensor, plastimatch: str, tmp_path: Path
) -> None:
    geometry = Geometry("cone", 1650.0, 1800.0, 96, 4.5)
    # Plastimatch reads the file's own frame: slices from the feet up, centered on the isocenter.
    volume = sitk.GetImageFromArray(np.ascontiguousarray(real_attenuation[0, 0].numpy()[::-1]))
    volume.SetSpacing((2, 2, 2))
    volume.SetOrigin([-(n - 1.0) for n in volume.GetSize()])
    sitk.WriteImage(volume, str(tmp_path / "in.mha"))
    _, row, ray = view.axes()
    edge = geometry.detector_px * geometry.detector_pitch_mm
    words = ["drr", "-t", "pfm", "-i", "exact", "-P", "none", "--sad", "1650", "--sid", "1800", "-o", "0 0 0"]
    words += ["-n", " ".join(map(str, -ray)), "--vup", " ".join(map(str, -row)), "-z", f"{edge} {edge}"]
    words += ["-r", f"{geometry.detector_px} {geometry.detector_px}", "-I", "in.mha", "-O", "out"]
    run = subprocess.run([plastimatch, *words], cwd=tmp_path, capture_output=True, text=True)
    files = list(tmp_path.glob("out*.pfm"))
    assert files, run.stdout + run.stderr
    raw = files[0].read_bytes().split(b"\n", 3)[3]
    # Its images are a tenth of the integral, and seen from the source, unlike ours.
    theirs = 10 * np.frombuffer(raw, "<f4").reshape(geometry.detector_px, geometry.detector_px)[:, ::-1]
    ours = project(real_attenuation, 2.0, geometry, view)[0, 0].numpy()
    assert theirs.max() > 4
    assert np.linalg.norm(ours - theirs) <= 0.011 * np.linalg.norm(theirs)


@pytest.mark.parametrize("view", [FRONTAL, View("oblique", 30.0, 10.0, 5.0), View("axial", elevation_deg=90.0)])
def test_a_pose_given_as_tensors_is_projected_as_the_view_of_that_pose(view: View) -> None:
    volume = torch.rand(2, 1, 16, 16, 16)
    geometry = Geometry("cone", 300.0, 700.0, 16, 20.0)
    by_view = project(volume, 8.0, geometry, view)
    by_tensors = project_pose(volume, 8.0, geometry, torch.tensor(view.axes()).float(), torch.zeros(3))
    # Both sample planes a voxel apart or less, but not the same ones.
    assert (by_view - by_tensors).abs().mean() < 0.02 * by_view.mean()
    torch.testing.assert_close(by_view.sum(), by_tensors.sum(), rtol=0.01, atol=0)


def test_a_voxel_stands_where_the_views_axes_place_it() -> None:
    column, row, depth = view_coordinates((4, 4, 4), 10.0, FRONTAL, torch.zeros(1))
    # Columns to the patient's left (W), rows to the feet (D), rays from back to front (against H).
    assert column[0, 0, :].tolist() == [-15.0, -5.0, 5.0, 15.0]
    assert row[:, 0, 0].tolist() == [-15.0, -5.0, 5.0, 15.0]
    assert depth[0, :, 0].tolist() == [15.0, 5.0, -5.0, -15.0]
