"""Fluxes on coarser and finer grids: restriction that keeps the net of every cell, prolongation that shares it out.

Fluxes are integrals, so the flux through a coarse face is the sum of the fine ones, and the net of a coarse cell the
sum of the nets in it. Nothing has to be projected on the way down, and on the way up only inside each coarse cell.

Reference: for the prolongation, Balsara, J. Comput. Phys. 174 (2001), and Tóth & Roe, J. Comput. Phys. 180 (2002),
who solve the same eight-cell problem with a polynomial.
"""

from __future__ import annotations

import itertools
import math

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from latentphys import operators
from latentphys.grid import SIDES, Geometry, Grid
from latentphys.projection import project

Factor = int | tuple[int, int, int]
"""Fine cells per coarse cell along each axis; a single number leaves axes of one cell alone."""


def coarsen(geometry: Geometry, factor: Factor) -> Geometry:
    """The box on larger cells; solid where all the fine cells are, with the same flow through inflow sides.

    Partly solid cells become fluid, so pores that were apart may come to touch: a restricted flux knows (nothing flows
    through their common face), a projection on the coarse geometry does not.

    Args:
        geometry: the fine box and its solids.
        factor: fine cells per coarse cell, along all axes or each.

    Raises:
        ValueError: a factor that does not divide the grid, or leaves a single cell along an axis that is not periodic.
    """
    grid, (fx, fy, fz) = geometry.grid, _factors(geometry.grid, factor)
    nx, ny, nz = grid.shape
    dx, dy, dz = grid.spacing
    coarse = Grid((nx // fx, ny // fy, nz // fz), (dx * fx, dy * fy, dz * fz), grid.boundaries)
    inflow = dict(geometry.inflow)
    for side, velocity in inflow.items():
        axis, end = divmod(SIDES.index(side), 2)
        fluid = geometry.fluid.select(axis - 3, -end)
        if isinstance(velocity, Tensor) or not bool(fluid.all()):
            values = torch.as_tensor(velocity, dtype=torch.float64)
            values = torch.where(fluid.to(values.device), values, 0.0)
            j, k = (f for a, f in enumerate((fx, fy, fz)) if a != axis)
            inflow[side] = reduce(values, "... (y j) (z k) -> ... y z", "mean", j=j, k=k)
    if geometry.solid is None:
        return Geometry(coarse, None, inflow)
    solid = reduce(geometry.solid, "... (x i) (y j) (z k) -> ... x y z", "all", i=fx, j=fy, k=fz)
    return Geometry(coarse, solid, inflow)


def refine(geometry: Geometry, factor: Factor) -> Geometry:
    """The same box, solids and inflow on smaller cells.

    Args:
        geometry: the coarse box and its solids.
        factor: fine cells per coarse cell, along all axes or each.

    Raises:
        ValueError: a factor below 1.
    """
    grid, factors = geometry.grid, _three(geometry.grid, factor)
    (nx, ny, nz), (dx, dy, dz), (fx, fy, fz) = grid.shape, grid.spacing, factors
    fine = Grid((nx * fx, ny * fy, nz * fz), (dx / fx, dy / fy, dz / fz), grid.boundaries)
    inflow = dict(geometry.inflow)
    for side, velocity in inflow.items():
        if isinstance(velocity, Tensor) and velocity.ndim:
            j, k = (f for a, f in enumerate(factors) if a != SIDES.index(side) // 2)
            inflow[side] = velocity.repeat_interleave(j, -2).repeat_interleave(k, -1)
    if geometry.solid is None:
        return Geometry(fine, None, inflow)
    solid = geometry.solid
    for axis, times in enumerate(factors):
        solid = solid.repeat_interleave(times, axis - 3)
    return Geometry(fine, solid, inflow)


def restrict(
    flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid, factor: Factor
) -> Float[Tensor, "*batch 3 mx my mz"]:
    """Flux through each coarse face: the sum of the fine fluxes through it. Exact, not an approximation.

    The net of a coarse cell is the sum of the nets of its fine cells. After `exact.conserve` it is 0.0 bit for bit as
    well: sums of multiples of its quantum q have no rounding error while Σ|F| over each coarse face stays below 2⁵² q.
    Fine fluxes stay below 2⁴⁶ q, so up to 63 fine faces per coarse face are safe whatever the flow: every factor up to
    7, powers of two or not, and in practice 8. With larger ones it depends on the flow, and `exact.conserve` on the
    coarse grid restores what rounding took. Fluxes of `exact.quantise` have that room in FP64 only.

    Args:
        flux: through the low faces of the fine grid [m³/s].
        grid: the fine box.
        factor: fine cells per coarse cell, along all axes or each.

    Returns:
        The flux through the low faces of ``coarsen(Geometry(grid), factor).grid`` [m³/s], differentiable.

    Raises:
        ValueError: a factor that does not divide the grid, or another shape than the grid's.
    """
    operators.check_shape(flux, grid, components=True)
    factors = _factors(grid, factor)
    components = []
    for axis, stride in enumerate(factors):
        i, j, k = (1 if a == axis else f for a, f in enumerate(factors))
        first = torch.arange(0, grid.shape[axis], stride, device=flux.device)
        low = flux[..., axis, :, :, :].index_select(axis - 3, first)
        components.append(reduce(low, "... (x i) (y j) (z k) -> ... x y z", "sum", i=i, j=j, k=k))
    return torch.stack(components, dim=-4)


def prolong(
    flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid, factor: int = 2, geometry: Geometry | None = None
) -> Float[Tensor, "*batch 3 mx my mz"]:
    """Flux on smaller cells, each with its share of the coarse net; second order where the flow is smooth.

    Every doubling shares each coarse flux among four faces, with linear slopes that sum to zero (central differences,
    one-sided at the sides of the box). The faces inside a coarse cell start from the mean of the two opposite them and
    are corrected by the orthogonal projection in that cell alone, an 8-cell Poisson problem with a closed rim. So
    ``restrict(prolong(F)) == F`` to rounding, and bit for bit after `exact.conserve` for factor 2, and a net of zero
    stays zero to rounding; `exact.conserve` makes it 0.0. On the faces that were there the velocity errs by

        ± h_b h_c/16 ∂_b∂_c u_a + O(h³)        (h the coarse spacing; b, c in the face),

    O(h²) too at the sides of the box; inside the coarse cells by O(h²).

    With solids or a prescribed inflow on the fine grid the result is masked and projected over the whole box. Then the
    nets are zero to the tolerance of `projection.project`, but the coarse fluxes are no longer kept. The flux through
    open high sides, which is not stored, is taken from `operators.high_faces`.

    Args:
        flux: through the low faces of the coarse grid [m³/s].
        grid: the coarse box.
        factor: fine cells per coarse cell along each axis of more than one cell, a power of two. Default 2.
        geometry: the fine box, its solids and its inflow. Default: neither.

    Returns:
        The flux through the low faces of ``refine(Geometry(grid), factor).grid`` [m³/s], differentiable.

    Raises:
        ValueError: a factor that is no power of two, a fine geometry of another box, or another shape than the grid's.
    """
    operators.check_shape(flux, grid, components=True)
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"Expected a power of two as factor, got {factor}; prolong to the next one and restrict.")
    fine = refine(Geometry(grid), factor).grid
    if geometry is not None and geometry.grid != fine:
        raise ValueError(f"Expected a fine geometry on {fine}, got one on {geometry.grid}.")
    while grid != fine:
        flux, grid = _doubled(flux, grid), refine(Geometry(grid), 2).grid
    if geometry is None or (geometry.is_empty and not geometry.inflow):
        return flux
    return project(flux, geometry)


def _doubled(flux: Tensor, grid: Grid) -> Tensor:
    """One doubling: the faces on coarse faces by slopes, those inside coarse cells by the local projection."""
    above, factors = operators.high_faces(flux, grid), _three(grid, 2)
    low, high = [], []
    for axis, n in enumerate(grid.shape):
        dim = axis - 3
        planes = torch.cat([flux[..., axis, :, :, :], above[..., axis, :, :, :].narrow(dim, n - 1, 1)], dim)
        planes = _shared(planes, axis, grid)
        low.append(planes.narrow(dim, 0, n))
        high.append(planes.narrow(dim, 1, n))
    # with the middle faces at the mean, both halves of a cell have half of what leaves it along that axis
    x, y, z = (((high[axis] - low[axis]) / f).repeat_interleave(f, axis - 3) for axis, f in enumerate(factors))
    i, j, k = factors
    cells = rearrange(x + y + z, "... (x i) (y j) (z k) -> ... x y z (i j k)", i=i, j=j, k=k)
    potential = cells @ _cell_poisson(grid, factors).to(flux)
    potential = rearrange(potential, "... x y z (i j k) -> ... (x i) (y j) (z k)", i=i, j=j, k=k)
    components = []
    for axis, (n, metric) in enumerate(zip(grid.shape, grid.conductances, strict=True)):
        if factors[axis] == 1:
            components.append(low[axis])
            continue
        dim = axis - 3
        halves = potential.unflatten(dim, (n, 2))
        difference = halves.select(dim, 1) - halves.select(dim, 0)
        middle = (low[axis] + high[axis]) / 2 - metric * difference
        components.append(torch.stack([low[axis], middle], dim).flatten(dim - 1, dim))
    return torch.stack(components, dim=-4)


def _shared(planes: Tensor, normal: int, grid: Grid) -> Tensor:
    """An equal share of each flux for each of its fine faces, four in 3D, and what linear slopes move between these."""
    tangential = [axis for axis in range(3) if axis != normal and grid.shape[axis] > 1]
    fine = _twice(planes, *tangential)
    for axis in tangential:
        n = grid.shape[axis]
        # the fine faces stand a quarter of a coarse face off its middle
        place = torch.tensor([-0.25, 0.25], dtype=planes.dtype, device=planes.device).repeat(n)
        place = place.reshape([2 * n if a == axis else 1 for a in range(3)])
        fine = fine + place * _twice(_slope(planes, axis, grid), *tangential)
    return fine / 2 ** len(tangential)


def _slope(x: Tensor, axis: int, grid: Grid) -> Tensor:
    """Change from one coarse face to the next: central, and one-sided at the sides of the box."""
    dim, n = axis - 3, grid.shape[axis]
    if grid.periodic[axis]:
        return (x.roll(-1, dim) - x.roll(1, dim)) / 2
    step = x.diff(dim=dim)
    inner = (step.narrow(dim, 0, n - 2) + step.narrow(dim, 1, n - 2)) / 2
    return torch.cat([step.narrow(dim, 0, 1), inner, step.narrow(dim, n - 2, 1)], dim)


def _twice(x: Tensor, *axes: int) -> Tensor:
    for axis in axes:
        x = x.repeat_interleave(2, axis - 3)
    return x


def _cell_poisson(grid: Grid, factors: tuple[int, int, int]) -> Float[Tensor, "n n"]:
    """Pseudo-inverse of div · metric · grad on the 2 × 2 × 2 cells of a coarse one with a closed rim, or on the 4 or 2
    where it is one cell thick; from its eigenvectors (Haar).
    """
    haar = {1: torch.ones(1, 1, dtype=torch.float64), 2: torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)}
    i, j, k = factors
    vectors = torch.kron(torch.kron(haar[i], haar[j]), haar[k])
    modes = itertools.product(*(range(f) for f in factors))
    values = torch.tensor(
        [-2 * sum(c * m for c, m in zip(grid.conductances, mode, strict=True)) for mode in modes], dtype=torch.float64
    )
    inverse = torch.where(values == 0, 0.0, 1 / values)
    return vectors * inverse @ vectors / math.prod(factors)


def _three(grid: Grid, factor: Factor) -> tuple[int, int, int]:
    fx, fy, fz = factor if isinstance(factor, tuple) else (factor if n > 1 else min(factor, 1) for n in grid.shape)
    if min(fx, fy, fz) < 1:
        raise ValueError(f"Expected a factor of at least 1 along each axis, got {factor}.")
    return fx, fy, fz


def _factors(grid: Grid, factor: Factor) -> tuple[int, int, int]:
    """The factor of each axis, checked against the grid."""
    factors = _three(grid, factor)
    if any(n % f for n, f in zip(grid.shape, factors, strict=True)):
        raise ValueError(f"Expected a factor that divides the grid {grid.shape}, got {factor}.")
    return factors
