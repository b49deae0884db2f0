"""The discrete exterior derivative on a staggered box: grad, curl, div, and what they make of a flow.

All three are incidence relations with coefficients ±1 on *integrated* quantities, so no spacing appears in them:

    potential (edges) [m³/s] --curl--> flux (faces) [m³/s] --div--> net flux (cells) [m³/s]
    scalar (cells)           --grad--> difference across faces,            grad = −divᵀ

``div(curl A) = 0`` holds identically: each edge enters a cell's sum twice with opposite signs. Spacings enter only
where a flux becomes a velocity (`velocity`), by division with the face area.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from latentphys.grid import Grid


def shift(x: Tensor, axis: int, offset: int, grid: Grid) -> Tensor:
    """``x`` at index i + offset (offset ±1) along spatial axis 0, 1 or 2: periodic, or zero beyond the box."""
    dim = axis - 3
    if grid.periodic[axis]:
        return x.roll(-offset, dims=dim)
    zero = torch.zeros_like(x.narrow(dim, 0, 1))
    n = x.shape[dim]
    if offset == 1:
        return torch.cat([x.narrow(dim, 1, n - 1), zero], dim=dim)
    return torch.cat([zero, x.narrow(dim, 0, n - 1)], dim=dim)


def check_shape(x: Tensor, grid: Grid, components: bool) -> None:
    """Raise ValueError where the last axes are not the grid's, with three components before them or without."""
    expected = (3, *grid.shape) if components else grid.shape
    if tuple(x.shape[-len(expected) :]) != expected:
        wanted = "(…, 3, nx, ny, nz)" if components else "(…, nx, ny, nz)"
        raise ValueError(f"Expected a field of shape {wanted} = (…, {str(expected)[1:-1]}), got {tuple(x.shape)}.")


def _zero_low_wall(x: Tensor, axis: int, grid: Grid) -> Tensor:
    """``x`` with zero at index 0 of an axis that begins with a wall."""
    if grid.periodic[axis] or grid.open_sides[axis][0]:
        return x
    dim = axis - 3
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 1, x.shape[dim] - 1)], dim=dim)


def div(flux: Num[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Num[Tensor, "*batch nx ny nz"]:
    """Net flux out of each cell [m³/s], or in the units of an integer flux: Σ_a F_a(i + e_a) − F_a(i).

    The result is the cell integral of the divergence; divide by ``grid.cell_volume`` for ∇·u [1/s]. A flux through
    the low wall counts, so that an inadmissible field shows. In the last cells before an open high side the net is zero
    by definition: the flux through the side is what closes their balance (`high_faces`, `inflow.through_sides`).
    """
    return zero_last_cells(stored_div(flux, grid), [high for _, high in grid.open_sides])


def stored_div(flux: Num[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Num[Tensor, "*batch nx ny nz"]:
    """`div` of the faces that are stored: before an open high side, minus what flows out through that side."""
    check_shape(flux, grid, components=True)
    parts = [shift(flux[..., a, :, :, :], a, 1, grid) - flux[..., a, :, :, :] for a in range(3)]
    return parts[0] + parts[1] + parts[2]


def zero_last_cells(scalar: Tensor, axes: Sequence[bool]) -> Tensor:
    """A scalar in cells, in place, with zero in the last cells along some of the three axes."""
    for axis, is_closed_by_definition in enumerate(axes):
        if is_closed_by_definition:
            scalar.select(axis - 3, -1).zero_()
    return scalar


def high_faces(flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Flux through the high face of each cell.

    Those of open high sides are what closes the balance of the last cells. A cell with several of them shares it as a
    uniform pressure behind them would, in proportion to face area / cell size.
    """
    faces = torch.stack([shift(flux[..., a, :, :, :], a, 1, grid) for a in range(3)], dim=-4)
    if not any(high for _, high in grid.open_sides):
        return faces
    share = torch.zeros_like(faces)
    for axis, (_, high) in enumerate(grid.open_sides):
        if high:
            share.select(-4, axis).select(axis - 3, -1).fill_(grid.conductances[axis])
    share = share / share.sum(-4, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return faces - share * stored_div(flux, grid).unsqueeze(-4)


def grad(scalar: Float[Tensor, "*batch nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Difference of a cell scalar across low faces, p(i) − p(i − e_a), zero on walls: minus the adjoint of `div`.

    Beyond an open low side the scalar counts as zero. Where a high side is open, it is the adjoint for scalars that
    vanish in the last cells before it, whose balance `div` leaves out.
    """
    check_shape(scalar, grid, components=False)
    return torch.stack([_zero_low_wall(scalar - shift(scalar, a, -1, grid), a, grid) for a in range(3)], dim=-4)


def curl(potential: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Flux through each face from the circulation of a vector potential round it (Stokes).

    ``potential`` holds ∫A·dl along each low edge [m³/s]; it counts as zero on the edges that lie in a wall, so nothing
    flows through walls, and continues unchanged beyond an open high side. ``div(curl(A)) = 0`` identically, in floating
    point to the rounding of three additions.
    """
    check_shape(potential, grid, components=True)
    a = []
    for component in range(3):
        edge = potential[..., component, :, :, :]
        for axis in range(3):
            if axis != component:
                edge = _zero_low_wall(edge, axis, grid)
        a.append(edge)

    def d(edge: Tensor, axis: int) -> Tensor:
        difference = shift(edge, axis, 1, grid) - edge
        if grid.open_sides[axis][1]:
            difference.select(axis - 3, -1).zero_()
        return difference

    return torch.stack([d(a[2], 1) - d(a[1], 2), d(a[0], 2) - d(a[2], 0), d(a[1], 0) - d(a[0], 1)], dim=-4)


def velocity(flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Normal velocity on each low face [m/s]: flux over face area."""
    return flux / grid.per_face(grid.face_areas, flux)


def flux_of(velocity: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Flux through each low face [m³/s] from the normal velocity on it [m/s]. The inverse of `velocity`."""
    return velocity * grid.per_face(grid.face_areas, velocity)


def cell_velocity(flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Velocity at cell centres [m/s], the mean of the two faces of each axis; second order. For pictures and export."""
    return velocity(0.5 * (flux + high_faces(flux, grid)), grid)


def mean_velocity(flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3"]:
    """Superficial velocity [m/s]: the mean over all faces of each axis, solids included."""
    return velocity(flux, grid).mean((-3, -2, -1))


def kinetic_energy(flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch"]:
    """Kinetic energy per unit mass, averaged over the box: ½⟨u·u⟩ on the low faces [m²/s²]."""
    return 0.5 * velocity(flux, grid).square().mean((-3, -2, -1)).sum(-1)


def vorticity(flux: Float[Tensor, "*batch 3 nx ny nz"], grid: Grid) -> Float[Tensor, "*batch 3 nx ny nz"]:
    """Vorticity on each low edge [1/s], from the face velocities around it; second order away from walls.

    On the edges of a wall it is one-sided and counts the wall as at rest; across an open low side nothing changes.
    """
    u = velocity(flux, grid)

    def d(component: int, axis: int) -> Tensor:
        face = u[..., component, :, :, :]
        difference = (face - shift(face, axis, -1, grid)) / grid.spacing[axis]
        if grid.open_sides[axis][0]:
            difference.select(axis - 3, 0).zero_()
        return difference

    return torch.stack([d(2, 1) - d(1, 2), d(0, 2) - d(2, 0), d(1, 0) - d(0, 1)], dim=-4)
