"""Rasterization of shapes in mm with partial-volume edges.

A solid is a signed distance field: negative inside, in mm near its surface. A voxel at the surface gets the fraction of
it that is inside, so that the position of an edge does not depend on the voxel size. Tubes (ribs, vessels, airways) are
chains of segments with a radius at each end; only the voxels around them are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.interpolate import PchipInterpolator

from raylift.datasets.geometry import Grid

FAR_MM = 1e3
"""Distance of voxels that are not near any tube."""

Numbers = Float[np.ndarray, "..."]
Singles = Float32[np.ndarray, "..."]
Real = float | int
"""A number in mm or HU; the type checks at run time distinguish int from float."""


def mm(x: Real, y: Real, z: Real) -> Float[np.ndarray, " 3"]:
    """A point or a step in patient coordinates."""
    return np.array([x, y, z], dtype=float)


@dataclass(frozen=True)
class Tubes:
    """Segments in patient coordinates with radius `radius[:, 0]` along the normal and `radius[:, 1]` across it."""

    start: Float[np.ndarray, "n 3"]
    end: Float[np.ndarray, "n 3"]
    radius_start: Float[np.ndarray, "n 2"]
    radius_end: Float[np.ndarray, "n 2"]
    normal: Float[np.ndarray, "n 3"]

    @classmethod
    def along(
        cls,
        points: Sequence[Sequence[float] | np.ndarray] | np.ndarray,
        radius: Real | Sequence[Real] | np.ndarray,
        wide: Real | Sequence[Real] | np.ndarray | None = None,
        up: tuple[float, float, float] = (0.0, 0.0, 1.0),
    ) -> Tubes:
        """A smooth curve through `points`, round or `wide`; the normal is orthogonal to the curve and to `up`."""
        nodes = np.asarray(points, dtype=float)
        at = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(nodes, axis=0), axis=1))])
        thick = np.broadcast_to(np.asarray(radius, dtype=float), at.shape)
        across = thick if wide is None else np.broadcast_to(np.asarray(wide, dtype=float), at.shape)
        curve = np.column_stack([nodes, thick, across])
        if len(nodes) > 2:
            curve = PchipInterpolator(at, curve)(np.linspace(0, at[-1], max(4, int(at[-1] / 6) + 1)))
        normal = np.cross(np.diff(curve[:, :3], axis=0), up)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        return cls(curve[:-1, :3], curve[1:, :3], curve[:-1, 3:], curve[1:, 3:], normal)

    @classmethod
    def tapering(
        cls,
        start: Float[np.ndarray, "n 3"],
        end: Float[np.ndarray, "n 3"],
        fed: Int[np.ndarray, " n"],
        tip_mm: Real,
        exponent: Real,
    ) -> Tubes:
        """Branches of radius `tip_mm * fed ** (1 / exponent)`; the exponent of Murray's law is 3."""
        radius = np.repeat((tip_mm * fed ** (1 / exponent))[:, None], 2, axis=1)
        return cls(start, end, radius, 0.88 * radius, np.zeros_like(start))

    @classmethod
    def concatenate(cls, parts: Sequence[Tubes]) -> Tubes:
        """All segments of `parts`."""
        return cls(
            np.concatenate([part.start for part in parts]),
            np.concatenate([part.end for part in parts]),
            np.concatenate([part.radius_start for part in parts]),
            np.concatenate([part.radius_end for part in parts]),
            np.concatenate([part.normal for part in parts]),
        )

    def moved(self, offset_mm: tuple[float, float, float]) -> Tubes:
        """The tubes translated by an offset."""
        return replace(self, start=self.start + offset_mm, end=self.end + offset_mm)

    def samples(
        self, spacing_mm: float, shrink_mm: Real
    ) -> tuple[Float[np.ndarray, "p 3"], Float[np.ndarray, "p 2"], Float[np.ndarray, "p 3"]]:
        """Points along the segments, dense enough that spheres around them form tubes, with radii and normals."""
        thinnest = np.minimum(self.radius_start, self.radius_end).min(axis=1)
        length = np.linalg.norm(self.end - self.start, axis=1)
        count = np.ceil(length / (0.3 * spacing_mm + 0.25 * thinnest)).astype(int).clip(1)
        which = np.repeat(np.arange(len(count)), count)
        first = np.repeat(np.cumsum(count) - count, count)
        share = ((np.arange(len(which)) - first + 0.5) / count[which])[:, None]
        radius = self.radius_start[which] * (1 - share) + self.radius_end[which] * share - shrink_mm
        point = self.start[which] * (1 - share) + self.end[which] * share
        kept = radius.min(axis=1) > 0
        return point[kept], radius[kept], self.normal[which][kept]


class Raster:
    """Voxel centers of a grid in patient coordinates, in mm, as three arrays that broadcast to (d, h, w)."""

    def __init__(self, grid: Grid) -> None:
        offset = (np.arange(grid.size, dtype=np.float32) - (grid.size - 1) / 2) * np.float32(grid.spacing_mm)
        self.grid = grid
        self.x: Float32[np.ndarray, "1 1 w"] = offset[None, None, :]
        self.y: Float32[np.ndarray, "1 h 1"] = offset[None, :, None]
        self.z: Float32[np.ndarray, "d 1 1"] = -offset[:, None, None]

    def coverage(self, distance: Singles) -> Singles:
        """Fraction of each voxel inside the solid, in [0, 1]."""
        return np.asarray(np.clip(np.float32(0.5) - distance * np.float32(1 / self.grid.spacing_mm), 0, 1))

    def sheet(self, distance: Singles, thickness_mm: Real) -> Singles:
        """Fraction of each voxel in a sheet thinner than a voxel at the zero level of `distance`."""
        spacing = np.float32(self.grid.spacing_mm)
        filled = np.float32(min(1.0, thickness_mm / self.grid.spacing_mm))
        return np.asarray(np.clip(1 - np.abs(distance) / spacing, 0, 1) * filled)

    def rescaled(self, field: Float32[np.ndarray, "d h w"]) -> Float32[np.ndarray, "d h w"]:
        """A field with a surface as its zero level, divided by its gradient: a distance in mm near that surface."""
        slopes = np.gradient(field, self.grid.spacing_mm)
        steepness = np.sqrt(slopes[0] ** 2 + slopes[1] ** 2 + slopes[2] ** 2)
        return np.asarray(field / np.maximum(steepness, 0.2), dtype=np.float32)

    def smooth_noise(self, rng: np.random.Generator, length_mm: Real, count: int = 6) -> Float32[np.ndarray, "d h w"]:
        """A smooth random field of mean 0 and variance 1 with wavelengths of about `length_mm`, for any spacing."""
        total = np.zeros(self.grid.shape, dtype=np.float32)
        for _ in range(count):
            ways, phase = rng.normal(0, 2 * np.pi / length_mm, 3), rng.uniform(0, 2 * np.pi)
            along_z, along_y, along_x = (
                np.exp(1j * (way * at + shift)).astype(np.complex64)
                for way, at, shift in zip(ways, (self.z, self.y, self.x), (phase, 0, 0), strict=True)
            )
            plane = along_z * along_y
            total += plane.real * along_x.real - plane.imag * along_x.imag
        return total * np.float32(np.sqrt(2 / count))

    def ellipsoid(
        self,
        center: Sequence[Real] | np.ndarray,
        half: Sequence[Real] | np.ndarray,
        axes: Float[np.ndarray, "3 3"] | None = None,
    ) -> Float32[np.ndarray, "d h w"]:
        """Distance, along the line to the center, from an ellipsoid with semi-axes `half` along the rows of `axes`."""
        dx, dy, dz = (at - np.float32(c) for at, c in zip((self.x, self.y, self.z), center, strict=True))
        squared = np.full(self.grid.shape, 1e-4, dtype=np.float32)
        for axis, extent in zip(np.eye(3) if axes is None else axes, half, strict=True):
            ax, ay, az = (axis / extent).astype(np.float32)
            squared += (ax * dx + ay * dy + az * dz) ** 2
        return np.asarray(np.sqrt(dx * dx + dy * dy + dz * dz) * (1 - 1 / np.sqrt(squared)))

    def tubes(self, tubes: Tubes, shrink_mm: Real = 0.0) -> Float32[np.ndarray, "d h w"]:
        """Fraction of each voxel inside the tubes, whose radii are reduced by `shrink_mm`."""
        result = np.zeros(self.grid.size**3, dtype=np.float32)
        half = self.grid.spacing_mm / 2
        for index, distance, radius in self._stencils(tubes, shrink_mm, reach_mm=half):
            share = self.coverage(distance)
            # `coverage` overestimates tubes thinner than a voxel: preserve the area of their cross-section.
            thin, thick = 6 * half * radius**2 / (radius + half) ** 3, radius**2 / (radius**2 + half**2 / 3)
            share *= np.where(radius < half, thin, thick).astype(np.float32)[:, None, None, None]
            hit = share > 0
            np.maximum.at(result, index[hit], share[hit])
        return result.reshape(self.grid.shape)

    def tube_distance(self, tubes: Tubes, reach_mm: Real) -> Float32[np.ndarray, "d h w"]:
        """Signed distance from the tubes' surface up to `reach_mm` outside, FAR_MM beyond."""
        result = np.full(self.grid.size**3, FAR_MM, dtype=np.float32)
        for index, distance, _ in self._stencils(tubes, 0.0, reach_mm):
            hit = distance < reach_mm
            np.minimum.at(result, index[hit], distance[hit])
        return result.reshape(self.grid.shape)

    def _stencils(
        self, tubes: Tubes, shrink_mm: Real, reach_mm: Real
    ) -> Iterator[tuple[Int[np.ndarray, "p k k k"], Float32[np.ndarray, "p k k k"], Float[np.ndarray, " p"]]]:
        """Flat indices of the voxels around samples of the tubes, their distances, and the samples' mean radii."""
        spacing, size = self.grid.spacing_mm, self.grid.size
        point, radius, normal = tubes.samples(spacing, shrink_mm)
        span = np.floor((radius.max(axis=1) + reach_mm) / spacing + 0.5).astype(int)
        # Samples of similar reach share a stencil size.
        for width in np.unique(span):
            chosen = span == width
            middle = point[chosen] / spacing * [1, 1, -1] + (size - 1) / 2
            voxel = np.rint(middle).astype(np.intp)[:, :, None] + np.arange(-width, width + 1)
            step = ((voxel - middle[:, :, None]) * spacing).astype(np.float32)
            # Voxels outside the grid are clipped into it at a distance without effect.
            step[(voxel < 0) | (voxel >= size)] = FAR_MM
            voxel = voxel.clip(0, size - 1)
            index = _outer_sum(voxel[:, 2] * size * size, voxel[:, 1] * size, voxel[:, 0])
            length = np.sqrt(_outer_sum(step[:, 2] ** 2, step[:, 1] ** 2, step[:, 0] ** 2))
            thick, wide = radius[chosen].astype(np.float32).T[:, :, None, None, None]
            distance = length - thick
            if np.any(thick != wide):
                n = normal[chosen].astype(np.float32)[:, :, None]
                along_normal = _outer_sum(-n[:, 2] * step[:, 2], n[:, 1] * step[:, 1], n[:, 0] * step[:, 0])
                scaled = np.sqrt((length / wide) ** 2 + along_normal**2 * (1 / thick**2 - 1 / wide**2))
                distance = length - np.maximum(length, 1e-3) / np.maximum(scaled, 1e-3 / wide)
            yield index, distance, np.sqrt(radius[chosen].prod(axis=1))


def superellipse(
    dx: Numbers,
    dy: Numbers,
    half_x: Numbers | Real,
    half_y: Numbers | Real,
    power: Numbers | Real,
) -> Numbers:
    """Distance, along the line to the center, from |dx / half_x|^power + |dy / half_y|^power = 1."""
    scaled = (np.abs(dx / half_x) ** power + np.abs(dy / half_y) ** power) ** (1 / power)
    length = np.sqrt(dx * dx + dy * dy)
    return np.asarray(length - length / np.maximum(scaled, 1e-3))


def capsule(
    at: tuple[Singles, Singles, Singles],
    start: Float[np.ndarray, " 3"],
    end: Float[np.ndarray, " 3"],
    radii: tuple[Real, Real],
) -> Singles:
    """Signed distance of the points `at` (x, y, z) from a capsule with these radii at its ends."""
    axis = (end - start).astype(np.float32)
    dx, dy, dz = (a - np.float32(s) for a, s in zip(at, start, strict=True))
    fx, fy, fz = axis / (axis @ axis)
    share = np.clip(dx * fx + dy * fy + dz * fz, 0, 1)
    ax, ay, az = axis
    length = np.sqrt((dx - share * ax) ** 2 + (dy - share * ay) ** 2 + (dz - share * az) ** 2)
    return np.asarray(length - (np.float32(radii[0]) + share * np.float32(radii[1] - radii[0])))


def union(a: Numbers, b: Numbers, round_mm: Real) -> Numbers:
    """Smooth union of two solids, blended over about `round_mm`."""
    overlap = np.maximum(np.float32(round_mm) - np.abs(a - b), 0)
    return np.asarray(np.minimum(a, b) - overlap * overlap * np.float32(0.25 / round_mm))


def intersection(a: Numbers, b: Numbers, round_mm: Real) -> Numbers:
    """Smooth intersection of two solids."""
    return -union(-a, -b, round_mm)


def _outer_sum(d: np.ndarray, h: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.asarray(d[:, :, None, None] + h[:, None, :, None] + w[:, None, None, :])
