"""The field of view of a scan: the sides at which it truncates the body, and an estimate of the tissue beyond them.

A scanner reconstructs a circle or a rectangle. A body that is wider is cut, and what lies outside is air in the file,
which it was not in the patient.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Int16
from scipy import ndimage
from skimage.morphology import convex_hull_image

from raylift.datasets.intensity import HU_MIN

FAT_HU = -100.0
SMOOTHING_MM = 20.0
"""Standard deviation of the Gaussian from superior to inferior that smooths the skin beyond the cuts."""
SOFT_TISSUE_HU = (-110, 60)
"""Range of the HU that is continued: bone and air at the edge are not."""
FALLOFF_MM = 15.0
"""Distance in which the difference from fat falls to 1 / e."""
CROSS = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], dtype=bool)
"""Neighbors within an axial slice."""


def measured_region(hu: Int16[np.ndarray, "d h w"], covered: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The voxels inside a scan's field of view: within the file's extent, the smallest ellipse with all signal.

    Voxels that are mixed with the padding beyond are outside. The ellipse has the center and the aspect of a slice, and
    at least its sides: air that was set to -1024 around a body leaves the inscribed one.

    Args:
        hu: the whole scan in volume order.
        covered: the voxels inside the file's extent.
    """
    y, x = (np.linspace(-1, 1, n) for n in hu.shape[1:])
    radius = np.hypot(y[:, None], x)
    signal = (hu > HU_MIN).any(axis=0)
    voxel = 2 / min(hu.shape[1:])
    outer = max(1.0, float(radius[signal].max(initial=0)) - voxel)
    inside: Bool[np.ndarray, "d h w"] = covered & (radius <= outer)
    return inside


def edge(measured: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The outermost voxels of a field of view in each axial slice; the outside of the volume is not beyond it."""
    outermost: Bool[np.ndarray, "d h w"] = measured & ~inner(measured)
    return outermost


def inner(measured: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """A field of view without its outermost voxels in each axial slice."""
    return ndimage.binary_erosion(measured, CROSS, border_value=1)


def unmeasured(body: Bool[np.ndarray, "d h w"], measured: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The voxels that may hold tissue and are not in the scan.

    They are slices beyond its ends and, in axial slices in which the body reaches the edge of the field of view, all
    voxels outside. In other slices there is air outside.

    Args:
        body: mask of the body.
        measured: the voxels inside the field of view, without those that interpolation mixed with the air beyond.
    """
    unknown = (body & edge(measured)).any(axis=(1, 2)) | ~measured.any(axis=(1, 2))
    outside: Bool[np.ndarray, "d h w"] = ~measured & unknown[:, None, None]
    return outside


def truncated_sides(body: Bool[np.ndarray, "d h w"]) -> dict[str, float]:
    """By side, the share of a scan's slices in which the body reaches the outermost voxels but one."""
    faces = {"right": body[:, :, 1], "left": body[:, :, -2], "anterior": body[:, 1], "posterior": body[:, -2]}
    return {side: round(float(face.any(axis=1).mean()), 3) for side, face in faces.items()}


def extend_body(
    hu: Int16[np.ndarray, "d h w"],
    body: Bool[np.ndarray, "d h w"],
    measured: Bool[np.ndarray, "d h w"],
    spacing_mm: float,
) -> Int16[np.ndarray, "d h w"]:
    """The volume with tissue in place of the air beyond a field of view that truncates the body.

    In each axial slice the skin between the two ends of a cut is an arc of a circle whose radius is half the depth of
    the body, which is the mean curvature of the flanks of a chest. What the arc encloses beyond the field of view takes
    the HU of the nearest voxel inside, limited to soft tissue, which falls off to fat with the distance.

    Args:
        hu: in volume order.
        body: mask of the body.
        measured: the voxels inside the field of view, without those that interpolation mixed with the air beyond.
        spacing_mm: edge of the voxels.
    """
    edges = edge(measured)
    slices = np.flatnonzero((body & edges).any(axis=(1, 2)))
    # The hull bridges a lung that the cut opens.
    hulls = [convex_hull_image(body[d]) for d in slices]
    distances = np.zeros((len(slices), *hu.shape[1:]))
    for n, (d, hull) in enumerate(zip(slices, hulls, strict=True)):
        cuts, count = ndimage.label(edges[d] & hull, np.ones((3, 3)))
        whole = measured[d].copy()
        for number in range(1, count + 1):
            for cut in _parts(np.argwhere(cuts == number), measured[d]):
                whole |= _behind(cut, body[d])
        distances[n] = ndimage.distance_transform_edt(~whole) - ndimage.distance_transform_edt(whole)
    weights = np.exp(-(((slices[:, None] - slices) * spacing_mm / SMOOTHING_MM) ** 2) / 2)
    smooth = np.tensordot(weights / weights.sum(axis=1, keepdims=True), distances, axes=1)

    result = hu.copy()
    for d, hull, outside in zip(slices, hulls, smooth, strict=True):
        distance, (rows, columns) = ndimage.distance_transform_edt(~measured[d], return_indices=True)
        nearest = hu[d][rows, columns].clip(*SOFT_TISSUE_HU)
        tissue = FAT_HU + (nearest - FAT_HU) * np.exp(-distance * spacing_mm / FALLOFF_MM)
        beyond = (outside < 0) & ~measured[d] & hull[rows, columns]
        result[d][beyond] = np.rint(tissue[beyond]).astype(np.int16)
    return result


def _chord(cut: Int[np.ndarray, "points 2"]) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"], float]:
    """The two points of a cut that are farthest apart, and their distance."""
    lengths = np.linalg.norm(cut[:, None] - cut, axis=-1)
    first, last = (cut[i].astype(float) for i in np.unravel_index(lengths.argmax(), lengths.shape))
    return first, last, float(lengths.max())


def _parts(cut: Int[np.ndarray, "points 2"], measured: Bool[np.ndarray, "h w"]) -> list[Int[np.ndarray, "points 2"]]:
    """A cut, or those of its quadrants at the left and right if it goes round the front or the back of the body."""
    first, last, chord = _chord(cut)
    across = np.abs((cut - first) @ np.array([last[1] - first[1], first[0] - last[0]]))
    y, x = (cut - np.argwhere(measured).mean(axis=0)).T
    if across.max() <= 2 * chord or x.min() > 0 or x.max() < 0:
        return [cut]
    parts = [cut[(np.abs(x) >= np.abs(y)) & side] for side in (x < 0, x > 0)]
    return [part for part in parts if len(part)]


def _behind(cut: Int[np.ndarray, "points 2"], body: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The pixels between the chord of a cut and the arc over it, on the side away from the body."""
    first, last, chord = _chord(cut)
    if chord == 0:
        return np.zeros_like(body)
    normal = np.array([last[1] - first[1], first[0] - last[0]]) / chord
    if ((first + last) / 2 - np.argwhere(body).mean(axis=0)) @ normal < 0:
        normal = -normal
    rows = np.flatnonzero(body.any(axis=1))
    # The body ends half a voxel beyond the last voxel centers that are inside it.
    chord += 1
    radius = max(rows[-1] - rows[0] + 1, chord) / 2
    center = (first + last) / 2 - normal * np.sqrt(radius**2 - chord**2 / 4)
    pixels = np.moveaxis(np.indices(body.shape), 0, -1)
    enclosed: Bool[np.ndarray, "h w"] = np.linalg.norm(pixels - center, axis=-1) <= radius
    enclosed &= (pixels - first) @ normal > -0.5
    return enclosed
