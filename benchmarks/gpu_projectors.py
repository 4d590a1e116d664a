"""raylift's projector on a card compared with nanodrr's and flashdrr's: time, and how far images and gradients agree.

All have the same volumes, pose, detector and step along the ray (a voxel), and are called by their public functions.
Differences of their conventions are compensated in the axes and the affine that they receive:

* nanodrr renders one volume per call, so a batch takes as many calls. It places a given number of samples on the part
  of a ray that lies inside the volume; the number makes a step one voxel long on the central ray.
* flashdrr reads the scale of the second volume of a batch outside its array, so volumes are its channels, which it
  renders in one launch. Its affine goes to indices for corners at voxel centers, its sampling from indices for corners
  at voxel faces: the affine undoes that. Its lengths are centimeters, its detector ends at the centers of the outer
  pixels, and its sum has n steps where its samples stand n - 1 apart: a factor outside.

The detector stands where no volume reaches it, because nanodrr's rays end there. The exact integral is that of the
trilinear interpolant, sampled in double precision eight times a voxel.
"""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from gpu_report import Report, milliseconds, peak_gib, reset_peak
from torch import Tensor
from torch.nn import functional as F

from raylift.datasets import projector
from raylift.datasets.geometry import FRONTAL, Geometry, Grid, View, fit_detector
from raylift.datasets.intensity import hu_to_attenuation
from raylift.datasets.phantom.thorax import thorax
from raylift.datasets.projector import INDEX_TO_PATIENT

Project = Callable[[Tensor], Tensor]
OBLIQUE = View("oblique", azimuth_deg=30.0, elevation_deg=15.0, roll_deg=5.0)


def projectors(report: Report, small: bool) -> None:
    """A row for each size, batch, pose and library; then raylift's through torch.compile."""
    sizes = (16,) if small else (128, 256)
    volumes = {sizes[0]: phantoms(Grid(sizes[0], 320.0 / sizes[0]), report.device)}
    if not small:
        volumes[sizes[1]] = F.interpolate(volumes[sizes[0]], scale_factor=2, mode="trilinear", align_corners=False)
    for size in sizes:
        for view in (FRONTAL, OBLIQUE):
            for batch in (1, 4):
                compare(report, volumes[size][:batch].contiguous(), Grid(size, 320.0 / size), view)
    if report.left() > 30 and not small:
        compile_ours(report, volumes[128][:1].contiguous(), Grid(128, 2.5))


def beam(grid: Grid) -> Geometry:
    """A wall stand whose detector is clear of the volume in every pose: SAD 1650 mm, SDD 2000 mm."""
    return fit_detector(grid, Geometry("cone", 1650.0, 2000.0, grid.size, 1.0))


def phantoms(grid: Grid, device: torch.device) -> Tensor:
    """The attenuation of a thorax, and of its mirror images."""
    hu = torch.from_numpy(thorax(1, grid)[0]).float()
    attenuation = hu_to_attenuation(hu)[None].to(device)
    return torch.stack([attenuation, attenuation.flip(1), attenuation.flip(2), attenuation.flip(3)])


def compare(report: Report, attenuation: Tensor, grid: Grid, view: View) -> None:
    """All libraries on one batch, each failing for itself."""
    geometry = beam(grid)
    ground_truth = exact(attenuation, grid.spacing_mm, geometry, view)
    weights = torch.rand(ground_truth.shape, generator=torch.Generator().manual_seed(0)).to(attenuation)
    makers: dict[str, Callable[..., Project]] = {"raylift": ours, "nanodrr": nanodrr, "flashdrr": flashdrr}
    base: tuple[float, float, Tensor, Tensor] | None = None
    for name, make in makers.items():
        where = f"{name} at {grid.size}^3, {view.name}, batch {len(attenuation)}"
        if report.left() < 0:
            report.note(f"no time for {where}")
            continue
        with report.guarded(where):
            project = make(grid, geometry, view, attenuation)
            results = measured(project, attenuation, weights, report.device)
            base = base or results[:4]
            row(report, name, grid, view, len(attenuation), results, base, ground_truth)


def measured(
    project: Project, attenuation: Tensor, weights: Tensor, device: torch.device
) -> tuple[float, float, Tensor, Tensor, float]:
    """Milliseconds forward and with backward, image, gradient of its weighted sum, and the peak of memory."""

    def both() -> Tensor:
        x = attenuation.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((project(x) * weights).sum(), x)
        return gradient

    with torch.no_grad():
        forward = milliseconds(lambda: project(attenuation), device)
        image = project(attenuation)
    whole = milliseconds(both, device)
    reset_peak(device)
    return forward, whole, image, both(), peak_gib(device)


def row(
    report: Report,
    name: str,
    grid: Grid,
    view: View,
    batch: int,
    results: tuple[float, float, Tensor, Tensor, float],
    base: tuple[float, float, Tensor, Tensor],
    ground_truth: Tensor,
) -> None:
    forward, whole, image, gradient, peak = results
    errors = [relative_error(image, ground_truth), relative_error(image, base[2]), relative_error(gradient, base[3])]
    cells = [name, f"{grid.size}^3", view.name, str(batch), f"{forward:.3g}", f"{whole:.3g}"]
    cells += [f"{forward / base[0]:.2f}", f"{whole / base[1]:.2f}", *(f"{error:.2e}" for error in errors)]
    values = {"name": name, "size": grid.size, "view": view.name, "batch": batch, "forward_ms": forward}
    values |= {"both_ms": whole, "peak_gib": peak, "to_exact": errors[0], "to_ours": errors[1], "gradient": errors[2]}
    report.row(TITLE, COLUMNS, [*cells, f"{peak:.2f}"], values)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance from the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def exact(attenuation: Tensor, spacing_mm: float, geometry: Geometry, view: View, fineness: int = 8) -> Tensor:
    """Line integrals of the trilinear interpolant, by midpoints an eighth of a voxel apart, in double precision."""
    column, row, ray = torch.from_numpy(view.axes()).to(attenuation.device)
    px = geometry.detector_px
    along = (torch.arange(px, device=attenuation.device).double() - (px - 1) / 2) * geometry.detector_pitch_mm
    half_mm = attenuation.shape[-1] * spacing_mm / 2
    # One voxel more than the volume: the interpolant falls to zero beyond its faces.
    reach = math.sqrt(3) * half_mm + spacing_mm
    count = math.ceil(2 * reach / spacing_mm) * fineness
    depth = ((torch.arange(count, device=attenuation.device).double() + 0.5) / count * 2 - 1) * reach
    shrink = (geometry.source_isocenter_mm + depth) / geometry.source_detector_mm
    flip = torch.tensor([1.0, 1.0, -1.0], device=attenuation.device, dtype=torch.float64)
    finely = attenuation.double()
    rows = []
    for v in along:
        across = along[None, :, None] * column + v * row
        points = shrink[:, None, None] * across + depth[:, None, None] * ray
        grid = (points * flip / half_mm)[None, :, None].expand(len(attenuation), -1, -1, -1, -1)
        sampled = F.grid_sample(finely, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        length = torch.sqrt(along**2 + v**2 + geometry.source_detector_mm**2) / geometry.source_detector_mm
        rows.append(sampled.sum(dim=2) * (2 * reach / count) * length)
    return torch.cat(rows, dim=2)


def ours(grid: Grid, geometry: Geometry, view: View, attenuation: Tensor) -> Project:  # noqa: ARG001
    """Raylift's."""
    return lambda x: projector.project(x, grid.spacing_mm, geometry, view)


def nanodrr(grid: Grid, geometry: Geometry, view: View, attenuation: Tensor) -> Project:
    """nanodrr's, with its kernel in Triton on a card and its sampling in torch elsewhere."""
    stand_in_for_torchio()
    from nanodrr.data import Subject
    from nanodrr.drr import DRR

    axes, source = axes_and_source(geometry, view)
    camera = torch.eye(4, dtype=torch.float64)
    camera[:3, :3], camera[:3, 3] = axes.T, source
    inverse = camera.float()[None].to(attenuation.device)
    # Its voxel indices run w, h, d.
    to_index = world_to_index(grid)[[2, 1, 0, 3]]
    shape = attenuation[:1].shape
    subject = Subject(
        attenuation[:1],
        torch.zeros_like(attenuation[:1]),
        to_index.inverse().float(),
        to_index.float(),
        Subject._make_voxel_to_grid(shape),
        torch.zeros(3),
        max_label=0,
        convert_to_mu=False,
    ).to(attenuation.device)
    pitch, px = geometry.detector_pitch_mm, geometry.detector_px
    camera_of = DRR.from_carm_intrinsics(
        geometry.source_detector_mm, pitch, pitch, 0.0, 0.0, px, px, dtype=torch.float32, device=attenuation.device
    )
    samples = math.ceil((grid.size + 1) / float(axes[2].abs().max()))

    def one(x: Tensor) -> Tensor:
        subject._image_hu = x
        return camera_of(subject, inverse, n_samples=samples)

    return lambda x: one(x) if len(x) == 1 else torch.cat([one(x[k : k + 1]) for k in range(len(x))])


def stand_in_for_torchio() -> None:
    """Names for nanodrr's import of torchio, where that is not installed: it reads files with it, and none are here."""
    try:
        import torchio  # noqa: F401
    except ImportError:
        names = types.ModuleType("torchio")
        names.ScalarImage = names.LabelMap = type("Unread", (), {})  # type: ignore[attr-defined]
        sys.modules["torchio"] = names


def flashdrr(grid: Grid, geometry: Geometry, view: View, attenuation: Tensor) -> Project:
    """flashdrr's, with its kernel in Triton on a card and its sampling in torch elsewhere."""
    from flashdrr.rendering import VolumeRaycaster

    axes, source = axes_and_source(geometry, view)
    camera = torch.eye(4, dtype=torch.float64)
    # Right, up and forward: rows run down.
    camera[:3, :3], camera[:3, 3] = torch.stack([axes[0], -axes[1], axes[2]], dim=1), source
    view_mat = camera.float()[None].to(attenuation.device)
    n = grid.size
    # Volumes are handed over as w, h, d, which it turns round: its gradient takes the strides of contiguous d, h, w.
    to_index = world_to_index(grid)[[2, 1, 0, 3]]
    to_index[:3, 3] += 0.5
    to_index[:3] *= (n - 1) / n
    affine = to_index.float().to(attenuation.device)
    near, far = VolumeRaycaster.compute_clipping_distances(view_mat, attenuation.shape[2:], torch.inverse(affine))
    length = float(far - near)
    samples = math.ceil(length / grid.spacing_mm) + 1
    reach = (geometry.detector_px - 1) / 2 * geometry.detector_pitch_mm / geometry.source_detector_mm
    caster: Any = VolumeRaycaster(
        ray_samples=samples, resolution=geometry.detector_px, fov=2 * math.degrees(math.atan(reach)), return_tau=True
    ).to(attenuation.device)
    factor = 10.0 * samples / (samples - 1)
    fused = attenuation.device.type == "cuda"

    def project(x: Tensor) -> Tensor:
        return factor * caster(x.permute(1, 0, 4, 3, 2), view_mat, affine, triton=fused).transpose(0, 1)

    return project


def axes_and_source(geometry: Geometry, view: View) -> tuple[Tensor, Tensor]:
    """Unit vectors of a view (rows: column, row and ray direction) and its source, in patient coordinates."""
    axes = torch.from_numpy(view.axes())
    return axes, -geometry.source_isocenter_mm * axes[2]


def world_to_index(grid: Grid) -> Tensor:
    """From mm in patient coordinates to indices d, h, w, as a matrix of homogeneous coordinates."""
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.from_numpy(INDEX_TO_PATIENT) / grid.spacing_mm
    matrix[:3, 3] = (grid.size - 1) / 2
    return matrix


def compile_ours(report: Report, attenuation: Tensor, grid: Grid) -> None:
    """Raylift's projector through torch.compile."""
    geometry = beam(grid)
    for view in (FRONTAL, OBLIQUE):
        if report.left() < 15:
            return
        with report.guarded(f"compiled projector, {view.name}"):
            ground_truth = exact(attenuation, grid.spacing_mm, geometry, view)
            weights = torch.ones_like(ground_truth, dtype=attenuation.dtype)
            plain = measured(ours(grid, geometry, view, attenuation), attenuation, weights, report.device)
            started = time.perf_counter()
            compiled = torch.compile(ours(grid, geometry, view, attenuation), dynamic=False)
            results = measured(compiled, attenuation, weights, report.device)
            report.note(f"compiled projector, {view.name}: {time.perf_counter() - started:.0f} s with compilation")
            row(report, "raylift, compiled", grid, view, 1, results, plain[:4], ground_truth)


TITLE = "projectors, times relative to raylift's, errors as relative L2"
COLUMNS = ["projector", "volume", "pose", "batch", "forward, ms", "with backward, ms", "forward / raylift's"]
COLUMNS += ["with backward / raylift's", "image to exact", "image to raylift's", "gradient to raylift's", "peak GiB"]
