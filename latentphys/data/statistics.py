"""Statistics of a field over many snapshots: one pass, FP64, mergeable.

Each snapshot is reduced about its own mean and merged into the running moments by Chan's formula

    δ = m_b − m_a,    m = m_a + δ n_b/n,    M₂ = M₂ₐ + M₂_b + δ² n_a n_b/n,

so that nothing cancels where the mean is large and the variance small. The moments are kept at the resolution of the
profile, the mean over the homogeneous directions; those of the whole field follow from them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from latentphys.fields import FieldSpec
from latentphys.grid import Geometry, Grid
from latentphys.sphere import Sphere

ARRAYS = ("mean", "m2", "min", "max", "open_count", "open_square")
"""What `RunningStatistics` holds beside its count."""


def homogeneous_axes(domain: Grid | Sphere, has_solids: bool) -> tuple[int, ...]:
    """Spatial axes along which statistics are the same everywhere: the periodic ones of a box without solids, and the
    longitude of a sphere."""
    if isinstance(domain, Sphere):
        return (1,)
    return () if has_solids else tuple(axis for axis, periodic in enumerate(domain.periodic) if periodic)


class RunningStatistics:
    """Moments of one field, updated snapshot by snapshot; those of several workers merge into one.

    Args:
        spec: the field.
        domain: the box or the sphere it lives on.
        has_solids: whether any sample of the set has solid voxels. Then no direction is homogeneous.
        num_components: components per point; default 1 for a scalar, otherwise 3 in a box and 2 on a sphere.
    """

    def __init__(
        self, spec: FieldSpec, domain: Grid | Sphere, has_solids: bool = False, num_components: int | None = None
    ) -> None:
        self.spec, self.domain, self.has_solids = spec, domain, has_solids
        self.shape = domain.shape if isinstance(domain, Grid) else (domain.nlat, domain.nlon)
        self.num_components = num_components or (1 if spec.kind == "scalar" else 3 if isinstance(domain, Grid) else 2)
        self.homogeneous = homogeneous_axes(domain, has_solids)
        self._axes = tuple(range(1, 1 + len(self.shape)))
        self._reduced = tuple(1 + axis for axis in self.homogeneous) or self._axes
        shape = (self.num_components, *(1 if axis in self._reduced else self.shape[axis - 1] for axis in self._axes))
        self._per_snapshot = self.num_components * int(np.prod(self.shape)) // int(np.prod(shape))
        self._share = _shares(domain, int(np.prod(shape[1:])))
        self._count = 0
        self._mean, self._m2 = np.zeros(shape), np.zeros(shape)
        self._min = np.full(self.num_components, np.inf)
        self._max = np.full(self.num_components, -np.inf)
        self._open_count, self._open_square = np.zeros((2, self.num_components))

    def state(self) -> dict[str, Any]:
        """All it holds, JSON-ready; `from_state` gives back the same bit for bit."""
        arrays = {name: getattr(self, f"_{name}") for name in ARRAYS}
        return {"count": self._count, **{name: _text(array) for name, array in arrays.items()}}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        spec: FieldSpec,
        domain: Grid | Sphere,
        has_solids: bool = False,
        num_components: int | None = None,
    ) -> RunningStatistics:
        """What `state` was taken of; the other arguments are those it was made with.

        Raises:
            ValueError: not a state of such statistics.
        """
        running = cls(spec, domain, has_solids, num_components)
        try:
            running._count = int(state["count"])
            for name in ARRAYS:
                array = getattr(running, f"_{name}")
                array[...] = np.frombuffer(base64.b64decode(state[name], validate=True), "<f8").reshape(array.shape)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected the state of statistics of {spec.name!r} on {domain}, got another one ({error})."
            ) from error
        return running

    def update(self, values: Tensor | np.ndarray, geometry: Geometry | None = None) -> None:
        """Add snapshots.

        Args:
            values: one snapshot or several, ``(…, [components,] nx, ny, nz)`` in a box, ``(…, [components,] nlat,
                nlon)`` on a sphere, any float type.
            geometry: the geometry they were made in, unbatched; needed only where there are solids.

        Raises:
            ValueError: values of another shape, or solids in a set that was said to have none.
        """
        numbers = values.detach().cpu().double() if isinstance(values, Tensor) else values
        x = np.asarray(numbers, dtype=np.float64)
        expected = self.shape if self.spec.kind == "scalar" else (self.num_components, *self.shape)
        if x.shape[-len(expected) :] != expected:
            raise ValueError(f"Expected {self.spec.name!r} of shape (…, {str(expected)[1:-1]}), got {x.shape}.")
        if geometry is not None and not geometry.is_empty and not self.has_solids:
            raise ValueError("Expected a box without solids, got solid voxels; pass has_solids=True.")
        for snapshot in x.reshape(-1, self.num_components, *self.shape):
            self._add(snapshot)
            if not self.homogeneous:
                self._add_square(snapshot, geometry)

    def _add(self, x: np.ndarray) -> None:
        """Merge one snapshot ``(components, …)`` into the moments."""
        mean = x.mean(self._reduced, keepdims=True)
        deviation = x - mean
        residual = deviation.mean(self._reduced, keepdims=True)
        np.square(deviation, out=deviation)
        m2 = deviation.sum(self._reduced, keepdims=True) - self._per_snapshot * residual**2
        self._merge_moments(
            self._per_snapshot, mean + residual, np.maximum(m2, 0.0), x.min(self._axes), x.max(self._axes)
        )

    def _add_square(self, x: np.ndarray, geometry: Geometry | None) -> None:
        """Add the squares on open faces (fluxes) or fluid cells (everything else)."""
        if geometry is None or geometry.is_empty:
            self._open_count += int(np.prod(self.shape))
            self._open_square += np.square(x).sum(self._axes)
            return
        mask = (geometry.open_faces if self.spec.kind == "flux" else geometry.fluid).cpu().numpy()
        mask = np.broadcast_to(mask, x.shape)
        self._open_count += mask.sum(self._axes)
        self._open_square += np.square(x).sum(self._axes, where=mask)

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
        mine = (self.spec, self.domain, self.has_solids, self.num_components)
        theirs = (other.spec, other.domain, other.has_solids, other.num_components)
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
            in the unit of the field. ``profile``: the mean over trajectories, times and homogeneous directions, nested
            lists of a shape that broadcasts to (components, nx, ny, nz); where no direction is homogeneous, zero for
            fluxes and vectors and the mean for scalars. ``fluctuation_std``: the root mean square of the field less its
            profile, over everything, or over open faces (fluid cells) where there are solids. A flux is divided by the
            face area first, so that it is a velocity [m/s]. On a sphere every mean is weighted by area.

        Raises:
            ValueError: nothing was added yet.
        """
        if not self._count:
            raise ValueError(f"Expected at least one snapshot of {self.spec.name!r}, got none; call update first.")
        axes, positions, share = self._axes, self._mean[0].size, self._share
        mean = (share * self._mean).sum(axes, keepdims=True)
        variance = (share * (self._m2 / self._count + np.square(self._mean - mean))).sum(axes)
        result: dict[str, Any] = {
            "count": self._count * positions,
            "mean": mean.ravel().tolist(),
            "std": np.sqrt(variance).tolist(),
            "min": self._min.tolist(),
            "max": self._max.tolist(),
        }
        area: np.ndarray | float = 1.0
        if self.spec.kind == "flux" and isinstance(self.domain, Grid):
            area = np.asarray(self.domain.face_areas)
        profile = self._mean if self.homogeneous else np.zeros_like(self._mean)
        if self.homogeneous:
            squares, number = (share * self._m2).sum(axes), np.full(self.num_components, self._count)
        elif self.spec.kind == "scalar":
            profile, squares, number = mean, variance * positions * self._count, np.array([positions * self._count])
        else:
            squares, number = self._open_square, self._open_count
        result["profile"] = profile.tolist()
        result["fluctuation_std"] = float(np.sqrt((squares / area**2).sum() / number.sum()))
        return result


def _shares(domain: Grid | Sphere, positions: int) -> np.ndarray | float:
    """Part of the box's volume, or of the sphere's surface, that each position of the profile stands for."""
    if isinstance(domain, Sphere):
        areas = domain.areas.numpy()
        return areas / areas.sum()
    return 1.0 / positions


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()
