"""Shifts, reflections and rotations of a box, exact to the last bit on the staggered complex.

A reflection turns cell i into n − 1 − i, so that low faces become high ones: what is stored on the low faces along the
reflected axis moves by one more, to index (n − i) mod n. On a periodic axis that goes round; between walls the low one
stands in for the high one, and nothing flows through either.

    reflection of axis a      x_a → −x_a:  F_a changes sign; of a potential, which is axial, the other two do
    quarter turn from a to b  e_a → e_b, e_b → −e_a:  axes a and b exchanged, then axis a reflected

Both move numbers and change signs, nothing else, so a reflection is its own inverse and four quarter turns are none.
They commute with `operators.curl` bit for bit, and with `operators.div` too, but for the order of its three additions
after a turn: where these are exact, as after `exact.conserve`, a net flux of 0.0 stays 0.0. Sides move with the cells:
of a box with two different walls comes the box with the walls exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from latentphys.grid import SIDES, Geometry, Grid

Placement = Literal["flux", "scalar", "vector", "potential"]
"""Where numbers stand: on low faces, in cells (one or three components), or on low edges (axial)."""
PLACEMENTS: tuple[Placement, ...] = ("flux", "scalar", "vector", "potential")
SPACE = (-3, -2, -1)


def shift(field: Tensor, grid: Grid, cells: Sequence[int]) -> Tensor:
    """A field moved by whole cells along periodic axes, x(i) → x(i − cells); of any placement.

    Args:
        field: flux, potential, vector or scalar, shape (…, nx, ny, nz).
        grid: the box.
        cells: cells per axis, of any sign; 0 along axes that are not periodic.

    Raises:
        ValueError: a shift along an axis with sides, or other than three numbers of cells.
    """
    if len(cells) != 3:
        raise ValueError(f"Expected a number of cells for each of three axes, got {tuple(cells)}.")
    for axis, (by, is_periodic) in enumerate(zip(cells, grid.periodic, strict=True)):
        if by and not is_periodic:
            raise ValueError(
                f"Expected a shift along periodic axes, got {by} cells along {'xyz'[axis]}; shift it by 0."
            )
    return field.roll(tuple(cells), SPACE)


def shift_geometry(geometry: Geometry, cells: Sequence[int]) -> Geometry:
    """The box with its solids moved as `shift` moves fields.

    Raises:
        ValueError: as `shift`, or a prescribed inflow.
    """
    _check_inflow(geometry)
    return Geometry(geometry.grid, shift(~geometry.fluid, geometry.grid, cells))


def reflect(field: Tensor, geometry: Geometry, axis: int, placement: Placement = "flux") -> Tensor:
    """The mirror image of a field along an axis; twice is the field itself, bit for bit.

    Args:
        field: shape (…, 3, nx, ny, nz), or (…, nx, ny, nz) for a scalar. A flux must have nothing on closed faces.
        geometry: the box it lives in; that of the result is `reflect_geometry` of it.
        axis: 0, 1 or 2.
        placement: ``flux`` (default), ``scalar``, ``vector`` (in cells) or ``potential`` (on edges).

    Raises:
        ValueError: an axis with an open side, whose high faces are not stored, or no such axis or placement.
    """
    _check_axes(axis)
    _check_placement(placement)
    _check_sides(geometry.grid, axis)
    dim = axis - 3
    if placement == "scalar":
        return field.flip(dim)
    components = []
    for component, x in enumerate(field.unbind(-4)):
        is_normal = component == axis
        is_staggered = is_normal if placement == "flux" else placement == "potential" and not is_normal
        mirrored = x.flip(dim).roll(1, dim) if is_staggered else x.flip(dim)
        components.append(-mirrored if is_normal != (placement == "potential") else mirrored)
    return torch.stack(components, dim=-4)


def reflect_geometry(geometry: Geometry, axis: int) -> Geometry:
    """The mirror image of a box along an axis: its solids, and its two sides exchanged.

    Raises:
        ValueError: no such axis, or a prescribed inflow.
    """
    _check_axes(axis)
    _check_inflow(geometry)
    grid = geometry.grid
    x, y, z = (pair[::-1] if a == axis else pair for a, pair in enumerate(grid.boundaries))
    return Geometry(Grid(grid.shape, grid.spacing, (x, y, z)), (~geometry.fluid).flip(axis - 3))


def rotate(field: Tensor, geometry: Geometry, plane: tuple[int, int], placement: Placement = "flux") -> Tensor:
    """A field after a quarter turn in a plane, from its first axis to its second; four are none, bit for bit.

    Args:
        field: shape (…, 3, nx, ny, nz), or (…, nx, ny, nz) for a scalar. A flux must have nothing on closed faces.
        geometry: the box it lives in; that of the result is `rotate_geometry` of it.
        plane: two different axes (a, b); (b, a) turns back.
        placement: ``flux`` (default), ``scalar``, ``vector`` (in cells) or ``potential`` (on edges).

    Raises:
        ValueError: a second axis with an open side, no such plane, or no such placement.
    """
    _check_axes(*plane)
    _check_placement(placement)
    a, b = plane
    _check_sides(geometry.grid, b)
    exchanged = field.transpose(a - 3, b - 3)
    if placement != "scalar":
        exchanged = exchanged[..., list(_exchanged((0, 1, 2), plane)), :, :, :]
        # an exchange of two axes is a mirror too, under which axial vectors change sign
        exchanged = -exchanged if placement == "potential" else exchanged
    return reflect(exchanged, Geometry(_exchanged_grid(geometry.grid, plane)), a, placement)


def rotate_geometry(geometry: Geometry, plane: tuple[int, int]) -> Geometry:
    """The box after a quarter turn, as `rotate` turns fields: its cells, spacings, sides and solids.

    Raises:
        ValueError: no such plane, or a prescribed inflow.
    """
    _check_axes(*plane)
    _check_inflow(geometry)
    a, b = plane
    solid = (~geometry.fluid).transpose(a - 3, b - 3)
    return reflect_geometry(Geometry(_exchanged_grid(geometry.grid, plane), solid), a)


def _exchanged(values: tuple, plane: tuple[int, int]) -> tuple:
    """One value per axis, those of the plane's two axes exchanged."""
    a, b = plane
    return tuple(values[{a: b, b: a}.get(axis, axis)] for axis in range(3))


def _exchanged_grid(grid: Grid, plane: tuple[int, int]) -> Grid:
    return Grid(_exchanged(grid.shape, plane), _exchanged(grid.spacing, plane), _exchanged(grid.boundaries, plane))


def _check_axes(*axes: int) -> None:
    if any(axis not in range(3) for axis in axes) or len(set(axes)) != len(axes):
        wanted = "an axis of 0, 1 or 2" if len(axes) == 1 else "a plane of two different axes of 0, 1 and 2"
        raise ValueError(f"Expected {wanted}, got {', '.join(map(str, axes))}.")


def _check_sides(grid: Grid, axis: int) -> None:
    if any(grid.open_sides[axis]):
        raise ValueError(
            f"Expected walls or periodic sides on axis {'xyz'[axis]}, got {grid.boundaries[axis]}: the flux through an "
            "open high side is not stored; reflect another axis."
        )


def _check_placement(placement: str) -> None:
    if placement not in PLACEMENTS:
        raise ValueError(f"Expected a placement of {' | '.join(PLACEMENTS)}, got {placement!r}.")


def _check_inflow(geometry: Geometry) -> None:
    if geometry.inflow:
        sides = ", ".join(side for side in SIDES if side in geometry.inflow)
        raise ValueError(
            f"Expected a box without a prescribed inflow, got one on {sides}; pass Geometry(grid, solid) and prescribe "
            "the moved inflow on the result."
        )
