"""Statistics of a field over many snapshots: one pass, FP64, mergeable.

Each snapshot is reduced about its own mean and merged into the running moments by Chan's formula

    δ = m_b − m_a,    m = m_a + δ n_b/n,    M₂ = M₂ₐ + M₂_b + δ² n_a n_b/n,

so that nothing cancels where the mean is large and the variance small. The moments are kept at the resolution of the
profile, the mean over the homogeneous directions; those of the whole field follow from them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid


def homogeneous_axes(grid: Grid, has_solids: bool) -> tuple[int, ...]:
    """Spatial axes along which statistics are the same everywhere: the periodic ones of a box without solids."""
    return () if has_solids else tuple(axis for axis, periodic in enumerate(grid.periodic) if periodic)


class RunningStatistics:
    """Moments of one field, updated snapshot by snapshot; those of several workers merge into one.

    Args:
        spec: the field.
        grid: the box it lives on.
        has_solids: whether any sample of the set has solid voxels. Then no direction is homogeneous.
        num_components: components per point; default 1 for a scalar and 3 otherwise.
    """

    def __init__(
        self, spec: FieldSpec, grid: Grid, has_solids: bool = False, num_components: int | None = None
    ) -> None:
        self.spec, self.grid, self.has_solids = spec, grid, has_solids
        self.num_components = num_components or (1 if spec.kind == "scalar" else 3)
        self.homogeneous = homogeneous_axes(grid, has_solids)
        self._reduced = tuple(1 + axis for axis in self.homogeneous or (0, 1, 2))
        shape = (self.num_components, *(1 if 1 + axis in self._reduced else n for axis, n in enumerate(grid.shape)))
        self._per_snapshot = self.num_components * grid.num_cells // int(np.prod(shape))
        self._count = 0
        self._mean, self._m2 = np.zeros(shape), np.zeros(shape)
        self._min = np.full(self.num_components, np.inf)
        self._max = np.full(self.num_components, -np.inf)
        self._open_count, self._open_square = np.zeros((2, self.num_components))

    def update(self, values: Tensor | np.ndarray, geometry: Geometry | None = None) -> None:
        """Add snapshots.

        Args:
            values: one snapshot or several, ``(…, [components,] nx, ny, nz)``, any float type.
            geometry: the geometry they were made in, unbatched; needed only where there are solids.

        Raises:
            ValueError: values of another shape, or solids in a set that was said to have none.
        """
        numbers = values.detach().cpu().double() if isinstance(values, Tensor) else values
        x = np.asarray(numbers, dtype=np.float64)
        expected = self.grid.shape if self.spec.kind == "scalar" else (self.num_components, *self.grid.shape)
        if x.shape[-len(expected) :] != expected:
            raise ValueError(f"Expected {self.spec.name!r} of shape (…, {str(expected)[1:-1]}), got {x.shape}.")
        if geometry is not None and not geometry.is_empty and not self.has_solids:
            raise ValueError("Expected a box without solids, got solid voxels; pass has_solids=True.")
        for snapshot in x.reshape(-1, self.num_components, *self.grid.shape):
            self._add(snapshot)
            if not self.homogeneous:
                self._add_square(snapshot, geometry)

    def _add(self, x: np.ndarray) -> None:
        """Merge one snapshot ``(components, nx, ny, nz)`` into the moments."""
        mean = x.mean(self._reduced, keepdims=True)
        deviation = x - mean
        residual = deviation.mean(self._reduced, keepdims=True)
        np.square(deviation, out=deviation)
        m2 = deviation.sum(self._reduced, keepdims=True) - self._per_snapshot * residual**2
        self._merge_moments(self._per_snapshot, mean + residual, m2, x.min((1, 2, 3)), x.max((1, 2, 3)))

    def _add_square(self, x: np.ndarray, geometry: Geometry | None) -> None:
        """Add the squares on open faces (fluxes) or fluid cells (everything else)."""
        if geometry is None or geometry.is_empty:
            self._open_count += self.grid.num_cells
            self._open_square += np.square(x).sum((1, 2, 3))
            return
        mask = (geometry.open_faces if self.spec.kind == "flux" else geometry.fluid).cpu().numpy()
        mask = np.broadcast_to(mask, x.shape)
        self._open_count += mask.sum((1, 2, 3))
        self._open_square += np.square(x).sum((1, 2, 3), where=mask)

    def _merge_moments(self, count: int, mean: np.ndarray, m2: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        total = self._count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._m2 = self._m2 + m2 + np.square(delta) * (self._count * (count / total))
        self._count = total
        self._min, self._max = np.minimum(self._min, low), np.maximum(self._max, high)

    def merge(self, other: RunningStatistics) -> None:
        """Add what another worker has seen of the same field.

        Raises:
            ValueError: statistics of another field or box.
        """
        mine = (self.spec, self.grid, self.has_solids, self.num_components)
        theirs = (other.spec, other.grid, other.has_solids, other.num_components)
        if mine != theirs:
            raise ValueError(f"Expected statistics of the same field and box, got {mine} and {theirs}.")
        if other._count:
            self._merge_moments(other._count, other._mean, other._m2, other._min, other._max)
            self._open_count = self._open_count + other._open_count
            self._open_square = self._open_square + other._open_square

    def summary(self) -> dict[str, Any]:
        """The statistics so far, JSON-ready.

        Returns:
            ``count``: values per component. ``mean``, ``std``, ``min``, ``max``: per component, over all stored values,
            in the unit of the field. For fluxes and vectors also ``profile``: the mean over trajectories, times and
            homogeneous directions, nested lists of a shape that broadcasts to (components, nx, ny, nz), zero where no
            direction is homogeneous; and ``fluctuation_std``: the root mean square of the field less its profile, over
            everything, or over open faces (fluid cells) where there are solids. A flux is divided by the face area
            first, so that it is a velocity [m/s].

        Raises:
            ValueError: nothing was added yet.
        """
        if not self._count:
            raise ValueError(f"Expected at least one snapshot of {self.spec.name!r}, got none; call update first.")
        axes = (1, 2, 3)
        positions = self._mean[0].size
        mean = self._mean.mean(axes, keepdims=True)
        m2 = self._m2.sum(axes) + self._count * np.square(self._mean - mean).sum(axes)
        result: dict[str, Any] = {
            "count": self._count * positions,
            "mean": mean.ravel().tolist(),
            "std": np.sqrt(m2 / (self._count * positions)).tolist(),
            "min": self._min.tolist(),
            "max": self._max.tolist(),
        }
        if self.spec.kind != "scalar":
            area = np.asarray(self.grid.face_areas) if self.spec.kind == "flux" else np.ones(self.num_components)
            if self.homogeneous:
                squares, number = self._m2.sum(axes), np.full(self.num_components, self._count * positions)
            else:
                squares, number = self._open_square, self._open_count
            result["profile"] = (self._mean if self.homogeneous else np.zeros_like(self._mean)).tolist()
            result["fluctuation_std"] = float(np.sqrt((squares / area**2).sum() / number.sum()))
        return result
