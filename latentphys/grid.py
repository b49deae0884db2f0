"""Boxes of cells: their size, their boundaries and the solid voxels inside them.

Everything in the library lives on a staggered (MAC) complex over such a box. A cell (i, j, k) owns its three
*low* faces and its three *low* edges, so that fluxes and potentials are arrays of shape ``(…, 3, nx, ny, nz)``:

    face  a of cell i: normal to axis a, between cell i − e_a and cell i
    edge  a of cell i: parallel to axis a, at the low corner of cell i

On a periodic axis the high face of the last cell is face 0. On a wall the low face 0 and the (unstored) high
face are closed: nothing flows through them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

Boundary = Literal["periodic", "no_slip", "free_slip"]
BOUNDARIES: tuple[Boundary, ...] = ("periodic", "no_slip", "free_slip")
Boundaries = tuple[tuple[Boundary, Boundary], tuple[Boundary, Boundary], tuple[Boundary, Boundary]]
PERIODIC: Boundaries = (("periodic", "periodic"),) * 3


@dataclass(frozen=True)
class Grid:
    """A box of ``nx × ny × nz`` cells.

    Args:
        shape: number of cells per axis, each ≥ 2.
        spacing: cell size per axis (dx, dy, dz) [m], > 0; the three may differ.
        boundaries: per axis the (low, high) pair, each ``periodic | no_slip | free_slip``. Default: periodic.

    Raises:
        ValueError: a shape, spacing or boundary that no box can have.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    boundaries: Boundaries = PERIODIC

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "spacing", tuple(float(h) for h in self.spacing))
        object.__setattr__(self, "boundaries", tuple(tuple(pair) for pair in self.boundaries))
        if len(self.shape) != 3 or min(self.shape) < 2:
            raise ValueError(f"Expected a shape of three axes with at least 2 cells each, got {self.shape}.")
        if len(self.spacing) != 3 or not all(np.isfinite(h) and h > 0 for h in self.spacing):
            raise ValueError(f"Expected three positive, finite spacings [m], got {self.spacing}.")
        if len(self.boundaries) != 3 or any(len(pair) != 2 for pair in self.boundaries):
            raise ValueError(f"Expected a (low, high) boundary pair for each of three axes, got {self.boundaries}.")
        for axis, pair in zip("xyz", self.boundaries, strict=True):
            for name in pair:
                if name not in BOUNDARIES:
                    raise ValueError(f"Expected a boundary of {' | '.join(BOUNDARIES)} on axis {axis}, got {name!r}.")
            if (pair[0] == "periodic") != (pair[1] == "periodic"):
                raise ValueError(f"Expected 'periodic' on both sides of axis {axis} or on neither, got {pair}.")

    @property
    def periodic(self) -> tuple[bool, bool, bool]:
        """Whether each axis is periodic."""
        x, y, z = (pair[0] == "periodic" for pair in self.boundaries)
        return x, y, z

    @property
    def num_cells(self) -> int:
        return int(np.prod(self.shape))

    @property
    def lengths(self) -> tuple[float, float, float]:
        """Edge lengths of the box [m]."""
        x, y, z = (n * h for n, h in zip(self.shape, self.spacing, strict=True))
        return x, y, z

    @property
    def cell_volume(self) -> float:
        """Volume of a cell [m³]."""
        return float(np.prod(self.spacing))

    @property
    def face_areas(self) -> tuple[float, float, float]:
        """Area of a face normal to each axis [m²]."""
        dx, dy, dz = self.spacing
        return dy * dz, dx * dz, dx * dy

    def per_face(self, values: tuple[float, float, float], like: Tensor) -> Float[Tensor, "3 1 1 1"]:
        """Three per-axis numbers as a tensor that multiplies a flux."""
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(3, 1, 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""
        return {
            "shape": list(self.shape),
            "spacing": list(self.spacing),
            "boundaries": [list(p) for p in self.boundaries],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: a missing entry or an impossible grid.
        """
        try:
            boundaries: Any = tuple(tuple(pair) for pair in data["boundaries"])
            return cls(tuple(data["shape"]), tuple(data["spacing"]), boundaries)
        except (KeyError, TypeError) as error:
            raise ValueError(f"Expected a grid with shape, spacing and boundaries, got {dict(data)!r}.") from error


@dataclass(frozen=True, eq=False)
class Geometry:
    """A grid and the solid voxels in it.

    Args:
        grid: the box.
        solid: boolean voxels, True where solid, shape ``(*batch, nx, ny, nz)``; None for an empty box. Batch axes
            broadcast against the leading axes of the fields, so a set of samples can carry one geometry each.

    Raises:
        ValueError: voxels of another shape or type than the grid's, or a box without a single fluid cell.
    """

    grid: Grid
    solid: Bool[Tensor, "*batch nx ny nz"] | None = None

    def __post_init__(self) -> None:
        if self.solid is None:
            return
        solid = torch.as_tensor(self.solid)
        if solid.dtype != torch.bool:
            raise ValueError(f"Expected boolean solid voxels, got {solid.dtype}; pass `solid > 0.5` or the like.")
        if tuple(solid.shape[-3:]) != self.grid.shape:
            raise ValueError(f"Expected solid voxels of shape (…, {self.grid.shape}), got {tuple(solid.shape)}.")
        if bool(solid.flatten(-3).all(-1).any()):
            raise ValueError("Expected at least one fluid cell in every sample, got a box that is solid throughout.")
        object.__setattr__(self, "solid", solid if bool(solid.any()) else None)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of `solid`; empty where one geometry serves every sample."""
        return () if self.solid is None else tuple(self.solid.shape[:-3])

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no solid."""
        return self.solid is None

    def to(self, device: torch.device | str) -> Geometry:
        """The same geometry on another device."""
        return self if self.solid is None else Geometry(self.grid, self.solid.to(device))

    def __getitem__(self, index: Any) -> Geometry:
        """The geometry of some samples of a batch; an unbatched geometry is everybody's."""
        return self if not self.batch_shape else Geometry(self.grid, self.solid[index])  # type: ignore[index]

    @classmethod
    def stack(cls, geometries: Sequence[Geometry]) -> Geometry:
        """One batch from the geometries of several samples; what each has worked out about itself is kept.

        Raises:
            ValueError: samples on different grids.
        """
        grid = geometries[0].grid
        if any(g.grid != grid for g in geometries):
            raise ValueError("Expected samples on one grid, got several; batch each grid by itself.")
        if all(g.is_empty for g in geometries):
            return geometries[0]
        batch = cls(grid, torch.stack([~g.fluid for g in geometries]))
        for name in ("open_faces", "wall_distance"):
            batch.__dict__[name] = torch.stack([getattr(g, name) for g in geometries])
        return batch

    @cached_property
    def fluid(self) -> Bool[Tensor, "*batch nx ny nz"]:
        """True in the cells that fluid fills."""
        return torch.ones(self.grid.shape, dtype=torch.bool) if self.solid is None else ~self.solid

    @cached_property
    def open_faces(self) -> Bool[Tensor, "*batch 3 nx ny nz"]:
        """True on the faces through which something can flow: no wall of the box, and fluid on both sides."""
        fluid = self.fluid
        faces = torch.stack([fluid & fluid.roll(1, dims=axis - 3) for axis in range(3)], dim=-4)
        for axis, periodic in enumerate(self.grid.periodic):
            if not periodic:
                faces.select(-4, axis).select(axis - 3, 0).fill_(False)
        return faces

    def mask(self, flux: Float[Tensor, "*batch 3 nx ny nz"]) -> Float[Tensor, "*batch 3 nx ny nz"]:
        """The flux with nothing through walls and solids."""
        return torch.where(self.open_faces.to(flux.device), flux, 0.0)

    @cached_property
    def porosity(self) -> Float[Tensor, "*batch"]:
        """Share of the box that is fluid, 0…1."""
        return self.fluid.double().mean((-3, -2, -1))

    @cached_property
    def wall_distance(self) -> Float[Tensor, "*batch nx ny nz"]:
        """Distance of each fluid cell's centre to the nearest no-slip surface [m]; 0 in solids.

        Euclidean to the centre of the nearest solid voxel less half a cell, and to the no-slip sides of the box; at
        most half the shortest side of the box, which is also what it is where there is no such surface at all.
        """
        from scipy.ndimage import distance_transform_edt

        grid, far = self.grid, 0.5 * min(self.grid.lengths)
        distance = torch.full((*self.batch_shape, *grid.shape), far, dtype=torch.float64)
        for axis, (low, high) in enumerate(grid.boundaries):
            centres = (torch.arange(grid.shape[axis], dtype=torch.float64) + 0.5) * grid.spacing[axis]
            along = [-1 if a == axis else 1 for a in range(3)]
            if low == "no_slip":
                distance = torch.minimum(distance, centres.reshape(along))
            if high == "no_slip":
                distance = torch.minimum(distance, (grid.lengths[axis] - centres).reshape(along))
        if self.solid is not None:
            margin = [n // 2 if periodic else 0 for n, periodic in zip(grid.shape, grid.periodic, strict=True)]
            inner = tuple(slice(m, m + n) for m, n in zip(margin, grid.shape, strict=True))
            to_solid = np.full((math.prod(self.batch_shape), *grid.shape), np.inf)
            for nearest, solid in zip(to_solid, self.solid.reshape(to_solid.shape).cpu().numpy(), strict=True):
                if solid.any():
                    images = np.pad(~solid, [(m, m) for m in margin], mode="wrap")
                    nearest[:] = distance_transform_edt(images, sampling=grid.spacing)[inner]
            beyond = torch.from_numpy(to_solid).reshape(distance.shape) - 0.5 * min(grid.spacing)
            distance = torch.minimum(distance, beyond.clamp(min=0.0))
        return distance
